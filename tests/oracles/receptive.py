"""Receptive fields by brute force: every pixel of the input is changed in turn, and the change followed.

Nothing is derived: the network runs once per pixel. Pixels are changed in two ways. "nan" passes through every
operation that reads it, also through multiplications by 0; "bump" adds a large number, which shows only where it has
weight, and not where something saturates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn


def receptive_fields(
    module: nn.Module,
    names: list[str],
    size: tuple[int, ...],
    channels: int = 1,
    change: str = "nan",
    to_nchw: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, np.ndarray]:
    """Measure for each layer (name, or name#call) which pixels each of its values depends on.

    Parameters
    ----------
    module : torch.nn.Module
        In float64; images of a batch must be independent.
    names : list of str
    size : tuple of int
        (H, W), (L,) or (D, H, W) of the input.
    channels : int
        Channels of the input.
    change : {"nan", "bump"}
    to_nchw : mapping of callables, optional
        How a layer's output is brought to channels first.

    Returns
    -------
    dict of ndarray
        bool, the axes of the layer's output followed by those of the input: (C, h, w, H, W) for images.
    """
    num_pixels = math.prod(size)
    x = torch.rand((1, channels, *size), dtype=torch.float64) + 0.5
    batch = x.repeat(num_pixels + 1, 1, *[1] * len(size))
    for pixel, position in enumerate(np.ndindex(*size)):
        batch[(pixel, slice(None), *position)] += float("nan") if change == "nan" else 1e3
    outputs = _layer_outputs(module, batch)
    fields = {}
    for name in names:
        output = to_nchw[name](outputs[name]) if to_nchw is not None else outputs[name]
        changed, unchanged = output[:-1], output[-1:]
        # Rounding depends on the position within the batch: differences in the last bits do not count.
        differs = changed.isnan() if change == "nan" else (changed - unchanged).abs() > 1e-9 * unchanged.abs()
        fields[name] = np.moveaxis(differs.numpy(), 0, -1).reshape(*differs.shape[1:], *size)
    return fields


def any_channel(field: np.ndarray) -> np.ndarray:
    """Return which pixels any of the channels depends on: (h, w, H, W) from (C, h, w, H, W)."""
    return field.any(0)


def _layer_outputs(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of all layers, further calls of a layer under name#call."""
    outputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            tensor = output if isinstance(output, Tensor) else next(iter(_parts(output)))
            outputs[name if calls[name] == 1 else f"{name}#{calls[name]}"] = tensor.clone()

        return hook

    handles = [layer.register_forward_hook(make_hook(name)) for name, layer in module.named_modules() if name]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return outputs


def _parts(output: object) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else list(output)  # type: ignore[call-overload]
