"""Attention as matrix products and a softmax, and a recorder of its weights.

Networks compute attention in three ways: by ``scaled_dot_product_attention``, by ``nn.MultiheadAttention``, or by their
own products and softmax. The first two hand no weights out. `AttentionMode` computes them by single steps, which its
subclasses intercept; the network itself is not changed, and other threads are not affected.
"""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.engine.function_modes import Args, Function, FunctionMode, Kwargs
from convscope.engine.nested import iter_tensors

PRODUCTS = frozenset({"matmul", "bmm", "einsum"})


class AttentionMode(FunctionMode):
    """Compute fused attention step by step; subclasses intercept the steps, and a network's own."""

    def intercept(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> Any:
        """Replace fused attention by its steps, during which this mode is active."""
        if name == "scaled_dot_product_attention":
            with self:
                return attend(*args, **kwargs)
        if name == "multi_head_attention_forward":
            with self:
                return _multi_head_attention(*args, **kwargs)
        return self.intercept_step(function, name, args, kwargs)

    def intercept_step(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> Any:  # noqa: ARG002
        """Return the result of ``function(*args, **kwargs)``, or a replacement for it."""
        return function(*args, **kwargs)


class AttentionRecorder(AttentionMode):
    """Record attention weights: results of a softmax over the last dimension that are a factor of a matrix product.

    Attributes
    ----------
    weights : list of Tensor
        The weights, in the order in which they are used: (N, heads, T, S), or as the network shapes them. The output
        depends on these very tensors, so that it can be differentiated with respect to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self._candidates: list[Tensor] = []

    def intercept_step(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> Any:
        """Call the function; record weights."""
        if name in PRODUCTS:
            self._record({(tensor.data_ptr(), tensor.numel()) for tensor in iter_tensors((args, kwargs))})
        output = function(*args, **kwargs)
        if name == "softmax" and isinstance(output, Tensor) and output.ndim >= 3:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, output.ndim - 1):
                self._candidates.append(output)
        return output

    def _record(self, factors: set[tuple[int, int]]) -> None:
        """Record the candidates that are among the factors of a product, reshaped or not."""
        used = [i for i, w in enumerate(self._candidates) if (w.data_ptr(), w.numel()) in factors]
        self.weights += [self._candidates[i] for i in used]
        self._candidates = [w for i, w in enumerate(self._candidates) if i not in used]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what ``scaled_dot_product_attention`` computes: ``softmax(q k^T / sqrt(d) + mask) v``."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value


def _no_torch_function(_tensors: object) -> bool:
    return False


_multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": _no_torch_function},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""PyTorch's function as it is, except that it does not hide its steps from function modes."""
