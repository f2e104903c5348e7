"""The seam of acceleration: a function that runs the network goes in, a faster one or the same one comes out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from convscope.engine.acceleration.conv_fusion import PIECES, find_fusions, with_fusion
from convscope.engine.nested import iter_tensors
from convscope.errors import ConvscopeError

R = TypeVar("R")

ENVIRONMENT_VARIABLE = "CONVSCOPE_ACCELERATE"
"""0 switches acceleration off, 1 (the default) switches it on; a comma-separated list switches on these `PIECES`."""

RTOL = 1e-2  # far above the effect of rounding, far below that of a mistake

logger = logging.getLogger(__name__)


def accelerate(
    run: Callable[[Tensor], R], example: Tensor, *, gradients: bool = False, enabled: bool = True, rtol: float = RTOL
) -> Callable[[Tensor], R]:
    """Return a faster function that computes what `run` computes, or `run` itself.

    The faster function is verified before use: both run on `example`, and every floating-point tensor in their results
    must agree; with `gradients`, so must the gradient of the results' squared norm. Otherwise, or if anything raises
    an exception (an operator that the installed PyTorch lacks, another signature), `run` is returned and a debug
    message is logged. If the faster function raises an exception later, `run` repeats the batch.

    Parameters
    ----------
    run : callable
        Runs the network on a batch (N, C, H, W). The network's parameters must not change while the result is in use.
    example : Tensor
        The batch to verify on; later ones may differ in size. It is not modified.
    gradients : bool
        Whether gradients with respect to the input will be needed.
    enabled : bool
        False returns `run`, as does the environment variable ``CONVSCOPE_ACCELERATE=0``.
    rtol : float
        Largest norm of the difference of two tensors, relative to the norm of the first.
    """
    pieces = _enabled_pieces() if enabled else frozenset()
    if "conv_fusion" not in pieces:
        return run
    try:
        with torch.set_grad_enabled(gradients):
            x = example.detach().requires_grad_(gradients)
            result, fusions = find_fusions(run, x.clone(), pieces)
            fused = with_fusion(run, fusions)
            if not fusions or not _agree(_tensors(result, x), _tensors(fused(x.clone()), x), rtol):
                logger.debug("not accelerated: %s", "the results differ" if fusions else "nothing to fuse")
                return run
    except Exception:  # whatever goes wrong, the plain pass still works, or raises by itself
        logger.debug("not accelerated", exc_info=True)
        return run

    def accelerated(x: Tensor) -> R:
        try:
            return fused(x)
        except Exception:  # as above
            logger.debug("batch of shape %s not accelerated", tuple(x.shape), exc_info=True)
        return run(x)

    return accelerated


def _enabled_pieces() -> frozenset[str]:
    """Return the pieces that the environment variable switches on."""
    value = os.environ.get(ENVIRONMENT_VARIABLE, "1")
    pieces = {"0": frozenset[str](), "1": PIECES}.get(value, frozenset(value.split(",")))
    if not pieces <= PIECES:
        raise ConvscopeError(
            f"{ENVIRONMENT_VARIABLE} is {value!r}; expected 0, 1 or a list of {', '.join(sorted(PIECES))}"
        )
    return pieces


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
