"""Receptive fields through single operations of PyTorch's dispatcher: one rule per kind of operation.

A rule takes an `Operation` and returns the receptive field of its output. `RULES` maps the names of ATen operations to
rules; pointwise operations need none. Everything else counts as global.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convscope.engine.receptive_field import (
    UNKNOWN,
    Axes,
    Axis,
    Field,
    map_axes,
    token_axes,
    unbounded_axes,
    union,
    unmerged_axes,
)

if TYPE_CHECKING:
    from torch._ops import OpOverload

REGION_OPERATIONS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")  # of torchvision: crops of boxes
Arguments = Sequence[Any]  # of an operation: tensors, numbers, lists of numbers, None


@dataclass(frozen=True)
class Operation:
    """One call of an ATen operation: its input, the input's spatial axes, its positional arguments, its output."""

    x: Tensor
    axes: Axes
    args: Arguments
    output: Tensor

    def argument(self, position: int, default: object = None) -> Any:
        """Return a positional argument, or `default` where it is missing."""
        return self.args[position] if len(self.args) > position else default

    @property
    def unchanged(self) -> Field:
        """The input's own field."""
        return Field(self.axes, is_global=False)

    def with_axes(self, function: Callable[[Axis], Axis]) -> Field:
        """Return the field with a function applied to all axes."""
        return Field(map_axes(self.axes, function), is_global=False)


Rule = Callable[[Operation], Field]


def propagate(
    func: OpOverload, args: Arguments, inputs: Sequence[Tensor], fields: Sequence[Field], output: Tensor, ndim: int
) -> Field:
    """Return the receptive field of one output of an operation.

    Parameters
    ----------
    func : OpOverload
        The operation.
    args : sequence
        Its positional arguments.
    inputs, fields : sequences of Tensor and Field
        The arguments that depend on the network's input, with their fields.
    output : Tensor
    ndim : int
        Dimensions of the network's input, batch included. Tensors with as many can be images.
    """
    name = operation_name(func)
    x, field = inputs[0], fields[0]
    if name in REGION_OPERATIONS or any(f.is_regional for f in fields):
        return replace(UNKNOWN, is_regional=True)
    if name == "cat" and (appended := _append_tokens(args, inputs, fields)) is not None:
        return appended
    if name in RULES and any(x is a for a in args[INPUT_POSITION.get(name, 0) :][:1]):
        axes = field.axes
        is_global = field.is_global or len(inputs) > 1
        if axes is None and x.ndim == ndim and RULES[name] in IMAGE_RULES:
            axes, is_global = unbounded_axes(x, range(2, x.ndim)), True  # such an input is an image again
        followed = UNKNOWN if axes is None else RULES[name](Operation(x, axes, args, output))
        return replace(followed, is_global=followed.is_global or is_global)
    if name not in KEEPS_POSITIONS and torch.Tag.pointwise not in func.tags:
        return _global(field.axes, x, output)
    aligned = [
        f.unmerged_axes(t) or f.axes for t, f in zip(inputs, fields, strict=True) if _keeps_positions(t, f.axes, output)
    ]
    # Where something local joins in, what may come from anywhere is a path parallel to it.
    local = [axes for axes in aligned if axes is not None and all(a.is_bounded for a in axes)]
    axes = union(local or [axes for axes in aligned if axes is not None])
    if axes is None:
        return _global(field.axes, x, output)
    is_global = any(f.is_global for f in fields) or len(aligned) < len(fields)
    return Field(axes, is_global or _mixes_positions(name, args, axes, output))


def operation_name(func: OpOverload) -> str:
    """Return an operation's name without namespace, overload and the underscore of in-place variants."""
    qualified_name: str = func.name()  # type: ignore[no-untyped-call]
    return qualified_name.partition("::")[2].partition(".")[0].rstrip("_")


def _keeps_positions(x: Tensor, axes: Axes | None, output: Tensor) -> bool:
    """Whether the output's positions are the input's, one for one."""
    return axes is not None and x.ndim == output.ndim and all(x.shape[a.dim] == output.shape[a.dim] for a in axes)


def _append_tokens(args: Arguments, inputs: Sequence[Tensor], fields: Sequence[Field]) -> Field | None:
    """Return the field of tokens appended to others that belong to no position; None for other concatenations.

    Tokens in front, such as the class token, depend on no pixel.
    """
    x, axes = inputs[-1], fields[-1].axes
    dim = (args[1] if len(args) > 1 else 0) % x.ndim
    if axes is None or token_axes(axes, x) is None or x is not args[0][-1] or axes[0].dim != dim or len(axes) == 1:
        return None
    if any(f.axes is not None for f in fields[:-1]):
        return None
    added = sum(part.shape[dim] for part in args[0][:-1])
    return replace(fields[-1], axes=map_axes(axes, lambda a: replace(a, prefix=a.prefix + added)))


def _global(axes: Axes | None, x: Tensor, output: Tensor) -> Field:
    """Return the field after an operation without a rule: it may look anywhere; an image stays an image."""
    axes = None if axes is None else unmerged_axes(axes, x)
    if axes is None or not x.ndim == output.ndim == len(axes) + 2:
        return UNKNOWN
    return Field(unbounded_axes(output, [a.dim for a in axes]), is_global=True)


def _mixes_positions(name: str, args: Arguments, axes: Axes, output: Tensor) -> bool:
    """Whether a normalisation or softmax runs along a spatial axis."""
    dims = {a.dim for a in axes}
    if name in BATCH_NORMS:
        return any(a is True for a in args)  # in training mode: with the batch's own statistics
    if name == "native_layer_norm":
        return bool(dims & set(range(output.ndim - len(args[1]), output.ndim)))
    return name == "native_group_norm" or (name in ALONG_ONE_DIM and args[1] % output.ndim in dims)


def _per_axis(value: float | Sequence[float], i: int) -> float:
    """Return entry i of an argument that is one number or a list of one or more."""
    return value if isinstance(value, int | float) else value[i] if len(value) > 1 else value[0]


def _map_image_axes(op: Operation, change: Callable[[Axis], Axis], first_dim: int = 0) -> Field:
    """Apply `change` to all axes of an image whose spatial dimensions start at `first_dim` or later."""
    if all(a.dim == 0 for a in op.axes) and len(op.x) == len(op.output):
        return op.unchanged  # a batch of windows: no row reads another
    axes = unmerged_axes(op.axes, op.x)
    if axes is None or min(a.dim for a in axes) < first_dim:
        return _global(op.axes, op.x, op.output)
    return Field(map_axes(axes, lambda a: replace(change(a), length=op.output.shape[a.dim])), is_global=False)


def _convolution(op: Operation) -> Field:
    _, weight, _, stride, padding, dilation, transposed = op.args[:7]

    def change(axis: Axis) -> Axis:
        i = axis.dim - 2
        k, s, p, d = weight.shape[axis.dim], _per_axis(stride, i), _per_axis(padding, i), _per_axis(dilation, i)
        return axis.strided(1 / s, (p - (k - 1) * d) / s, p / s) if transposed else axis.windowed(k, s, p, d)

    return _map_image_axes(op, change, first_dim=2)


def _quantized_convolution(op: Operation) -> Field:
    weights = op.args[1]
    if isinstance(weights, Tensor):  # the operation of the same name on floats, before it is broken down
        return _global(op.axes, op.x, op.output)
    weight, _ = weights.unpack()
    parameters = weights.stride(), weights.padding(), weights.dilation(), bool(weights.transpose())
    return _convolution(replace(op, args=(op.x, weight, None, *parameters)))


def _pooling(op: Operation) -> Field:
    kernel = op.args[1]
    stride = op.argument(2) or kernel
    padding = op.argument(3, 0)
    dilation = op.argument(4, 1)
    windows = (kernel, stride, padding, 1 if isinstance(dilation, bool) else dilation)  # of averages: ceil_mode
    return _map_image_axes(op, lambda a: a.windowed(*(_per_axis(w, a.dim - 2) for w in windows)), first_dim=2)


def _adaptive_pooling(op: Operation) -> Field:
    def change(axis: Axis) -> Axis:
        before, after = op.x.shape[axis.dim], op.output.shape[axis.dim]
        windows = ((i * before // after, -(-(i + 1) * before // after) - 1) for i in range(after))
        return axis.fitted(before / after, windows)

    field = _map_image_axes(op, change, first_dim=2)
    pools_all = field.axes is not None and all(op.output.shape[a.dim] == 1 < op.x.shape[a.dim] for a in field.axes)
    return replace(field, is_global=field.is_global or pools_all)


def _reduction(op: Operation, dims_at: int = 1) -> Field:
    """Handle sums, means and the like; argument `dims_at` holds the dimensions."""
    return _reduce(op, op.argument(dims_at))


def _reduce(op: Operation, dim: int | Sequence[int] | Tensor | None) -> Field:
    ndim = op.x.ndim
    if isinstance(dim, Tensor):
        return UNKNOWN
    dims = set(range(ndim)) if dim is None else {d % ndim for d in ([dim] if isinstance(dim, int) else dim)}
    if dims & {a.dim for a in op.axes}:
        return UNKNOWN
    if op.output.ndim == ndim:
        return op.unchanged
    return op.with_axes(lambda a: replace(a, dim=a.dim - sum(d < a.dim for d in dims)))


def _unbind(op: Operation) -> Field:
    return _reduce(op, op.argument(1, 0))


def _attention(op: Operation) -> Field:
    """Handle attention: each query's position depends on everything that the keys depend on."""
    return Field(op.axes, is_global=True) if _keeps_positions(op.x, op.axes, op.output) else UNKNOWN


def _matrix_product(op: Operation) -> Field:
    """Handle matrix products, which mix values along the last dimension."""
    return UNKNOWN if any(a.dim == op.x.ndim - 1 for a in op.axes) else op.unchanged


def _permute(op: Operation) -> Field:
    order = [d % op.x.ndim for d in op.args[1]]
    return op.with_axes(lambda a: replace(a, dim=order.index(a.dim)))


def _transpose(op: Operation) -> Field:
    first, second = (d % op.x.ndim for d in op.args[1:3]) if len(op.args) > 2 else (0, 1)
    swapped = {first: second, second: first}
    return op.with_axes(lambda a: replace(a, dim=swapped.get(a.dim, a.dim)))


def _expand(op: Operation) -> Field:
    return op.unchanged if _keeps_positions(op.x, op.axes, op.output) else UNKNOWN


def _view(op: Operation) -> Field:
    """Handle reshapes, which keep the order of the values."""
    axes = tuple(moved for axis in op.axes if (moved := _locate_axis(op, axis)) is not None)
    return Field(axes, is_global=False) if len(axes) == len(op.axes) else UNKNOWN


def _locate_axis(op: Operation, axis: Axis) -> Axis | None:
    """Return where an axis lies after a reshape: its index changes every `step` values, before and after."""
    sizes = list(op.output.shape)
    units = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]  # values per position of each dimension
    unit = math.prod(op.x.shape[axis.dim + 1 :])
    if axis.prefix:  # only as long as its dimension stays one
        same = (dim for dim in range(len(sizes)) if (units[dim], sizes[dim]) == (unit, op.x.shape[axis.dim]))
        return next((replace(axis, dim=dim) for dim in same), None)
    step = axis.inner * unit
    extent = step * axis.length
    for dim in reversed(range(len(sizes))):
        if units[dim] == step and sizes[dim] == axis.length:
            return replace(axis, dim=dim, inner=1)
    for dim in reversed(range(len(sizes))):
        unit, size = units[dim], sizes[dim]
        if step % unit == 0 and extent <= unit * size:
            return replace(axis, dim=dim, inner=step // unit)
        if unit % step == 0 == extent % unit and unit < extent <= unit * size:
            split = axis.windowed(unit // step, unit // step, 0)  # each position depends on the inner part
            return replace(split, dim=dim, inner=1, length=extent // unit)
    return None


def _unfold(op: Operation) -> Field:
    """Handle sliding windows (N, C, H, W) that become the columns of (N, C * k * k, L), row by row."""
    axes = unmerged_axes(op.axes, op.x)
    if axes is None or [a.dim for a in axes] != [2, 3]:
        return UNKNOWN
    kernel, dilation, padding, stride = op.args[1:5]
    windowed, inner = [], 1
    for i, axis in reversed(list(enumerate(axes))):
        k, d, p, s = (_per_axis(value, i) for value in (kernel, dilation, padding, stride))
        length = int((axis.length + 2 * p - (k - 1) * d - 1) // s + 1)
        windowed.append(replace(axis.windowed(k, s, p, d), dim=2, length=length, inner=inner))
        inner *= length
    return Field(tuple(reversed(windowed)), is_global=False)


def _pixel_shuffle(op: Operation) -> Field:
    factor = op.args[1]
    return _map_image_axes(op, lambda a: a.strided(1 / factor, 1 / factor - 1, 0))


def _pixel_unshuffle(op: Operation) -> Field:
    return _map_image_axes(op, lambda a: a.windowed(op.args[1], op.args[1], 0))


def _pad(op: Operation) -> Field:
    widths = op.args[1]

    def change(axis: Axis) -> Axis:
        i = 2 * (op.x.ndim - 1 - axis.dim)
        before = widths[i] if i < len(widths) else 0
        return axis.strided(1, -before, -before)

    return _map_image_axes(op, change)


def _slice(op: Operation) -> Field:
    x, axes = op.x, op.axes
    dim = op.argument(1, 0) % x.ndim
    start, step = op.argument(2, 0) or 0, op.argument(4, 1)
    first = max(0, start + x.shape[dim]) if start < 0 else start
    if all(a.dim != dim for a in axes):
        return op.unchanged
    # Of tokens, only the prefix may be cut.
    if token_axes(axes, x) is not None and first <= axes[0].prefix and first + op.output.shape[dim] == x.shape[dim]:
        return op.with_axes(lambda a: replace(a, prefix=a.prefix - first))
    return _map_image_axes(op, lambda a: a.strided(step, first, first) if a.dim == dim else a)


def _resize_nearest(op: Operation) -> Field:
    return _resize(op, 0, op.args[2:])


def _resize_linear(op: Operation) -> Field:
    return _resize(op, 1, op.args[3:], align_corners=bool(op.args[2]))


def _resize_cubic(op: Operation) -> Field:
    return _resize(op, 2, op.args[3:], align_corners=bool(op.args[2]))


def _resize(op: Operation, support: int, scales: Arguments, align_corners: bool = False) -> Field:
    """Handle resampling: each position reads the nearest position (support 0) or `support` positions on either side."""

    def change(axis: Axis) -> Axis:
        before, after = op.x.shape[axis.dim], op.output.shape[axis.dim]
        scale = scales[axis.dim - 2] if len(scales) > axis.dim - 2 else None
        ratio = 1 / scale if isinstance(scale, float) else before / after
        if align_corners:
            ratio = (before - 1) / max(after - 1, 1)
        shift = (ratio - 1) / 2 if support and not align_corners else 0
        margin = max(support - 1, 0)

        def window(i: int) -> tuple[int, int]:
            center = i * ratio + shift
            first, last = math.floor(center), math.ceil(center) if support else math.floor(center)
            return max(0, first - margin), min(before - 1, last + margin)

        return axis.fitted(ratio, map(window, range(after)))

    return _map_image_axes(op, change, first_dim=2)


ALONG_ONE_DIM = frozenset({"_softmax", "_log_softmax", "index_select"})
BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"})
QUANTIZED = frozenset({
    "add", "add_relu", "add_scalar", "add_scalar_relu", "batch_norm2d", "batch_norm2d_relu", "cat_relu", "dequantize",
    "mul", "mul_relu", "mul_scalar", "quantize_per_channel", "quantize_per_tensor",
})  # fmt: skip
# Besides the operations that PyTorch tags as pointwise: those whose output at a position depends on that position
# alone, unless they run along a spatial axis. PyTorch 2.6 does not tag the in-place variants of some activations.
KEEPS_POSITIONS = frozenset({
    *ALONG_ONE_DIM, *BATCH_NORMS,
    "_native_batch_norm_legit_no_training", "_prelu_kernel", "_to_copy", "abs", "alias", "celu", "cat", "clone",
    "copy", "detach", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "lift_fresh",
    "log_sigmoid_forward", "masked_fill", "mish", "native_dropout", "native_group_norm", "native_layer_norm",
    "relu6", "rsub", "selu", "split", "split_with_sizes", "threshold", "true_divide", "where",
    *QUANTIZED,
})  # fmt: skip
QUANTIZED_CONVOLUTIONS = ("conv2d", "conv2d_relu", "conv3d", "conv3d_relu", "conv_transpose2d", "conv_transpose3d")
MAX_POOLINGS = ("max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices", "quantized_max_pool2d")
INPUT_POSITION = {"addmm": 1, "baddbmm": 1}  # of the argument that is followed, if it is not the first
# Their inputs are images.
IMAGE_RULES: tuple[Rule, ...] = (_convolution, _quantized_convolution, _pooling, _adaptive_pooling)
RULES: dict[str, Rule] = {
    "convolution": _convolution,
    **dict.fromkeys(QUANTIZED_CONVOLUTIONS, _quantized_convolution),
    **dict.fromkeys((*MAX_POOLINGS, "avg_pool2d", "avg_pool3d"), _pooling),
    "_adaptive_avg_pool2d": _adaptive_pooling,
    "_adaptive_avg_pool3d": _adaptive_pooling,
    "adaptive_avg_pool2d": _adaptive_pooling,
    "adaptive_max_pool2d": _adaptive_pooling,
    "adaptive_max_pool3d": _adaptive_pooling,
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "select"), _reduction),
    "linalg_vector_norm": lambda op: _reduction(op, dims_at=2),
    "unbind": _unbind,
    "_native_multi_head_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _matrix_product),
    "expand": _expand,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"), _view),
    "im2col": _unfold,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "constant_pad_nd": _pad,
    **{f"{mode}_pad{n}d": _pad for mode in ("reflection", "replication") for n in (1, 2, 3)},
    "slice": _slice,
    **{f"upsample_nearest{n}d": _resize_nearest for n in (1, 2, 3)},
    "upsample_linear1d": _resize_linear,
    "upsample_bilinear2d": _resize_linear,
    "upsample_trilinear3d": _resize_linear,
    "upsample_bicubic2d": _resize_cubic,
}
