"""The number of passes, fusion of layers, averaging of views, and what methods are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import Model
from convscope.attribution.context import LayerContext, MethodContext
from convscope.attribution.registry import METHODS, CamMethod, ModelMethod
from tests.attribution.helpers import (
    SIZE,
    heatmap_values,
    heatmaps_by_specs,
    load_module,
    random_images,
    relative_error,
)
from tests.oracles.nets import SmallConvNet, UnusedBranchNet, randomized

TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order
BATCHES = 1e-5  # rounding differs between batch sizes
CAMS = [name for name, m in METHODS.items() if isinstance(m, CamMethod) and not m.needs_boxes]
ANYWHERE = [name for name in CAMS if name != "cam"]


class Counted(SmallConvNet):
    """Count forward passes, and backward passes through the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards, self.backwards = [], 0
        outer = self

        class CountBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Tensor:
                outer.backwards += 1
                return gradients[0]

        self.count_backward = CountBackward

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(len(x))
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.conv2(x))
        x = self.count_backward.apply(self.bn3(self.conv3(x)))
        return self.fc(self.relu3(x).mean((2, 3)))


@pytest.fixture
def counted() -> tuple[Model, Counted]:
    net = Counted()
    model = load_module(randomized(net))
    net.forwards.clear()
    return model, net


@pytest.fixture(scope="module")
def small_model() -> Model:
    return load_module(randomized(SmallConvNet()))


# --- no wasted work --------------------------------------------------------------------------------------------------


def test_all_methods_at_all_layers_in_one_pass(counted: tuple[Model, Counted]) -> None:
    """One forward pass, one backward pass for the targets' scores, and one for the contrasts of finer-cam."""
    model, net = counted
    specs = [(method, layer) for layer in ("relu1", "conv2", "conv3") for method in ANYWHERE]
    specs += [("grad-cam", ["conv1", "conv3"])]
    actual = heatmaps_by_specs(model, random_images(), [[0, 1, 2]] * 3, *specs)
    assert net.forwards == [3]
    assert net.backwards == 2
    for result, (method, layer) in zip(actual, specs, strict=True):
        single = convscope.heatmaps(model, random_images(), [[0, 1, 2]] * 3, method=method, layer=layer)
        assert relative_error(result.values, single.values) < TINY
        assert (result.method, result.layer) == (single.method, single.layer)
        assert np.array_equal(result.logits, single.logits)
        assert result.settings == single.settings


def test_all_targets_share_one_backward_pass(counted: tuple[Model, Counted]) -> None:
    model, net = counted
    heatmap_values(model, random_images(), [[0, 1, 2, 3, 4]] * 3, layer="conv1")
    assert (net.forwards, net.backwards) == ([3], 1)
    heatmap_values(model, random_images(), layer="relu3")
    assert (net.forwards, net.backwards) == ([3, 3], 1)  # the counted operation comes before the layer


def test_little_memory_processes_targets_and_images_one_by_one(counted: tuple[Model, Counted]) -> None:
    model, net = counted
    for method in ANYWHERE:
        full = heatmap_values(model, random_images(), [[0, 1, 2]] * 3, method=method, layer="relu2")
        net.forwards.clear()
        net.backwards = 0
        parts = heatmap_values(model, random_images(), [[0, 1, 2]] * 3, method=method, layer="relu2", memory=1)
        expected = 0 if method == "eigen-cam" else 9  # it needs no gradient
        assert (net.forwards, net.backwards) == ([1, 1, 1], expected)
        assert relative_error(parts, full) < BATCHES


@pytest.mark.parametrize("memory", [1 << 16, 1 << 18, 1 << 20])
def test_memory_changes_maps_by_rounding_only(small_model: Model, memory: int) -> None:
    full = heatmap_values(small_model, random_images(5), [[0, 1, 2, 3, 4]] * 5, layer="conv1")
    assert (
        relative_error(
            heatmap_values(small_model, random_images(5), [[0, 1, 2, 3, 4]] * 5, layer="conv1", memory=memory), full
        )
        < BATCHES
    )


def test_unbatchable_backward_processes_targets_one_by_one() -> None:
    """An operation that branches on its gradient's values cannot be batched over targets."""

    class BranchingRelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradients[0] * (x > 0) if bool((gradients[0] != 0).any()) else gradients[0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(BranchingRelu.apply(self.conv(x)).mean((2, 3)))

    model = load_module(randomized(Net()))
    together = heatmap_values(model, random_images(), [[0, 1, 4]] * 3, layer="conv")
    single = np.concatenate([heatmap_values(model, random_images(), t, layer="conv") for t in (0, 1, 4)], axis=1)
    assert np.array_equal(together, single)


@pytest.mark.parametrize("method", CAMS)
def test_maps_do_not_depend_on_the_batch(small_model: Model, method: str) -> None:
    layer = None if method == "cam" else "conv2"
    together = heatmap_values(small_model, random_images(), method=method, layer=layer)
    permuted = heatmap_values(small_model, random_images().flip(0), method=method, layer=layer)
    assert np.array_equal(together, permuted[::-1])
    for n in range(3):
        assert (
            relative_error(
                heatmap_values(small_model, random_images()[n : n + 1], method=method, layer=layer), together[n : n + 1]
            )
            < BATCHES
        )


# --- several layers --------------------------------------------------------------------------------------------------


def resize_linear(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Interpolate linearly along each axis, with half-pixel centres."""
    for axis, count in enumerate(size):
        have = values.shape[axis]
        at = (np.arange(count) + 0.5) * have / count - 0.5
        values = np.apply_along_axis(lambda line, at=at, n=have: np.interp(at, np.arange(n), line), axis, values)
    return values


FUSIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda stack: stack.mean(0),
    "max": lambda stack: stack.max(0),
    "product": lambda stack: np.maximum(stack, 0).prod(0) ** (1 / len(stack)),
}


@pytest.mark.parametrize("method", ["grad-cam", "layer-cam", "eigen-cam"])
@pytest.mark.parametrize("fuse", FUSIONS)
def test_fused_by_hand(small_model: Model, fuse: str, method: str) -> None:
    """Maps of 24 x 24 and 12 x 12, divided by their largest absolute values, upsampled to the finest, then fused."""
    layers = ["conv2", "conv1", "relu3"]
    parts = [
        heatmap_values(small_model, random_images(), [[0, 3]] * 3, layer=name, method=method).astype(np.float64)
        for name in layers
    ]
    expected = np.zeros((3, 2, 24, 24))
    for n, t in np.ndindex(3, 2):
        units = [part[n, t] / np.abs(part[n, t]).max() for part in parts]
        expected[n, t] = FUSIONS[fuse](np.stack([resize_linear(unit, (24, 24)) for unit in units]))
    actual = convscope.heatmaps(small_model, random_images(), [[0, 3]] * 3, layer=layers, method=method, fuse=fuse)
    assert actual.layer == "conv2 + conv1 + relu3"
    assert actual.settings["fuse"] == fuse
    # The root of a product is steep near 0.
    assert relative_error(actual.values, expected) < (1e-4 if fuse == "product" else BATCHES)


def test_single_layer_is_not_scaled(small_model: Model) -> None:
    single_layer = heatmap_values(small_model, random_images(), layer="conv2")
    for layers in (["conv2"], ("conv2", "conv2"), ["conv2#1", "conv2"]):
        actual = convscope.heatmaps(small_model, random_images(), layer=layers, fuse="product")
        assert actual.layer == "conv2"
        assert "fuse" not in actual.settings
        assert np.array_equal(actual.values, single_layer)


def test_fusion_with_a_layer_without_influence() -> None:
    model = load_module(randomized(UnusedBranchNet()))
    used = heatmap_values(model, random_images(), [[0, 1]] * 3, layer="used")
    actual = heatmap_values(model, random_images(), [[0, 1]] * 3, layer=["unused", "used"])
    assert relative_error(actual, used / np.abs(used).max((2, 3), keepdims=True) / 2) < TINY


# --- smoothing -------------------------------------------------------------------------------------------------------


def test_flips_by_hand() -> None:
    """The mirror image's target is the class of the image, whatever the mirror image's top class is."""
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5)))
    model, x = load_module(net), random_images(6)
    actual = convscope.heatmaps(model, x, smooth="flips", layer="0")
    assert actual.settings["smooth"] == "flips"
    plain = convscope.heatmaps(model, x, layer="0")
    assert np.array_equal(actual.targets, plain.targets)
    assert np.array_equal(actual.logits, plain.logits)
    assert not np.array_equal(convscope.predict(model, x.flip(-1), top=1).indices, plain.targets)
    other = heatmap_values(model, x.flip(-1), plain.targets, layer="0")
    assert relative_error(actual.values, (plain.values + other[..., ::-1]) / 2) < TINY


def test_flips_change_nothing_for_a_mirror_symmetric_network() -> None:
    net = randomized(SmallConvNet())
    with torch.no_grad():
        for conv in (net.conv1, net.conv2, net.conv3):
            conv.weight.add_(conv.weight.flip(-1).clone())
    model = load_module(net)
    for method in CAMS:
        assert (
            relative_error(
                heatmap_values(model, random_images(), method=method, smooth="flips"),
                heatmap_values(model, random_images(), method=method),
            )
            < 1e-4
        )


def test_noise_by_hand(small_model: Model) -> None:
    """The image and eight copies with noise of a tenth of its range; the same noise for every image."""
    x = random_images() * torch.tensor([1.0, 10, 0.1]).reshape(3, 1, 1, 1)
    generator = torch.Generator().manual_seed(5)
    plain = convscope.heatmaps(small_model, x, layer="conv2")
    total = plain.values.astype(np.float64)
    for _ in range(8):
        noise = torch.randn((3, SIZE, SIZE), generator=generator)
        copies = torch.stack([image + 0.1 * (image.max() - image.min()) * noise for image in x])
        total += heatmap_values(small_model, copies, plain.targets, layer="conv2")
    actual = convscope.heatmaps(small_model, x, smooth="noise", seed=5, layer="conv2")
    assert np.array_equal(actual.targets, plain.targets)
    assert relative_error(actual.values, total / 9) < BATCHES
    repeated = heatmap_values(small_model, x[[2, 0, 1]], smooth="noise", seed=5, layer="conv2")
    assert np.array_equal(repeated, actual.values[[2, 0, 1]])
    assert relative_error(heatmap_values(small_model, x, smooth="noise", seed=6, layer="conv2"), actual.values) > 0.01


# --- methods with their own passes -----------------------------------------------------------------------------------


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[MethodContext]:
    """Register two methods, one at a layer and one at the input, that record their contexts."""
    contexts: list[MethodContext] = []

    def at_layer(context: LayerContext, *, factor: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
        contexts.append(context)
        context.report_progress(0.5)
        mean = context.layer_activations().mean(1, keepdim=True).expand(-1, context.num_targets, -1, -1)
        return factor * mean, {"error": context.x.flatten(1).mean(1)}

    def at_input(context: MethodContext) -> Tensor:
        contexts.append(context)
        return context.x[:, :1].expand(-1, context.num_targets, -1, -1)

    monkeypatch.setitem(METHODS, "at-layer", ModelMethod(at_layer, at_input=False))
    monkeypatch.setitem(METHODS, "at-input", ModelMethod(at_input))
    return contexts


def test_method_context_and_output(small_model: Model, contexts: list[MethodContext]) -> None:
    actual = convscope.heatmaps(
        small_model, random_images(), [[0, 1]] * 3, method="at-layer", layer="conv2", factor=3.0, seed=4
    )
    mean = convscope.activations(small_model, random_images(), "conv2")["conv2"].mean(1, keepdims=True)
    assert relative_error(actual.values, np.repeat(3 * mean, 2, axis=1)) < TINY
    assert actual.settings["factor"] == 3.0
    assert relative_error(actual.extras["error"], random_images().flatten(1).mean(1)) < 1e-4
    assert relative_error(actual.arrays()["error"], actual.extras["error"]) == 0
    (context,) = contexts
    assert isinstance(context, LayerContext)
    assert (context.layer.name, context.seed, context.num_targets) == ("conv2", 4, 2)
    at_input = convscope.heatmaps(small_model, random_images(), [[0, 1]] * 3, method="at-input", smooth="flips")
    assert at_input.layer == "input"
    assert relative_error(at_input.values, random_images()[:, [0, 0]]) < TINY  # the mirror image's map is flipped back
    both = convscope.heatmaps(small_model, random_images(), method="at-layer", layer=["conv1", "conv2"])
    assert both.extras == {}  # extras belong to single layers
    assert [context.layer.name for context in contexts[-2:] if isinstance(context, LayerContext)] == ["conv1", "conv2"]


def test_mixed_methods_equal_separate_calls(small_model: Model, contexts: list[MethodContext]) -> None:
    specs = [("at-layer", "conv2"), ("grad-cam", "relu1"), ("at-input", None), ("finer-cam", "conv3")]
    for result, (method, layer) in zip(heatmaps_by_specs(small_model, random_images(), 1, *specs), specs, strict=True):
        assert (
            relative_error(result.values, heatmap_values(small_model, random_images(), 1, method=method, layer=layer))
            < TINY
        )
    assert len(contexts) == 4


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [None, "flips", "noise"])
def test_progress_increases_to_the_number_of_images(
    small_model: Model, contexts: list[MethodContext], smooth: str | None
) -> None:
    reported: list[tuple[float, int]] = []

    def record(done: float, full: int) -> None:
        reported.append((done, full))

    images = [np.zeros((9, 9, 3), np.uint8), "missing.png", np.full((9, 9, 3), 99, np.uint8)]
    specs = [("grad-cam", None), ("at-layer", ["conv1", "conv2"]), ("hirescam", "conv1")]
    heatmaps_by_specs(small_model, images, 0, *specs, smooth=smooth, progress=record, memory=1)
    done = [value for value, _ in reported]
    assert {full for _, full in reported} == {3}
    assert done == sorted(done)
    assert done[-1] == pytest.approx(3)
    assert len(set(done)) > 4
