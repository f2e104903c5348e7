"""The forward pass of a diagnosis: logits, pooled features and evidence of a batch, and where the evidence lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convscope.attribution.methods.cam import grad_cam
from convscope.engine import capture
from convscope.engine.acceleration import accelerate
from convscope.engine.batching import forward_batch_size, pad_to_fixed_batch
from convscope.engine.function_modes import without_function_modes
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.outputs import LOG_TASKS
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError

RIM = 8  # the rim is an eighth of the map wide, and at least one position


class BatchObservations(NamedTuple):
    """What is recorded of B images, float32.

    Attributes
    ----------
    logits : Tensor of shape (B, K)
        Their softmax is the network's probabilities.
    features, peaks : Tensor of shape (B, C)
        The layer's activations: mean and maximum over positions.
    evidence : Tensor of shape (B, h, w)
        Grad-CAM of the predicted class at the layer.
    """

    logits: Tensor
    features: Tensor
    peaks: Tensor
    evidence: Tensor

    def finite_rows(self) -> Tensor:
        """Return which images (B,), bool, have finite values everywhere."""
        return torch.stack([part.flatten(1).isfinite().all(1) for part in self]).all(0)


@contextmanager
def observing_forward(model: Model, layer: Layer, example: Tensor) -> Iterator[Callable[[Tensor], BatchObservations]]:
    """Provide a pass that records a batch: forwards once, and backwards from the logits to the layer.

    Gradients exist behind the layer only. Where the rest of the network is affine, as behind the last feature maps of
    many networks, the way back is one product with the weights of the predicted classes.

    Parameters
    ----------
    model : Model
    layer : Layer
    example : Tensor
        Network input on which an accelerated pass is verified.
    """
    with torch.no_grad(), capture.capture_layers(model, [layer.name], detach_at_layer=True) as run:

        def observe(x: Tensor, module: nn.Module | None = None) -> BatchObservations:
            outputs = run(x, module)
            maps, logits = outputs.maps[layer.name], outputs.logits
            with torch.enable_grad():
                predicted = logits.gather(1, logits.detach().argmax(1, keepdim=True)).sum()
            gradient = None
            if predicted.requires_grad:
                (gradient,) = torch.autograd.grad(predicted, maps, allow_unused=True)
            with without_function_modes():
                return _reduce(model, layer, logits.detach(), maps.detach().float(), gradient)

        yield accelerate(observe, model.module, example, enabled=model.can_accelerate)


@contextmanager
def scoring_forward(model: Model, memory: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Provide a pass that returns the probabilities (n, K), float32 on the CPU, of any number of inputs (n, C, H, W).

    Parameters
    ----------
    model : Model
    memory : int
        Bytes that intermediate results may take.

    Raises
    ------
    ConvscopeError
        If an output is not finite.
    """
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        size = forward_batch_size(model, memory)
        logits = accelerate(
            lambda x, module: run(x, module).logits,
            model.module,
            example_input(model),
            enabled=model.can_accelerate,
        )

        def scores(x: Tensor) -> Tensor:
            parts = []
            for part in torch.split(x, size):
                values = logits(pad_to_fixed_batch(model, part))[: len(part)]
                require_finite(model, values, "the network's output for a modified image")
                parts.append(softmax_logits(model, values).float().softmax(1).cpu())
            return torch.cat(parts)

        yield scores


def example_input(model: Model) -> Tensor:
    """Return noise on which an accelerated pass is verified."""
    height, width = model.preprocessing.image_size
    shape = (model.fixed_batch_size or 1, model.preprocessing.channels, height, width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(model.device, memory_format=torch.channels_last)


def softmax_logits(model: Model, logits: Tensor) -> Tensor:
    """Return logits (B, K) whose softmax are the network's probabilities.

    A single output s for two classes is read as the logits -s and s; its probability is their softmax at half of them.
    """
    is_sigmoid = model.reader.has_implicit_class and model.task not in LOG_TASKS
    return logits / 2 if is_sigmoid else logits


def _reduce(
    model: Model, layer: Layer, logits: Tensor, activation: Tensor, gradient: Tensor | None
) -> BatchObservations:
    """Reduce a layer's activations (B, C, h, w) and their gradient."""
    if gradient is None:
        raise ConvscopeError(
            f"layer {layer.name!r} has no influence on the predicted class; choose a layer on the way to the logits"
        )
    return BatchObservations(
        softmax_logits(model, logits),
        activation.mean((2, 3)),
        activation.amax((2, 3)),
        grad_cam(activation, gradient.float()),
    )


# --- where the evidence lies -----------------------------------------------------------------------------------------


def evidence_x(shares: Tensor) -> Tensor:
    """Return the horizontal centre of the evidence, 0 (left) to 1 (right)."""
    return shares.sum(1) @ _centers(shares.shape[2], shares)


def evidence_y(shares: Tensor) -> Tensor:
    """Return the vertical centre of the evidence, 0 (top) to 1 (bottom)."""
    return shares.sum(2) @ _centers(shares.shape[1], shares)


def evidence_spread(shares: Tensor) -> Tensor:
    """Return the share of positions that the evidence takes: 1 / (Z sum w_i^2), the participation ratio."""
    return 1 / (shares.square().sum((1, 2)) * shares[0].numel())


def evidence_at_rim(shares: Tensor) -> Tensor:
    """Return the share of the evidence in the outer eighth of the map on each side."""
    height, width = shares.shape[1:]
    rows, columns = (max(1, round(side / RIM)) for side in (height, width))
    return 1 - shares[:, rows : height - rows, columns : width - columns].sum((1, 2))


def _centers(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count


POSITION_FACTS: Mapping[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "evidence x": (evidence_x, "horizontal centre of the evidence, 0 (left) to 1"),
    "evidence y": (evidence_y, "vertical centre of the evidence, 0 (top) to 1"),
    "evidence spread": (evidence_spread, "share of positions that the evidence takes"),
    "evidence at the rim": (evidence_at_rim, "share of the evidence at the rim of the image"),
}
"""Facts about where the evidence lies, by name: a function of shares (B, h, w) that sum to 1, and a description."""


def position_facts(evidence: Tensor) -> Tensor:
    """Compute the facts (B, F) of `POSITION_FACTS` from evidence (B, h, w); NaN where no evidence is positive."""
    positive = evidence.double().clamp(min=0)
    total = positive.sum((1, 2), keepdim=True)
    shares = positive / torch.where(total > 0, total, 1)
    facts = torch.stack([function(shares) for function, _ in POSITION_FACTS.values()], 1).float()
    return torch.where(total[:, :, 0] > 0, facts, torch.nan)
