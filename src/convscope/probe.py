"""One traced forward pass: which layers run in which order, what they give, and how far each of them sees.

Receptive fields are followed through every operation that really runs, branches, padding and functional calls
included, so they hold for graphs of any shape. A place of a tensor sees the pixels `index * jump + low` to
`index * jump + high` of the input, per axis; each operation changes these four numbers:

    convolution, pooling (kernel k, stride s, padding p, dilation d):
        jump' = jump s,   low' = low - p jump,   high' = high + ((k - 1) d - p) jump
    sums, concatenations: the union of what the inputs see

(for chains: Araujo, Norris, Sim, Computing Receptive Fields of Convolutional Neural Networks, Distill 2019)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from convscope.model import Dialect, Layer, LayerTable
from convscope.tap import first_tensor, observe


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a tensor: its dimension, and what index i along it sees of the input."""

    dim: int
    jump: float
    low: float
    high: float

    def windowed(self, kernel: float, stride: float, padding: float, dilation: float = 1) -> Axis:
        """Behind a window that slides along this axis."""
        reach = (kernel - 1) * dilation
        return dataclasses.replace(
            self,
            jump=self.jump * stride,
            low=self.low - padding * self.jump,
            high=self.high + (reach - padding) * self.jump,
        )


@dataclass(frozen=True)
class Field:
    """What a tensor sees of the input: `axes` (height, width) where it has them, `whole` if a global path joins in.

    `op` is the operation that made the tensor.
    """

    axes: tuple[Axis, Axis] | None
    whole: bool
    op: str = "input"

    def mapped(self, change: Callable[[int, Axis], Axis]) -> Field:
        if self.axes is None:
            return self
        return dataclasses.replace(self, axes=(change(0, self.axes[0]), change(1, self.axes[1])))


@dataclass(frozen=True)
class Probed:
    """The layer table, the number of outputs and the activation that ends the network."""

    layers: LayerTable
    outputs: int | None
    head: str | None


def probe(module: nn.Module, dialect: Dialect, x: Tensor) -> Probed:
    """Run `x` (1, C, H, W) once, without gradients, and note every layer's output as it is done."""
    calls: dict[str, int] = {}
    rows: list[Layer] = []
    made: dict[tuple[int, int], str] = {}
    keep: list[Tensor] = []  # alive, so that identities stay unique

    with _Trace(x) as trace:

        def note(name: str, layer: nn.Module, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            tensor = first_tensor(output)
            if tensor is None or tensor.ndim < 2:
                return
            keep.append(tensor)
            own = name if calls[name] == 1 else f"{name}#{calls[name]}"
            same_as = made.setdefault((id(tensor), tensor._version), own)
            field = trace.field(tensor)
            rows.append(_row(own, layer, tensor, field, None if same_as == own else same_as, trace.bytes, dialect))

        output = observe(module, dialect, x, note)
        final = first_tensor(output)
        head = trace.field(final).op.strip("_") if final is not None and final.ndim == 2 else ""
    return Probed(
        LayerTable(rows),
        None if final is None or final.ndim < 2 else final.shape[1],
        head if head in ("softmax", "log_softmax", "sigmoid") else None,
    )


def _row(
    name: str, layer: nn.Module, tensor: Tensor, field: Field, same_as: str | None, bytes_: int, dialect: Dialect
) -> Layer:
    axes = field.axes
    shape = tuple(tensor.shape[1:])
    last = axes is not None and tensor.ndim == 4 and (axes[0].dim, axes[1].dim) == (1, 2)
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
        has_space=axes is not None and tensor.ndim == 4 and shape[-1] * shape[-2] > 1,
        channels_last=last,
    )


def _size(axis: Axis) -> int:
    return math.ceil(axis.high - axis.low) + 1


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows fields through all operations on tensors that depend on the input."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        start = Field((Axis(2, 1, 0, 0), Axis(3, 1, 0, 0)), whole=False)
        self._fields: dict[int, tuple[Tensor, Field]] = {
            id(x): (x, start)
        }  # the tensor is kept, so its id stays its own
        self.bytes = 0

    def field(self, tensor: Tensor) -> Field:
        return self._fields[id(tensor)][1] if id(tensor) in self._fields else Field(None, whole=True, op="unknown")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [t for t in _tensors(args) if id(t) in self._fields]
        if inputs:
            name = func._schema.name.partition("::")[2].rstrip("_")
            fields = [self._fields[id(t)][1] for t in inputs]
            for tensor in _tensors(output):
                field = _follow(name, args, inputs, fields, tensor)
                self._fields[id(tensor)] = (tensor, dataclasses.replace(field, op=name))
                if not any(tensor.data_ptr() == t.data_ptr() for t in inputs):
                    self.bytes += tensor.numel() * tensor.element_size()
        return output


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple | list) else []


def _follow(name: str, args: Any, inputs: list[Tensor], fields: list[Field], output: Tensor) -> Field:
    """The field of one output of an operation."""
    x, field = inputs[0], fields[0]
    rule = RULES.get(name)
    if rule is not None and len(inputs) == 1:
        if rule in (_convolution, _pooling, _adaptive) and field.axes is None and x.ndim == 4:
            field = dataclasses.replace(field, axes=(_anywhere(2), _anywhere(3)))  # such an input is a picture again
        return rule(field, x, args, output) if field.axes is not None else Field(None, whole=True)
    kept = [f for t, f in zip(inputs, fields, strict=True) if _keeps(t, f, output)]
    if not kept:
        return _unknown(field, x, output)
    whole = any(f.whole for f in fields) or len(kept) < len(fields)
    if name in WHOLE_NORMS or (name in BATCH_NORMS and _uses_batch(args)) or _mixes_places(name, args, kept[0], output):
        whole = True
    return Field(_union(kept), whole)


def _keeps(x: Tensor, field: Field, output: Tensor) -> bool:
    """Whether the output's places are this input's, one for one."""
    return (
        field.axes is not None
        and x.ndim == output.ndim
        and all(x.shape[a.dim] == output.shape[a.dim] for a in field.axes)
    )


def _union(fields: Sequence[Field]) -> tuple[Axis, Axis]:
    def widest(i: int) -> Axis:
        axes = [f.axes[i] for f in fields if f.axes is not None]
        return dataclasses.replace(
            axes[0],
            jump=max(a.jump for a in axes),
            low=min(a.low for a in axes),
            high=max(a.high for a in axes),
        )

    return widest(0), widest(1)


def _unknown(field: Field, x: Tensor, output: Tensor) -> Field:
    """An operation without a rule of its own: it may look anywhere; a picture stays a picture."""
    if field.axes is None or output.ndim != x.ndim or output.ndim != 4:
        return Field(None, whole=True)

    return dataclasses.replace(field.mapped(lambda _, axis: _anywhere(axis.dim)), whole=True)


def _anywhere(dim: int) -> Axis:
    return Axis(dim, 1, -math.inf, math.inf)


WHOLE_NORMS = frozenset({"native_group_norm"})
BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"})


def _uses_batch(args: Any) -> bool:
    return len(args) > 5 and args[5] is True


def _mixes_places(name: str, args: Any, field: Field, output: Tensor) -> bool:
    """A norm or softmax that runs along a spatial axis."""
    if field.axes is None:
        return False
    dims = {a.dim for a in field.axes}
    if name == "native_layer_norm":
        return bool(dims & set(range(output.ndim - len(args[1]), output.ndim)))
    return name in ("_softmax", "_log_softmax") and args[1] % output.ndim in dims


def _pair(value: Any, i: int) -> Any:
    return value if isinstance(value, int | float) else value[i] if len(value) > 1 else value[0]


def _convolution(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    _, weight, _, stride, padding, dilation, transposed = args[:7]

    def along(i: int, axis: Axis) -> Axis:
        k, s, p, d = weight.shape[2 + i], _pair(stride, i), _pair(padding, i), _pair(dilation, i)
        if not transposed:
            return axis.windowed(k, s, p, d)
        return dataclasses.replace(
            axis,
            jump=axis.jump / s,
            low=axis.low + (p - (k - 1) * d) / s * axis.jump,
            high=axis.high + p / s * axis.jump,
        )

    return field.mapped(along)


def _pooling(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    padding = args[3] if len(args) > 3 else 0
    dilation = args[4] if len(args) > 4 and not isinstance(args[4], bool) else 1
    return field.mapped(
        lambda i, a: a.windowed(_pair(kernel, i), _pair(stride, i), _pair(padding, i), _pair(dilation, i))
    )


def _adaptive(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    def along(_: int, axis: Axis) -> Axis:
        ratio = x.shape[axis.dim] / output.shape[axis.dim]
        kernel = ratio if ratio == int(ratio) else math.ceil(ratio) + 1
        return axis.windowed(kernel, ratio, 0)

    small = all(output.shape[a.dim] == 1 < x.shape[a.dim] for a in field.axes or ())
    return dataclasses.replace(field.mapped(along), whole=field.whole or small)


def _reduction(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    if field.axes is None:
        return field
    given = args[1] if len(args) > 1 and args[1] is not None else range(x.ndim)
    dims = {d % x.ndim for d in ([given] if isinstance(given, int) else given)}
    if dims & {a.dim for a in field.axes}:
        return Field(None, whole=True)
    if output.ndim == x.ndim:
        return field
    return field.mapped(lambda _, a: dataclasses.replace(a, dim=a.dim - sum(d < a.dim for d in dims)))


def _permute(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    order = [d % x.ndim for d in args[1]]
    return field.mapped(lambda _, a: dataclasses.replace(a, dim=order.index(a.dim)))


def _transpose(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    one, other = args[1] % x.ndim, args[2] % x.ndim
    swap = {one: other, other: one}
    return field.mapped(lambda _, a: dataclasses.replace(a, dim=swap.get(a.dim, a.dim)))


def _view(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    """Axes survive a reshape where they keep their length and what lies in front of them."""

    def place(dim: int) -> int | None:
        front = math.prod(x.shape[:dim])
        for new in range(output.ndim):
            if output.shape[new] == x.shape[dim] and math.prod(output.shape[:new]) == front:
                return new
        return None

    if field.axes is None:
        return field
    height, width = place(field.axes[0].dim), place(field.axes[1].dim)
    if height is None or width is None or height == width:
        return Field(None, whole=True)
    return dataclasses.replace(
        field,
        axes=(dataclasses.replace(field.axes[0], dim=height), dataclasses.replace(field.axes[1], dim=width)),
    )


def _pad(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    widths = args[1]

    def along(_: int, axis: Axis) -> Axis:
        pair = 2 * (x.ndim - 1 - axis.dim)
        before = widths[pair] if pair < len(widths) else 0
        return dataclasses.replace(axis, low=axis.low - before * axis.jump, high=axis.high - before * axis.jump)

    return field.mapped(along)


def _slice(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    dim = (args[1] if len(args) > 1 else 0) % x.ndim
    start = (args[2] if len(args) > 2 else 0) or 0
    step = args[4] if len(args) > 4 else 1

    def along(_: int, axis: Axis) -> Axis:
        if axis.dim != dim:
            return axis
        first = (start + x.shape[dim] if start < 0 else start) * axis.jump
        return dataclasses.replace(axis, jump=axis.jump * step, low=axis.low + first, high=axis.high + first)

    return field.mapped(along)


def _upsample(reach_before: float, reach_behind: float) -> Callable[[Field, Tensor, Any, Tensor], Field]:
    """Behind an enlargement each place sees its nearest place of the input, or for bilinear the one on either side."""

    def rule(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
        def along(_: int, axis: Axis) -> Axis:
            scale = output.shape[axis.dim] / x.shape[axis.dim]
            slack = (1 - 1 / scale) * axis.jump
            return dataclasses.replace(
                axis,
                jump=axis.jump / scale,
                low=axis.low - slack - reach_before * axis.jump / 2,
                high=axis.high + reach_behind * axis.jump,
            )

        return field.mapped(along)

    return rule


RULES: dict[str, Callable[[Field, Tensor, Any, Tensor], Field]] = {
    "convolution": _convolution,
    "max_pool2d": _pooling,
    "max_pool2d_with_indices": _pooling,
    "avg_pool2d": _pooling,
    "_adaptive_avg_pool2d": _adaptive,
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    "mean": _reduction,
    "sum": _reduction,
    "amax": _reduction,
    "max": _reduction,
    "var": _reduction,
    "linalg_vector_norm": _reduction,
    "permute": _permute,
    "transpose": _transpose,
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
    "unsqueeze": _view,
    "squeeze": _view,
    "constant_pad_nd": _pad,
    "reflection_pad2d": _pad,
    "replication_pad2d": _pad,
    "slice": _slice,
    "upsample_nearest2d": _upsample(0, 0),
    "upsample_bilinear2d": _upsample(1, 1),
}
