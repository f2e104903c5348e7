"""What each place of a layer really sees: one pixel of the input after the other is changed, and the change followed.

Nothing is derived: the network runs once for every pixel. Two ways to change a pixel are needed. "nan" passes through
any operation that reads it, and through those that multiply it by 0; "bump" adds a large number, which only shows
where it has weight (and is lost where something saturates).
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
    way: str = "nan",
    laid: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict:
    """For each layer (name, or name#call): booleans, the output's axes then the input's: whether it sees a pixel.

    `size` is (H, W), (L,) or (D, H, W); for a layer (C, h, w) of pictures the result is (C, h, w, H, W). `laid` says
    how to make that of what else a layer gives. The module must be in float64 and give each picture a result of its
    own.
    """
    pixels = math.prod(size)
    x = torch.rand((1, channels, *size), dtype=torch.float64) + 0.5
    batch = x.repeat(pixels + 1, 1, *[1] * len(size))
    for pixel, place in enumerate(np.ndindex(*size)):
        batch[(pixel, slice(None), *place)] += float("nan") if way == "nan" else 1e3
    outputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def hook_of(name: str):
        def hook(_module, _args, output):
            calls[name] = calls.get(name, 0) + 1
            tensor = output if isinstance(output, Tensor) else next(iter(_values(output)))
            outputs[name if calls[name] == 1 else f"{name}#{calls[name]}"] = tensor.clone()

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in module.named_modules() if name]
    with torch.no_grad():
        module(batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name in names:
        output = laid[name](outputs[name]) if laid is not None else outputs[name]
        changed, plain = output[:-1], output[-1:]
        # Rounding depends on the place within the batch, so a difference in the last bits is none.
        differs = (changed.isnan() if way == "nan" else (changed - plain).abs() > 1e-9 * plain.abs()).numpy()
        found[name] = np.moveaxis(differs, 0, -1).reshape(*differs.shape[1:], *size)
    return found


def any_channel(seen_by_unit: np.ndarray) -> np.ndarray:
    """(h, w, H, W) from (C, h, w, H, W): what any of the channels sees."""
    return seen_by_unit.any(0)


def _values(output: object) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else list(output)  # type: ignore[attr-defined]
