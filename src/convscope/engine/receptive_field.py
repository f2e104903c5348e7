"""How far a tensor sees: receptive fields, followed through every operation of a forward pass.

Branches, padding and functional calls are included, so this holds for graphs of any shape. A place of a tensor sees the
pixels `index * jump + low` to `index * jump + high` of the input, per axis; each operation changes these four numbers:

    convolution, pooling (kernel k, stride s, padding p, dilation d):
        jump' = jump s,   low' = low - p jump,   high' = high + ((k - 1) d - p) jump
    sums, concatenations: the union of what the inputs see

(For chains: Araujo, Norris, Sim, Computing Receptive Fields of Convolutional Neural Networks, Distill 2019.)

The four numbers bound what is seen at every place; where neighbouring places see windows of different size (behind an
enlargement, say) the bound is not always reached. Padding that mirrors or repeats the border counts as if the picture
went on. Whatever is not known here counts as seeing the whole picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Axes = tuple["Axis", ...]


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a tensor: where it lies, and what index i along it sees of the input.

    Position p of the tensor's dimension `dim` has index `(p - before) // inner % length`: an axis that a reshape has
    merged with others into one dimension is still followed, also behind `before` positions that belong to no place (the
    class token of a transformer, say).
    """

    dim: int
    length: int
    jump: float = 1
    low: float = 0
    high: float = 0
    inner: int = 1
    before: int = 0

    def plain(self, size: int) -> Axis | None:
        """The same as an axis that has its dimension, of `size`, for itself; None if it shares it with another."""
        if self.before or self.inner * self.length != size:
            return None
        jump = self.jump / self.inner
        return dataclasses.replace(self, length=size, inner=1, jump=jump, low=self.low - self.jump + jump)

    def windowed_op(self, kernel: float, stride: float, padding: float, dilation: float = 1) -> Axis:
        """Behind a window that slides along this axis."""
        reach = (kernel - 1) * dilation
        return self.strided(stride, -padding, reach - padding)

    def strided(self, ratio: float, first: float, last: float) -> Axis:
        """Behind an operation whose place i looks at places `i * ratio + first` to `i * ratio + last` of this axis."""
        return dataclasses.replace(
            self,
            jump=self.jump * ratio,
            low=self.low + first * self.jump,
            high=self.high + last * self.jump,
        )


@dataclass(frozen=True)
class Field:
    """What a tensor sees of the input: its spatial `axes` where it has them, `whole` if a global path joins in.

    The axes are in the input's own order: (length,), (height, width) or (depth, height, width).
    `op` is the operation that made the tensor, `made_of` the tensors that it goes back to, of those that are marked.
    """

    axes: Axes | None
    is_global: bool
    op: str = "input"
    ancestors: frozenset[str] = frozenset()

    def mapped(self, change: Callable[[Axis], Axis]) -> Field:
        """With `change` applied to all axes."""
        if self.axes is None:
            return self
        return dataclasses.replace(self, axes=tuple(change(axis) for axis in self.axes))

    def plain(self, tensor: Tensor) -> Axes | None:
        """The axes, if each has a dimension of the tensor for itself."""
        if self.axes is None:
            return None
        axes = tuple(plain for axis in self.axes if (plain := axis.plain(tensor.shape[axis.dim])) is not None)
        return axes if len({axis.dim for axis in axes}) == len(self.axes) else None

    def tokens(self, tensor: Tensor) -> Axes | None:
        """The axes, if all places follow each other along one dimension of the tensor, row by row, up to its end."""
        if self.axes is None or len({(axis.dim, axis.before) for axis in self.axes}) != 1:
            return None
        inner = 1
        for axis in reversed(self.axes):
            if axis.inner != inner:
                return None
            inner *= axis.length
        return self.axes if self.axes[0].before + inner == tensor.shape[self.axes[0].dim] else None


UNKNOWN = Field(None, is_global=True, op="unknown")


def propagate(
    func: Any, name: str, args: Any, inputs: list[Tensor], fields: list[Field], output: Tensor, image: int
) -> Field:
    """The field of one output of an operation; a tensor of `picture` dimensions can be a picture, as the input is."""
    x, field = inputs[0], fields[0]
    others = len(inputs) > 1
    if name == "cat" and (joined := _joined(args, inputs, fields)) is not None:
        return joined
    if name in RULES and any(x is a for a in args[FIRST.get(name, 0) :][:1]):
        if field.axes is None and x.ndim == image and RULES[name] in (_convolution, _pooling, _adaptive):
            field = Field(_anywhere(x, range(2, x.ndim)), is_global=True)  # such an input is a picture again
        followed = RULES[name](field, x, args, output) if field.axes is not None else UNKNOWN
        return dataclasses.replace(followed, is_global=followed.is_global or field.is_global or others)
    if name not in KEEPS_POSITIONS and torch.Tag.pointwise not in func.tags:
        return _unknown(field, x, output)
    kept = [f.plain(t) or f.axes for t, f in zip(inputs, fields, strict=True) if _keeps(t, f, output)]
    # Where something local joins in, what may come from anywhere is a path beside it.
    local = [axes for axes in kept if axes is not None and all(math.isfinite(a.high - a.low) for a in axes)]
    axes = _union(local or [axes for axes in kept if axes is not None])
    if axes is None:
        return _unknown(field, x, output)
    whole = any(f.is_global for f in fields) or len(kept) < len(fields) or _mixes_positions(name, args, axes, output)
    return Field(axes, whole)


def _keeps(x: Tensor, field: Field, output: Tensor) -> bool:
    """Whether the output's places are this input's, one for one."""
    return (
        field.axes is not None
        and x.ndim == output.ndim
        and all(x.shape[a.dim] == output.shape[a.dim] for a in field.axes)
    )


def _joined(args: Any, inputs: list[Tensor], fields: list[Field]) -> Field | None:
    """Tokens of which each belongs to a place, the last of what is joined along them; None if that is not what it is.

    What comes before them, the class token and its like, has no place, and they see nothing of it.
    """
    x, field = inputs[-1], fields[-1]
    axes = field.tokens(x)
    dim = (args[1] if len(args) > 1 else 0) % x.ndim
    if x is not args[0][-1] or axes is None or axes[0].dim != dim or len(axes) == 1:
        return None
    if any(f.axes is not None for f in fields[:-1]):
        return None
    before = sum(part.shape[dim] for part in args[0][:-1])
    return field.mapped(lambda a: dataclasses.replace(a, before=a.before + before))


def _union(fields: Sequence[Axes]) -> Axes | None:
    """What several tensors see together; None if their axes lie differently."""
    positions = {tuple((a.dim, a.length, a.inner, a.before) for a in axes) for axes in fields}
    if len(positions) != 1:
        return None

    def widest(axes: Sequence[Axis]) -> Axis:
        jump, last = axes[0].jump, axes[0].length - 1
        # Where the jumps differ, one window must hold the others at both ends of the axis.
        low = min(a.low + i * (a.jump - jump) for a in axes for i in (0, last))
        high = max(a.high + i * (a.jump - jump) for a in axes for i in (0, last))
        return dataclasses.replace(axes[0], low=low, high=high)

    return tuple(widest(along) for along in zip(*fields, strict=True))


def _unknown(field: Field, x: Tensor, output: Tensor) -> Field:
    """An operation without a rule of its own: it may look anywhere; a picture stays a picture."""
    axes = field.plain(x)
    if axes is None or not x.ndim == output.ndim == len(axes) + 2:
        return UNKNOWN
    return Field(_anywhere(output, [a.dim for a in axes]), is_global=True)


def _anywhere(tensor: Tensor, dims: Iterable[int]) -> Axes:
    return tuple(Axis(dim, tensor.shape[dim], 1, -math.inf, math.inf) for dim in dims)


def _mixes_positions(name: str, args: Any, axes: Axes, output: Tensor) -> bool:
    """A normalisation or softmax that runs along a spatial axis."""
    dims = {a.dim for a in axes}
    if name in BATCH_NORMS:
        return any(a is True for a in args)  # in training: of the batch's own statistics
    if name == "native_layer_norm":
        return bool(dims & set(range(output.ndim - len(args[1]), output.ndim)))
    return name == "native_group_norm" or (name in ALONG and args[1] % output.ndim in dims)


def _pair(value: Any, i: int) -> Any:
    return value if isinstance(value, int | float) else value[i] if len(value) > 1 else value[0]


def _each(field: Field, x: Tensor, output: Tensor, change: Callable[[Axis], Axis], first: int = 0) -> Field:
    """`change` applied to all axes of a picture, whose dimensions begin behind `first`."""
    axes = field.plain(x)
    if axes is None or min(a.dim for a in axes) < first:
        return _unknown(field, x, output)
    changed = tuple(dataclasses.replace(change(a), length=output.shape[a.dim]) for a in axes)
    return dataclasses.replace(field, axes=changed)


def _convolution(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    _, weight, _, stride, padding, dilation, transposed = args[:7]

    def along(axis: Axis) -> Axis:
        i = axis.dim - 2
        k, s, p, d = weight.shape[axis.dim], _pair(stride, i), _pair(padding, i), _pair(dilation, i)
        return axis.strided(1 / s, (p - (k - 1) * d) / s, p / s) if transposed else axis.windowed_op(k, s, p, d)

    return _each(field, x, output, along, first=2)


def _pooling(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    padding = args[3] if len(args) > 3 else 0
    dilation = args[4] if len(args) > 4 and not isinstance(args[4], bool) else 1
    windows = (kernel, stride, padding, dilation)
    return _each(field, x, output, lambda a: a.windowed_op(*(_pair(w, a.dim - 2) for w in windows)), first=2)


def _fitted(axis: Axis, ratio: float, looked_at: Iterable[tuple[int, int]]) -> Axis:
    """Behind an operation of which the first and the last place that each place looks at are known one by one."""
    gaps = [(first - i * ratio, last - i * ratio) for i, (first, last) in enumerate(looked_at)]
    return axis.strided(ratio, min(first for first, _ in gaps), max(last for _, last in gaps))


def _adaptive(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    def along(axis: Axis) -> Axis:
        before, behind = x.shape[axis.dim], output.shape[axis.dim]
        windows = ((i * before // behind, -(-(i + 1) * before // behind) - 1) for i in range(behind))
        return _fitted(axis, before / behind, windows)

    followed = _each(field, x, output, along, first=2)
    small = followed.axes is not None and all(output.shape[a.dim] == 1 < x.shape[a.dim] for a in followed.axes)
    return dataclasses.replace(followed, is_global=followed.is_global or small)


def _reduction(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    assert field.axes is not None
    given = args[1] if len(args) > 1 and args[1] is not None else range(x.ndim)
    if isinstance(given, Tensor):
        return UNKNOWN
    dims = {d % x.ndim for d in ([given] if isinstance(given, int) else given)}
    if dims & {a.dim for a in field.axes}:
        return UNKNOWN
    if output.ndim == x.ndim:
        return field
    return field.mapped(lambda a: dataclasses.replace(a, dim=a.dim - sum(d < a.dim for d in dims)))


def _unbind(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    return _reduction(field, x, (x, args[1] if len(args) > 1 else 0), output)


def _attention(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    """Each query's place gets something of all that the keys belong to."""
    return dataclasses.replace(field, is_global=True) if _keeps(x, field, output) else UNKNOWN


def _product(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    """A matrix product mixes what lies along the last dimension."""
    assert field.axes is not None
    return UNKNOWN if any(a.dim == x.ndim - 1 for a in field.axes) else field


def _permute(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    order = [d % x.ndim for d in args[1]]
    return field.mapped(lambda a: dataclasses.replace(a, dim=order.index(a.dim)))


def _transpose(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    one, other = (args[1] % x.ndim, args[2] % x.ndim) if len(args) > 2 else (0, 1)
    swap = {one: other, other: one}
    return field.mapped(lambda a: dataclasses.replace(a, dim=swap.get(a.dim, a.dim)))


def _expand(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    return field if _keeps(x, field, output) else UNKNOWN


def _view(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    """A reshape leaves the order of the values, in which the index along an axis changes every `step` of them."""
    assert field.axes is not None
    sizes = list(output.shape)
    units = [math.prod(sizes[dim + 1 :]) for dim in range(output.ndim)]  # values per place of each dimension

    def place(axis: Axis) -> Axis | None:
        unit = math.prod(x.shape[axis.dim + 1 :])
        if axis.before:  # only as long as its dimension stays one
            same = (dim for dim in range(output.ndim) if (units[dim], sizes[dim]) == (unit, x.shape[axis.dim]))
            return next((dataclasses.replace(axis, dim=dim) for dim in same), None)
        step = axis.inner * unit
        reach = step * axis.length
        for dim in reversed(range(output.ndim)):
            if units[dim] == step and sizes[dim] == axis.length:
                return dataclasses.replace(axis, dim=dim, inner=1)
        for dim in reversed(range(output.ndim)):
            unit, size = units[dim], sizes[dim]
            if step % unit == 0 and reach <= unit * size:
                return dataclasses.replace(axis, dim=dim, inner=step // unit)
            if unit % step == 0 == reach % unit and unit < reach <= unit * size:
                split = axis.windowed_op(unit // step, unit // step, 0)  # its inner part is seen from each place
                return dataclasses.replace(split, dim=dim, inner=1, length=reach // unit)
        return None

    axes = tuple(placed for axis in field.axes if (placed := place(axis)) is not None)
    return dataclasses.replace(field, axes=axes) if len(axes) == len(field.axes) else UNKNOWN


def _shuffle(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    def along(axis: Axis) -> Axis:
        return axis.strided(1 / args[1], 1 / args[1] - 1, 0)

    return _each(field, x, output, along)


def _unshuffle(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    return _each(field, x, output, lambda a: a.windowed_op(args[1], args[1], 0))


def _pad(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    widths = args[1]

    def along(axis: Axis) -> Axis:
        pair = 2 * (x.ndim - 1 - axis.dim)
        before = widths[pair] if pair < len(widths) else 0
        return axis.strided(1, -before, -before)

    return _each(field, x, output, along)


def _slice(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
    dim = (args[1] if len(args) > 1 else 0) % x.ndim
    start = (args[2] if len(args) > 2 else 0) or 0
    step = args[4] if len(args) > 4 else 1
    first = max(0, start + x.shape[dim]) if start < 0 else start

    assert field.axes is not None
    if all(a.dim != dim for a in field.axes):
        return field
    # Of tokens, only what comes before the places is cut off.
    if field.tokens(x) is not None and first <= field.axes[0].before and first + output.shape[dim] == x.shape[dim]:
        return field.mapped(lambda a: dataclasses.replace(a, before=a.before - first))
    return _each(field, x, output, lambda a: a.strided(step, first, first) if a.dim == dim else a)


def _resize(reach: int) -> Callable[[Field, Tensor, Any, Tensor], Field]:
    """Enlarging and reducing: each place looks at the nearest place (reach 0) or at so many on either side."""

    def rule(field: Field, x: Tensor, args: Any, output: Tensor) -> Field:
        corners = bool(args[2]) if reach else False
        scales = args[3:] if reach else args[2:]

        def along(axis: Axis) -> Axis:
            before, behind = x.shape[axis.dim], output.shape[axis.dim]
            given = scales[axis.dim - 2] if len(scales) > axis.dim - 2 else None
            ratio = 1 / given if isinstance(given, float) else before / behind
            if corners:
                ratio = (before - 1) / max(behind - 1, 1)
            shift = (ratio - 1) / 2 if reach and not corners else 0

            def looked_at(i: int) -> tuple[int, int]:
                at = i * ratio + shift
                first, last = (math.floor(at), math.ceil(at)) if reach else (math.floor(at), math.floor(at))
                return max(0, first - max(reach - 1, 0)), min(before - 1, last + max(reach - 1, 0))

            return _fitted(axis, ratio, map(looked_at, range(behind)))

        return _each(field, x, output, along, first=2)

    return rule


# Beside what torch itself tags as pointwise: operations that give each place something of that place alone, as long
# as they do not run along a spatial axis.
ALONG = frozenset({"_softmax", "_log_softmax", "index_select"})
BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"})
KEEPS_POSITIONS = frozenset(
    {
        *ALONG,
        *BATCH_NORMS,
        "_native_batch_norm_legit_no_training",
        "_prelu_kernel",
        "_to_copy",
        "alias",
        "cat",
        "clone",
        "copy",
        "detach",
        "glu",
        "hardswish",
        "lift_fresh",
        "log_sigmoid_forward",
        "masked_fill",
        "native_dropout",
        "native_group_norm",
        "native_layer_norm",
        "rsub",
        "split",
        "split_with_sizes",
        "where",
    }
)
FIRST = {"addmm": 1, "baddbmm": 1}  # which argument is the one that is followed, if not the first
RULES: dict[str, Callable[[Field, Tensor, Any, Tensor], Field]] = {
    "convolution": _convolution,
    "max_pool2d": _pooling,
    "max_pool2d_with_indices": _pooling,
    "max_pool3d_with_indices": _pooling,
    "avg_pool2d": _pooling,
    "avg_pool3d": _pooling,
    "_adaptive_avg_pool2d": _adaptive,
    "_adaptive_avg_pool3d": _adaptive,
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    "adaptive_max_pool3d": _adaptive,
    "mean": _reduction,
    "sum": _reduction,
    "amax": _reduction,
    "amin": _reduction,
    "max": _reduction,
    "min": _reduction,
    "var": _reduction,
    "var_mean": _reduction,
    "std": _reduction,
    "linalg_vector_norm": lambda field, x, args, output: _reduction(field, x, (x, *args[2:]), output),
    "select": _reduction,
    "unbind": _unbind,
    "_native_multi_head_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "mm": _product,
    "bmm": _product,
    "addmm": _product,
    "baddbmm": _product,
    "expand": _expand,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
    "_reshape_alias": _view,
    "unsqueeze": _view,
    "squeeze": _view,
    "pixel_shuffle": _shuffle,
    "pixel_unshuffle": _unshuffle,
    "constant_pad_nd": _pad,
    "reflection_pad1d": _pad,
    "reflection_pad2d": _pad,
    "reflection_pad3d": _pad,
    "replication_pad1d": _pad,
    "replication_pad2d": _pad,
    "replication_pad3d": _pad,
    "slice": _slice,
    "upsample_nearest1d": _resize(0),
    "upsample_nearest2d": _resize(0),
    "upsample_nearest3d": _resize(0),
    "upsample_linear1d": _resize(1),
    "upsample_bilinear2d": _resize(1),
    "upsample_trilinear3d": _resize(1),
    "upsample_bicubic2d": _resize(2),
}
