"""AttnLRP: layer-wise relevance propagation through attention, normalisation and smooth activations.

The relevance of a tensor is its value times a modified gradient. The gradient of linear layers and sums is the epsilon
rule with epsilon 0, that of a softmax is its Taylor rule. `AttnLrpMode` changes the others as they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convscope.attribution.context import Extras, MethodContext
from convscope.attribution.methods.gradient import input_x_gradient
from convscope.attribution.methods.relu_rules import OTHER_ACTIVATIONS
from convscope.engine.attention import PRODUCTS, AttentionMode
from convscope.engine.capture import ForwardResult
from convscope.engine.function_modes import Args, Function, Kwargs, is_inplace
from convscope.engine.nested import iter_tensors
from convscope.errors import ConvscopeError


def attn_lrp(context: MethodContext) -> tuple[Tensor, Extras]:
    """Propagate relevance by the rules of AttnLRP (signed).

    ::

        M = sum_c x_c G_c

    in which the backward pass that gives G has other rules: a product of two tensors that depend on the image passes
    half of its gradient to each (uniform rule); an activation passes ``G f(x) / x`` (identity rule); a normalisation
    takes its standard deviation as a constant (identity rule).

    Parameters
    ----------
    context : MethodContext

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
    extras : dict
        "conservation_error" (B, T): the map's sum minus the score, which is the share of biases, of tokens that do not
        depend on the image, and of the softmaxes.

    References
    ----------
    Achtibat et al., AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers, ICML 2024, section 3.3;
    the formulation by gradients is that of the package ``lxt``.
    """

    def run(x: Tensor, module: nn.Module | None = None, /) -> ForwardResult:
        with AttnLrpMode():
            return context.run(x, module)

    maps = input_x_gradient(replace(context, run=run))
    scores = context.scores(context.x, torch.arange(len(maps), device=maps.device))
    return maps, {"conservation_error": maps.flatten(2).sum(2) - scores}


class AttnLrpMode(AttentionMode):
    """Replace the gradients of products, activations and normalisation, while active."""

    def intercept_step(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> Any:
        """Call the function with the backward pass of its rule."""
        num_inputs = sum(tensor.requires_grad for tensor in iter_tensors((args, kwargs)))
        if not num_inputs or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if name in _REFUSED:
            raise ConvscopeError(f"attn-lrp has no rule for {name}; use integrated-gradients instead")
        if name in _CONSTANTS:
            return function(*args, **kwargs).detach()
        if name in _NORMALISATIONS:
            return _NORMALISATIONS[name](*args, **kwargs)
        if name in _ACTIVATIONS:
            return _with_identity_rule(function, *args, **kwargs)
        output = function(*args, **kwargs)
        if name in _PRODUCTS and num_inputs > 1:
            output.register_hook(_half)
        return output


def _half(gradient: Tensor) -> Tensor:
    return gradient / 2


def _with_identity_rule(function: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply an activation; its gradient is the ratio of output and input, 0 where the input is 0."""
    x = input.detach()
    output = function(x.clone(), *args, **kwargs)
    ratio = torch.where(x == 0, 0, output / x)
    # The difference is 0, but for inputs that are 0 and activations that are not.
    result = input * ratio + (output - x * ratio)
    return input.copy_(result) if is_inplace(function) or kwargs.get("inplace") else result


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centered = input - input.mean(dims, keepdim=True)
    deviation = (centered.square().mean(dims, keepdim=True) + eps).sqrt().detach()
    return _affine(centered / deviation, weight, bias)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(input / (input.square().mean(dims, keepdim=True) + eps).sqrt().detach(), weight, None)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    groups = input.reshape(len(input), num_groups, -1)
    normalized = _layer_norm(groups, groups.shape[2:], eps=eps).reshape(input.shape)
    shape = (1, -1, *[1] * (input.ndim - 2))
    return _affine(normalized, *(None if t is None else t.reshape(shape) for t in (weight, bias)))


def _normalize(
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(input, p, dim, keepdim=True)
    result = input / norm.clamp(min=eps).detach()
    return result if out is None else out.copy_(result)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_PRODUCTS = PRODUCTS | {"baddbmm", "mul", "div"}
_ACTIVATIONS = OTHER_ACTIVATIONS | {"relu6", "hardtanh"}
_NORMALISATIONS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "normalize": _normalize,
}
_CONSTANTS = frozenset(
    {"std", "var", "rsqrt", "norm", "vector_norm", "linalg_norm", "linalg_vector_norm"}
)  # of normalisation that a network computes itself
_REFUSED = frozenset({"instance_norm", "local_response_norm"})
