"""Perturbation methods against closed forms, plain loops and other programs."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.context import MethodContext
from convscope.attribution.methods import perturbation, rise
from convscope.engine.capture import ForwardResult
from convscope.engine.layer_table import LayerTable
from convscope.engine.model import Model
from convscope.images.loading import ImageBatchLoader
from tests.attribution.helpers import SIZE, load_module, random_images, relative_error
from tests.oracles.nets import SmallConvNet, SpiedNet, diff_snapshots, in_training, randomized, snapshot

TINY = 1e-5  # float32 sums of a few hundred products; drops are small compared with scores

METHODS: dict[str, dict[str, Any]] = {
    "score-cam": {},
    "ablation-cam": {},
    "occlusion": {"window": 7, "stride": 5},
    "rise": {"samples": 230, "cells": 4, "tolerance": 0.0},
}
AT_LAYER = ("score-cam", "ablation-cam")
IMAGES_IN_MEMORY = 6  # memory, in multiples of what one image allocates: batches of three


def compute(model: Model, x: Tensor, method: str, targets: Any = 1, **options: Any) -> np.ndarray:
    where = {"layer": "conv2"} if method in AT_LAYER and "layer" not in options else {}
    return convscope.heatmaps(model, x, targets, method=method, **where, **options).values


class Pooled(nn.Module):
    """Convolution, global average, linear head."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


class Linear(nn.Module):
    """A weight for every pixel, on any number of axes; an identity convolution provides a spatial layer."""

    def __init__(self, channels: int, *sides: int) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(sides)]
        self.conv = kind(channels, channels, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(channels).reshape(self.conv.weight.shape))
        self.fc = nn.Linear(channels * math.prod(sides), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


def logits(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


# --- ablation-cam ----------------------------------------------------------------------------------------------------


def test_ablation_cam_of_a_linear_head() -> None:
    """With a global average, y = sum_k w_k mean(A_k) + b, so the drop of channel k is w_k mean(A_k).

    In double precision: the score of class 2, a denominator, is a thousandth of its terms.
    """
    net = randomized(Pooled()).double()
    x = random_images().double()
    with torch.no_grad():
        maps = net.conv(x)
        weights = net.fc.weight.detach()
        y = net(x)
    slopes = weights[None] * maps.mean((2, 3))[:, None] / y[..., None]  # (N, T, K)
    expected = torch.einsum("ntk,nkhw->nthw", slopes, maps)
    actual = compute(load_module(net), x, "ablation-cam", [[0, 1, 2, 3]] * 3, layer="conv")
    assert relative_error(actual, expected) < TINY
    assert (y < 0).any()  # negative scores turn the map's sign, as in the paper


def ablation_cam_by_loops(net: nn.Module, layer: nn.Module, x: Tensor, target: int) -> np.ndarray:
    """Compute the paper's slopes in plain loops: a full pass for every channel of every image."""
    expected = []
    for n in range(len(x)):
        captured: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, out, captured=captured: captured.append(out.clone()))
        y = logits(net, x[n : n + 1])[0, target].double()
        handle.remove()
        cam = torch.zeros(captured[0].shape[2:], dtype=torch.float64)
        for k in range(captured[0].shape[1]):
            without = captured[0].clone()
            without[:, k] = 0
            handle = layer.register_forward_hook(lambda _, __, out, without=without: without.clone())
            y_k = logits(net, x[n : n + 1])[0, target].double()
            handle.remove()
            cam += (y - y_k) / y * captured[0][0, k].double()
        expected.append(cam.numpy())
    return np.stack(expected)


@pytest.mark.parametrize("layer", ["conv1", "relu1", "bn3", "relu3"])
def test_ablation_cam_in_plain_loops(layer: str) -> None:
    net = randomized(SmallConvNet())
    x = random_images()
    actual = compute(load_module(net), x, "ablation-cam", [[2, 4]] * 3, layer=layer)
    for position, target in enumerate((2, 4)):
        expected = ablation_cam_by_loops(net, net.get_submodule(layer), x, target)
        assert relative_error(actual[:, position], expected) < 1e-4  # float32 drops of 1e-3 of the score


def test_ablation_cam_agrees_with_pytorch_grad_cam() -> None:
    """After a ReLU, where they set the channel to 0 as the paper does; their map is clamped, scaled and resized.

    On maps with negative values they replace the channel by min - 1e7 (see their comment); there the paper's
    definition and the plain loops above decide.
    """
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = randomized(SmallConvNet(inplace=False))
    x = random_images()
    reference_net = copy.deepcopy(net)
    with AblationCAM(reference_net, [reference_net.relu3], batch_size=4) as cam:
        reference = cam(x.clone(), [ClassifierOutputTarget(2)] * 3)
    actual = compute(load_module(net), x, "ablation-cam", 2, layer="relu3")[:, 0]
    scaled = scale_cam_image(np.maximum(actual, 0), (SIZE, SIZE))
    assert reference.max() > 0.9
    assert relative_error(scale_cam_image(scaled), reference) < 1e-4


def test_ablation_cam_agrees_with_captum() -> None:
    """captum's feature ablation, with one feature per channel, is the drop, y times the slope, at every position."""
    from captum.attr import LayerFeatureAblation

    net = randomized(SmallConvNet(inplace=False))
    x = random_images()
    features = torch.arange(12).reshape(1, 12, 1, 1).expand(1, 12, 12, 12)
    drops = LayerFeatureAblation(net, net.conv2).attribute(x, target=2, layer_mask=features)[:, :, 0, 0].double()
    with torch.no_grad():
        maps = net.conv2(net.pool(net.relu1(net.bn1(net.conv1(x))))).double()
        y = net(x)[:, 2].double()
    expected = torch.einsum("nk,nkhw->nhw", drops / y[:, None], maps)
    assert relative_error(compute(load_module(net), x, "ablation-cam", 2)[:, 0], expected) < 1e-4


def test_ablation_cam_skips_inactive_channels() -> None:
    net = randomized(SpiedNet())
    with torch.no_grad():
        net.conv1.weight[1:3] = 0
        net.conv1.bias[1:3] = 0
    model, x = load_module(net), random_images(1)
    net.between.batches.clear()
    net.before.batches.clear()
    actual = compute(model, x, "ablation-cam", 0, layer="conv1")
    # One pass for targets, one up to the layer, one to cache the prefix; then no channel removed + two channels.
    assert net.between.batches == [1, 1, 3]
    assert net.before.batches == [1, 1, 1]
    assert relative_error(actual[:, 0], ablation_cam_by_loops(net, net.conv1, x, 0)) < TINY


def test_ablation_cam_of_a_zero_score() -> None:
    """The weights are the drops themselves."""
    net = randomized(Pooled())
    with torch.no_grad():
        net.fc.weight[0] = 0
        net.fc.bias[0] = 0
    model = load_module(net)
    assert np.array_equal(compute(model, random_images(1), "ablation-cam", 0, layer="conv"), np.zeros((1, 1, 22, 22)))


# --- score-cam -------------------------------------------------------------------------------------------------------


def score_cam_by_loops(net: nn.Module, maps: Tensor, x: Tensor, target: int) -> np.ndarray:
    """Algorithm 1 of the paper in plain loops."""
    expected = []
    for n in range(len(x)):
        base = logits(net, torch.zeros_like(x[:1]))[0, target].double()
        increases = []
        for a in maps[n]:
            up = F.interpolate(a[None, None], x.shape[2:], mode="bilinear")
            low, high = up.min(), up.max()
            # Checked on the map itself: upsampling a constant rounds, and the rounding would become a mask.
            h = (up - low) / (high - low) if a.max() > a.min() else torch.zeros_like(up)
            increases.append(logits(net, x[n : n + 1] * h)[0, target].double() - base)
        alpha = torch.stack(increases).exp() / torch.stack(increases).exp().sum()
        expected.append((alpha[:, None, None] * maps[n].double()).sum(0).numpy())
    return np.stack(expected)


@pytest.mark.parametrize("layer", ["conv1", "relu1", "conv2", "relu3"])
def test_score_cam_in_plain_loops(layer: str) -> None:
    net = randomized(SmallConvNet(inplace=False))
    x = random_images()
    captured: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, out: captured.append(out.clone()))
    logits(net, x)
    handle.remove()
    actual = compute(load_module(net), x, "score-cam", [[3, 0]] * 3, layer=layer)
    for position, target in enumerate((3, 0)):
        assert relative_error(actual[:, position], score_cam_by_loops(net, captured[0], x, target)) < TINY


def test_score_cam_agrees_with_pytorch_grad_cam_and_torchcam() -> None:
    """At a layer as large as the image; elsewhere algorithm 1 and the authors' program decide.

    pytorch-grad-cam upsamples with aligned corners, and torchcam scales maps to [0, 1] before upsampling, so that
    interpolated masks do not reach 1; neither follows the paper's order and the authors' interpolation.
    """
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = randomized(SmallConvNet(inplace=False))
    x = random_images()
    actual = compute(load_module(net), x, "score-cam", 3, layer="relu1")[:, 0]
    scaled = scale_cam_image(np.maximum(actual, 0))
    reference_net = copy.deepcopy(net)
    with ScoreCAM(reference_net, [reference_net.relu1]) as cam:
        reference = cam(x.clone(), [ClassifierOutputTarget(3)] * 3)
    assert reference.max() > 0.9
    assert relative_error(scaled, reference) < 1e-4

    torchcam = pytest.importorskip("torchcam.methods")
    reference_net = copy.deepcopy(net)
    with torchcam.ScoreCAM(reference_net, reference_net.relu1) as cam, torch.no_grad():
        reference_net(x)
        reference = cam(3)[0].numpy()
    assert relative_error(scaled, reference) < 1e-4


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_score_cam_skips_constant_maps(value: float) -> None:
    """Their increase is exactly 0, which still takes part in the softmax."""
    net = randomized(SpiedNet())
    with torch.no_grad():
        net.conv1.weight[1:3] = 0
        net.conv1.bias[1:3] = value
    model, x = load_module(net), random_images(1)
    net.before.batches.clear()
    actual = compute(model, x, "score-cam", 0, layer="conv1")
    assert net.before.batches[-1] == 3  # the zero image and two masks
    assert sum(net.before.batches[:-1]) == len(net.before.batches) - 1
    assert relative_error(actual[:, 0], score_cam_by_loops(net, logits(net.conv1, x), x, 0)) < TINY


def test_score_cam_of_constant_maps_only() -> None:
    net = randomized(Pooled())
    with torch.no_grad():
        net.conv.weight.zero_()
    actual = compute(load_module(net), random_images(2), "score-cam", 0, layer="conv")
    assert relative_error(actual, np.full((2, 1, 22, 22), float(net.conv.bias.detach().mean()))) < TINY


# --- occlusion -------------------------------------------------------------------------------------------------------

WINDOWS: list[tuple[Any, Any, float]] = [
    (5, 3, 0.4),
    (4, 4, 0.0),
    (24, 1, 0.4),
    ((3, 7), (2, 5), 0.0),
    (1, 1, 0.0),
    ((24, 6), (24, 6), 0.4),
    (7, 6, 0.0),
]


@pytest.mark.parametrize(("window", "stride", "fill"), WINDOWS)
def test_occlusion_agrees_with_captum(window: Any, stride: Any, fill: float) -> None:
    """Including windows that extend beyond the image and windows as large as the image."""
    from captum.attr import Occlusion

    net = randomized(SmallConvNet())
    x = random_images(2)
    actual = compute(load_module(net), x, "occlusion", [[0, 3]] * 2, window=window, stride=stride, fill=fill)
    windows = (window,) * 2 if isinstance(window, int) else window
    strides = (stride,) * 2 if isinstance(stride, int) else stride
    for position, target in enumerate((0, 3)):
        reference = Occlusion(net).attribute(
            x,
            sliding_window_shapes=(3, *windows),
            strides=(3, *strides),
            target=target,
            baselines=fill,
            perturbations_per_eval=16,
        )
        assert relative_error(actual[:, position], reference[:, 0]) < 1e-4


def test_occlusion_of_lite0_agrees_with_captum(lite0: Model, photos: list[str]) -> None:
    from captum.attr import Occlusion

    x = next(ImageBatchLoader(photos[3], lite0.preprocessing).batches(1)).x
    actual = compute(lite0, x, "occlusion", 387, window=112, stride=100)
    reference = Occlusion(lite0.module).attribute(
        x, sliding_window_shapes=(3, 112, 112), strides=(3, 100, 100), target=387, perturbations_per_eval=8
    )
    assert relative_error(actual[:, 0], reference[:, 0]) < 1e-4


@pytest.mark.parametrize("sides", [(12,), (9, 11), (5, 6, 4)])
def test_occlusion_of_a_linear_network(sides: tuple[int, ...]) -> None:
    """A window of one pixel changes the score by w (x - fill), for signals, images and volumes."""
    net = randomized(Linear(2, *sides))
    x = torch.randn((2, 2, *sides), generator=torch.Generator().manual_seed(3))
    context = make_context(net, x, [1, 2])
    actual = perturbation.occlusion(context, window=1, stride=1, fill=0.25)
    for position, target in enumerate((1, 2)):
        expected = (input_weights(net, target, x[0]) * (x.double().numpy() - 0.25)).sum(1)
        assert relative_error(actual[:, position], expected) < TINY
    average_filled = perturbation.occlusion(context, window=1, stride=1, fill="average")
    mean = x.double().mean(tuple(range(2, x.ndim)), keepdim=True).numpy()
    assert (
        relative_error(average_filled[:, 0], (input_weights(net, 1, x[0]) * (x.double().numpy() - mean)).sum(1)) < TINY
    )


def input_weights(net: nn.Module, target: int, x: Tensor) -> np.ndarray:
    """Return the gradient of a target of `Linear` with respect to the input."""
    (gradient,) = torch.autograd.grad(net(one := x[None].clone().requires_grad_())[0, target], one)
    return gradient[0].double().numpy()


def make_context(net: nn.Module, x: Tensor, targets: list[int], size: int = 7, seed: int = 0) -> MethodContext:
    """Make a context around a bare network, for inputs with any number of axes."""

    class Stub:
        module = nn.Identity()
        fixed_batch_size = None
        final_activation = None
        can_accelerate = False
        device = torch.device("cpu")
        layers = LayerTable([])

    def run(batch: Tensor, _module: nn.Module | None = None) -> ForwardResult:
        assert len(batch) <= size
        out = net(batch)
        return ForwardResult({}, out, out)

    batch_targets = BatchTargets(torch.tensor([targets] * len(x)))
    stub: Any = Stub()
    return MethodContext(stub, x, batch_targets, run, size, seed, lambda fraction: None)


def test_occlusion_defaults_depend_on_the_image_size() -> None:
    model, x = load_module(randomized(SmallConvNet())), random_images(1)
    explicit = compute(model, x, "occlusion", window=4, stride=2, fill=0.0)
    assert np.array_equal(compute(model, x, "occlusion"), explicit)  # a seventh of 24, and half of it


# --- rise ------------------------------------------------------------------------------------------------------------


def expected_products(side: int, cells: int) -> np.ndarray:
    """Compute E[sum_c u_c(a) u_c(b)] over cells c, for pixels a, b of one axis, averaged over all shifts."""
    cell = -(-side // cells)
    up = (cells + 1) * cell
    u = np.zeros((up, cells))
    for pixel in range(up):
        at = min(max((pixel + 0.5) * cells / up - 0.5, 0), cells - 1)
        low = min(int(at), cells - 1)
        high = min(low + 1, cells - 1)
        u[pixel, low] += 1 - (at - low)
        u[pixel, high] += at - low
    shifted = [u[s : s + side] for s in range(cell)]
    return np.mean([np.einsum("ac,bc->abc", w, w) for w in shifted], 0)


@pytest.mark.parametrize("sides", [(11,), (8, 6)])
def test_rise_of_a_linear_network(sides: tuple[int, ...]) -> None:
    """f = b + sum_q v_q m_q, so E[f m_a] / p = b + sum_q v_q (p + (1 - p) P(a, q)), P the overlap of pixels a and q.

    The overlap of two pixels on two axes is the product of those on each, as shifts are drawn independently.
    """
    net, keep, cells = randomized(Linear(2, *sides)), 0.3, 3
    x = torch.randn((1, 2, *sides), generator=torch.Generator().manual_seed(3))
    v = (input_weights(net, 1, x[0]) * x[0].double().numpy()).sum(0)
    b = float(net.fc.bias[1].detach())
    overlap = [expected_products(side, cells).sum(2) for side in sides]
    letters = "abc"[: len(sides)], "xyz"[: len(sides)]
    terms = ",".join(a + x for a, x in zip(*letters, strict=True))
    mask_term = np.einsum(f"{letters[1]},{terms}->{letters[0]}", v, *overlap)
    expected = b + keep * v.sum() + (1 - keep) * mask_term
    actual, extras = rise.rise(
        make_context(net, x, [1], size=500), samples=20000, cells=cells, keep=keep, tolerance=0.0
    )
    error = extras["standard_error"][0, 0].numpy()
    off = np.abs(actual[0, 0].numpy() - expected) / error
    assert 0 < error.max() < 0.05 * np.ptp(expected)
    assert off.max() < 4.5  # standard errors, over 48 correlated pixels
    assert extras["samples"].tolist() == [[20000.0]]


def test_standard_error_is_the_spread_of_repeated_runs() -> None:
    net = randomized(Linear(2, 8, 6))
    x = torch.randn((1, 2, 8, 6), generator=torch.Generator().manual_seed(3))
    runs, errors = [], []
    for seed in range(60):
        context = make_context(net, x, [1], size=200)
        context = type(context)(**{**vars(context), "seed": seed})
        actual, extras = rise.rise(context, samples=200, cells=3, tolerance=0.0)
        runs.append(actual[0, 0].double())
        errors.append(extras["standard_error"][0, 0].double())
    spread = torch.stack(runs).std(0)
    ratio = (torch.stack(errors).mean(0) / spread).numpy()
    assert 0.8 < np.median(ratio) < 1.25  # sixty runs determine a standard deviation to 9 % per pixel
    assert 0.6 < ratio.min() < ratio.max() < 1.7


def test_rise_in_plain_loops() -> None:
    """Draw the masks from the generator, upsample and shift them one by one, as the authors do."""
    net = randomized(SmallConvNet())
    x = random_images(2)
    actual = compute(load_module(net), x, "rise", [[0, 2]] * 2, samples=150, cells=5, keep=0.4, tolerance=0.0)
    generator = torch.Generator().manual_seed(0)
    masks = []
    for count in (100, 50):
        grids = (torch.rand((count, 5, 5), generator=generator) < 0.4).float()
        rows, columns = (torch.randint(5, (count,), generator=generator) for _ in range(2))
        for grid, row, column in zip(grids, rows, columns, strict=True):
            up = F.interpolate(grid[None, None], (30, 30), mode="bilinear")[0, 0]
            masks.append(up[row : row + SIZE, column : column + SIZE])
    expected = torch.zeros(2, 2, SIZE, SIZE, dtype=torch.float64)
    for mask in masks:
        scores = logits(net, x * mask)[:, [0, 2]].double()
        expected += scores[..., None, None] * mask.double() / 150 / 0.4
    assert relative_error(actual, expected) < TINY


def test_rise_of_probabilities() -> None:
    net = randomized(SmallConvNet())
    model, x = load_module(net), random_images(1)
    options = {"samples": 50, "cells": 4, "tolerance": 0.0}
    actual = compute(model, x, "rise", [[0, 1, 2, 3, 4]], probability=True, **options)

    class Probabilities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).softmax(1) * 1.0  # hides the softmax from `load`

    values = convscope.load(Probabilities(), preprocessing={"size": SIZE}, task="regression")
    assert relative_error(actual, compute(values, x, "rise", [[0, 1, 2, 3, 4]], **options)) < TINY
    full = compute(model, x, "rise", lambda out: torch.ones(len(out)), **options)
    assert relative_error(actual.sum(1, keepdims=True), full) < TINY  # the sum of all probabilities is 1
    against = compute(model, x, "rise", 0, against=3, probability=True, **options)
    assert relative_error(against[:, 0], actual[:, 0] - actual[:, 3]) < TINY


def test_rise_stops_at_the_tolerance() -> None:
    model, x = load_module(randomized(SmallConvNet())), random_images(2)

    def rise_with(tolerance: float, targets: Any = ((0, 1, 2),) * 2, samples: int = 2000) -> convscope.Heatmaps:
        return convscope.heatmaps(
            model, x, [list(t) for t in targets], method="rise", samples=samples, cells=3, tolerance=tolerance
        )

    exhaustive, loose, tight = rise_with(0.0, samples=300), rise_with(0.5), rise_with(0.35)
    assert exhaustive.extras["samples"].tolist() == [[300.0] * 3] * 2
    assert np.all(tight.extras["samples"] < 2000)
    assert np.all(tight.extras["samples"] % 100 == 0)
    assert np.all(loose.extras["samples"] <= tight.extras["samples"])
    assert (loose.extras["samples"] < tight.extras["samples"]).any()
    assert len(set(tight.extras["samples"].flatten().tolist())) > 1  # targets finish separately
    for actual, tolerance in ((loose, 0.5), (tight, 0.35)):
        error, span = actual.extras["standard_error"], np.ptp(actual.values, axis=(2, 3))
        assert error.shape == actual.values.shape
        assert np.all(error.max((2, 3)) <= tolerance * span * (1 + TINY))
        assert not any("noisy" in note for note in actual.notes)
    relative = exhaustive.extras["standard_error"].max((2, 3)) / np.ptp(exhaustive.values, axis=(2, 3))
    noisy = [note for note in exhaustive.notes if "noisy after 300 masks" in note]
    assert len(noisy) == (relative > 0.05).sum() > 0
    # When a target finishes does not depend on the other targets.
    for t in range(3):
        single = rise_with(0.35, ((t,),) * 2)
        assert np.array_equal(single.extras["samples"][:, 0], tight.extras["samples"][:, t])
        assert relative_error(single.values[:, 0], tight.values[:, t]) < TINY


def test_rise_with_one_mask_has_no_standard_error() -> None:
    actual = convscope.heatmaps(
        load_module(randomized(SmallConvNet())), random_images(1), 0, method="rise", samples=1, cells=3
    )
    assert np.isfinite(actual.values).all()
    assert np.isnan(actual.extras["standard_error"]).all()


# --- all methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_batch_or_targets(method: str) -> None:
    model, x = load_module(randomized(SmallConvNet())), random_images()
    options = METHODS[method]
    three = compute(model, x, method, [[1, 4]] * 3, **options)
    repeated = compute(model, x, method, [[1, 4]] * 3, **options)
    permuted = compute(model, x[[2, 0, 0]], method, [[1, 4]] * 3, **options)
    assert three.shape[:2] == (3, 2)
    assert np.array_equal(three, repeated)
    assert np.array_equal(permuted, three[[2, 0, 0]])
    for n in range(3):
        single = compute(model, x[n : n + 1], method, [[1, 4]], **options)
        assert relative_error(single, three[n : n + 1]) < TINY
    for t, target in enumerate((1, 4)):
        assert relative_error(compute(model, x, method, target, **options)[:, 0], three[:, t]) < TINY
    assert relative_error(three[:, 0], three[:, 1]) > 0.01
    assert relative_error(three[0], three[1]) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_memory_changes_maps_by_rounding_only(method: str) -> None:
    model, x = load_module(randomized(SmallConvNet())), random_images(2)
    options = METHODS[method]
    assert relative_error(compute(model, x, method, memory=1, **options), compute(model, x, method, **options)) < 5e-5


@pytest.mark.parametrize("method", METHODS)
def test_memory_limits_the_batch_size(method: str) -> None:
    """Batches are as large as memory allows; more masks or windows make more batches, not larger ones."""
    net = randomized(SpiedNet())
    model, x = load_module(net), random_images(2)
    extras = {"rise": {"samples": 400}, "occlusion": {"stride": 1}}.get(method, {})
    layer_option = {"layer": "conv1"} if method in AT_LAYER else {}
    for options in ({}, extras):
        net.between.batches.clear()
        compute(
            model,
            x,
            method,
            0,
            memory=IMAGES_IN_MEMORY * model.layers[-1].allocated_bytes,
            **{**METHODS[method], **layer_option, **options},
        )
        assert max(net.between.batches) == 3


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_serves_all_targets(method: str) -> None:
    net = randomized(SpiedNet())
    model, x = load_module(net), random_images(1)
    options = {**METHODS[method], **({"layer": "conv1"} if method in AT_LAYER else {})}
    counts = []
    for targets in ([[0]], [[0, 1, 2, 3, 4]]):
        net.between.batches.clear()
        compute(model, x, method, targets, **options)
        counts.append(sum(net.between.batches))
    assert counts[0] == counts[1]
    assert not any(net.between.modes)


@pytest.mark.parametrize("method", METHODS)
def test_seed_changes_only_stochastic_methods(method: str) -> None:
    model, x = load_module(randomized(SmallConvNet())), random_images(1)
    one, other = (compute(model, x, method, seed=seed, **METHODS[method]) for seed in (0, 1))
    assert np.array_equal(one, other) == (method != "rise")


@pytest.mark.parametrize("method", METHODS)
def test_contrast_is_the_difference_of_scores(method: str) -> None:
    """Occlusion and RISE are linear in the score; the other methods are applied to the difference itself."""
    model, x = load_module(randomized(SmallConvNet())), random_images(2)
    options = METHODS[method]
    actual = compute(model, x, method, 1, against=3, **options)[:, 0]
    function = compute(model, x, method, lambda out: out[:, 1] - out[:, 3], **options)[:, 0]
    assert relative_error(actual, function) < TINY
    if method not in AT_LAYER:
        both = compute(model, x, method, [[1, 3]] * 2, **options)
        assert relative_error(actual, both[:, 0] - both[:, 1]) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_model_and_input_are_unchanged(method: str) -> None:
    net = randomized(SmallConvNet())
    _hooks = in_training(net)
    model, x = load_module(net), random_images(2)
    explicit, before = x.clone(), snapshot(net)
    compute(model, x, method, **METHODS[method])
    assert diff_snapshots(before, snapshot(net)) == []
    assert torch.equal(x, explicit)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [1, 3])
def test_exception_in_progress_cancels_cleanly(method: str, after: int) -> None:
    class Cancelled(Exception):
        pass

    net = randomized(SmallConvNet())
    model, x = load_module(net), random_images(2)
    before = snapshot(net)
    reported: list[float] = []

    def progress(done: float, count: int) -> None:
        reported.append(done / count)
        if len(reported) == after:
            raise Cancelled

    with pytest.raises(Cancelled):
        compute(model, x, method, progress=progress, memory=1, **METHODS[method])
    assert len(reported) == after
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize("method", METHODS)
def test_progress_increases_to_1(method: str) -> None:
    reported: list[float] = []
    model, x = load_module(randomized(SmallConvNet())), random_images(2)
    memory = IMAGES_IN_MEMORY * model.layers[-1].allocated_bytes

    def progress(done: float, count: int) -> None:
        reported.append(done / count)

    compute(model, x, method, progress=progress, memory=memory, **METHODS[method])
    assert reported == sorted(reported)
    assert len(reported) > 4
    assert 0 < reported[0] < 0.5
    assert reported[-1] == pytest.approx(1)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("occlusion", {"window": 25}, "window is 25, larger than the input of 24 x 24"),
    ("occlusion", {"window": (3, 30)}, r"window is \(3, 30\), larger than the input"),
    ("occlusion", {"window": 0}, "window is 0; expected at least 1"),
    ("occlusion", {"window": 2.5}, "window is 2.5; expected a whole number"),
    ("occlusion", {"window": True}, "window is True; expected a whole number"),
    ("occlusion", {"window": "9"}, "window is '9'; expected a whole number"),
    ("occlusion", {"window": (3, 3, 3)}, r"window is \(3, 3, 3\); expected one number, or 2"),
    ("occlusion", {"window": 5, "stride": 0}, "stride is 0; expected at least 1"),
    ("occlusion", {"window": 5, "stride": -2}, "stride is -2; expected at least 1"),
    ("occlusion", {"window": 5, "stride": 6}, "stride 6 is longer than window 5"),
    ("occlusion", {"fill": "grey"}, "fill is 'grey'; expected a number in the network's input space, or \"average\""),
    ("occlusion", {"fill": float("nan")}, "fill is nan; expected a number"),
    ("occlusion", {"fill": None}, "fill is None; expected a number"),
    ("occlusion", {"windows": 3}, "method 'occlusion' has no option 'windows'; its options: window, stride, fill"),
    ("rise", {"samples": 0}, "samples is 0; expected a whole number, 1 or more"),
    ("rise", {"samples": 1.5}, "samples is 1.5"),
    ("rise", {"cells": 0}, "cells is 0; expected at least 1"),
    ("rise", {"cells": 25}, "cells is 25, larger than the input"),
    ("rise", {"keep": 0}, "keep is 0; expected a number above 0 and below 1"),
    ("rise", {"keep": 1.0}, "keep is 1.0; expected a number above 0 and below 1"),
    ("rise", {"tolerance": -0.1}, "tolerance is -0.1; expected a number of at least 0"),
    ("rise", {"tolerance": "low"}, "tolerance is 'low'; expected a number of at least 0"),
]


@pytest.mark.parametrize(("method", "options", "message"), REFUSED)
def test_invalid_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    net = randomized(SpiedNet())
    model = load_module(net)
    net.before.batches.clear()
    with pytest.raises(ConvscopeError, match=message) as caught:
        convscope.heatmaps(model, random_images(1), 0, method=method, **options)
    assert "\n" not in str(caught.value)
    # Options that depend on the input's size are checked after the pass that determines targets; others before it.
    depends = any(words in message for words in ("larger than", "longer than", "or 2"))
    assert sum(net.before.batches) == depends


def test_probability_of_a_function_is_refused() -> None:
    function: Callable[[Tensor], Tensor] = lambda out: out[:, 0]  # noqa: E731
    with pytest.raises(ConvscopeError, match="a function or a box has no probability"):
        compute(load_module(randomized(SmallConvNet())), random_images(1), "rise", function, probability=True)


@pytest.mark.parametrize("method", ["score-cam", "ablation-cam"])
def test_transformer_layer_on_a_grid(method: str) -> None:
    """The channels of a transformer's layer are maps over its grid of tokens."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=7
    ).eval()
    actual = compute(load_module(net, 32), random_images(1, 32), method, 3, layer="blocks.1.norm1")
    assert actual.shape == (1, 1, 4, 4)
    assert np.ptp(actual) > 0


def test_of_mean_scores_the_excess_over_their_mean_is_drawn() -> None:
    """The values stay mean scores; drawn as they are, they would be nearly the same color everywhere."""
    model = load_module(randomized(SmallConvNet()))
    heatmaps = convscope.heatmaps(model, random_images(1), 1, method="rise", samples=64, tolerance=0.0)
    values = heatmaps.values + 10  # as of a score that is large for all masks
    heatmaps = dataclasses.replace(heatmaps, values=values)
    centered = dataclasses.replace(heatmaps, method="saliency", values=values - values.mean((2, 3), keepdims=True))
    ((overlay, scale),) = heatmaps.iter_overlays()
    ((expected, expected_scale),) = centered.iter_overlays()
    assert scale.maximum == pytest.approx(expected_scale.maximum, rel=1e-3)
    assert scale.maximum < 5
    np.testing.assert_allclose(np.asarray(overlay, int), np.asarray(expected, int), atol=2)
    assert (heatmaps.values > 0).all()
