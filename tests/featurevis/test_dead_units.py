"""Units that are never active: optimised from a crop of a photograph, or noted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convscope
import convscope.samples
from convscope import ConvscopeError
from convscope.featurevis import scoring
from convscope.featurevis.image_set_objectives import diversity
from convscope.featurevis.objectives import channel
from convscope.featurevis.parameterization import FourierImage
from convscope.featurevis.recipes import RECIPES
from convscope.featurevis.request import parse_request
from convscope.featurevis.task import render_uint8
from convscope.images.loading import ImageBatchLoader
from tests.featurevis.helpers import CPU, load_model
from tests.oracles.nets import randomized

STARTS = RECIPES["robust"].starts


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return small copies of the sample photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    paths = [str(folder / f"{i}.png") for i in range(4)]
    for path, original in zip(paths, convscope.samples.photographs(), strict=True):
        Image.open(original).convert("RGB").resize((128, 128)).save(path)
    return paths


@pytest.fixture(autouse=True, scope="module")
def _small_photographs(photographs: list[str]) -> Iterator[None]:
    """Use them instead of the sample photographs, which take longer to decode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "photographs", lambda: photographs)
        yield


class Gate(nn.Module):
    """A layer with the output `activation(x)` and a zero gradient, which no optimisation can change."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x).detach() + 0 * x[:, :1]


class Gated(nn.Module):
    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.gate = Gate(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).mean((2, 3))


def redness(x: Tensor) -> Tensor:
    """Return by how much red exceeds blue plus one half; 0 for gray."""
    return (x[:, :1] - x[:, 2:] - 0.5).relu()


def excess_height(x: Tensor) -> Tensor:
    """Return by how much the image is higher than 40 pixels, whatever it shows."""
    return torch.full_like(x[:, :1], max(0, x.shape[2] - 40))


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x[:, :1])


def load_unnormalized(net: nn.Module, size: int, **preprocessing: Any) -> convscope.Model:
    return load_model(net, size, **{"mean": 0.0, "std": 1.0, **preprocessing})


def test_unit_that_no_start_activates_is_cropped_from_the_best_photograph(photographs: list[str]) -> None:
    model = load_unnormalized(Gated(redness), 96)
    result = convscope.patterns(model, "gate", size=32, steps=4)
    # Reference: the reddest pixel of the four preprocessed photographs, and a square around it.
    x = next(ImageBatchLoader(photographs, model.preprocessing).batches(4)).x
    maps = redness(x)[:, 0]
    n, row, column = np.unravel_index(int(maps.argmax()), maps.shape)
    top, left = (int(np.clip(round(float(coordinate) - 16), 0, 96 - 32)) for coordinate in (row, column))
    square = (x[n, :, top : top + 32, left : left + 32] * 255).round().to(torch.uint8)
    assert np.array_equal(result.images[0], square.permute(1, 2, 0).numpy())
    np.testing.assert_allclose(result.scores[0], float(redness(square[None] / 255).mean()), rtol=1e-5)
    assert result.scores[0] > 0
    assert not result.history.any()
    assert result.notes == ("unit 0 is active on this image, but not on any shifted or scaled view of it.",)


@pytest.mark.parametrize(
    ("activation", "preprocessing", "note"),
    [
        (
            zeros,
            {},
            f"unit 0 looks dead: no activation on the sample images or from {STARTS} starts. It has no pattern.",
        ),
        (
            excess_height,
            {},
            f"unit 0 is active on a sample image, but not on its crop of 32 x 32 pixels or from {STARTS} starts. "
            "It has no pattern; a larger size= may help.",
        ),
        (zeros, {"channels": 1}, f"unit 0 looks dead: no activation from {STARTS} starts. It has no pattern."),
    ],
)
def test_note_explains_why_a_unit_is_inactive(activation: Any, preprocessing: dict[str, Any], note: str) -> None:
    """A unit looks dead only if it is active nowhere; photographs are mentioned only if they were tried."""
    result = convscope.patterns(load_unnormalized(Gated(activation), 96, **preprocessing), "gate", size=32, steps=4)
    assert result.scores.tolist() == [0]
    assert result.notes == (note,)


def test_unit_active_only_during_optimisation_is_noted() -> None:
    """The unit is active whenever gradients are enabled, never otherwise."""
    model = load_unnormalized(Gated(lambda x: torch.full_like(x[:, :1], float(torch.is_grad_enabled()))), 96)
    result = convscope.patterns(model, "gate", size=32, steps=4)
    assert result.scores.tolist() == [0]
    assert (result.history > 0).all()
    assert result.notes == (
        f"unit 0 was active during optimisation, but not on a finished image, from {STARTS} starts. It has no pattern.",
    )


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_notes_belong_to_units_whatever_the_batches(memory: int) -> None:
    def three_units(x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), zeros(x), redness(x)], 1)

    result = convscope.patterns(load_unnormalized(Gated(three_units), 96), "gate", size=32, steps=4, memory=memory)
    assert (result.scores > 0).tolist() == [True, False, True]
    assert [note.split(".")[0] for note in result.notes] == [
        "unit 0 has a score of 1, not above the noise baseline (1)",
        f"unit 1 looks dead: no activation on the sample images or from {STARTS} starts",
        "unit 2 is active on this image, but not on any shifted or scaled view of it",
    ]


def test_inactive_unit_without_positions_is_noted() -> None:
    """A ReLU after a linear layer returns (N, C)."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU())
    randomized(net)
    with torch.no_grad():
        net[3].weight[0], net[3].bias[0] = 0, -1
    result = convscope.patterns(load_model(net, 32), "4", [0], size=32, steps=2)
    assert result.scores.tolist() == [0]
    assert result.notes[0].startswith("unit 0 looks dead: no activation on the sample images")


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_photographs_run_once_for_all_inactive_units(memory: int) -> None:
    """Units that are active on photographs are optimised from their own crops, in one batch."""
    passes: list[tuple[int, int]] = []

    def five_units(x: Tensor) -> Tensor:
        passes.append((len(x), x.shape[2]))
        difference = x[:, :1] - x[:, 2:]
        return torch.cat([zeros(x), (difference - 0.5).relu(), zeros(x), (-difference - 0.3).relu(), zeros(x)], 1)

    model = load_unnormalized(Gated(five_units), 96)
    passes.clear()
    result = convscope.patterns(model, "gate", size=32, steps=4, memory=memory)
    assert passes.count((4, 96)) == 1
    assert (result.scores > 0).tolist() == [False, True, False, True, False]
    for number in (1, 3):
        alone = convscope.patterns(model, "gate", [number], size=32, steps=4)
        assert np.array_equal(result.images[number], alone.images[0])
    after = passes[passes.index((4, 96)) + 1 :]
    assert next(count for count, side in after if side == 32) == (2 if memory > 1 else 1)


def initial_images_by_hand(side: int) -> Tensor:
    """Return the initial image of each start (STARTS, C, H, W)."""
    request = parse_request(load_unnormalized(Gated(zeros), side), "gate", None, "robust", RECIPES["robust"])
    generators = [request.generators([0], 0, start) for start in range(STARTS)]
    return torch.cat([render_uint8(FourierImage(g, 3, (side, side), CPU)) for g in generators])


def balance(x: Tensor) -> Tensor:
    """Return the mean red of the left half minus that of the right half (N,)."""
    half = x.shape[3] // 2
    return x[:, 0, :, :half].mean((1, 2)) - x[:, 0, :, half:].mean((1, 2))


def gate_for(index: int, images: Tensor) -> tuple[Any, float]:
    """Return a gate that is active on one of these images only, and its activation there."""
    balances = balance(images / 255)
    width = float((balances[torch.arange(len(balances)) != index] - balances[index]).abs().min()) / 2

    def gate(x: Tensor) -> Tensor:
        activations = (width - (balance(x) - balances[index]).abs()).relu()
        return activations[:, None, None, None].expand(-1, 1, *x.shape[2:])

    return gate, width


def test_unit_that_is_active_from_one_start_only() -> None:
    images = initial_images_by_hand(32)
    gate, width = gate_for(5, images)

    def with_constant(x: Tensor) -> Tensor:
        return torch.cat([gate(x), torch.ones_like(x[:, :1])], 1)

    result = convscope.patterns(load_unnormalized(Gated(gate), 32), "gate", size=32, steps=2)
    assert np.array_equal(result.images[0], images[5].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(result.scores[0], width, rtol=1e-4)
    assert result.notes == ("unit 0 is active on this image, but not on any shifted or scaled view of it.",)
    paired = convscope.patterns(load_unnormalized(Gated(with_constant), 32), "gate", size=32, steps=2)
    assert np.array_equal(paired.images[0], result.images[0])
    five_starts = replace(RECIPES["robust"], starts=5)
    retried = convscope.patterns(load_unnormalized(Gated(gate), 32), "gate", size=32, steps=2, recipe=five_starts)
    assert retried.notes == (
        "unit 0 looks dead: no activation on the sample images or from 5 starts. It has no pattern.",
    )


def test_unit_active_on_a_small_canvas_is_tried_from_every_start_at_full_size() -> None:
    """At 41 x 41 pixels, the view size of 64 x 64, another start is active than at full size."""
    small_images, large_images = initial_images_by_hand(41), initial_images_by_hand(64)
    gates = {41: gate_for(1, small_images)[0], 64: gate_for(6, large_images)[0]}

    def activation(x: Tensor) -> Tensor:
        return gates[x.shape[2]](x) if x.shape[2] in gates else zeros(x)

    result = convscope.patterns(load_unnormalized(Gated(activation), 96), "gate", size=64, steps=2)
    assert np.array_equal(result.images[0], large_images[6].permute(1, 2, 0).numpy())
    assert result.scores[0] > 0


class SingleImageGate(Gated):
    """Refuses batches of several images."""

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 1
        return super().forward(x)


def test_photographs_respect_a_fixed_batch_size() -> None:
    batched = convscope.patterns(load_unnormalized(Gated(redness), 96), "gate", size=32, steps=2)
    single = convscope.patterns(
        replace(load_unnormalized(SingleImageGate(redness), 96), fixed_batch_size=1), "gate", size=32, steps=2
    )
    assert np.array_equal(single.images, batched.images)
    with pytest.raises(
        ConvscopeError, match=r"4 images have to go through the network together, and .* takes 1 at a time"
    ):
        convscope.patterns(
            replace(load_unnormalized(SingleImageGate(redness), 96), fixed_batch_size=1),
            diversity(channel("gate", 0), "gate", 4),
            steps=2,
        )


class Roughness(nn.Module):
    """Unit 0 is active on smooth images, such as its start, unit 1 never, unit 2 on rough images."""

    def forward(self, x: Tensor) -> Tensor:
        roughness = (x[..., 1:] - x[..., :-1]).square().mean((1, 2, 3))
        values = torch.stack([2e-4 - roughness, roughness - 1000, roughness], 1)
        return values[:, :, None, None].expand(-1, -1, 2, 2)


def test_dead_neighbour_does_not_change_a_live_unit() -> None:
    net = nn.Sequential(Roughness(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model = load_model(net, 64)
    alone, with_dead = (convscope.patterns(model, "1", units, steps=3) for units in ([0], [0, 1]))
    np.testing.assert_allclose(with_dead.scores[0], alone.scores[0], rtol=0.01)
    assert np.abs(with_dead.images[0].astype(int) - alone.images[0]).max() <= 1


def test_note_of_recipes_with_a_single_start() -> None:
    model = load_unnormalized(Gated(zeros), 32)
    photograph = np.full((32, 32, 3), 100, np.uint8)
    for recipe, reason in (
        ("plain", "its ReLU is off everywhere and has no gradient"),
        ("dream", "no activation, although the gradient of its ReLU was redirected"),
    ):
        start = {"start": photograph} if recipe == "dream" else {"size": 32}
        (note,) = convscope.patterns(model, "gate", [0], recipe=recipe, steps=2, **start).notes
        assert note.startswith(f"unit 0 looks dead: {reason}")
