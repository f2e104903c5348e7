"""Units that no ascent wakes: drawn from a photograph, or told why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.featurevis import parameterization, recipes, request
from convscope.featurevis.objectives import channel, diversity
from convscope.images.loading import ImageBatchLoader
from convscope.samples import photographs
from tests.featurevis.test_recipes import loaded
from tests.oracles.nets import randomized

STARTS = recipes.RECIPES["robust"].starts


class Gate(nn.Module):
    """A layer without a gradient, which no ascent gets anywhere with: what `fires` says of the picture."""

    def __init__(self, fires: Any) -> None:
        super().__init__()
        self.fires = fires

    def forward(self, x: Tensor) -> Tensor:
        return self.fires(x).detach() + 0 * x[:, :1]


class Gated(nn.Module):
    def __init__(self, fires: Any) -> None:
        super().__init__()
        self.gate = Gate(fires)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).mean((2, 3))


def warm(x: Tensor) -> Tensor:
    """How much redder than blue a pixel is, beyond one half: gray never is."""
    return (x[:, :1] - x[:, 2:] - 0.5).relu()


def high(x: Tensor) -> Tensor:
    """Fires at pictures higher than 40 pixels, whatever they show."""
    return torch.full_like(x[:, :1], max(0, x.shape[2] - 40))


def never(x: Tensor) -> Tensor:
    return torch.zeros_like(x[:, :1])


def as_it_is(net: nn.Module, size: int, **more: Any) -> convscope.Model:
    return loaded(net, size, **{"mean": 0.0, "std": 1.0, **more})


def test_what_no_start_wakes_is_cut_from_the_photograph_that_excites_it_most() -> None:
    model = as_it_is(Gated(warm), 96)
    found = convscope.patterns(model, "gate", size=32, steps=4)
    # By hand: the warmest pixel of the four photographs, as the network sees them, and a square around it.
    x = next(ImageBatchLoader(photographs(), model.preprocessing).batches(4)).x
    maps = warm(x)[:, 0]
    n, row, column = np.unravel_index(int(maps.argmax()), maps.shape)
    top, left = (int(np.clip(round(float(place) - 16), 0, 96 - 32)) for place in (row, column))
    square = (x[n, :, top : top + 32, left : left + 32] * 255).round().to(torch.uint8)
    assert np.array_equal(found.images[0], square.permute(1, 2, 0).numpy())
    np.testing.assert_allclose(found.scores[0], float(warm(square[None] / 255).mean()), rtol=1e-5)
    assert found.scores[0] > 0
    assert not found.history.any()
    assert found.notes == ("unit 0 is active on this image, but not on any shifted or scaled view of it.",)


@pytest.mark.parametrize(
    ("fires", "more", "why"),
    [
        (
            never,
            {},
            f"unit 0 looks dead: no activation on the sample images or from {STARTS} starts. It has no pattern.",
        ),
        (
            high,
            {},
            f"unit 0 is active on a sample image, but not on its crop of 32 x 32 pixels or from {STARTS} starts. "
            "It has no pattern; a larger size= may help.",
        ),
        (never, {"channels": 1}, f"unit 0 looks dead: no activation from {STARTS} starts. It has no pattern."),
    ],
)
def test_what_stays_silent_is_told_why(fires: Any, more: dict[str, Any], why: str) -> None:
    """A unit is dead only if it fired nowhere, and photographs are spoken of only where they were looked at."""
    found = convscope.patterns(as_it_is(Gated(fires), 96, **more), "gate", size=32, steps=4)
    assert found.scores.tolist() == [0]
    assert found.notes == (why,)


def test_what_fires_on_the_way_only_is_told_so() -> None:
    """Here: whenever it is climbed, never when it is only looked at."""
    model = as_it_is(Gated(lambda x: torch.full_like(x[:, :1], float(torch.is_grad_enabled()))), 96)
    found = convscope.patterns(model, "gate", size=32, steps=4)
    assert found.scores.tolist() == [0]
    assert (found.history > 0).all()
    assert found.notes == (
        f"unit 0 was active during optimisation, but not on a finished image, from {STARTS} starts. It has no pattern.",
    )


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_each_unit_is_told_of_by_itself_whatever_the_batches(memory: int) -> None:
    def three(x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), never(x), warm(x)], 1)

    found = convscope.patterns(as_it_is(Gated(three), 96), "gate", size=32, steps=4, memory=memory)
    assert (found.scores > 0).tolist() == [True, False, True]
    assert [note.split(".")[0] for note in found.notes] == [
        "unit 0 has a score of 1, not above the noise baseline (1)",
        f"unit 1 looks dead: no activation on the sample images or from {STARTS} starts",
        "unit 2 is active on this image, but not on any shifted or scaled view of it",
    ]


def test_a_silent_unit_without_places_is_told_of_too() -> None:
    """A rectifier behind a matrix gives (N, C)."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU())
    randomized(net)
    with torch.no_grad():
        net[3].weight[0], net[3].bias[0] = 0, -1
    found = convscope.patterns(loaded(net, 32), "4", [0], size=32, steps=2)
    assert found.scores.tolist() == [0]
    assert found.notes[0].startswith("unit 0 looks dead: no activation on the sample images")


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_the_photographs_are_run_once_for_all_silent_units(memory: int) -> None:
    """Whatever the batches; units that fire in them are drawn from their own pieces, together."""
    passes: list[tuple[int, int]] = []

    def five(x: Tensor) -> Tensor:
        passes.append((len(x), x.shape[2]))
        red = x[:, :1] - x[:, 2:]
        return torch.cat([never(x), (red - 0.5).relu(), never(x), (-red - 0.3).relu(), never(x)], 1)

    model = as_it_is(Gated(five), 96)
    passes.clear()
    found = convscope.patterns(model, "gate", size=32, steps=4, memory=memory)
    assert passes.count((4, 96)) == 1
    assert (found.scores > 0).tolist() == [False, True, False, True, False]
    for number in (1, 3):
        alone = convscope.patterns(model, "gate", [number], size=32, steps=4)
        assert np.array_equal(found.images[number], alone.images[0])
    after = passes[passes.index((4, 96)) + 1 :]
    assert next(count for count, side in after if side == 32) == (2 if memory > 1 else 1)


def begun(side: int) -> Tensor:
    """The pictures (STARTS, C, H, W) with which each start begins, by hand."""
    wanted = request.parse_request(as_it_is(Gated(never), side), "gate", None, "robust", recipes.RECIPES["robust"])
    draws = [wanted.generators([0], 0, start) for start in range(STARTS)]
    return torch.cat(
        [recipes.render_uint8(parameterization.FourierImage(d, 3, (side, side), torch.device("cpu"))) for d in draws]
    )


def balance(x: Tensor) -> Tensor:
    """How much redder a picture (N, C, H, W) is on its left than on its right."""
    half = x.shape[3] // 2
    return x[:, 0, :, :half].mean((1, 2)) - x[:, 0, :, half:].mean((1, 2))


def only(which: int, pictures: Tensor) -> tuple[Any, float]:
    """A gate without a gradient that lets one of these pictures through, and by how much."""
    lean = balance(pictures / 255)
    width = float((lean[torch.arange(len(lean)) != which] - lean[which]).abs().min()) / 2

    def gate(x: Tensor) -> Tensor:
        near = (width - (balance(x) - lean[which]).abs()).relu()
        return near[:, None, None, None].expand(-1, 1, *x.shape[2:])

    return gate, width


def test_a_unit_that_wakes_from_one_start_only() -> None:
    pictures = begun(32)
    gate, width = only(5, pictures)

    def beside(x: Tensor) -> Tensor:
        return torch.cat([gate(x), torch.ones_like(x[:, :1])], 1)

    found = convscope.patterns(as_it_is(Gated(gate), 32), "gate", size=32, steps=2)
    assert np.array_equal(found.images[0], pictures[5].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(found.scores[0], width, rtol=1e-4)
    assert found.notes == ("unit 0 is active on this image, but not on any shifted or scaled view of it.",)
    both = convscope.patterns(as_it_is(Gated(beside), 32), "gate", size=32, steps=2)
    assert np.array_equal(both.images[0], found.images[0])
    before = replace(recipes.RECIPES["robust"], starts=5)
    dead = convscope.patterns(as_it_is(Gated(gate), 32), "gate", size=32, steps=2, recipe=before)
    assert dead.notes == ("unit 0 looks dead: no activation on the sample images or from 5 starts. It has no pattern.",)


def test_what_fires_on_a_small_canvas_only_is_looked_for_on_the_whole_from_every_start() -> None:
    """On 41 x 41 pixels, in which views of 64 x 64 are shown, another start fires than on the whole."""
    small, large = begun(41), begun(64)
    gates = {41: only(1, small)[0], 64: only(6, large)[0]}

    def fires(x: Tensor) -> Tensor:
        return gates[x.shape[2]](x) if x.shape[2] in gates else never(x)

    found = convscope.patterns(as_it_is(Gated(fires), 96), "gate", size=64, steps=2)
    assert np.array_equal(found.images[0], large[6].permute(1, 2, 0).numpy())
    assert found.scores[0] > 0


class OneByOne(Gated):
    """Refuses to look at several pictures at once."""

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 1
        return super().forward(x)


def test_photographs_are_shown_as_many_at_a_time_as_the_network_takes() -> None:
    several = convscope.patterns(as_it_is(Gated(warm), 96), "gate", size=32, steps=2)
    single = convscope.patterns(replace(as_it_is(OneByOne(warm), 96), fixed_batch_size=1), "gate", size=32, steps=2)
    assert np.array_equal(single.images, several.images)
    with pytest.raises(
        ConvscopeError, match=r"4 images have to go through the network together, and .* takes 1 at a time"
    ):
        convscope.patterns(
            replace(as_it_is(OneByOne(warm), 96), fixed_batch_size=1), diversity(channel("gate", 0), "gate", 4), steps=2
        )


class Rough(nn.Module):
    """Unit 0 fires at what is not too rough, as its start is, unit 1 never, unit 2 at whatever is rough."""

    def forward(self, x: Tensor) -> Tensor:
        rough = (x[..., 1:] - x[..., :-1]).square().mean((1, 2, 3))
        values = torch.stack([2e-4 - rough, rough - 1000, rough], 1)
        return values[:, :, None, None].expand(-1, -1, 2, 2)


def test_a_dead_neighbour_wakes_nobody() -> None:
    net = nn.Sequential(Rough(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model = loaded(net, 64)
    alone, beside = (convscope.patterns(model, "1", units, steps=3) for units in ([0], [0, 1]))
    np.testing.assert_allclose(beside.scores[0], alone.scores[0], rtol=0.01)
    assert np.abs(beside.images[0].astype(int) - alone.images[0]).max() <= 1


def test_the_textbook_recipe_alone_is_told_of_the_rectifier() -> None:
    model = as_it_is(Gated(never), 32)
    photograph = np.full((32, 32, 3), 100, np.uint8)
    for recipe, why in (
        ("plain", "its ReLU is off everywhere and has no gradient"),
        ("dream", "no activation, although the gradient of its ReLU was redirected"),
    ):
        start = {"start": photograph} if recipe == "dream" else {"size": 32}
        (note,) = convscope.patterns(model, "gate", [0], recipe=recipe, steps=2, **start).notes
        assert note.startswith(f"unit 0 looks dead: {why}")
