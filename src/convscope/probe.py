"""One traced forward pass: which layers run in which order, what they give, and how far each of them sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convscope.errors import ConvscopeError
from convscope.fields import Axis, Field, Trace
from convscope.model import Dialect, Layer, LayerTable
from convscope.tap import first_tensor, observe


@dataclass(frozen=True)
class Probed:
    """The layer table, the number of outputs, the activation that ends the network.

    `classes_last`: the network ends in maps of classes (N, H, W, K).
    """

    layers: LayerTable
    outputs: int | None
    head: str | None
    classes_last: bool


def probe(module: nn.Module, dialect: Dialect, x: Tensor) -> Probed:
    """Run `x` (1, C, H, W) once, without gradients, and note every layer's output as it is done."""
    calls: dict[str, int] = {}
    rows: list[Layer] = []
    made: dict[tuple[int, int], str] = {}
    keep: list[Tensor] = []  # alive, so that identities stay unique

    with Trace(x) as trace:

        def note(name: str, layer: nn.Module, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            tensor = first_tensor(output)
            if tensor is None or tensor.ndim < 2:
                return
            keep.append(tensor)
            own = name if calls[name] == 1 else f"{name}#{calls[name]}"
            version = 0 if tensor.is_inference() else tensor._version
            same_as = made.setdefault((id(tensor), version), own)
            field = trace.field(tensor)
            rows.append(_row(own, layer, tensor, field, None if same_as == own else same_as, trace.bytes, dialect))

        output = observe(module, dialect, x, note)
        final = first_tensor(output)
        _require_scores(output, final)
        if final is None:
            return Probed(LayerTable(rows), None, None, False)
        field = trace.field(final)
        axes = field.plain(final) if final.ndim == 4 else None
    head = field.op.strip("_")
    last = axes is not None and (axes[0].dim, axes[1].dim) == (1, 2)
    return Probed(
        LayerTable(rows),
        final.shape[-1 if last else 1] if final.ndim > 1 else 1,
        head if head in ("softmax", "log_softmax", "sigmoid") else None,
        last,
    )


def _require_scores(output: Any, final: Tensor | None) -> None:
    """Refuse what does not say one thing of the one picture."""
    boxes = isinstance(output, list) and any(isinstance(part, Mapping) for part in output)
    if boxes or (final is not None and final.ndim > 0 and final.shape[0] != 1):
        raise ConvscopeError(
            "the network does not give each picture its scores; is it a detector? Then load its backbone: "
            "load(detector.backbone)"
        )


def _row(
    name: str, layer: nn.Module, tensor: Tensor, field: Field, same_as: str | None, bytes_: int, dialect: Dialect
) -> Layer:
    axes = field.plain(tensor)
    shape = tuple(tensor.shape[1:])
    place = None if axes is None or tensor.ndim != 4 else (axes[0].dim, axes[1].dim)
    last = place == (1, 2)
    if place != (2, 3) and not last:
        axes = None
    if last:
        shape = (shape[2], shape[0], shape[1])
    known = axes is not None and all(math.isfinite(a.high - a.low) for a in axes)
    return Layer(
        name=name,
        kind=type(layer).__name__,
        shape=shape,
        receptive_field=(_size(axes[0]), _size(axes[1])) if axes is not None and known else None,
        stride=(axes[0].jump, axes[1].jump) if axes is not None and known else None,
        origin=(axes[0].low, axes[1].low) if axes is not None and known else None,
        sees_all=field.whole or not known,
        parameters=sum(p.numel() for p in dialect.parameters(layer)),
        same_as=same_as,
        bytes=bytes_,
        pooled="pool" in field.op or field.op == "mean",
        has_space=axes is not None and shape[-1] * shape[-2] > 1,
        channels_last=last,
    )


def _size(axis: Axis) -> int:
    return math.floor(axis.high - axis.low + 1e-6) + 1
