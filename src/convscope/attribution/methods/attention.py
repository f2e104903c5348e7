"""Methods that read the attention weights of a transformer.

``A_l`` (heads, T, S) holds the weights of attention number ``l``: row ``i`` says from which tokens ``j`` token ``i``
takes its values. A method combines the weights of all layers into a matrix ``R`` (T, T), the contribution of each token
of the first attention to each token of the last. The map is the mean of the rows of ``R`` that the score depends on,
laid on the grid of patches: the class token's row, or all rows in a network that averages its tokens. The gradient of
the score with respect to the last attention weights is 0 in the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from convscope.attribution.context import MethodContext
from convscope.attribution.methods.gradient import grad_batch_size
from convscope.engine import capture
from convscope.engine.attention import AttentionRecorder
from convscope.engine.batching import balanced_chunks
from convscope.engine.model import Model
from convscope.errors import ConvscopeError

OTHERS = "Use grad-cam or integrated-gradients instead"


def attention_rollout(context: MethodContext) -> Tensor:
    """Multiply the attention weights of all layers, residual connections included (attention rollout, unsigned).

    ::

        R = B_L ... B_2 B_1,    B_l = (mean_h A_l,h + 1) / 2

    The same for all targets that depend on the same tokens. Where queries are no tokens of the layer before (attention
    pooling), there is no residual connection: ``B_l = mean_h A_l,h``.

    Parameters
    ----------
    context : MethodContext

    Returns
    -------
    Tensor of shape (B, T, h, w)
        On the grid of patches.

    Raises
    ------
    ConvscopeError
        If the network has no attention between all tokens of an image.

    References
    ----------
    Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, section 3.
    """

    def rollout(weights: Sequence[Tensor], _gradients: Sequence[Tensor]) -> Tensor:
        result = _identity(weights[0])
        for w in weights:
            mean = w.mean(1)
            result = ((mean + _identity(w)) / 2 if _is_square(w) else mean) @ result
        return result

    return _map_tokens(context, rollout)


def transformer_attribution(context: MethodContext) -> Tensor:
    """Accumulate the attention weights times their positive gradients over all layers (Chefer et al., unsigned).

    ::

        R_0 = 1,    R_l = R_(l-1) + E_l R_(l-1),    E_l = mean_h relu(dS/dA_l,h A_l,h)

    Where queries are no tokens of the layer before (attention pooling), ``R_l = E_l N(R_(l-1))``, in which N scales the
    rows of ``R - 1`` to sum 1 and adds 1 again.

    Parameters
    ----------
    context : MethodContext

    Returns
    -------
    Tensor of shape (B, T, h, w)
        On the grid of patches.

    Raises
    ------
    ConvscopeError
        If the network has no attention between all tokens of an image.

    References
    ----------
    Chefer et al., Generic Attention-Model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers,
    ICCV 2021, equations 5 and 6, 8 to 10.
    """

    def relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        result = _identity(weights[0])
        for w, gradient in zip(weights, gradients, strict=True):
            evidence = (gradient * w).clamp(min=0).mean(1)
            result = result + evidence @ result if _is_square(w) else evidence @ _normalized(result)
        return result

    return _map_tokens(context, relevance)


def has_global_attention(model: Model) -> bool:
    """Check whether a network has attention between all tokens of an image; one forward pass per model."""
    if model not in _has_global_attention:
        zeros = torch.zeros(model.fixed_batch_size or 1, model.preprocessing.channels, *model.preprocessing.size)
        with torch.no_grad(), capture.capture_layers(model, []) as run, AttentionRecorder() as recorder:
            run(zeros)
        _has_global_attention[model] = any(is_per_image(w, len(zeros)) for w in recorder.weights)
    return _has_global_attention[model]


_has_global_attention: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


# --- from weights to maps --------------------------------------------------------------------------------------------

Combine = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Takes the weights (P, heads, T, S) of all layers and their gradients; returns the matrix R (P, T, T)."""


def _map_tokens(context: MethodContext, combine: Combine) -> Tensor:
    """Combine the layers' attention; average the rows that each target depends on; lay the patches on their grid."""
    x, size = context.x, grad_batch_size(context)
    maps = []
    for positions in balanced_chunks(range(len(x)), size):
        rows = torch.arange(positions[0], positions[-1] + 1, device=x.device)
        with AttentionRecorder() as recorder:
            _, scores = context.forward(x[rows], rows)
        recorded = differentiable_weights(context.model, recorder, scores)
        relevance = []
        for t in range(context.num_targets):
            weights, gradients = _used_weights(context.model, scores, t, recorded)
            is_read = gradients[-1].abs().amax((1, 3)) > 0
            read = is_read / is_read.sum(1, keepdim=True).clamp(min=1)
            relevance.append((read[:, None] @ combine(weights, gradients))[:, 0])
        maps.append(lay_on_grid(context, torch.stack(relevance, 1)))
        context.report_progress((positions[-1] + 1) / len(x))
    return torch.cat(maps)


def differentiable_weights(model: Model, recorder: AttentionRecorder, scores: Tensor) -> list[Tensor]:
    """Return the recorded weights that scores may depend on; raise ConvscopeError if there are none."""
    weights = [w for w in recorder.weights if w.requires_grad]
    if not weights or not scores.requires_grad:
        raise ConvscopeError(f"the method reads attention weights, and {model.name} computes none. {OTHERS}")
    return weights


def _used_weights(
    model: Model, scores: Tensor, target: int, recorded: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights (P, heads, T, S) that a target depends on, in order, and its gradients at them."""
    retain_graph = target + 1 < scores.shape[1]
    by_weights = torch.autograd.grad(scores[:, target].sum(), recorded, retain_graph=retain_graph, allow_unused=True)
    pairs = [(w.detach(), g) for w, g in zip(recorded, by_weights, strict=True) if g is not None]
    if not pairs:
        raise ConvscopeError(f"the target does not depend on the attention weights of {model.name}. {OTHERS}")
    weights, gradients = ([per_image(w, len(scores)).float() for w in part] for part in zip(*pairs, strict=True))
    for before, after in pairwise(weights):
        if before.shape[2] != after.shape[3]:
            raise ConvscopeError(
                f"attention of {model.name} goes from {before.shape[2]} tokens to {after.shape[3]}; the method needs "
                f"layers that hand the same tokens on. {OTHERS}"
            )
    return weights, gradients


def per_image(weights: Tensor, count: int) -> Tensor:
    """Return attention weights as (N, heads, T, S); raise ConvscopeError for attention within parts of an image."""
    if is_per_image(weights, count):
        return weights if weights.ndim == 4 else weights.reshape(count, -1, *weights.shape[1:])
    raise ConvscopeError(
        f"attention weights have shape {tuple(weights.shape)} for {count} images; the method needs (images, heads, "
        f"queries, tokens). This looks like attention within windows. {OTHERS}"
    )


def is_per_image(weights: Tensor, count: int) -> bool:
    """Check for attention weights (N, heads, T, S) of N images; the heads may be folded into the batch."""
    return (weights.ndim == 3 and len(weights) % count == 0) or (weights.ndim == 4 and len(weights) == count)


def lay_on_grid(context: MethodContext, tokens: Tensor) -> Tensor:
    """Lay values (..., T) of all tokens on the grid of patches (..., h, w); class and register tokens are left out.

    The grid is that of a layer, enlarged as the images are.
    """
    model, count = context.model, tokens.shape[-1]
    scales = [side / base for side, base in zip(context.x.shape[2:], model.preprocessing.size, strict=True)]
    layouts = {(layer.layout.grid, layer.layout.prefix_tokens) for layer in model.layers if layer.layout.grid}
    grids = {(tuple(round(s * n) for s, n in zip(scales, grid, strict=True)), prefix) for grid, prefix in layouts}
    fitting = {(grid, prefix) for grid, prefix in grids if math.prod(grid) + prefix == count}
    if len(fitting) != 1:
        raise ConvscopeError(
            f"attention of {model.name} begins with {count} tokens, and the grid of patches that they lie on is not "
            "known; give it to load as grid=(h, w)"
        )
    ((grid, num_prefix),) = fitting
    return tokens[..., num_prefix:].reshape(*tokens.shape[:-1], *grid)


def _is_square(weights: Tensor) -> bool:
    return weights.shape[-1] == weights.shape[-2]


def _identity(weights: Tensor) -> Tensor:
    """Return the identity (S, S) of weights (P, heads, T, S)."""
    return torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)


def _normalized(relevance: Tensor) -> Tensor:
    """Scale the rows of ``R - 1`` to sum 1, and add 1 (equations 8 and 9 of Chefer et al.)."""
    identity = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    update = relevance - identity
    return update / update.sum(-1, keepdim=True).clamp(min=torch.finfo(update.dtype).tiny) + identity
