"""One traced forward pass: which layers run in which order, what they give, and how far each of them sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.capture import run_with_callback
from convscope.engine.layer_table import Layer, LayerTable, Layout
from convscope.engine.nested import primary_tensor
from convscope.engine.receptive_field import Axes, Axis, Field
from convscope.engine.tracing import Trace
from convscope.errors import ConvscopeError


@dataclass(frozen=True)
class ProbeResult:
    """The layer table, the number of outputs, the activation that ends the network.

    `classes_last`: the network ends in maps of classes (N, H, W, K).
    """

    layers: LayerTable
    num_outputs: int | None
    final_activation: str | None
    channels_last_output: bool


def probe(module: nn.Module, dialect: FrameworkAdapter, x: Tensor) -> ProbeResult:
    """Run `x`, (1, C, H, W) or a signal or volume, once, without gradients; note every layer's output as it is done."""
    calls: dict[str, int] = {}
    rows: list[Layer] = []
    made: dict[tuple[int, int], str] = {}
    keep: list[Tensor] = []  # alive, so that identities stay unique

    with Trace(x) as trace:

        def note(name: str, layer: nn.Module, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            tensor = primary_tensor(output)
            if tensor is None or tensor.ndim < 2:
                return
            keep.append(tensor)
            own = name if calls[name] == 1 else f"{name}#{calls[name]}"
            version = 0 if tensor.is_inference() else tensor._version
            first = made.setdefault((id(tensor), version), own)
            same_as = None if first == own else first
            field = trace.field(tensor)
            rows.append(_row(own, layer, tensor, field, same_as, trace.bytes, dialect, x.ndim))
            if same_as is None:
                trace.mark(tensor, own)

        output = run_with_callback(module, dialect, x, note)
        final = primary_tensor(output)
        _require_scores(output, final)
        if final is None:
            return ProbeResult(LayerTable(rows), None, None, False)
        field = trace.field(final)
        layout, _ = _laid(final, field, x.ndim)
    head = field.op.strip("_")
    last = bool(layout.spatial_dims) and layout.channel_dim != 1
    return ProbeResult(
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
    name: str,
    layer: nn.Module,
    tensor: Tensor,
    field: Field,
    same_as: str | None,
    bytes_: int,
    dialect: FrameworkAdapter,
    image: int,
) -> Layer:
    layout, axes = _laid(tensor, field, image)
    shape = tuple(layout.to_nchw(tensor).shape[1:])
    known = len(axes) > 0 and all(math.isfinite(a.high - a.low) for a in axes)
    return Layer(
        name=name,
        kind=type(layer).__name__,
        shape=shape,
        receptive_field=tuple(_size(a) for a in axes) if known else None,
        stride=tuple(a.jump for a in axes) if known else None,
        origin=tuple(a.low for a in axes) if known else None,
        has_global_context=field.is_global or not known,
        parameters=sum(p.numel() for p in dialect.parameters(layer)),
        alias_of=same_as,
        bytes=bytes_,
        is_pooling="pool" in field.op or field.op == "mean",
        is_spatial=len(axes) > 0 and math.prod(shape[1:]) > 1,
        layout=layout,
        inputs=(same_as,) if same_as else tuple(sorted(field.ancestors)),
    )


def _laid(tensor: Tensor, field: Field, image: int) -> tuple[Layout, Axes]:
    """How an output lies, and its spatial axes, none where there is no extent; the input has `picture` dimensions."""
    plain, tokens = field.plain(tensor), field.tokens(tensor)
    dims = [] if plain is None or tensor.ndim != image else [a.dim for a in plain]
    if plain is not None and dims == list(range(2, image)):
        return Layout(1, tuple(dims)), plain
    if plain is not None and dims == list(range(1, image - 1)):
        return Layout(image - 1, tuple(dims)), plain
    if tokens is not None and tensor.ndim == 3 < image and tokens[0].dim == 1:
        return Layout(2, (1,), tuple(a.length for a in tokens), tokens[0].before), tokens
    return Layout(2 if tensor.ndim == 3 < image else 1), ()


def _size(axis: Axis) -> int:
    return math.floor(axis.high - axis.low + 1e-6) + 1
