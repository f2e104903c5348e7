"""What can be asked of `convscope.patterns`: objectives, recipes of one's own, frames, patience, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

import convscope
from convscope import ConvscopeError
from convscope.featurevis.defaults import constant_schedule, full_view, native_size
from convscope.featurevis.objectives import Objective, channel, channels, deepdream, diversity, interpolation, neuron
from convscope.featurevis.optimizer import from_torch_optimizer
from convscope.featurevis.parameterization import PhaseImage, PixelImage
from convscope.featurevis.recipes import RECIPES, Recipe
from convscope.featurevis.task import OptimizationTask, RecipeOutput, render_uint8
from tests.featurevis.test_objectives import between_by_hand, diverse_by_hand
from tests.featurevis.test_recipes import CPU, SUMS, loaded, outputs
from tests.oracles.nets import SmallConvNet, diff_snapshots, in_training, randomized, snapshot


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    """Three convolutions, five classes, a preprocessing of its own."""
    return loaded(randomized(SmallConvNet()), 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """Three of them, of noise in squares of 4 x 4 pixels."""
    squares = np.random.default_rng(0).integers(20, 236, (3, 8, 10, 3), np.uint8)
    return squares.repeat(4, 1).repeat(4, 2)


# --- objectives ------------------------------------------------------------------------------------------------------


def test_scores_of_objectives_by_hand(usual: convscope.Model) -> None:
    """On the finished 8-bit pictures, each of its own objective, under its name."""
    objectives = [
        channel("relu2", 3) - 0.5 * channel("relu2", 4),
        neuron("conv3", 2),
        -channel("logits", 1),
        channels("conv1", [0, 5]) * 2 + 1,
        diversity(channel("relu2", 7), "conv2", 3, weight=0.4),
        deepdream("conv1"),
        interpolation(channel("logits", 0), channel("logits", 2), "conv3", 2, weight=0.1),
    ]
    found = convscope.patterns(usual, objectives, steps=12, size=32)
    shown = found.images
    assert shown.shape == (10, 32, 32, 3)
    maps = {layer: outputs(usual, layer, shown) for layer in ("conv1", "conv2", "relu2", "conv3", "logits")}
    means = {layer: x.reshape(*x.shape[:2], -1).mean(2) for layer, x in maps.items()}
    texture = maps["conv2"][4:7].reshape(3, 12, -1)
    row = maps["conv3"][8:].reshape(2, -1)
    expected = [
        means["relu2"][0, 3] - 0.5 * means["relu2"][0, 4],
        maps["conv3"][1, 2, 8, 8],
        -means["logits"][2, 1],
        2 * (means["conv1"][3, 0] + means["conv1"][3, 5]) + 1,
        *diverse_by_hand(texture, means["relu2"][4:7, 7], 0.4),
        (maps["conv1"][7] ** 2).mean(),
        *between_by_hand(row, means["logits"][8:, 0], means["logits"][8:, 2], 0.1),
    ]
    assert found.scores == pytest.approx(expected, rel=SUMS, abs=SUMS)
    assert found.names == [
        "relu2 3 - 0.5 * relu2 4", "conv3 2 at middle", "-logit 1", "conv1 0+5 * 2 + 1",
        "3 of relu2 7 (1)", "3 of relu2 7 (2)", "3 of relu2 7 (3)", "all of conv1",
        "from logit 0 to logit 2 (1)", "from logit 0 to logit 2 (2)",
    ]  # fmt: skip
    assert found.units.tolist() == list(range(10))
    assert found.layer == "relu2, conv3, logits, conv1, conv2"
    assert (found.history[-1] > found.history[0]).sum() >= 8  # a row's and a set's pictures pull at each other


def test_one_objective_is_the_unit_it_is_about(usual: convscope.Model) -> None:
    alone = convscope.patterns(usual, channel("relu2", 3), recipe="plain", start=np.full((32, 32, 3), 128), steps=5)
    named = convscope.patterns(usual, "relu2", [3], recipe="plain", start=np.full((32, 32, 3), 128), steps=5)
    assert np.array_equal(alone.images, named.images)
    assert np.array_equal(alone.scores, named.scores)
    assert alone.names == named.names == ["relu2 3"]


# --- every picture for itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["maco", "dream"])
def test_neighbours_change_nothing(usual: convscope.Model, photographs: np.ndarray, recipe: str) -> None:
    """Same seed, same number of pictures: the same bytes, whatever is drawn beside a unit and in whatever order."""

    def drawn(what: Sequence[int], **more: Any) -> convscope.Patterns:
        start = {"start": photographs[0]} if recipe == "dream" else {"size": 32}
        return convscope.patterns(usual, "relu2", what, recipe=recipe, steps=10, **start, **more)

    one, other = drawn([3, 0, 1]), drawn([2, 4, 3])
    assert np.array_equal(one.images[0], other.images[2])
    assert np.array_equal(one.history[:, 0], other.history[:, 2])
    assert one.scores[0] == other.scores[2]
    if recipe == "maco":
        assert one.alpha is not None
        assert other.alpha is not None
        assert np.array_equal(one.alpha[0], other.alpha[2])
    reseeded = drawn([3, 0, 1], seed=1)
    assert not np.array_equal(reseeded.images[0], one.images[0])
    assert drawn([3]).scores[0] == pytest.approx(one.scores[0], rel=0.01)  # the engine's promise: batch sizes round


def test_neighbours_change_nothing_for_objectives(usual: convscope.Model) -> None:
    def drawn(*objectives: Objective) -> convscope.Patterns:
        return convscope.patterns(usual, list(objectives), steps=10, size=32)

    mixed, sole = channel("relu2", 3) - channel("relu2", 4), deepdream("conv2")
    one, other = drawn(mixed, sole, channel("conv2", 1)), drawn(neuron("conv2", 4), mixed, channel("relu2", 7))
    assert np.array_equal(one.images[0], other.images[1])
    assert np.array_equal(one.history[:, 0], other.history[:, 1])


# --- a recipe of one's own -------------------------------------------------------------------------------------------


def gray(task: OptimizationTask) -> RecipeOutput:
    """From middle gray, with momentum."""
    first = torch.full((len(task.generators), task.channels, *task.size), 127.5, device=task.device)
    canvas = PixelImage(first)
    step = from_torch_optimizer(canvas.params, partial(torch.optim.SGD, lr=task.step_size, momentum=0.5))
    history = task.optimize(
        canvas, lambda _: task.objective(task.preprocess(canvas.images())), step, partial(render_uint8, canvas)
    )
    return RecipeOutput(render_uint8(canvas), history)


def test_a_recipe_of_ones_own(usual: convscope.Model) -> None:
    own = Recipe(gray, native_size, full_view, constant_schedule(4, 1e5))
    found = convscope.patterns(usual, "conv1", [2, 6], recipe=own, frames=2)
    assert (found.recipe, found.steps, found.step_size) == ("gray", 4, 1e5)
    assert found.images.shape == (2, 32, 32, 3)
    # The first layer is linear: its gradient stays, and momentum makes 1 + 1.5 + 1.75 + 1.875 steps of four.
    x = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    convolved = usual.module.conv1(usual.preprocessing.normalize(x)).mean((2, 3))[0]
    for i, number in enumerate((2, 6)):
        (gradient,) = torch.autograd.grad(convolved[number], x, retain_graph=True)
        moved = 127.5 + 6.125 * 1e5 * gradient[0] / 255
        assert moved.min() > 0
        assert moved.max() < 255
        assert float((moved - 127.5).abs().max()) > 10
        # Rounded to whole numbers; the gradient is one of float32.
        assert np.abs(found.images[i] - moved.permute(1, 2, 0).numpy()).max() < 0.51
    with pytest.raises(ConvscopeError, match="recipe 'gray' takes no start image"):
        convscope.patterns(usual, "conv1", [2], recipe=own, start=np.zeros((32, 32, 3)))


# --- looking on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "steps", "kept"), [("plain", 7, 3), ("maco", 6, 6), ("robust", 3, 5), ("dream", 4, 1)]
)
def test_frames_are_evenly_spaced_and_end_with_the_finished_picture(
    usual: convscope.Model, photographs: np.ndarray, recipe: str, steps: int, kept: int
) -> None:
    """Those that `watch` is shown: frame f of F is that of step ceil(f S / F)."""
    seen: list[np.ndarray] = []
    told: list[int] = []

    def watch(step: int, pictures: np.ndarray) -> None:
        told.append(step)
        seen.append(pictures.copy())

    start = {"start": photographs[0]} if recipe == "dream" else {"size": 32}
    options: dict[str, Any] = {"recipe": recipe, "steps": steps, **start}
    found = convscope.patterns(usual, "relu2", [0, 5], frames=kept, callback=watch, **options)
    assert told == list(range(1, steps + 1))
    assert found.frames is not None
    assert found.frames.dtype == np.uint8
    assert found.frames.shape == (kept, *found.images.shape)
    for f in range(1, kept + 1):
        assert np.array_equal(found.frames[f - 1], seen[-(-f * steps // kept) - 1])
    assert np.array_equal(found.frames[-1], found.images)
    assert not np.array_equal(seen[0], seen[-1])
    unseen = convscope.patterns(usual, "relu2", [0, 5], **options)
    assert unseen.frames is None
    assert np.array_equal(unseen.images, found.images)  # looking on changes nothing


def test_frames_of_several_batches_stand_side_by_side(usual: convscope.Model) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"size": 32, "steps": 4, "frames": 2}
    parts = convscope.patterns(
        usual, "relu2", range(6), memory=1, callback=lambda step, shown: told.append((step, len(shown))), **options
    )
    assert parts.frames is not None
    assert parts.frames.shape == (2, 6, 32, 32, 3)
    assert np.array_equal(parts.frames[-1], parts.images)
    assert [step for step, _ in told] == list(range(1, len(told) + 1))  # counted through all batches
    assert sum(count for _, count in told) == 4 * 6
    assert len({count for _, count in told}) == 1


@pytest.mark.parametrize("ends", ["callback", "progress"])
@pytest.mark.parametrize("recipe", ["robust", "maco", "plain"])
def test_an_end_from_outside_leaves_nothing_behind(recipe: str, ends: str) -> None:
    class Enough(Exception):
        pass

    calls: list[int] = []

    def enough(step: int, _: Any) -> None:
        calls.append(step)
        if step == 2:
            raise Enough

    net, handles = in_training(randomized(SmallConvNet()))
    model = loaded(net, 32)
    before = snapshot(net)
    with pytest.raises(Enough):
        convscope.patterns(model, "relu2", [0, 1], recipe=recipe, size=32, steps=5, **{ends: enough})
    assert calls == [1, 2]
    assert diff_snapshots(before, snapshot(net)) == []
    assert len(list(handles)) == 9


# --- patience --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4])
def test_patience_ends_early(usual: convscope.Model, kept: int) -> None:
    """Less than one per cent in three steps: as the history says; frames and history keep their number."""
    told: list[int] = []
    options: dict[str, Any] = {"recipe": "plain", "start": np.full((32, 32, 3), 128.0), "steps": 40}
    found = convscope.patterns(
        usual,
        100 + 0.01 * channel("conv1", 2),
        patience=3,
        frames=kept,
        callback=lambda i, _: told.append(i),
        **options,
    )
    assert told == [1, 2, 3]
    assert found.history.shape == (40, 1)
    assert (found.history[3:] == found.history[3]).all()
    stopped = convscope.patterns(usual, 100 + 0.01 * channel("conv1", 2), **{**options, "steps": 3})
    assert np.array_equal(found.images, stopped.images)
    assert np.array_equal(found.scores, stopped.scores)
    if kept:
        assert found.frames is not None
        assert found.frames.shape == (4, 1, 32, 32, 3)
        assert np.array_equal(found.frames[-1], found.images)


def test_what_is_done_is_the_same_beside_whoever_climbs_on(usual: convscope.Model) -> None:
    """Also its history and its opacity, though views and gradients go on."""

    def drawn(*neighbours: Objective) -> convscope.Patterns:
        return convscope.patterns(usual, [slow, *neighbours], recipe="maco", size=32, steps=12, patience=3)

    slow, quick = 100 + 0.01 * channel("relu2", 3), channel("relu2", 4) - channel("relu2", 5)
    among_slow, among_quick = drawn(50 + 0.01 * channel("relu2", 1)), drawn(quick)
    assert (among_quick.history[4:, 1] != among_quick.history[3:-1, 1]).any()
    assert among_slow.alpha is not None
    assert among_quick.alpha is not None
    for one, other in zip(
        (among_slow.images, among_slow.alpha, among_slow.history.T),
        (among_quick.images, among_quick.alpha, among_quick.history.T),
        strict=True,
    ):
        assert np.array_equal(one[0], other[0])


@pytest.mark.parametrize(("frail", "expected"), [(False, [2, 2, 2]), (True, [2, 2, 2, 2])])
def test_a_unit_drawn_again_has_its_own_opacity_and_last_frame(frail: bool, expected: list[int]) -> None:
    """A recipe whose first start is black, where the unit is silent, and whose second is white: as the canvas lies,
    and also in views or, if frail, not in these. A unit by itself is drawn twice, as no batch of one is."""
    draws: list[int] = []

    def twice(task: OptimizationTask) -> RecipeOutput:
        draws.append(len(task.generators))
        level = 255 if task.without_transforms or (len(draws) == 3 and not frail) else 0
        pictures = torch.full((len(task.generators), 3, *task.size), level, dtype=torch.uint8)
        task.on_step(0, lambda: pictures)
        sight = torch.full((len(task.generators), *task.size), level / 255)
        return RecipeOutput(pictures, torch.zeros(1, len(task.generators)), sight)

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU())
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.copy_(torch.tensor([-1.0, 1.0]))
    own = Recipe(twice, native_size, full_view, constant_schedule(1, 1.0), starts=2)
    found = convscope.patterns(loaded(net, 8), "1", [0, 1], recipe=own, frames=1)
    assert draws == expected
    assert found.scores.tolist() == [2, 1]
    assert found.images[:, 0, 0, 0].tolist() == [255, 0]
    assert found.alpha is not None
    assert found.alpha[:, 0, 0].tolist() == [255, 0]
    assert found.frames is not None
    assert np.array_equal(found.frames[-1], found.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience is 0; expected a whole number, 1 or more"),
        ({"patience": 2.5}, "patience is 2.5"),
        ({"frames": -1}, "frames is -1; expected a whole number, 0 or more"),
        ({"frames": True}, "frames is True"),
    ],
)
def test_refused(usual: convscope.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvscopeError) as raised:
        convscope.patterns(usual, "relu2", [0], **options)
    assert message in str(raised.value)


# --- beside noise and natural pictures -------------------------------------------------------------------------------


def noises_by_hand(seed: int, size: tuple[int, int]) -> np.ndarray:
    """The textbook's gray noise four times, then random phases of a photograph's spectrum four times; (8, H, W, 3)."""
    found = []
    for i in range(8):
        generator = Generator().manual_seed(8 * seed + i)
        if i < 4:
            found.append((128 + 20 * torch.rand((3, *size), generator=generator)).numpy().astype(np.uint8))
        else:
            shown: Tensor = PhaseImage([generator], 3, size, CPU).images().detach()[0]
            found.append(np.round(shown.numpy() * 255).astype(np.uint8))
    return np.stack(found).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("seed", [0, 3])
def test_noise_by_hand(usual: convscope.Model, seed: int) -> None:
    """Each score beside the best of eight pictures that show nothing, of the canvas's size."""
    shown = noises_by_hand(seed, (24, 36))
    by_units = convscope.patterns(usual, "relu2", [3, 0, 9], size=(24, 36), steps=1, seed=seed)
    best = outputs(usual, "relu2", shown).mean((2, 3)).max(0)
    assert by_units.noise_scores == pytest.approx(best[[3, 0, 9]], rel=SUMS, abs=SUMS)
    objectives = [
        channel("logits", 1) - channel("logits", 0),
        diversity(channel("relu2", 1), "relu2", 2),
        -neuron("conv3", 4),
    ]
    found = convscope.patterns(usual, objectives, size=(24, 36), steps=1, seed=seed)
    logits, middle = outputs(usual, "logits", shown), outputs(usual, "conv3", shown)[:, 4, 6, 9]
    expected = [(logits[:, 1] - logits[:, 0]).max(), np.nan, np.nan, (-middle).max()]
    assert found.noise_scores == pytest.approx(expected, rel=SUMS, abs=SUMS, nan_ok=True)


def test_reference_by_hand(usual: convscope.Model, photographs: np.ndarray, tmp_path: Path) -> None:
    """The best score among natural pictures, those that cannot be read left out and named."""
    natural = photographs[:, :, :32]
    objectives = [channel("relu2", 2), 2 * channel("logits", 1) - 3, deepdream("conv1")]
    found = convscope.patterns(usual, objectives, size=32, steps=1, reference=natural)
    expected = [
        outputs(usual, "relu2", natural)[:, 2].mean((1, 2)).max(),
        (2 * outputs(usual, "logits", natural)[:, 1] - 3).max(),
        (outputs(usual, "conv1", natural) ** 2).mean((1, 2, 3)).max(),
    ]
    assert found.reference_scores == pytest.approx(expected, rel=SUMS, abs=SUMS)
    one_by_one = convscope.patterns(usual, objectives, size=32, steps=1, reference=natural, memory=1)
    assert one_by_one.reference_scores == pytest.approx(expected, rel=SUMS, abs=SUMS)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, picture in zip(files, natural, strict=False):
        Image.fromarray(picture).save(file)
    files[3].write_bytes(b"no picture")
    read = convscope.patterns(usual, objectives, size=32, steps=1, reference=files)
    assert read.reference_scores == pytest.approx(expected, rel=SUMS, abs=SUMS)
    assert [str(files[3]) in failure.name or failure.name in str(files[3]) for failure in read.failed] == [True]
    assert convscope.patterns(usual, "relu2", [2], size=32, steps=1).reference_scores is None
    comparing = convscope.patterns(
        usual, diversity(channel("relu2", 1), "relu2", 2), size=32, steps=1, reference=natural
    )
    assert comparing.reference_scores is not None
    assert np.isnan(comparing.reference_scores).tolist() == [True, True]


def test_a_score_no_better_than_noise_is_said(usual: convscope.Model) -> None:
    """By a recipe that ends with one of the pictures of noise."""
    noises = torch.from_numpy(noises_by_hand(0, (32, 32))).permute(0, 3, 1, 2)

    def lost(task: OptimizationTask) -> RecipeOutput:
        return RECIPES["plain"].run(task)._replace(images=noises[2:3])

    found = convscope.patterns(
        usual, channel("relu2", 3), recipe=Recipe(lost, native_size, full_view, constant_schedule(1, 1.0))
    )
    assert found.noise_scores is not None
    assert found.scores[0] < found.noise_scores[0]
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"relu2 3 has a score of {found.scores[0]:.3g}, not above the noise baseline")


def test_noise_and_nature_are_fed_as_the_picture_is(usual: convscope.Model, photographs: np.ndarray) -> None:
    """With space='input' nothing is prepared: numbers from 0 to 255 for all three."""
    natural = photographs[:, :, :32]
    options = {"recipe": "plain", "space": "input", "size": 32, "steps": 1}
    found = convscope.patterns(usual, "conv1", [1], reference=natural, **options)
    for score, shown in ((found.noise_scores, noises_by_hand(0, (32, 32))), (found.reference_scores, natural)):
        x = torch.from_numpy(np.ascontiguousarray(shown.transpose(0, 3, 1, 2))).float()
        with torch.no_grad():
            expected = usual.module.conv1(x).mean((2, 3))[:, 1].max()
        assert score == pytest.approx([float(expected)], rel=1e-3)  # natural pictures come back from their preparation


def test_a_large_seed_is_as_good_as_any(usual: convscope.Model) -> None:
    found = [convscope.patterns(usual, "conv1", [1], size=16, steps=1, seed=seed) for seed in (2**62, 2**62, 5)]
    assert np.array_equal(found[0].images, found[1].images)
    assert not np.array_equal(found[0].images, found[2].images)
