"""Recipes through `convscope.patterns` on tiny networks: what each promises, derived once more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.featurevis import recipes, task
from convscope.featurevis.objectives import caricature, channel
from convscope.featurevis.optimizer import DEAD_AFTER_STEPS, adam_step, consistency_weighted_adam
from convscope.featurevis.parameterization import FourierImage, PhaseImage, natural_magnitude
from convscope.featurevis.recipes import ADAM_DAMPING, LIGHT_DAMPING, RECIPES
from convscope.featurevis.task import render_uint8
from convscope.featurevis.transforms import AugmentationConfig, identity, random_affine, random_roll
from tests.featurevis.test_parameterization import colour_axes, logit
from tests.oracles.nets import SmallConvNet, randomized

SUMS = 1e-4  # float32 through three layers, in another memory layout
CPU = torch.device("cpu")


class Window(nn.Module):
    """Two units that see a part of the picture, given in shares of its sides, and nothing else."""

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


def loaded(net: nn.Module, size: Any = 32, **more: Any) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": size, **more})


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    """Three convolutions, five classes, a preprocessing of its own."""
    return loaded(randomized(SmallConvNet()), 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """Smooth, with structure of all sizes, never quite black or white: (32, 40, 3)."""
    down, across = np.mgrid[:32, :40]
    waves = [np.sin(down / 3 + across / (2 + c)) + np.cos(down * across / (40 + 9 * c)) for c in range(3)]
    return (128 + 50 * np.stack(waves, axis=2)).round().clip(0, 255).astype(np.uint8)


def outputs(model: convscope.Model, layer: str, images: np.ndarray) -> np.ndarray:
    """What a layer gives for 8-bit pictures (N, H, W, C), by a hook of the test's own, in float64."""
    kept: list[Tensor] = []
    module = model.module if layer == "logits" else model.module.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output.detach().clone()))
    with torch.no_grad():
        model.module(model.preprocessing.normalize(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) / 255))
    handle.remove()
    return kept[0].double().numpy()


def generator(seed: int, number: int) -> Generator:
    """A unit's own random numbers."""
    return Generator().manual_seed(seed * 1_000_003 + number * 7919 + 1)


# --- robust ----------------------------------------------------------------------------------------------------------


def test_robust_for_classes_by_hand() -> None:
    """Views of 5/14 and 7/14 of the canvas, two fifths of the steps each, and of 12/14, of a canvas no finer than they;
    steps that grow from 3 %; the mean over the last fifth of them."""
    net = randomized(SmallConvNet())
    model = loaded(net, 112)
    steps, number, seed = 10, 2, 5
    rule = replace(RECIPES["robust"], max_restarts=1)
    found = convscope.patterns(model, "logits", [number, 4], recipe=rule, steps=steps, seed=seed)
    assert found.images.shape == (2, 112, 112, 3)
    own = generator(seed, number)
    canvas = FourierImage([own], 3, (112, 112), CPU)
    sides = (40, 40, 56, 56, 96)
    views = [random_affine(AugmentationConfig((0.5, 1), 10, (side, side)), 2, [own], CPU) for side in sides]
    rates = [0.2 * min(1.0, 0.03 ** (1 - i / 6)) for i in range(steps)]
    step = adam_step(canvas.params, lambda i: rates[i], ADAM_DAMPING)
    been = []
    for i in range(steps):
        shown = model.preprocessing.normalize(views[i // 2](i % 2, canvas.images((sides[i // 2],) * 2)))
        value = net(shown)[0, number]
        assert found.history[i, 0] == pytest.approx(value.item(), abs=SUMS)
        (gradient,) = torch.autograd.grad(value, canvas.params)
        with torch.no_grad():
            step(canvas.params, gradient)
        been.append(canvas.params.detach().clone())
    canvas.params = (been[-1] + been[-2]) / 2
    # A whole number may be rounded the other way; a rectifier at its kink too, which moves a pixel here and there more.
    apart = np.abs(found.images[0].astype(int) - render_uint8(canvas)[0].permute(1, 2, 0).numpy())
    assert (apart > 1).mean() < 5e-3
    assert apart.mean() < 0.1
    assert found.images[0].std() > 5  # beside which that is nothing


class Residual(nn.Module):
    """x + f(x) between two convolutions; `share` of the gradient goes through f."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.stem, self.branch, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = self.branch(x.relu())
        if branch.requires_grad:
            branch.register_hook(lambda gradient: self.share * gradient)
        return self.head((x + branch).relu()).mean((2, 3))


def test_robust_takes_less_than_half_of_what_residual_branches_hand_back_of_classes() -> None:
    """As a network whose branches do so by themselves, to the byte; units of layers are drawn with all of it."""
    rule = replace(RECIPES["robust"], max_restarts=1)
    assert rule.residual_grad_scale == 0.45
    whole, less = (loaded(randomized(Residual(share)), 56) for share in (1.0, 0.45))
    found = convscope.patterns(whole, "logits", recipe=rule, steps=12)
    expected = convscope.patterns(less, "logits", recipe=replace(rule, residual_grad_scale=1.0), steps=12)
    assert np.array_equal(found.images, expected.images)
    assert np.array_equal(found.history, expected.history)
    other = convscope.patterns(whole, "logits", recipe=replace(rule, residual_grad_scale=1.0), steps=12)
    assert not np.array_equal(found.images, other.images)
    units = [convscope.patterns(net, "head", recipe=rule, steps=4).images for net in (whole, less)]
    assert not np.array_equal(*units)
    plain = convscope.patterns(whole, "head", recipe=replace(rule, residual_grad_scale=1.0), steps=4).images
    assert np.array_equal(units[0], plain)


def test_robust_for_units_that_see_little_by_hand() -> None:
    """The canvas, rolled; steps that go where gradients agree."""
    net = randomized(SmallConvNet())
    model = loaded(net, 112)
    steps, number, seed = 6, 2, 5
    found = convscope.patterns(model, "relu1", [number, 4], steps=steps, seed=seed)
    size = found.images.shape[1]
    own = generator(seed, number)
    canvas = FourierImage([own], 3, (size, size), CPU)
    view = random_roll(steps, [own], CPU)
    step = consistency_weighted_adam(canvas.params, 0.35, LIGHT_DAMPING)
    for i in range(steps):
        shown = model.preprocessing.normalize(view(i, canvas.images()))
        value = net.relu1(net.bn1(net.conv1(shown)))[0, number].mean()
        assert found.history[i, 0] == pytest.approx(value.item(), rel=1e-4)
        (gradient,) = torch.autograd.grad(value, canvas.params)
        with torch.no_grad():
            step(canvas.params, gradient)
    apart = np.abs(found.images[0].astype(int) - render_uint8(canvas)[0].permute(1, 2, 0).numpy())
    assert (apart > 1).mean() < 5e-3  # as above
    assert found.images[0].std() > 5


def test_units_with_a_field_of_their_own_take_even_steps_and_views_of_one_size() -> None:
    full = (224, 224)
    assert RECIPES["robust"].view_sizes(None, full, full) == (*[(80, 80)] * 2, *[(112, 112)] * 2, (192, 192))
    assert RECIPES["robust"].view_sizes(200, full, full) == ((144, 144),)
    assert RECIPES["robust"].view_sizes(40, full, (120, 120)) == ((120, 120),)
    assert RECIPES["robust"].schedule(200, full) == (150, 0.15)


@pytest.mark.parametrize(("layer", "given_up"), [("logits", 40), ("relu3", DEAD_AFTER_STEPS)])
def test_what_begins_with_short_steps_is_not_given_up(
    usual: convscope.Model, monkeypatch: pytest.MonkeyPatch, layer: str, given_up: int
) -> None:
    """A silent picture is, after so many steps; where they grow, not before the last."""
    found: list[int] = []
    climb = task.gradient_ascent

    def spied(*args: Any, **kwargs: Any) -> Tensor:
        found.append(kwargs.get("dead_after", DEAD_AFTER_STEPS))
        return climb(*args, **kwargs)

    monkeypatch.setattr(task, "gradient_ascent", spied)
    convscope.patterns(usual, layer, [0, 1], steps=40, recipe=replace(RECIPES["robust"], starts=1))
    assert found[0] == given_up


# --- maco ------------------------------------------------------------------------------------------------------------


def test_maco_keeps_the_natural_spectrum_in_the_finished_picture(usual: convscope.Model) -> None:
    """Read back from 8 bits: off by no more, all in all, than half a step in every pixel can do (Parseval)."""
    found = convscope.patterns(usual, "logits", [0, 3], recipe="maco", steps=24, size=(30, 33))
    natural = natural_magnitude(3, (30, 33)).double().numpy()[:, :, 1:]  # the first column is its own mirror image
    inverse = np.linalg.inv(colour_axes(3))
    for picture in found.images.transpose(0, 3, 1, 2) / 255:
        assert picture.min() > 1 / 255
        assert picture.max() < 254 / 255
        plain = np.einsum("cr,rhw->chw", inverse, logit(picture))
        magnitude = np.abs(np.fft.rfft2(plain, norm="ortho"))[:, :, 1:]
        half = np.maximum(logit(picture + 0.5 / 255) - logit(picture), logit(picture) - logit(picture - 0.5 / 255))
        bound = np.linalg.norm(inverse, 2) * np.linalg.norm(half)
        # Each of these columns stands for two.
        off = math.sqrt(2) * np.linalg.norm(magnitude - natural)
        assert off < bound
        assert off < 0.05 * math.sqrt(2) * np.linalg.norm(natural)
    assert (found.scores > found.history[0]).all()


def test_maco_opacity_by_hand() -> None:
    """The gradient at every pixel of the canvas, in size, mean over colours, summed over steps of two views."""
    net = randomized(SmallConvNet())
    model = loaded(net, 32)
    steps, number, seed = 3, 2, 5
    found = convscope.patterns(
        model, "logits", [number, 4], recipe="maco", steps=steps, step_size=0.1, seed=seed, size=32
    )
    assert found.alpha is not None
    assert (found.alpha.dtype, found.alpha.shape) == (np.uint8, (2, 32, 32))
    own = generator(seed, number)
    canvas = PhaseImage([own], 3, (32, 32), CPU)
    views = random_affine(AugmentationConfig((0.5, 1), 10, (32, 32)), 2 * steps, [own], CPU)
    step = adam_step(canvas.params, 0.1, ADAM_DAMPING)
    asked = np.zeros((32, 32))
    for i in range(steps):
        picture = canvas.images()
        seen = torch.cat([views(2 * i, picture), views(2 * i + 1, picture)])
        value = net(model.preprocessing.normalize(seen))[:, number].mean()
        at_pixels, at_phases = torch.autograd.grad(value, (picture, canvas.params))
        assert found.history[i, 0] == pytest.approx(value.item(), abs=SUMS)
        asked += at_pixels[0].abs().mean(0).double().numpy()
        with torch.no_grad():
            step(canvas.params, at_phases)
    low, high = np.quantile(asked, 0.5), np.quantile(asked, 0.9)
    expected = 255 * np.clip((asked - low) / (high - low), 0, 1)
    assert np.abs(found.alpha[0] - expected).max() <= 1.5  # rounded, and three steps of float32
    # A whole number may be rounded the other way.
    assert np.abs(found.images[0].astype(int) - render_uint8(canvas)[0].permute(1, 2, 0).numpy()).max() <= 1


def test_maco_is_opaque_where_the_unit_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a canvas that lies still, a unit of the left half has nothing to do with the right one."""
    monkeypatch.setattr(recipes, "_choose_transform", lambda task, several=1: identity)
    model = loaded(randomized(Window((0, 1), (0, 0.5))), 32)
    found = convscope.patterns(model, "logits", [0, 1], recipe="maco", steps=8, size=32)
    assert found.alpha is not None
    for alpha in found.alpha:
        assert not alpha[:, 16:].any()
        assert (alpha[:, :16] > 0).mean() > 0.95
        assert alpha.max() == 255
    assert convscope.patterns(model, "logits", [0], recipe="robust", steps=2, size=32).alpha is None


# --- dream and caricature --------------------------------------------------------------------------------------------


def test_dream_changes_nothing_where_the_unit_does_not_look() -> None:
    """The unit sees the middle tenth of each view; what no view brings there keeps the photograph's bytes."""
    side = 128
    model = loaded(randomized(Window((0.45, 0.55), (0.45, 0.55))), side)
    photograph = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    before = convscope.patterns(model, "logits", [0, 1], recipe="dream", start=photograph, steps=0)
    assert np.array_equal(before.images, np.stack([photograph] * 2))
    found = convscope.patterns(model, "logits", [0, 1], recipe="dream", start=photograph, steps=12)
    # A view of scale 0.7 has its middle up to 0.3 of the half side, 19 pixels, from the canvas's; what it shows there
    # is up to 6 wide (and turned), resampled by 1 and spread by one and a half places of the coarsest level, 24.
    reach = math.ceil(0.3 * side / 2 + 0.1 * side / 2 * math.sqrt(2) + 1 + 24)
    middle = slice(side // 2 - reach, side // 2 + reach)
    changed = (found.images != photograph).any(3)
    for unit_changed in changed:
        assert unit_changed[middle, middle].mean() > 0.2
        unit_changed[middle, middle] = False
        assert not unit_changed.any()
    assert (found.scores > 1.2 * before.scores).all()
    assert np.square(outputs(model, "conv", found.images)).mean((2, 3))[[0, 1], [0, 1]] == pytest.approx(
        found.scores, rel=SUMS
    )


def test_dream_of_a_layer_is_its_mean_square(usual: convscope.Model, photograph: np.ndarray) -> None:
    found = convscope.patterns(usual, "relu2", recipe="dream", start=photograph, steps=10)
    assert found.names == ["all of relu2"]
    assert found.images.shape == (1, 32, 40, 3)
    shown = np.stack([photograph, found.images[0]])
    before, after = np.square(outputs(usual, "relu2", shown)).mean((1, 2, 3))
    assert found.scores[0] == pytest.approx(after, rel=SUMS)
    assert after > 1.2 * before
    with pytest.raises(ConvscopeError, match="recipe 'dream' needs units= for 'logits'"):
        convscope.patterns(usual, "logits", recipe="dream", start=photograph)


def test_caricature_grows_like_its_photograph(usual: convscope.Model, photograph: np.ndarray) -> None:
    """The score is x . p / n, times the cosine, of the finished picture's layer x and the photograph's, p."""
    photographs = np.stack([photograph, photograph[::-1], photograph[:, ::-1]])
    objectives = [caricature("relu2"), 2 * caricature("conv1"), caricature("relu2", 2)]
    drawn = [
        convscope.patterns(usual, objectives, recipe="caricature", start=photographs, steps=steps) for steps in (0, 40)
    ]
    for found in drawn:
        for i, (layer, factor, power) in enumerate((("relu2", 1, 1), ("conv1", 2, 1), ("relu2", 1, 2))):
            own, given = outputs(usual, layer, np.stack([found.images[i], photographs[i]])).reshape(2, -1)
            cosine = (own @ given) / np.linalg.norm(own) / np.linalg.norm(given)
            assert found.scores[i] == pytest.approx(
                factor * (own @ given) / own.size * max(0.1, cosine) ** power, rel=SUMS
            )
    assert (drawn[1].scores > drawn[0].scores).all()
    assert (drawn[1].history[-8:].mean(0) > drawn[1].history[0]).all()
    assert drawn[1].names == ["likeness in relu2", "2 * likeness in conv1", "likeness in relu2"]
    assert drawn[1].noise_scores is not None
    assert np.isnan(drawn[1].noise_scores).all()  # it compares pictures
    alone = convscope.patterns(usual, "relu2", recipe="caricature", start=photograph, steps=40)
    assert alone.scores[0] == pytest.approx(drawn[1].scores[0], rel=0.01)  # the engine's promise for other batch sizes


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("relu2", {}, "recipe 'caricature' needs a photograph; give one as start="),
        ("relu2", {"units": [0], "start": True}, "recipe 'caricature' is for a layer as a whole; leave out units="),
        (channel("relu2", 0), {"start": True}, "relu2 0 does not compare with a photograph"),
        (caricature("relu2"), {"recipe": "robust"}, "likeness in relu2 compares with a photograph"),
        (channel("relu2", 0), {"units": [0], "recipe": "robust"}, "units= goes with a layer's name"),
        ([], {"recipe": "robust"}, "expected a layer's name, an objective, or a list of objectives"),
        (3 + channel("relu2", 12), {"recipe": "robust"}, "unit 12 is not in layer 'relu2'"),
    ],
)
def test_refused(
    usual: convscope.Model, photograph: np.ndarray, layer: Any, options: dict[str, Any], message: str
) -> None:
    given = {"recipe": "caricature", **options, **({"start": photograph} if "start" in options else {})}
    with pytest.raises(ConvscopeError) as raised:
        convscope.patterns(usual, layer, **given)
    assert message in str(raised.value)


@pytest.mark.parametrize("shape", [(30, 60), (50, 25), (16, 16)])
def test_a_photograph_from_a_file_keeps_its_shape(
    usual: convscope.Model, tmp_path: Path, shape: tuple[int, int]
) -> None:
    """Its shorter side is brought to the network's own, 32; with `size`, it is brought to that."""
    ramp = np.linspace(20, 230, shape[0] * shape[1]).reshape(*shape, 1).repeat(3, 2).round().astype(np.uint8)
    file = tmp_path / "ramp.png"
    Image.fromarray(ramp).save(file)
    for given in (file, str(file), Image.fromarray(ramp)):
        found = convscope.patterns(usual, "relu2", [0, 1], recipe="dream", start=given, steps=0)
        height, width = (round(side * 32 / min(shape)) for side in shape)
        assert found.images.shape == (2, height, width, 3)
        kind = Image.Resampling[usual.preprocessing.interpolation.upper()]
        expected = np.asarray(Image.fromarray(ramp).resize((width, height), kind)).astype(int)
        assert np.abs(found.images[0] - expected).max() <= 1  # rounded once or twice
    asked = convscope.patterns(usual, "relu2", [0], recipe="dream", start=file, steps=0, size=(24, 36))
    assert asked.images.shape == (1, 24, 36, 3)
