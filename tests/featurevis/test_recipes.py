"""Recipes on small networks: each against a hand-written optimisation, and its guarantees."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.featurevis import recipes, task
from convscope.featurevis.objectives import caricature, channel
from convscope.featurevis.optimizer import DEAD_AFTER_STEPS, adam_step, consistency_weighted_adam
from convscope.featurevis.parameterization import FourierImage, PhaseImage, natural_magnitude
from convscope.featurevis.recipes import ADAM_DAMPING, LIGHT_DAMPING, RECIPES
from convscope.featurevis.task import render_uint8
from convscope.featurevis.transforms import AugmentationConfig, identity, random_affine, random_roll
from tests.featurevis.helpers import CPU, FLOAT32_SUMS, layer_outputs, load_model, unit_generator
from tests.featurevis.test_parameterization import logit, reference_color_axes
from tests.oracles.nets import SmallConvNet, randomized


class WindowUnits(nn.Module):
    """Two units that depend on a window of the image only, given in fractions of its sides."""

    def __init__(self, rows: tuple[float, float], columns: tuple[float, float]) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = (
            (round(a * side), round(b * side))
            for (a, b), side in zip((self.rows, self.columns), x.shape[2:], strict=True)
        )
        return self.conv(x[:, :, top:bottom, left:right]).square().mean((2, 3))


# --- robust ----------------------------------------------------------------------------------------------------------


def test_robust_for_classes_by_hand() -> None:
    """Views of 5/14, 7/14 and 12/14 of the canvas, rendered at that size; warm-up; average of the last fifth."""
    net = randomized(SmallConvNet())
    model = load_model(net, 112)
    steps, unit, seed = 10, 2, 5
    recipe = replace(RECIPES["robust"], max_restarts=1)
    result = convscope.patterns(model, "logits", [unit, 4], recipe=recipe, steps=steps, seed=seed)
    assert result.images.shape == (2, 112, 112, 3)
    generator = unit_generator(seed, unit)
    canvas = FourierImage([generator], 3, (112, 112), CPU)
    sides = (40, 40, 56, 56, 96)
    views = [random_affine(AugmentationConfig((0.5, 1), 10, (side, side)), 2, [generator], CPU) for side in sides]
    rates = [0.2 * min(1.0, 0.03 ** (1 - i / 6)) for i in range(steps)]
    step = adam_step(canvas.params, lambda i: rates[i], ADAM_DAMPING)
    snapshots = []
    for i in range(steps):
        network_input = model.preprocessing.normalize(views[i // 2](i % 2, canvas.images((sides[i // 2],) * 2)))
        value = net(network_input)[0, unit]
        assert result.history[i, 0] == pytest.approx(value.item(), abs=FLOAT32_SUMS)
        (gradient,) = torch.autograd.grad(value, canvas.params)
        with torch.no_grad():
            step(canvas.params, gradient)
        snapshots.append(canvas.params.detach().clone())
    canvas.params = (snapshots[-1] + snapshots[-2]) / 2
    # Rounding may differ by one; a ReLU input near 0 may change a few pixels by more.
    difference = np.abs(result.images[0].astype(int) - render_uint8(canvas)[0].permute(1, 2, 0).numpy())
    assert (difference > 1).mean() < 5e-3
    assert difference.mean() < 0.1
    assert result.images[0].std() > 5  # compared with which the difference is small


class Residual(nn.Module):
    """x + f(x) between two convolutions; the gradient through f is multiplied by `scale`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.stem, self.branch, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = self.branch(x.relu())
        if branch.requires_grad:
            branch.register_hook(lambda gradient: self.scale * gradient)
        return self.head((x + branch).relu()).mean((2, 3))


def test_robust_scales_residual_gradients_of_classes() -> None:
    """Identical to a network with scaled branches; the gradient of units of layers is not scaled."""
    recipe = replace(RECIPES["robust"], max_restarts=1)
    assert recipe.residual_grad_scale == 0.45
    full_gradient, scaled_branches = (load_model(randomized(Residual(scale)), 56) for scale in (1.0, 0.45))
    result = convscope.patterns(full_gradient, "logits", recipe=recipe, steps=12)
    expected = convscope.patterns(scaled_branches, "logits", recipe=replace(recipe, residual_grad_scale=1.0), steps=12)
    assert np.array_equal(result.images, expected.images)
    assert np.array_equal(result.history, expected.history)
    unscaled = convscope.patterns(full_gradient, "logits", recipe=replace(recipe, residual_grad_scale=1.0), steps=12)
    assert not np.array_equal(result.images, unscaled.images)
    units = [convscope.patterns(net, "head", recipe=recipe, steps=4).images for net in (full_gradient, scaled_branches)]
    assert not np.array_equal(*units)
    unscaled_units = convscope.patterns(
        full_gradient, "head", recipe=replace(recipe, residual_grad_scale=1.0), steps=4
    ).images
    assert np.array_equal(units[0], unscaled_units)


def test_robust_for_small_receptive_fields_by_hand() -> None:
    """Random rolls, and consistency-weighted Adam."""
    net = randomized(SmallConvNet())
    model = load_model(net, 112)
    steps, unit, seed = 6, 2, 5
    result = convscope.patterns(model, "relu1", [unit, 4], steps=steps, seed=seed)
    size = result.images.shape[1]
    generator = unit_generator(seed, unit)
    canvas = FourierImage([generator], 3, (size, size), CPU)
    transform = random_roll(steps, [generator], CPU)
    step = consistency_weighted_adam(canvas.params, 0.35, LIGHT_DAMPING)
    for i in range(steps):
        network_input = model.preprocessing.normalize(transform(i, canvas.images()))
        value = net.relu1(net.bn1(net.conv1(network_input)))[0, unit].mean()
        assert result.history[i, 0] == pytest.approx(value.item(), rel=1e-4)
        (gradient,) = torch.autograd.grad(value, canvas.params)
        with torch.no_grad():
            step(canvas.params, gradient)
    difference = np.abs(result.images[0].astype(int) - render_uint8(canvas)[0].permute(1, 2, 0).numpy())
    assert (difference > 1).mean() < 5e-3  # as above
    assert result.images[0].std() > 5


def test_views_and_schedule_by_receptive_field() -> None:
    full = (224, 224)
    assert RECIPES["robust"].view_sizes(None, full, full) == (*[(80, 80)] * 2, *[(112, 112)] * 2, (192, 192))
    assert RECIPES["robust"].view_sizes(200, full, full) == ((144, 144),)
    assert RECIPES["robust"].view_sizes(40, full, (120, 120)) == ((120, 120),)
    assert RECIPES["robust"].schedule(200, full) == (150, 0.15)


@pytest.mark.parametrize(("layer", "expected_steps"), [("logits", 40), ("relu3", DEAD_AFTER_STEPS)])
def test_warm_up_disables_the_early_end_for_inactive_images(
    small_model: convscope.Model, monkeypatch: pytest.MonkeyPatch, layer: str, expected_steps: int
) -> None:
    """Without warm-up, an inactive image is finished after a fixed number of steps."""
    dead_after: list[int] = []
    gradient_ascent = task.gradient_ascent

    def record_steps(*args: Any, **kwargs: Any) -> Tensor:
        dead_after.append(kwargs.get("dead_after", DEAD_AFTER_STEPS))
        return gradient_ascent(*args, **kwargs)

    monkeypatch.setattr(task, "gradient_ascent", record_steps)
    convscope.patterns(small_model, layer, [0, 1], steps=40, recipe=replace(RECIPES["robust"], starts=1))
    assert dead_after[0] == expected_steps


# --- maco ------------------------------------------------------------------------------------------------------------


def test_maco_image_has_the_natural_spectrum(small_model: convscope.Model) -> None:
    """Read back from 8 bits; the deviation is at most that of half a step in every pixel (Parseval)."""
    result = convscope.patterns(small_model, "logits", [0, 3], recipe="maco", steps=24, size=(30, 33))
    natural = natural_magnitude(3, (30, 33)).double().numpy()[:, :, 1:]  # the first column is its own mirror image
    inverse = np.linalg.inv(reference_color_axes(3))
    for image in result.images.transpose(0, 3, 1, 2) / 255:
        assert image.min() > 1 / 255
        assert image.max() < 254 / 255
        decorrelated = np.einsum("cr,rhw->chw", inverse, logit(image))
        magnitude = np.abs(np.fft.rfft2(decorrelated, norm="ortho"))[:, :, 1:]
        half_step = np.maximum(logit(image + 0.5 / 255) - logit(image), logit(image) - logit(image - 0.5 / 255))
        bound = np.linalg.norm(inverse, 2) * np.linalg.norm(half_step)
        # Each of these columns counts twice.
        deviation = math.sqrt(2) * np.linalg.norm(magnitude - natural)
        assert deviation < bound
        assert deviation < 0.05 * math.sqrt(2) * np.linalg.norm(natural)
    assert (result.scores > result.history[0]).all()


def test_maco_opacity_by_hand() -> None:
    """Absolute gradients at each pixel, mean over channels, summed over steps with two views each."""
    net = randomized(SmallConvNet())
    model = load_model(net, 32)
    steps, unit, seed = 3, 2, 5
    result = convscope.patterns(
        model, "logits", [unit, 4], recipe="maco", steps=steps, step_size=0.1, seed=seed, size=32
    )
    assert result.alpha is not None
    assert (result.alpha.dtype, result.alpha.shape) == (np.uint8, (2, 32, 32))
    generator = unit_generator(seed, unit)
    canvas = PhaseImage([generator], 3, (32, 32), CPU)
    views = random_affine(AugmentationConfig((0.5, 1), 10, (32, 32)), 2 * steps, [generator], CPU)
    step = adam_step(canvas.params, 0.1, ADAM_DAMPING)
    gradient_sum = np.zeros((32, 32))
    for i in range(steps):
        image = canvas.images()
        views_of_step = torch.cat([views(2 * i, image), views(2 * i + 1, image)])
        value = net(model.preprocessing.normalize(views_of_step))[:, unit].mean()
        pixel_gradient, phase_gradient = torch.autograd.grad(value, (image, canvas.params))
        assert result.history[i, 0] == pytest.approx(value.item(), abs=FLOAT32_SUMS)
        gradient_sum += pixel_gradient[0].abs().mean(0).double().numpy()
        with torch.no_grad():
            step(canvas.params, phase_gradient)
    low, high = np.quantile(gradient_sum, 0.5), np.quantile(gradient_sum, 0.9)
    expected = 255 * np.clip((gradient_sum - low) / (high - low), 0, 1)
    assert np.abs(result.alpha[0] - expected).max() <= 1.5  # rounding, and three steps in float32
    # Rounding may differ by one.
    assert np.abs(result.images[0].astype(int) - render_uint8(canvas)[0].permute(1, 2, 0).numpy()).max() <= 1


def test_maco_is_opaque_inside_the_receptive_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transforms, a unit of the left half does not depend on the right half."""
    monkeypatch.setattr(recipes, "_choose_transform", lambda _: identity)
    model = load_model(randomized(WindowUnits((0, 1), (0, 0.5))), 32)
    result = convscope.patterns(model, "logits", [0, 1], recipe="maco", steps=8, size=32)
    assert result.alpha is not None
    for alpha in result.alpha:
        assert not alpha[:, 16:].any()
        assert (alpha[:, :16] > 0).mean() > 0.95
        assert alpha.max() == 255
    assert convscope.patterns(model, "logits", [0], recipe="robust", steps=2, size=32).alpha is None


# --- dream and caricature --------------------------------------------------------------------------------------------


def test_dream_keeps_the_photograph_outside_the_receptive_field() -> None:
    """The unit depends on the middle tenth of each view; pixels that no view moves there do not change."""
    side = 128
    model = load_model(randomized(WindowUnits((0.45, 0.55), (0.45, 0.55))), side)
    photograph = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    before = convscope.patterns(model, "logits", [0, 1], recipe="dream", start=photograph, steps=0)
    assert np.array_equal(before.images, np.stack([photograph] * 2))
    result = convscope.patterns(model, "logits", [0, 1], recipe="dream", start=photograph, steps=12)
    # The centre of a view of scale 0.7 is up to 0.3 of half a side (19 pixels) from the centre; the window in it
    # is up to 6 wide (and rotated), resampled by 1, spread by one and a half values of the coarsest level (24).
    reach = math.ceil(0.3 * side / 2 + 0.1 * side / 2 * math.sqrt(2) + 1 + 24)
    middle = slice(side // 2 - reach, side // 2 + reach)
    changed = (result.images != photograph).any(3)
    for unit_changed in changed:
        assert unit_changed[middle, middle].mean() > 0.2
        unit_changed[middle, middle] = False
        assert not unit_changed.any()
    assert (result.scores > 1.2 * before.scores).all()
    assert np.square(layer_outputs(model, "conv", result.images)).mean((2, 3))[[0, 1], [0, 1]] == pytest.approx(
        result.scores, rel=FLOAT32_SUMS
    )


def test_dream_of_a_layer_maximises_its_mean_square(small_model: convscope.Model, photograph: np.ndarray) -> None:
    result = convscope.patterns(small_model, "relu2", recipe="dream", start=photograph, steps=10)
    assert result.names == ["all of relu2"]
    assert result.images.shape == (1, 32, 40, 3)
    network_input = np.stack([photograph, result.images[0]])
    before, after = np.square(layer_outputs(small_model, "relu2", network_input)).mean((1, 2, 3))
    assert result.scores[0] == pytest.approx(after, rel=FLOAT32_SUMS)
    assert after > 1.2 * before
    with pytest.raises(ConvscopeError, match="recipe 'dream' needs units= for 'logits'"):
        convscope.patterns(small_model, "logits", recipe="dream", start=photograph)


def test_caricature_score_by_hand(small_model: convscope.Model, photograph: np.ndarray) -> None:
    """The score is x . y / n times the cosine, of the layer's output for the finished image and the photograph."""
    photographs = np.stack([photograph, photograph[::-1], photograph[:, ::-1]])
    objectives = [caricature("relu2"), 2 * caricature("conv1"), caricature("relu2", 2)]
    results = [
        convscope.patterns(small_model, objectives, recipe="caricature", start=photographs, steps=steps)
        for steps in (0, 40)
    ]
    for result in results:
        for i, (layer, factor, power) in enumerate((("relu2", 1, 1), ("conv1", 2, 1), ("relu2", 1, 2))):
            x, y = layer_outputs(small_model, layer, np.stack([result.images[i], photographs[i]])).reshape(2, -1)
            cosine = (x @ y) / np.linalg.norm(x) / np.linalg.norm(y)
            assert result.scores[i] == pytest.approx(
                factor * (x @ y) / x.size * max(0.1, cosine) ** power, rel=FLOAT32_SUMS
            )
    assert (results[1].scores > results[0].scores).all()
    assert (results[1].history[-8:].mean(0) > results[1].history[0]).all()
    assert results[1].names == ["likeness in relu2", "2 * likeness in conv1", "likeness in relu2"]
    assert results[1].noise_scores is not None
    assert np.isnan(results[1].noise_scores).all()  # it compares images
    single = convscope.patterns(small_model, "relu2", recipe="caricature", start=photograph, steps=40)
    assert single.scores[0] == pytest.approx(results[1].scores[0], rel=0.01)  # guaranteed: 1 % for other batch sizes


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("relu2", {}, "recipe 'caricature' needs a photograph; give one as start="),
        ("relu2", {"units": [0], "start": True}, "recipe 'caricature' is for a layer as a whole; leave out units="),
        (channel("relu2", 0), {"start": True}, "relu2 0 does not compare with a photograph"),
        (caricature("relu2"), {"recipe": "robust"}, "likeness in relu2 compares with a photograph"),
        (channel("relu2", 0), {"units": [0], "recipe": "robust"}, "units= goes with a layer's name"),
        ([], {"recipe": "robust"}, "layer is []; expected a layer's name or module, an objective"),
        (3 + channel("relu2", 12), {"recipe": "robust"}, "unit 12 is not in layer 'relu2'"),
    ],
)
def test_refused(
    small_model: convscope.Model, photograph: np.ndarray, layer: Any, options: dict[str, Any], message: str
) -> None:
    arguments = {"recipe": "caricature", **options, **({"start": photograph} if "start" in options else {})}
    with pytest.raises(ConvscopeError) as raised:
        convscope.patterns(small_model, layer, **arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("shape", [(30, 60), (50, 25), (16, 16)])
def test_photograph_from_a_file_keeps_its_aspect_ratio(
    small_model: convscope.Model, tmp_path: Path, shape: tuple[int, int]
) -> None:
    """The shorter side is scaled to the model's size of 32, or the image to `size`."""
    ramp = np.linspace(20, 230, shape[0] * shape[1]).reshape(*shape, 1).repeat(3, 2).round().astype(np.uint8)
    file = tmp_path / "ramp.png"
    Image.fromarray(ramp).save(file)
    for start_image in (file, str(file), Image.fromarray(ramp)):
        result = convscope.patterns(small_model, "relu2", [0, 1], recipe="dream", start=start_image, steps=0)
        height, width = (round(side * 32 / min(shape)) for side in shape)
        assert result.images.shape == (2, height, width, 3)
        resampling = Image.Resampling[small_model.preprocessing.interpolation.upper()]
        expected = np.asarray(Image.fromarray(ramp).resize((width, height), resampling)).astype(int)
        assert np.abs(result.images[0] - expected).max() <= 1  # rounding
    resized = convscope.patterns(small_model, "relu2", [0], recipe="dream", start=file, steps=0, size=(24, 36))
    assert resized.images.shape == (1, 24, 36, 3)
