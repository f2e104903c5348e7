"""The seam of acceleration: a function that runs the network goes in, a faster one or the same one comes out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from convscope.engine.acceleration.conv_fusion import CONVOLUTIONS, Run, find_chains, with_fusion
from convscope.engine.nested import iter_tensors

R = TypeVar("R")

ENVIRONMENT_VARIABLE = "CONVSCOPE_ACCELERATE"
"""0 switches acceleration off."""

RTOL = 1e-2  # far above the effect of rounding, far below that of a mistake

logger = logging.getLogger(__name__)


def accelerate(
    run: Run[R],
    network: nn.Module,
    example: Tensor,
    *,
    gradients: bool = False,
    enabled: bool = True,
    rtol: float = RTOL,
) -> Callable[[Tensor], R]:
    """Return a function of a batch that computes what ``run(x, network)`` computes, faster if possible.

    It runs a copy of the network's modules, which shares parameters, buffers and hooks with them. It is verified before
    use: both run on `example`, and every floating-point tensor in their results must agree; with `gradients`, so must
    the gradient of the results' squared norm. Otherwise, or if anything raises an exception (an operator that the
    installed PyTorch lacks, another signature), the plain function is returned and a debug message is logged. If the
    faster function raises an exception later, the batch is repeated on the network.

    Parameters
    ----------
    run : callable
        ``run(x, network)`` runs the network, or a copy of it, on a batch (N, C, H, W).
    network : nn.Module
        It is not modified. Its parameters must not change while the result is in use.
    example : Tensor
        The batch to verify on; later ones may differ in size. It is not modified.
    gradients : bool
        Whether gradients with respect to the input will be needed.
    enabled : bool
        False returns the plain function, as does the environment variable ``CONVSCOPE_ACCELERATE=0``.
    rtol : float
        Largest norm of the difference of two tensors, relative to the norm of the first.
    """

    def plain(x: Tensor) -> R:
        return run(x, network)

    enabled = enabled and os.environ.get(ENVIRONMENT_VARIABLE) != "0"
    if not enabled or not any(isinstance(module, CONVOLUTIONS) for module in network.modules()):
        return plain
    try:
        with torch.set_grad_enabled(gradients):
            x = example.detach().requires_grad_(gradients)
            result, copied, chains = find_chains(run, network, x.clone())
            fused = with_fusion(run, copied, chains)
            if not chains or not _agree(_tensors(result, x), _tensors(fused(x.clone()), x), rtol):
                logger.debug("not accelerated: %s", "the results differ" if chains else "nothing to fuse")
                return plain
    except Exception:  # whatever goes wrong, the plain pass still works, or raises by itself
        logger.debug("not accelerated", exc_info=True)
        return plain

    def accelerated(x: Tensor) -> R:
        try:
            return fused(x)
        except Exception:  # as above
            logger.debug("batch of shape %s not accelerated", tuple(x.shape), exc_info=True)
        return plain(x)

    return accelerated


def _tensors(result: object, x: Tensor) -> list[Tensor]:
    """Return the floating-point tensors in a result, and the gradient of half their squared norm if there is one."""
    outputs = [tensor for tensor in iter_tensors(result) if tensor.is_floating_point()]
    ends = [output for output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(ends, x, [end.detach() for end in ends]) if ends else ()
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def _agree(expected: list[Tensor], actual: list[Tensor], rtol: float) -> bool:
    """Compare two lists of tensors by the norms of their differences; NaN never agrees."""
    norm = torch.linalg.vector_norm
    return len(expected) == len(actual) and all(
        a.shape == b.shape and bool(norm(a - b) <= rtol * norm(a)) for a, b in zip(expected, actual, strict=True)
    )
