"""Compare the receptive fields of a layer table with brute force; networks made of a function and named layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

import convscope
from convscope.engine.layer_table import Layer, LayerTable
from tests.oracles import receptive

SIZE = H, W = (25, 20)


def load_table(module: nn.Module, size: tuple[int, ...] = SIZE, channels: int = 1) -> LayerTable:
    return convscope.load(module, preprocessing={"size": size, "channels": channels}).layers


def positive(module: nn.Module) -> nn.Module:
    """Set positive weights, which keep every ReLU active and let no two changes cancel."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.2, 0.6)
    return module.double().eval()


def assert_bounds(layer: Layer, field: np.ndarray, *, slack: float = 0, cropped: bool = False) -> int:
    """Assert that a layer's receptive field bounds the measured `field` (h, w, H, W).

    No position may depend on pixels beyond its window. Where the window lies inside the image, its edges must be
    reached: at every position, or in half of them if the network has `cropped` the image. With `slack`, the largest
    measured extent must come within so many pixels of the window instead.

    Returns the number of positions that were compared exactly, over all axes.
    """
    assert layer.receptive_field is not None, f"{layer.name}: {layer}"
    num_exact = 0
    num_axes = len(layer.receptive_field)
    for axis in range(num_axes):
        others = tuple(other for other in range(2 * num_axes) if other % num_axes != axis)
        depends = field.any(others)  # (positions, pixels)
        size, stride, origin = layer.receptive_field[axis], layer.stride[axis], layer.origin[axis]
        widest, exact = 0, []
        for position, mask in enumerate(depends):
            (pixels,) = np.nonzero(mask)
            first, last = origin + position * stride, origin + position * stride + size - 1
            if len(pixels):
                assert pixels[0] >= first - 1e-6, (layer.name, axis, position)
                limit = last + 1 - 1e-6 if slack else last + 1e-6
                assert pixels[-1] <= limit, (layer.name, axis, position)
                widest = max(widest, pixels[-1] - pixels[0] + 1)
            if first >= 0 and last < depends.shape[1]:
                exact.append(len(pixels) > 0 and (pixels[0], pixels[-1]) == (first, last))
        if slack:
            assert widest >= size - slack, (layer.name, axis)
        elif cropped:
            assert sum(exact) >= len(exact) / 2, (layer.name, axis, exact)
        else:
            assert all(exact), (layer.name, axis, exact)
        num_exact += sum(exact)
    return num_exact


def check_receptive_fields(
    module: nn.Module,
    size: tuple[int, ...] = SIZE,
    *,
    slack: float = 0,
    change: str = "nan",
    channels: int = 1,
    cropped: bool = False,
) -> LayerTable:
    """Compare every spatial layer with brute force, at least one position of them exactly; return the table."""
    table = load_table(positive(module), size, channels)
    layers = [layer for layer in table if layer.is_spatial and layer.receptive_field is not None]
    to_nchw = {layer.name: layer.to_nchw for layer in layers}
    fields = receptive.receptive_fields(module, list(to_nchw), size, channels, change, to_nchw)
    num_exact = 0
    for layer in layers:
        field = receptive.any_channel(fields[layer.name])
        num_exact += assert_bounds(layer, field, slack=slack, cropped=cropped)
    assert num_exact or slack
    return table


class FunctionNet(nn.Module):
    """Named layers and the function that calls them."""

    def __init__(self, run: Callable[[FunctionNet, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.end = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.run(self, x))


def conv(kernel: int = 3, channels: int = 1, **options: int) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(channels, channels, kernel, **options)
