"""What a method gets: a batch of images, their targets, and ways to run the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convscope.attribution import influence
from convscope.attribution.batch_targets import BatchTargets
from convscope.engine import capture, resume
from convscope.engine.acceleration import accelerate
from convscope.engine.batching import cache_friendly_batch_size, pad_to_fixed_batch
from convscope.engine.capture import ForwardResult, NetworkForward
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model

Extras = dict[str, Tensor]
MethodOutput = Tensor | tuple[Tensor, Extras]
"""What a method returns: maps (B, T, ...), alone or with further arrays (B, ...) by name."""

LOGITS_RTOL = 1e-5  # accepted difference of a fused network's logits, relative to the largest logit


@dataclass(frozen=True)
class MethodContext:
    """A batch of B preprocessed images with T targets each, and the network.

    Attributes
    ----------
    model : Model
    x : Tensor of shape (B, C, H, W)
        The network's input.
    targets : BatchTargets
    run : callable
        Runs inputs (M, C, H, W) through the network.
    batch_size : int
        The number of inputs whose intermediate results fit into memory.
    seed : int
        Seed of random draws; they are the same for every image.
    report_progress : callable
        Takes the fraction of the work that is done, 0 to 1.
    """

    model: Model
    x: Tensor
    targets: BatchTargets
    run: NetworkForward[ForwardResult]
    batch_size: int
    seed: int
    report_progress: Callable[[float], None]

    @property
    def num_targets(self) -> int:
        """The number T of targets per image."""
        return self.targets.classes.shape[1]

    def generator(self) -> torch.Generator:
        """Create a random generator on the CPU, seeded alike for every image."""
        return torch.Generator().manual_seed(self.seed)

    # --- without gradients -------------------------------------------------------------------------------------------

    def scores(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute the scores (M, T) of inputs `x` (M, C, H, W) for the targets of the images `rows` (M,)."""
        with torch.no_grad():
            return self.targets.scores(
                self.run(pad_to_fixed_batch(self.model, x)), pad_to_fixed_batch(self.model, rows)
            )[: len(x)]

    def score_fn(self, image: int, probability: bool = False) -> Callable[[Tensor], Tensor]:
        """Return a function that computes the scores of many inputs for one image's targets.

        Parameters
        ----------
        image : int
            Row of the batch.
        probability : bool
            Compute probabilities rather than logits.

        Returns
        -------
        callable
            Takes inputs (M, C, H, W), returns scores (M, T); runs without gradients.
        """
        example = pad_to_fixed_batch(self.model, self.x[image : image + 1])
        run = accelerate(self.run, self.model.module, example, enabled=self.model.can_accelerate, rtol=LOGITS_RTOL)

        def scores(x: Tensor) -> Tensor:
            with torch.no_grad():
                outputs = run(pad_to_fixed_batch(self.model, x))
                return self._image_scores(self._with_probabilities(outputs) if probability else outputs, image)[
                    : len(x)
                ]

        return scores

    @property
    def forward_batch_size(self) -> int:
        """The number of inputs per pass without gradients that is fast and fits into memory."""
        if self.model.fixed_batch_size is not None:
            return self.batch_size
        return min(self.batch_size, cache_friendly_batch_size(self.model))

    # --- with gradients ----------------------------------------------------------------------------------------------

    def gradients(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the targets' scores at inputs.

        An input's score depends on no other input, so the gradient of the scores' sum holds each input's own.

        Parameters
        ----------
        x : Tensor of shape (M, C, H, W)
        rows : Tensor of shape (M,), optional
            The image of the batch that each input belongs to; if omitted, the inputs are the batch itself.

        Returns
        -------
        gradients : Tensor of shape (T, M, C, H, W), float32
        scores : Tensor of shape (M, T)
        """
        x, scores = self.forward(x, rows)
        return torch.stack(list(self.backward(x, scores))), scores.detach()

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Make `x` a leaf of a new graph; return it and the scores (M, T) computed from it."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            scores = self.targets.scores(self.run(x.clone()), rows)  # a copy: the network may modify its input
        self.require_gradient(scores)
        return x, scores

    def require_gradient(self, scores: Tensor | None, layer: Layer | None = None) -> None:
        """Raise ConvscopeError if scores, or a gradient, miss the gradient that they should have.

        That is where they depend on the layer (None: on the input), though only forward passes show it.
        """
        if scores is None or not scores.requires_grad:
            influence.require_gradient(self.model, layer, self.x, influence.scores_of_image(self.targets))

    def backward(self, x: Tensor, scores: Tensor, layer: Layer | None = None) -> Iterator[Tensor]:
        """Yield the gradients (M, C, H, W) float32 of each target's scores, one backward pass per target.

        `x` holds inputs, or the output of `layer`.
        """
        for t in range(self.num_targets):
            gradient = None
            if scores.requires_grad:
                one_hot = torch.zeros_like(scores)
                one_hot[:, t] = 1
                retain_graph = t + 1 < self.num_targets
                (gradient,) = torch.autograd.grad(scores, x, one_hot, retain_graph=retain_graph, allow_unused=True)
            if gradient is None:
                self.require_gradient(None, layer)
            yield torch.zeros_like(x, requires_grad=False).float() if gradient is None else gradient.float()

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _image_scores(self, outputs: ForwardResult, image: int) -> Tensor:
        rows = torch.full((len(outputs.logits),), image, device=outputs.logits.device)
        return self.targets.scores(outputs, rows)

    def _with_probabilities(self, outputs: ForwardResult) -> ForwardResult:
        """Replace the logits by probabilities."""
        return replace(outputs, logits=self.model.probabilities(outputs.logits))


@dataclass(frozen=True)
class LayerContext(MethodContext):
    """A `MethodContext` with the layer that a method works at.

    Attributes
    ----------
    layer : Layer
    """

    layer: Layer

    @contextmanager
    def from_layer(self, image: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Run only the part of the network after the layer.

        The block gets a function that takes maps (M, C, h, w) in place of the layer's output for one image and returns
        the scores (M, T) of the image's targets.
        """
        with resume.resume_from_layer(self.model, self.layer.name, self.x[image : image + 1]) as run:

            def scores(maps: Tensor) -> Tensor:
                return self._image_scores(run(pad_to_fixed_batch(self.model, maps)), image)[: len(maps)]

            yield scores

    def layer_activations(self) -> Tensor:
        """Compute the layer's output (B, C, h, w), float32, without gradients."""
        with torch.no_grad(), capture.capture_layers(self.model, [self.layer.name], stop_early=True) as run:
            return run(self.x).maps[self.layer.name].float()
