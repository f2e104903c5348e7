"""LeGrad: the gradient of what each block's tokens would say, with respect to the block's own attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convscope.attribution.context import MethodContext
from convscope.attribution.methods.attention import OTHERS, differentiable_weights, lay_on_grid, per_image
from convscope.attribution.methods.gradient import grad_batch_size
from convscope.engine.attention import AttentionRecorder
from convscope.engine.batching import balanced_chunks
from convscope.engine.capture import forward_hook
from convscope.engine.isolation import exclusive_access
from convscope.engine.layer_table import Layer
from convscope.engine.nested import primary_tensor, replace_tensor
from convscope.errors import ConvscopeError


def legrad(context: MethodContext) -> Tensor:
    """Average the positive gradients with respect to the attention of all blocks (LeGrad, unsigned).

    ::

        M = mean_l mean_h mean_i relu(dS_l / dA_l,h,i)

    ``S_l`` is the score of the network if its last block returned the mean of block ``l``'s tokens everywhere; ``A_l``
    are the attention weights of that block, of head ``h`` and token ``i``. In a network with attention pooling, its
    last block returns the tokens of block ``l`` instead, and ``A_l`` are the weights of the pooling.

    Costs one forward pass per block, and one more.

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
        If the network is no sequence of blocks with attention between all tokens of an image.

    References
    ----------
    Bousselham et al., LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity,
    ICCV 2025, section 3.
    """
    x, size = context.x, grad_batch_size(context)
    maps = []
    for positions in balanced_chunks(range(len(x)), size):
        rows = torch.arange(positions[0], positions[-1] + 1, device=x.device)
        blocks, has_pooling = _run_blocks(context, rows)
        relevance = [_block_relevance(context, rows, block, blocks[-1], has_pooling) for block in blocks]
        maps.append(lay_on_grid(context, torch.stack(relevance).mean(0)))
        context.report_progress((positions[-1] + 1) / len(x))
    return torch.cat(maps)


class Block(NamedTuple):
    """The block of one attention: the outermost module around it alone that returns tokens on a grid.

    `tokens` is what the module returned, `weights` are those of its attention.
    """

    module: nn.Module
    layer: Layer
    tokens: Tensor
    weights: Tensor


def _run_blocks(context: MethodContext, rows: Tensor) -> tuple[list[Block], bool]:
    """Run images; return the network's blocks, and whether an attention pooling follows them."""
    model = context.model
    with AttentionRecorder() as recorder, _record_blocks(context, recorder) as blocks:
        _, scores = context.forward(context.x[rows], rows)
    weights = differentiable_weights(model, recorder, scores)
    used = [block for _, block in sorted(blocks.items()) if block.tokens.requires_grad]
    num_others = len(weights) - len(used)
    if not used or num_others > 1 or (num_others == 1 and weights[-1] is used[-1].weights):
        raise ConvscopeError(
            f"legrad finds {len(used)} blocks that return tokens on a grid for {len(weights)} attentions in "
            f"{model.name}; expected one for each, except for a pooling. {OTHERS}"
        )
    return used, num_others == 1


@contextmanager
def _record_blocks(context: MethodContext, recorder: AttentionRecorder) -> Iterator[dict[int, Block]]:
    """Record the block of each attention, by the number of the attention, while the network runs."""
    model = context.model
    modules, _ = model.modules_and_parameters()
    blocks: dict[int, Block] = {}
    starts: dict[str, int] = {}

    def watch(name: str, module: nn.Module, stack: ExitStack) -> None:
        layer = model.layers[name]

        def on_start(*_: object) -> None:
            starts[name] = len(recorder.weights)

        def on_finish(_module: nn.Module, _args: object, output: object) -> None:
            tokens = primary_tensor(output)
            if len(recorder.weights) == starts[name] + 1 and tokens is not None:
                blocks[starts[name]] = Block(module, layer, tokens, recorder.weights[-1])

        stack.callback(module.register_forward_pre_hook(on_start).remove)
        stack.enter_context(forward_hook(module, on_finish))

    with exclusive_access(model.module), ExitStack() as stack:
        for name, module in modules.items():
            if name in model.layers.names and model.layers[name].layout.grid:
                watch(name, module, stack)
        yield blocks


def _block_relevance(context: MethodContext, rows: Tensor, block: Block, last: Block, has_pooling: bool) -> Tensor:
    """Compute the relevance (P, T, tokens) of one block, averaged over heads and queries."""
    (dim,) = block.layer.layout.spatial_dims
    tokens = block.tokens if has_pooling else block.tokens.mean(dim, keepdim=True).expand_as(block.tokens)

    def replace_tokens(_module: nn.Module, _args: object, output: Any) -> Any:
        original = primary_tensor(output)
        return output if original is None else replace_tensor(output, original, tokens)

    with (
        exclusive_access(context.model.module),
        forward_hook(last.module, replace_tokens),
        AttentionRecorder() as recorder,
    ):
        _, scores = context.forward(context.x[rows], rows)
    weights = recorder.weights[-1] if has_pooling else block.weights
    return torch.stack([_positive_gradient(scores[:, t], weights) for t in range(context.num_targets)], 1)


def _positive_gradient(scores: Tensor, weights: Tensor) -> Tensor:
    """Compute the positive gradient (P, tokens) of scores (P,) at weights, averaged over heads and queries."""
    (gradient,) = torch.autograd.grad(scores.sum(), weights, retain_graph=True, allow_unused=True)
    gradient = torch.zeros_like(weights) if gradient is None else gradient
    return per_image(gradient, len(scores)).float().clamp(min=0).mean((1, 2))
