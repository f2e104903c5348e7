"""`convscope.patterns` with objectives, custom recipes, frames, callbacks, patience and baselines."""

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
from convscope.featurevis.image_set_objectives import diversity, interpolation
from convscope.featurevis.objectives import Objective, channel, channels, deepdream, neuron
from convscope.featurevis.optimizer import from_torch_optimizer
from convscope.featurevis.parameterization import PhaseImage, PixelImage
from convscope.featurevis.recipes import RECIPES, Recipe
from convscope.featurevis.task import OptimizationTask, RecipeOutput, render_uint8
from tests.featurevis.helpers import CPU, FLOAT32_SUMS, layer_outputs, load_model
from tests.featurevis.test_objectives import reference_diversity, reference_interpolation
from tests.oracles.nets import SmallConvNet, diff_snapshots, in_training, randomized, snapshot

# --- objectives ------------------------------------------------------------------------------------------------------


def test_scores_of_objectives_by_hand(small_model: convscope.Model) -> None:
    """Each score is the value of the objective on its finished 8-bit image."""
    objectives = [
        channel("relu2", 3) - 0.5 * channel("relu2", 4),
        neuron("conv3", 2),
        -channel("logits", 1),
        channels("conv1", [0, 5]) * 2 + 1,
        diversity(channel("relu2", 7), "conv2", 3, weight=0.4),
        deepdream("conv1"),
        interpolation(channel("logits", 0), channel("logits", 2), "conv3", 2, weight=0.1),
    ]
    result = convscope.patterns(small_model, objectives, steps=12, size=32)
    assert result.images.shape == (10, 32, 32, 3)
    maps = {
        layer: layer_outputs(small_model, layer, result.images)
        for layer in ("conv1", "conv2", "relu2", "conv3", "logits")
    }
    means = {layer: x.reshape(*x.shape[:2], -1).mean(2) for layer, x in maps.items()}
    texture = maps["conv2"][4:7].reshape(3, 12, -1)
    series = maps["conv3"][8:].reshape(2, -1)
    expected = [
        means["relu2"][0, 3] - 0.5 * means["relu2"][0, 4],
        maps["conv3"][1, 2, 8, 8],
        -means["logits"][2, 1],
        2 * (means["conv1"][3, 0] + means["conv1"][3, 5]) + 1,
        *reference_diversity(texture, means["relu2"][4:7, 7], 0.4),
        (maps["conv1"][7] ** 2).mean(),
        *reference_interpolation(series, means["logits"][8:, 0], means["logits"][8:, 2], 0.1),
    ]
    assert result.scores == pytest.approx(expected, rel=FLOAT32_SUMS, abs=FLOAT32_SUMS)
    assert result.names == [
        "relu2 3 - 0.5 * relu2 4", "conv3 2 at middle", "-logit 1", "conv1 0+5 * 2 + 1",
        "3 of relu2 7 (1)", "3 of relu2 7 (2)", "3 of relu2 7 (3)", "all of conv1",
        "from logit 0 to logit 2 (1)", "from logit 0 to logit 2 (2)",
    ]  # fmt: skip
    assert result.units.tolist() == list(range(10))
    assert result.layer == "relu2, conv3, logits, conv1, conv2"
    # Images of an interpolation or of a diversity objective compete.
    assert (result.history[-1] > result.history[0]).sum() >= 8


def test_objective_of_a_channel_equals_its_unit(small_model: convscope.Model) -> None:
    by_objective = convscope.patterns(
        small_model, channel("relu2", 3), recipe="plain", start=np.full((32, 32, 3), 128), steps=5
    )
    by_unit = convscope.patterns(small_model, "relu2", [3], recipe="plain", start=np.full((32, 32, 3), 128), steps=5)
    assert np.array_equal(by_objective.images, by_unit.images)
    # Float32 sums over the map, whose order depends on the processor.
    assert np.allclose(by_objective.scores, by_unit.scores, rtol=1e-6, atol=0)
    assert by_objective.names == by_unit.names == ["relu2 3"]


# --- independence of the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["maco", "dream"])
def test_result_does_not_depend_on_the_batch(
    small_model: convscope.Model, photographs: np.ndarray, recipe: str
) -> None:
    """Same seed and batch size: the same bytes, whatever the other units and their order."""

    def run(units: Sequence[int], **options: Any) -> convscope.Patterns:
        start = {"start": photographs[0]} if recipe == "dream" else {"size": 32}
        return convscope.patterns(small_model, "relu2", units, recipe=recipe, steps=10, **start, **options)

    first, permuted = run([3, 0, 1]), run([2, 4, 3])
    assert np.array_equal(first.images[0], permuted.images[2])
    assert np.array_equal(first.history[:, 0], permuted.history[:, 2])
    assert first.scores[0] == permuted.scores[2]
    if recipe == "maco":
        assert first.alpha is not None
        assert permuted.alpha is not None
        assert np.array_equal(first.alpha[0], permuted.alpha[2])
    reseeded = run([3, 0, 1], seed=1)
    assert not np.array_equal(reseeded.images[0], first.images[0])
    assert run([3]).scores[0] == pytest.approx(first.scores[0], rel=0.01)  # guaranteed: 1 % for other batch sizes


def test_result_of_objectives_does_not_depend_on_the_batch(small_model: convscope.Model) -> None:
    def run(*objectives: Objective) -> convscope.Patterns:
        return convscope.patterns(small_model, list(objectives), steps=10, size=32)

    difference, whole_layer = channel("relu2", 3) - channel("relu2", 4), deepdream("conv2")
    first, permuted = (
        run(difference, whole_layer, channel("conv2", 1)),
        run(neuron("conv2", 4), difference, channel("relu2", 7)),
    )
    assert np.array_equal(first.images[0], permuted.images[1])
    assert np.array_equal(first.history[:, 0], permuted.history[:, 1])


# --- custom recipes --------------------------------------------------------------------------------------------------


def momentum_from_gray(task: OptimizationTask) -> RecipeOutput:
    """Optimise pixels from middle gray with momentum."""
    start_pixels = torch.full((len(task.generators), task.channels, *task.size), 127.5, device=task.device)
    canvas = PixelImage(start_pixels)
    step = from_torch_optimizer(canvas.params, partial(torch.optim.SGD, lr=task.step_size, momentum=0.5))
    history = task.optimize(
        canvas, lambda _: task.objective(task.preprocess(canvas.images())), step, partial(render_uint8, canvas)
    )
    return RecipeOutput(render_uint8(canvas), history)


def test_custom_recipe(small_model: convscope.Model) -> None:
    recipe_ = Recipe(momentum_from_gray, native_size, full_view, constant_schedule(4, 1e5))
    result = convscope.patterns(small_model, "conv1", [2, 6], recipe=recipe_, frames=2)
    assert (result.recipe, result.steps, result.step_size) == ("momentum_from_gray", 4, 1e5)
    assert result.images.shape == (2, 32, 32, 3)
    # The first layer is linear: with a constant gradient, momentum makes 1 + 1.5 + 1.75 + 1.875 steps.
    x = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    convolved = small_model.module.conv1(small_model.preprocessing.normalize(x)).mean((2, 3))[0]
    for i, number in enumerate((2, 6)):
        (gradient,) = torch.autograd.grad(convolved[number], x, retain_graph=True)
        moved = 127.5 + 6.125 * 1e5 * gradient[0] / 255
        assert moved.min() > 0
        assert moved.max() < 255
        assert float((moved - 127.5).abs().max()) > 10
        # Rounding to integers; the gradient is float32.
        assert np.abs(result.images[i] - moved.permute(1, 2, 0).numpy()).max() < 0.51
    with pytest.raises(ConvscopeError, match="recipe 'momentum_from_gray' takes no start image"):
        convscope.patterns(small_model, "conv1", [2], recipe=recipe_, start=np.zeros((32, 32, 3)))


# --- frames and callbacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "steps", "num_frames"), [("plain", 7, 3), ("maco", 6, 6), ("robust", 3, 5), ("dream", 4, 1)]
)
def test_frames_are_evenly_spaced_up_to_the_finished_image(
    small_model: convscope.Model, photographs: np.ndarray, recipe: str, steps: int, num_frames: int
) -> None:
    """Frame f of F is the image that the callback gets at step ceil(f S / F)."""
    callback_images: list[np.ndarray] = []
    callback_steps: list[int] = []

    def record_step(step: int, images: np.ndarray) -> None:
        callback_steps.append(step)
        callback_images.append(images.copy())

    start = {"start": photographs[0]} if recipe == "dream" else {"size": 32}
    options: dict[str, Any] = {"recipe": recipe, "steps": steps, **start}
    result = convscope.patterns(small_model, "relu2", [0, 5], frames=num_frames, callback=record_step, **options)
    assert callback_steps == list(range(1, steps + 1))
    assert result.frames is not None
    assert result.frames.dtype == np.uint8
    assert result.frames.shape == (num_frames, *result.images.shape)
    for f in range(1, num_frames + 1):
        assert np.array_equal(result.frames[f - 1], callback_images[-(-f * steps // num_frames) - 1])
    assert np.array_equal(result.frames[-1], result.images)
    assert not np.array_equal(callback_images[0], callback_images[-1])
    without_callback = convscope.patterns(small_model, "relu2", [0, 5], **options)
    assert without_callback.frames is None
    assert np.array_equal(without_callback.images, result.images)  # callbacks do not change the result


def test_frames_of_several_batches_are_joined(small_model: convscope.Model) -> None:
    callback_steps: list[tuple[int, int]] = []
    options: dict[str, Any] = {"size": 32, "steps": 4, "frames": 2}
    batched = convscope.patterns(
        small_model,
        "relu2",
        range(6),
        memory=1,
        callback=lambda step, images: callback_steps.append((step, len(images))),
        **options,
    )
    assert batched.frames is not None
    assert batched.frames.shape == (2, 6, 32, 32, 3)
    assert np.array_equal(batched.frames[-1], batched.images)
    assert [step for step, _ in callback_steps] == list(range(1, len(callback_steps) + 1))  # counted over all batches
    assert sum(count for _, count in callback_steps) == 4 * 6
    assert len({count for _, count in callback_steps}) == 1


@pytest.mark.parametrize("callback_name", ["callback", "progress"])
@pytest.mark.parametrize("recipe", ["robust", "maco", "plain"])
def test_cancelling_restores_the_model(recipe: str, callback_name: str) -> None:
    class Cancelled(Exception):
        pass

    calls: list[int] = []

    def cancel_at_step_2(step: int, _: Any) -> None:
        calls.append(step)
        if step == 2:
            raise Cancelled

    net, handles = in_training(randomized(SmallConvNet()))
    model = load_model(net, 32)
    state_before = snapshot(net)
    with pytest.raises(Cancelled):
        convscope.patterns(model, "relu2", [0, 1], recipe=recipe, size=32, steps=5, **{callback_name: cancel_at_step_2})
    assert calls == [1, 2]
    assert diff_snapshots(state_before, snapshot(net)) == []
    assert len(list(handles)) == 9


# --- patience --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [0, 4])
def test_patience_stops_early(small_model: convscope.Model, num_frames: int) -> None:
    """The gain in three steps is below 1 %; frames and history keep their length."""
    callback_steps: list[int] = []
    options: dict[str, Any] = {"recipe": "plain", "start": np.full((32, 32, 3), 128.0), "steps": 40}
    result = convscope.patterns(
        small_model,
        100 + 0.01 * channel("conv1", 2),
        patience=3,
        frames=num_frames,
        callback=lambda i, _: callback_steps.append(i),
        **options,
    )
    assert callback_steps == [1, 2, 3]
    assert result.history.shape == (40, 1)
    assert (result.history[3:] == result.history[3]).all()
    three_steps = convscope.patterns(small_model, 100 + 0.01 * channel("conv1", 2), **{**options, "steps": 3})
    assert np.array_equal(result.images, three_steps.images)
    assert np.array_equal(result.scores, three_steps.scores)
    if num_frames:
        assert result.frames is not None
        assert result.frames.shape == (4, 1, 32, 32, 3)
        assert np.array_equal(result.frames[-1], result.images)


def test_finished_image_does_not_depend_on_the_batch(small_model: convscope.Model) -> None:
    """Including its history and opacity, although the batch continues."""

    def run(*neighbours: Objective) -> convscope.Patterns:
        return convscope.patterns(small_model, [slow, *neighbours], recipe="maco", size=32, steps=12, patience=3)

    slow, fast = 100 + 0.01 * channel("relu2", 3), channel("relu2", 4) - channel("relu2", 5)
    with_slow, with_fast = run(50 + 0.01 * channel("relu2", 1)), run(fast)
    assert (with_fast.history[4:, 1] != with_fast.history[3:-1, 1]).any()
    assert with_slow.alpha is not None
    assert with_fast.alpha is not None
    for first, permuted in zip(
        (with_slow.images, with_slow.alpha, with_slow.history.T),
        (with_fast.images, with_fast.alpha, with_fast.history.T),
        strict=True,
    ):
        assert np.array_equal(first[0], permuted[0])


@pytest.mark.parametrize(("fragile", "expected"), [(False, [2, 2, 2]), (True, [2, 2, 2, 2])])
def test_opacity_and_last_frame_of_a_retried_unit(fragile: bool, expected: list[int]) -> None:
    """The first start of this recipe is black, where the unit is inactive, the second white.

    The fragile unit is active only without transforms. A single unit is run twice, to avoid a batch of one.
    """
    batch_sizes: list[int] = []

    def black_then_white(task: OptimizationTask) -> RecipeOutput:
        batch_sizes.append(len(task.generators))
        value = 255 if task.without_transforms or (len(batch_sizes) == 3 and not fragile) else 0
        images = torch.full((len(task.generators), 3, *task.size), value, dtype=torch.uint8)
        task.on_step(0, lambda: images)
        alpha = torch.full((len(task.generators), *task.size), value / 255)
        return RecipeOutput(images, torch.zeros(1, len(task.generators)), alpha)

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU())
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.copy_(torch.tensor([-1.0, 1.0]))
    recipe_ = Recipe(black_then_white, native_size, full_view, constant_schedule(1, 1.0), starts=2)
    result = convscope.patterns(load_model(net, 8), "1", [0, 1], recipe=recipe_, frames=1)
    assert batch_sizes == expected
    assert result.scores.tolist() == [2, 1]
    assert result.images[:, 0, 0, 0].tolist() == [255, 0]
    assert result.alpha is not None
    assert result.alpha[:, 0, 0].tolist() == [255, 0]
    assert result.frames is not None
    assert np.array_equal(result.frames[-1], result.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience is 0; expected a whole number, 1 or more"),
        ({"patience": 2.5}, "patience is 2.5"),
        ({"frames": -1}, "frames is -1; expected a whole number, 0 or more"),
        ({"frames": True}, "frames is True"),
    ],
)
def test_refused(small_model: convscope.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvscopeError) as raised:
        convscope.patterns(small_model, "relu2", [0], **options)
    assert message in str(raised.value)


# --- baselines -------------------------------------------------------------------------------------------------------


def reference_noise_images(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Return four images of uniform noise and four with random phases of the natural spectrum (8, H, W, 3)."""
    images = []
    for i in range(8):
        generator = Generator().manual_seed(8 * seed + i)
        if i < 4:
            images.append((128 + 20 * torch.rand((3, *size), generator=generator)).numpy().astype(np.uint8))
        else:
            natural: Tensor = PhaseImage([generator], 3, size, CPU).images().detach()[0]
            images.append(np.round(natural.numpy() * 255).astype(np.uint8))
    return np.stack(images).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("seed", [0, 3])
def test_noise_baseline_by_hand(small_model: convscope.Model, seed: int) -> None:
    """The maximum over eight noise images of the canvas's size."""
    images = reference_noise_images(seed, (24, 36))
    of_units = convscope.patterns(small_model, "relu2", [3, 0, 9], size=(24, 36), steps=1, seed=seed)
    maxima = layer_outputs(small_model, "relu2", images).mean((2, 3)).max(0)
    assert of_units.noise_scores == pytest.approx(maxima[[3, 0, 9]], rel=FLOAT32_SUMS, abs=FLOAT32_SUMS)
    objectives = [
        channel("logits", 1) - channel("logits", 0),
        diversity(channel("relu2", 1), "relu2", 2),
        -neuron("conv3", 4),
    ]
    result = convscope.patterns(small_model, objectives, size=(24, 36), steps=1, seed=seed)
    logits, middle_values = (
        layer_outputs(small_model, "logits", images),
        layer_outputs(small_model, "conv3", images)[:, 4, 6, 9],
    )
    expected = [(logits[:, 1] - logits[:, 0]).max(), np.nan, np.nan, (-middle_values).max()]
    assert result.noise_scores == pytest.approx(expected, rel=FLOAT32_SUMS, abs=FLOAT32_SUMS, nan_ok=True)


def test_reference_baseline_by_hand(small_model: convscope.Model, photographs: np.ndarray, tmp_path: Path) -> None:
    """The maximum over the reference images; unreadable ones are reported as failed."""
    reference_images = photographs[:, :, :32]
    objectives = [channel("relu2", 2), 2 * channel("logits", 1) - 3, deepdream("conv1")]
    result = convscope.patterns(small_model, objectives, size=32, steps=1, reference=reference_images)
    expected = [
        layer_outputs(small_model, "relu2", reference_images)[:, 2].mean((1, 2)).max(),
        (2 * layer_outputs(small_model, "logits", reference_images)[:, 1] - 3).max(),
        (layer_outputs(small_model, "conv1", reference_images) ** 2).mean((1, 2, 3)).max(),
    ]
    assert result.reference_scores == pytest.approx(expected, rel=FLOAT32_SUMS, abs=FLOAT32_SUMS)
    unbatched = convscope.patterns(small_model, objectives, size=32, steps=1, reference=reference_images, memory=1)
    assert unbatched.reference_scores == pytest.approx(expected, rel=FLOAT32_SUMS, abs=FLOAT32_SUMS)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, image in zip(files, reference_images, strict=False):
        Image.fromarray(image).save(file)
    files[3].write_bytes(b"no image")
    from_files = convscope.patterns(small_model, objectives, size=32, steps=1, reference=files)
    assert from_files.reference_scores == pytest.approx(expected, rel=FLOAT32_SUMS, abs=FLOAT32_SUMS)
    assert [str(files[3]) in failure.name or failure.name in str(files[3]) for failure in from_files.failed] == [True]
    assert convscope.patterns(small_model, "relu2", [2], size=32, steps=1).reference_scores is None
    of_diversity = convscope.patterns(
        small_model, diversity(channel("relu2", 1), "relu2", 2), size=32, steps=1, reference=reference_images
    )
    assert of_diversity.reference_scores is not None
    assert np.isnan(of_diversity.reference_scores).tolist() == [True, True]


def test_score_below_the_noise_baseline_is_noted(small_model: convscope.Model) -> None:
    """With a recipe that returns one of the noise images."""
    noise = torch.from_numpy(reference_noise_images(0, (32, 32))).permute(0, 3, 1, 2)

    def return_noise(task: OptimizationTask) -> RecipeOutput:
        return RECIPES["plain"].run(task)._replace(images=noise[2:3])

    result = convscope.patterns(
        small_model, channel("relu2", 3), recipe=Recipe(return_noise, native_size, full_view, constant_schedule(1, 1.0))
    )
    assert result.noise_scores is not None
    assert result.scores[0] < result.noise_scores[0]
    assert len(result.notes) == 1
    assert result.notes[0].startswith(f"relu2 3 has a score of {result.scores[0]:.3g}, not above the noise baseline")


def test_baselines_use_the_space_of_the_image(small_model: convscope.Model, photographs: np.ndarray) -> None:
    """With space='input' there is no preprocessing: values from 0 to 255 for image and baselines."""
    reference_images = photographs[:, :, :32]
    options = {"recipe": "plain", "space": "input", "size": 32, "steps": 1}
    result = convscope.patterns(small_model, "conv1", [1], reference=reference_images, **options)
    for actual, images in (
        (result.noise_scores, reference_noise_images(0, (32, 32))),
        (result.reference_scores, reference_images),
    ):
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        with torch.no_grad():
            expected = small_model.module.conv1(x).mean((2, 3))[:, 1].max()
        assert actual == pytest.approx([float(expected)], rel=1e-3)  # reference images are denormalized


def test_large_seeds(small_model: convscope.Model) -> None:
    result = [convscope.patterns(small_model, "conv1", [1], size=16, steps=1, seed=seed) for seed in (2**62, 2**62, 5)]
    assert np.array_equal(result[0].images, result[1].images)
    assert not np.array_equal(result[0].images, result[2].images)
