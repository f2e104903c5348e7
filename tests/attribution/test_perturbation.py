"""Methods that ask the network again: known by hand where they can be, agreed upon by other programs where not."""

from __future__ import annotations

import copy
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
from convscope.attribution.methods import perturbation
from convscope.engine.layer_table import LayerTable
from convscope.engine.model import Model
from tests.oracles.nets import Spied, Usual, changes, filled, lived_in, snapshot

SIZE = 24
TINY = 1e-5  # float32 sums of a few hundred products, and drops that are small beside the scores

METHODS: dict[str, dict[str, Any]] = {
    "score-cam": {},
    "ablation-cam": {},
    "occlusion": {"window": 7, "stride": 5},
    "rise": {"samples": 230, "cells": 4, "tolerance": 0.0},
}
AT_LAYER = ("score-cam", "ablation-cam")
ROOM = 6  # times all that a pass over one picture allocates: the engine lets three pictures into that


def loaded(net: nn.Module, size: Any = SIZE, **more: Any) -> Model:
    return convscope.load(net, preprocessing={"size": size, **more})


def inputs(count: int = 3, size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(seed))


def apart(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def asked(model: Model, x: Tensor, method: str, targets: Any = 1, **options: Any) -> np.ndarray:
    where = {"layer": "conv2"} if method in AT_LAYER and "layer" not in options else {}
    return convscope.heatmaps(model, x, targets, method=method, **where, **options).values


class Pooled(nn.Module):
    """Convolution, average over all places, linear head."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


class Linear(nn.Module):
    """A weight for every pixel; `sides` may be of any number of axes. A convolution of nothing gives it a layer."""

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


def test_ablation_of_a_linear_head() -> None:
    """Behind an average y = sum_k w_k mean(A_k) + b, so the drop of channel k is w_k mean(A_k).

    In double precision: of class 2 the sum is a thousandth of its terms, and the slopes are divided by it.
    """
    net = filled(Pooled()).double()
    x = inputs().double()
    with torch.no_grad():
        maps = net.conv(x)
        weights = net.fc.weight.detach()
        y = net(x)
    slopes = weights[None] * maps.mean((2, 3))[:, None] / y[..., None]  # (N, T, K)
    expected = torch.einsum("ntk,nkhw->nthw", slopes, maps)
    found = asked(loaded(net), x, "ablation-cam", [[0, 1, 2, 3]] * 3, layer="conv")
    assert apart(found, expected) < TINY
    assert (y < 0).any()  # where it turns the sign, as in the paper


def brute_ablation(net: nn.Module, layer: nn.Module, x: Tensor, target: int) -> np.ndarray:
    """The paper's slopes in plain loops: a whole run for every channel of every picture."""
    expected = []
    for n in range(len(x)):
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.clone()))
        y = logits(net, x[n : n + 1])[0, target].double()
        handle.remove()
        cam = torch.zeros(kept[0].shape[2:], dtype=torch.float64)
        for k in range(kept[0].shape[1]):
            without = kept[0].clone()
            without[:, k] = 0
            handle = layer.register_forward_hook(lambda _, __, out, without=without: without.clone())
            y_k = logits(net, x[n : n + 1])[0, target].double()
            handle.remove()
            cam += (y - y_k) / y * kept[0][0, k].double()
        expected.append(cam.numpy())
    return np.stack(expected)


@pytest.mark.parametrize("layer", ["conv1", "relu1", "bn3", "relu3"])
def test_ablation_in_plain_loops(layer: str) -> None:
    net = filled(Usual())
    x = inputs()
    found = asked(loaded(net), x, "ablation-cam", [[2, 4]] * 3, layer=layer)
    for position, target in enumerate((2, 4)):
        expected = brute_ablation(net, net.get_submodule(layer), x, target)
        assert apart(found[:, position], expected) < 1e-4  # float32 drops of 1e-3 of the score


def test_ablation_agrees_with_pytorch_grad_cam() -> None:
    """Behind a rectifier, where they zero the channel as the paper does; theirs is rectified, scaled and resized.

    On maps with negative values they put min - 1e7 in the channel's place instead (their comment says so): the
    paper's definition decides, and the plain loops above.
    """
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = filled(Usual(inplace=False))
    x = inputs()
    theirs_net = copy.deepcopy(net)
    with AblationCAM(theirs_net, [theirs_net.relu3], batch_size=4) as cam:
        theirs = cam(x.clone(), [ClassifierOutputTarget(2)] * 3)
    found = asked(loaded(net), x, "ablation-cam", 2, layer="relu3")[:, 0]
    scaled = scale_cam_image(np.maximum(found, 0), (SIZE, SIZE))
    assert theirs.max() > 0.9
    assert apart(scale_cam_image(scaled), theirs) < 1e-4


def test_ablation_agrees_with_captum() -> None:
    """Feature ablation at the layer, one feature per channel, is the drop: y times the slope, at every place."""
    from captum.attr import LayerFeatureAblation

    net = filled(Usual(inplace=False))
    x = inputs()
    features = torch.arange(12).reshape(1, 12, 1, 1).expand(1, 12, 12, 12)
    drops = LayerFeatureAblation(net, net.conv2).attribute(x, target=2, layer_mask=features)[:, :, 0, 0].double()
    with torch.no_grad():
        maps = net.conv2(net.pool(net.relu1(net.bn1(net.conv1(x))))).double()
        y = net(x)[:, 2].double()
    expected = torch.einsum("nk,nkhw->nhw", drops / y[:, None], maps)
    assert apart(asked(loaded(net), x, "ablation-cam", 2)[:, 0], expected) < 1e-4


def test_ablation_of_dead_channels_takes_no_pass() -> None:
    net = filled(Spied())
    with torch.no_grad():
        net.conv1.weight[1:3] = 0
        net.conv1.bias[1:3] = 0
    model, x = loaded(net), inputs(1)
    net.between.batches.clear()
    net.before.batches.clear()
    found = asked(model, x, "ablation-cam", 0, layer="conv1")
    # The engine's own pass, the maps (which stop at the layer), the recording one; then nothing missing + two channels.
    assert net.between.batches == [1, 1, 3]
    assert net.before.batches == [1, 1, 1]
    assert apart(found[:, 0], brute_ablation(net, net.conv1, x, 0)) < TINY


def test_ablation_of_a_score_of_nought() -> None:
    """There is nothing to divide by, and the drop itself stands."""
    net = filled(Pooled())
    with torch.no_grad():
        net.fc.weight[0] = 0
        net.fc.bias[0] = 0
    model = loaded(net)
    assert np.array_equal(asked(model, inputs(1), "ablation-cam", 0, layer="conv"), np.zeros((1, 1, 22, 22)))


# --- score-cam -------------------------------------------------------------------------------------------------------


def brute_score(net: nn.Module, maps: Tensor, x: Tensor, target: int) -> np.ndarray:
    """Algorithm 1 of the paper in plain loops."""
    expected = []
    for n in range(len(x)):
        base = logits(net, torch.zeros_like(x[:1]))[0, target].double()
        increases = []
        for a in maps[n]:
            up = F.interpolate(a[None, None], x.shape[2:], mode="bilinear")
            low, high = up.min(), up.max()
            # Asked of the map itself: enlarging a constant rounds, and its noise would become a mask.
            h = (up - low) / (high - low) if a.max() > a.min() else torch.zeros_like(up)
            increases.append(logits(net, x[n : n + 1] * h)[0, target].double() - base)
        alpha = torch.stack(increases).exp() / torch.stack(increases).exp().sum()
        expected.append((alpha[:, None, None] * maps[n].double()).sum(0).numpy())
    return np.stack(expected)


@pytest.mark.parametrize("layer", ["conv1", "relu1", "conv2", "relu3"])
def test_score_in_plain_loops(layer: str) -> None:
    net = filled(Usual(inplace=False))
    x = inputs()
    kept: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(out.clone()))
    logits(net, x)
    handle.remove()
    found = asked(loaded(net), x, "score-cam", [[3, 0]] * 3, layer=layer)
    for position, target in enumerate((3, 0)):
        assert apart(found[:, position], brute_score(net, kept[0], x, target)) < TINY


def test_score_agrees_with_pytorch_grad_cam_and_torchcam() -> None:
    """Where the layer is as large as the picture; elsewhere algorithm 1 and the authors' program decide.

    pytorch-grad-cam enlarges with the corners aligned, and torchcam brings maps to [0, 1] before it enlarges them, so
    that interpolated masks do not reach 1; neither is the paper's order and the authors' interpolation.
    """
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = filled(Usual(inplace=False))
    x = inputs()
    found = asked(loaded(net), x, "score-cam", 3, layer="relu1")[:, 0]
    scaled = scale_cam_image(np.maximum(found, 0))
    theirs_net = copy.deepcopy(net)
    with ScoreCAM(theirs_net, [theirs_net.relu1]) as cam:
        theirs = cam(x.clone(), [ClassifierOutputTarget(3)] * 3)
    assert theirs.max() > 0.9
    assert apart(scaled, theirs) < 1e-4

    torchcam = pytest.importorskip("torchcam.methods")
    theirs_net = copy.deepcopy(net)
    with torchcam.ScoreCAM(theirs_net, theirs_net.relu1) as cam, torch.no_grad():
        theirs_net(x)
        theirs = cam(3)[0].numpy()
    assert apart(scaled, theirs) < 1e-4


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_score_of_constant_maps_takes_no_pass(value: float) -> None:
    """They show nothing: an increase of exactly 0, which has its share in the softmax all the same."""
    net = filled(Spied())
    with torch.no_grad():
        net.conv1.weight[1:3] = 0
        net.conv1.bias[1:3] = value
    model, x = loaded(net), inputs(1)
    net.before.batches.clear()
    found = asked(model, x, "score-cam", 0, layer="conv1")
    assert net.before.batches[-1] == 3  # nothing of the picture, and two masks
    assert sum(net.before.batches[:-1]) == len(net.before.batches) - 1
    assert apart(found[:, 0], brute_score(net, logits(net.conv1, x), x, 0)) < TINY


def test_score_where_every_map_is_constant() -> None:
    net = filled(Pooled())
    with torch.no_grad():
        net.conv.weight.zero_()
    found = asked(loaded(net), inputs(2), "score-cam", 0, layer="conv")
    assert apart(found, np.full((2, 1, 22, 22), float(net.conv.bias.detach().mean()))) < TINY


# --- occlusion -------------------------------------------------------------------------------------------------------

WINDOWS: list[tuple[Any, Any]] = [(5, 3), (4, 4), (24, 1), ((3, 7), (2, 5)), (1, 1), ((24, 6), (24, 6)), (7, 6)]


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
@pytest.mark.parametrize("fill", [0.0, 0.4])
def test_occlusion_agrees_with_captum(window: Any, stride: Any, fill: float) -> None:
    """Windows that stick out at the end, and those that leave no room to move, included."""
    from captum.attr import Occlusion

    net = filled(Usual())
    x = inputs(2)
    found = asked(loaded(net), x, "occlusion", [[0, 3]] * 2, window=window, stride=stride, fill=fill)
    windows = (window,) * 2 if isinstance(window, int) else window
    strides = (stride,) * 2 if isinstance(stride, int) else stride
    for position, target in enumerate((0, 3)):
        theirs = Occlusion(net).attribute(
            x,
            sliding_window_shapes=(3, *windows),
            strides=(3, *strides),
            target=target,
            baselines=fill,
            perturbations_per_eval=16,
        )
        assert apart(found[:, position], theirs[:, 0]) < 1e-4


def test_occlusion_of_lite0_agrees_with_captum(lite0: Model, photos: list[str]) -> None:
    from captum.attr import Occlusion

    from convscope.images.loading import ImageBatchLoader

    x = next(ImageBatchLoader(photos[3], lite0.preprocessing).batches(1)).x
    found = asked(lite0, x, "occlusion", 387, window=64, stride=60)
    theirs = Occlusion(lite0.module).attribute(
        x, sliding_window_shapes=(3, 64, 64), strides=(3, 60, 60), target=387, perturbations_per_eval=8
    )
    assert apart(found[:, 0], theirs[:, 0]) < 1e-4


@pytest.mark.parametrize("sides", [(12,), (9, 11), (5, 6, 4)])
def test_occlusion_of_a_linear_network(sides: tuple[int, ...]) -> None:
    """A window of one pixel hides what this pixel adds: w (x - fill), for signals, pictures and volumes."""
    net = filled(Linear(2, *sides))
    x = torch.randn((2, 2, *sides), generator=torch.Generator().manual_seed(3))
    question = posed(net, x, [1, 2])
    found = perturbation.occlusion(question, window=1, stride=1, fill=0.25)
    for position, target in enumerate((1, 2)):
        expected = (worth(net, target, x[0]) * (x.double().numpy() - 0.25)).sum(1)
        assert apart(found[:, position], expected) < TINY
    own = perturbation.occlusion(question, window=1, stride=1, fill="average")
    mean = x.double().mean(tuple(range(2, x.ndim)), keepdim=True).numpy()
    assert apart(own[:, 0], (worth(net, 1, x[0]) * (x.double().numpy() - mean)).sum(1)) < TINY


def worth(net: nn.Module, target: int, x: Tensor) -> np.ndarray:
    """What each value of the input is worth to the target of a `Linear`, its mixing convolution included."""
    (gradient,) = torch.autograd.grad(net(one := x[None].clone().requires_grad_())[0, target], one)
    return gradient[0].double().numpy()


def posed(net: nn.Module, x: Tensor, targets: list[int], size: int = 7, layer: Any = None) -> Any:
    """A question as the engine poses it, for inputs that pictures cannot be."""
    from convscope.attribution.context import MethodContext
    from convscope.attribution.targets import BatchTargets
    from convscope.engine.capture import ForwardResult

    class Stub:
        fixed_batch = None
        head = None
        owned = False
        layers = LayerTable([])

    def run(many: Tensor) -> ForwardResult:
        assert len(many) <= size
        out = net(many)
        return ForwardResult({}, out, out)

    chosen = BatchTargets(torch.tensor([targets] * len(x)))
    stub: Any = Stub()
    return MethodContext(stub, x, chosen, run, size, 0, lambda share: None, layer)


def test_defaults_of_occlusion_follow_the_picture() -> None:
    model, x = loaded(filled(Usual())), inputs(1)
    given = asked(model, x, "occlusion", window=4, stride=2, fill=0.0)
    assert np.array_equal(asked(model, x, "occlusion"), given)  # a seventh of 24, and half of it


# --- rise ------------------------------------------------------------------------------------------------------------


def expected_products(side: int, cells: int) -> np.ndarray:
    """E[sum over cells c of u_c(a) u_c(b)] of two pixels a, b of one axis, the mean over all shifts, written out."""
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
    net, keep, cells = filled(Linear(2, *sides)), 0.3, 3
    x = torch.randn((1, 2, *sides), generator=torch.Generator().manual_seed(3))
    v = (worth(net, 1, x[0]) * x[0].double().numpy()).sum(0)
    b = float(net.fc.bias[1].detach())
    overlap = [expected_products(side, cells).sum(2) for side in sides]
    letters = "abc"[: len(sides)], "xyz"[: len(sides)]
    terms = ",".join(a + x for a, x in zip(*letters, strict=True))
    through = np.einsum(f"{letters[1]},{terms}->{letters[0]}", v, *overlap)
    expected = b + keep * v.sum() + (1 - keep) * through
    found, more = perturbation.rise(posed(net, x, [1], size=500), samples=20000, cells=cells, keep=keep, tolerance=0.0)
    error = more["standard_error"][0, 0].numpy()
    off = np.abs(found[0, 0].numpy() - expected) / error
    assert 0 < error.max() < 0.05 * np.ptp(expected)
    assert off.max() < 4.5  # standard errors, over 48 correlated pixels
    assert more["samples"].tolist() == [[20000.0]]


def test_standard_error_is_the_spread_of_repeated_runs() -> None:
    net = filled(Linear(2, 8, 6))
    x = torch.randn((1, 2, 8, 6), generator=torch.Generator().manual_seed(3))
    runs, errors = [], []
    for seed in range(60):
        question = posed(net, x, [1], size=200)
        question = type(question)(**{**vars(question), "seed": seed})
        found, more = perturbation.rise(question, samples=200, cells=3, tolerance=0.0)
        runs.append(found[0, 0].double())
        errors.append(more["standard_error"][0, 0].double())
    spread = torch.stack(runs).std(0)
    ratio = (torch.stack(errors).mean(0) / spread).numpy()
    assert 0.8 < np.median(ratio) < 1.25  # sixty runs tell a spread to 9 % per pixel
    assert 0.6 < ratio.min() < ratio.max() < 1.7


def test_rise_in_plain_loops() -> None:
    """The masks are those that the generator gives, enlarged and shifted one by one, as the authors do."""
    net = filled(Usual())
    x = inputs(2)
    found = asked(loaded(net), x, "rise", [[0, 2]] * 2, samples=150, cells=5, keep=0.4, tolerance=0.0)
    draw = torch.Generator().manual_seed(0)
    masks = []
    for count in (100, 50):
        grids = (torch.rand((count, 5, 5), generator=draw) < 0.4).float()
        rows, columns = (torch.randint(5, (count,), generator=draw) for _ in range(2))
        for grid, row, column in zip(grids, rows, columns, strict=True):
            up = F.interpolate(grid[None, None], (30, 30), mode="bilinear")[0, 0]
            masks.append(up[row : row + SIZE, column : column + SIZE])
    expected = torch.zeros(2, 2, SIZE, SIZE, dtype=torch.float64)
    for mask in masks:
        scores = logits(net, x * mask)[:, [0, 2]].double()
        expected += scores[..., None, None] * mask.double() / 150 / 0.4
    assert apart(found, expected) < TINY


def test_rise_of_probabilities() -> None:
    net = filled(Usual())
    model, x = loaded(net), inputs(1)
    options = {"samples": 50, "cells": 4, "tolerance": 0.0}
    found = asked(model, x, "rise", [[0, 1, 2, 3, 4]], probability=True, **options)

    class Likely(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).softmax(1) * 1.0  # not known as a head

    assert apart(found, asked(loaded(Likely()), x, "rise", [[0, 1, 2, 3, 4]], **options)) < TINY
    whole = asked(model, x, "rise", lambda out: torch.ones(len(out)), **options)
    assert apart(found.sum(1, keepdims=True), whole) < TINY  # the sum of all probabilities is 1
    against = asked(model, x, "rise", 0, against=3, probability=True, **options)
    assert apart(against[:, 0], found[:, 0] - found[:, 3]) < TINY


def test_rise_stops_when_it_knows_enough() -> None:
    model, x = loaded(filled(Usual())), inputs(2)

    def told(tolerance: float, targets: Any = ((0, 1, 2),) * 2) -> convscope.Heatmaps:
        return convscope.heatmaps(
            model, x, [list(t) for t in targets], method="rise", samples=2000, cells=3, tolerance=tolerance
        )

    never, loose, tight = told(0.0), told(0.5), told(0.35)
    assert never.extras["samples"].tolist() == [[2000.0] * 3] * 2
    assert np.all(tight.extras["samples"] < 2000)
    assert np.all(tight.extras["samples"] % 100 == 0)
    assert np.all(loose.extras["samples"] <= tight.extras["samples"])
    assert (loose.extras["samples"] < tight.extras["samples"]).any()
    assert len(set(tight.extras["samples"].flatten().tolist())) > 1  # each target has its own end
    for found, tolerance in ((loose, 0.5), (tight, 0.35)):
        error, span = found.extras["standard_error"], np.ptp(found.values, axis=(2, 3))
        assert error.shape == found.values.shape
        assert np.all(error.max((2, 3)) <= tolerance * span * (1 + TINY))
    # A target's end does not depend on the others'.
    for t in range(3):
        alone = told(0.35, ((t,),) * 2)
        assert np.array_equal(alone.extras["samples"][:, 0], tight.extras["samples"][:, t])
        assert apart(alone.values[:, 0], tight.values[:, t]) < TINY


def test_rise_of_a_single_mask_knows_no_error() -> None:
    found = convscope.heatmaps(loaded(filled(Usual())), inputs(1), 0, method="rise", samples=1, cells=3)
    assert np.isfinite(found.values).all()
    assert np.isnan(found.extras["standard_error"]).all()


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_neighbours_and_other_targets_change_nothing(method: str) -> None:
    model, x = loaded(filled(Usual())), inputs()
    options = METHODS[method]
    three = asked(model, x, method, [[1, 4]] * 3, **options)
    again = asked(model, x, method, [[1, 4]] * 3, **options)
    turned = asked(model, x[[2, 0, 0]], method, [[1, 4]] * 3, **options)
    assert three.shape[:2] == (3, 2)
    assert np.array_equal(three, again)
    assert np.array_equal(turned, three[[2, 0, 0]])
    for n in range(3):
        alone = asked(model, x[n : n + 1], method, [[1, 4]], **options)
        assert apart(alone, three[n : n + 1]) < TINY
    for t, target in enumerate((1, 4)):
        assert apart(asked(model, x, method, target, **options)[:, 0], three[:, t]) < TINY
    assert apart(three[:, 0], three[:, 1]) > 0.01
    assert apart(three[0], three[1]) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_memory_changes_nothing_but_rounding(method: str) -> None:
    model, x = loaded(filled(Usual())), inputs(2)
    options = METHODS[method]
    assert apart(asked(model, x, method, memory=1, **options), asked(model, x, method, **options)) < 5e-5


@pytest.mark.parametrize("method", METHODS)
def test_memory_bounds_what_is_held_at_once(method: str) -> None:
    """Passes are as large as memory allows, never larger; more masks or windows make more of them, no larger ones."""
    net = filled(Spied())
    model, x = loaded(net), inputs(2)
    more = {"rise": {"samples": 400}, "occlusion": {"stride": 1}}.get(method, {})
    place = {"layer": "conv1"} if method in AT_LAYER else {}
    for options in ({}, more):
        net.between.batches.clear()
        asked(model, x, method, 0, memory=ROOM * model.layers[-1].bytes, **{**METHODS[method], **place, **options})
        assert max(net.between.batches) == 3


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_serves_all_targets(method: str) -> None:
    net = filled(Spied())
    model, x = loaded(net), inputs(1)
    options = {**METHODS[method], **({"layer": "conv1"} if method in AT_LAYER else {})}
    counts = []
    for targets in ([[0]], [[0, 1, 2, 3, 4]]):
        net.between.batches.clear()
        asked(model, x, method, targets, **options)
        counts.append(sum(net.between.batches))
    assert counts[0] == counts[1]
    assert not any(net.between.modes)


@pytest.mark.parametrize("method", METHODS)
def test_seed(method: str) -> None:
    model, x = loaded(filled(Usual())), inputs(1)
    one, other = (asked(model, x, method, seed=seed, **METHODS[method]) for seed in (0, 1))
    assert np.array_equal(one, other) == (method != "rise")


@pytest.mark.parametrize("method", METHODS)
def test_contrast_is_the_difference_of_scores(method: str) -> None:
    """Occlusion and RISE are linear in the score; the others are not, and have to be asked of the difference itself."""
    model, x = loaded(filled(Usual())), inputs(2)
    options = METHODS[method]
    found = asked(model, x, method, 1, against=3, **options)[:, 0]
    function = asked(model, x, method, lambda out: out[:, 1] - out[:, 3], **options)[:, 0]
    assert apart(found, function) < TINY
    if method not in AT_LAYER:
        both = asked(model, x, method, [[1, 3]] * 2, **options)
        assert apart(found, both[:, 0] - both[:, 1]) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method: str) -> None:
    net = filled(Usual())
    _kept = lived_in(net)
    model, x = loaded(net), inputs(2)
    given, before = x.clone(), snapshot(net)
    asked(model, x, method, **METHODS[method])
    assert changes(before, snapshot(net)) == []
    assert torch.equal(x, given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [1, 3])
def test_cancelling_ends_the_work_and_leaves_nothing(method: str, after: int) -> None:
    class Cancelled(Exception):
        pass

    net = filled(Usual())
    model, x = loaded(net), inputs(2)
    before = snapshot(net)
    told: list[float] = []

    def progress(done: float, count: int) -> None:
        told.append(done / count)
        if len(told) == after:
            raise Cancelled

    with pytest.raises(Cancelled):
        asked(model, x, method, progress=progress, memory=1, **METHODS[method])
    assert len(told) == after
    assert changes(before, snapshot(net)) == []


@pytest.mark.parametrize("method", METHODS)
def test_progress_rises_to_all(method: str) -> None:
    told: list[float] = []
    model, x = loaded(filled(Usual())), inputs(2)
    memory = ROOM * model.layers[-1].bytes

    def progress(done: float, count: int) -> None:
        told.append(done / count)

    asked(model, x, method, progress=progress, memory=memory, **METHODS[method])
    assert told == sorted(told)
    assert len(told) > 4
    assert 0 < told[0] < 0.5
    assert told[-1] == pytest.approx(1)


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
    ("occlusion", {"window": 5, "stride": 6}, "stride 6 is longer than the window, 5"),
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
def test_bad_options_are_refused_before_the_work(method: str, options: dict[str, Any], message: str) -> None:
    net = filled(Spied())
    model = loaded(net)
    net.before.batches.clear()
    with pytest.raises(ConvscopeError, match=message) as caught:
        convscope.heatmaps(model, inputs(1), 0, method=method, **options)
    assert "\n" not in str(caught.value)
    # What depends on the input's size is found behind the pass that says what the classes score; all else before it.
    depends = any(words in message for words in ("larger than", "longer than", "or 2"))
    assert sum(net.before.batches) == depends


def test_probability_of_a_function_is_refused() -> None:
    function: Callable[[Tensor], Tensor] = lambda out: out[:, 0]  # noqa: E731
    with pytest.raises(ConvscopeError, match="a function of the network's output has no probability"):
        asked(loaded(filled(Usual())), inputs(1), "rise", function, probability=True)


@pytest.mark.parametrize("method", ["score-cam", "ablation-cam"])
def test_tokens_on_a_grid(method: str) -> None:
    """A layer of a transformer: maps of its channels over the grid."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=7
    ).eval()
    found = asked(loaded(net, 32), inputs(1, 32), method, 3, layer="blocks.1.norm1")
    assert found.shape == (1, 1, 4, 4)
    assert np.ptp(found) > 0
