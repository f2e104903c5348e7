"""While a pass runs, single calls of torch's functions are seen, or answered otherwise; the network is not touched."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convscope.engine.nested import primary_tensor, replace_tensor
from convscope.errors import ConvscopeError


class ForceGradMode(TorchFunctionMode):
    """While active, what the network itself says about gradients (`no_grad`, `enable_grad`) is passed over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__name__", "") == "_set_grad_enabled" else func(*args, **(kwargs or {}))


class RowsOnly(TorchFunctionMode):
    """While active, a single picture's gradient goes back through those rows of large matrices only that it reaches.

    Where it has passed a rectifier most of it is 0, and for one picture a matrix product is as slow as its matrix is
    read: VGG16's first one has 411 MB.
    """

    WORTH = 1 << 22  # weights; below this there is little to save

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _is_row(*args[:2]):
            return _RowsLinear.apply(*args)
        return func(*args, **(kwargs or {}))


def _is_row(x: Tensor, weight: Tensor) -> bool:
    single = x.requires_grad and x.numel() == x.shape[-1] and weight.numel() >= RowsOnly.WORTH
    return single and x.device.type == "cpu" and x.dtype == torch.float32


class _RowsLinear(torch.autograd.Function):
    """W x + b for one row x, of which only x has a gradient: g W, summed over the rows of W where g is not 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        flat = gradient.reshape(-1)
        rows = flat.nonzero()[:, 0]
        if not 0 < 4 * len(rows) <= 3 * len(flat):
            return gradient @ weight, None, None
        found = F.embedding_bag(rows[None], weight, per_sample_weights=flat[rows][None], mode="sum")
        return found.reshape(*gradient.shape[:-1], -1), None, None


class LogitsRecorder(TorchFunctionMode):
    """Remembers what went into each softmax or sigmoid, so that the last one can be taken off again.

    Works for a module, a function and an activation fused into a Keras layer alike, and touches none of them.
    """

    HEADS = frozenset({"softmax", "log_softmax", "sigmoid"})
    CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as"})

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]
        if name.removesuffix("_") not in self.HEADS:
            output = func(*args, **(kwargs or {}))
            if name in self.CASTS:  # the same values, rounded
                self.made += [(output, went_in) for made, went_in in self.made if made is args[0]]
            return output
        went_in = args[0] if args else kwargs["input"]
        went_in = went_in.clone() if name.endswith("_") else went_in
        output = func(*args, **(kwargs or {}))
        self.made.append((output, went_in))
        return output

    def pre_activation(self, output: Any) -> Any:
        last = primary_tensor(output)
        for made, went_in in reversed(self.made):
            # The very values, whatever shape they were given since.
            if last is not None and made.data_ptr() == last.data_ptr() and made.numel() == last.numel():
                return replace_tensor(output, last, went_in.reshape(last.shape))
        raise ConvscopeError("the network ended in a softmax or sigmoid when it was loaded, and does not now")
