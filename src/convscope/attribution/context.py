"""One batch of pictures and what is asked about them: what a method may do with the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from convscope.attribution.targets import BatchTargets
from convscope.engine import capture, resume
from convscope.engine.acceleration.conv_fusion import Folds, find_fusions, with_fusion
from convscope.engine.batching import cache_friendly_batch_size, pad_to_fixed_batch
from convscope.engine.capture import ForwardResult
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model

MethodOutput = Tensor | tuple[Tensor, dict[str, Tensor]]
"""What a method returns: maps (B, T, ...), or these and what else it found, under names, (B, ...) each."""

LOGITS_RTOL = 1e-5  # logits, relative to the largest


@dataclass(frozen=True)
class MethodContext:
    """B pictures, prepared: `x` (B, C, H, W); T targets of each; a layer, for methods that look at one.

    `run` puts inputs through the network, `size` inputs fit into memory at once, `seed` is what random draws come from
    (the same for every picture, whatever its neighbours). `tell` is told the share, 0 to 1, of the work that is done.
    """

    model: Model
    x: Tensor
    targets: BatchTargets
    run: Callable[[Tensor], ForwardResult]
    batch_size: int
    seed: int
    report_progress: Callable[[float], None]
    layer: Layer | None = None

    @property
    def num_targets(self) -> int:
        """T."""
        return self.targets.classes.shape[1]

    def generator(self) -> torch.Generator:
        """A fresh generator on the CPU: the same draws for every picture."""
        return torch.Generator().manual_seed(self.seed)

    def scores(self, x: Tensor, image: int | Tensor) -> Tensor:
        """What the targets of one picture score for M inputs (M, C, H, W): (M, T), without gradients.

        `picture` may also be (M,): which picture's targets each input is asked for.
        """
        with torch.no_grad():
            return self._target_scores(self.run(pad_to_fixed_batch(self.model, x)), image)[: len(x)]

    def score_fn(self, image: int, probability: bool = False) -> Callable[[Tensor], Tensor]:
        """What gives the scores (M, T) of one picture's targets for many inputs (M, C, H, W), without gradients.

        `probability`: what the network makes of the logits, behind its softmax or sigmoid, counts in their place.
        """

        run = self._fused_run(image)

        def scores(x: Tensor) -> Tensor:
            with torch.no_grad():
                seen = run(pad_to_fixed_batch(self.model, x))
                return self._target_scores(_with_probabilities(self.model, seen) if probability else seen, image)[
                    : len(x)
                ]

        return scores

    @property
    def cache_batch_size(self) -> int:
        """Inputs to a pass without gradients: on a CPU, no more than leave an activation in the cache.

        Beyond that, its memory goes back to the system after every layer, which costs more than larger passes gain.
        """
        if self.model.fixed_batch_size is not None:
            return self.batch_size
        return min(self.batch_size, cache_friendly_batch_size(self.model))

    def _fused_run(self, image: int) -> Callable[[Tensor], ForwardResult]:
        """`run`, folded if that gives this picture's own logits again; else as it is."""
        if not self.model.loaded_by_convscope or not self._fusions:
            return self.run
        quick, x = with_fusion(self.run, self._fusions), pad_to_fixed_batch(self.model, self.x[image : image + 1])
        with torch.no_grad():
            plain, folded = self.run(x).logits, quick(x).logits
        return quick if bool((plain - folded).abs().max() <= LOGITS_RTOL * plain.abs().max()) else self.run

    @cached_property
    def _fusions(self) -> Folds:
        return find_fusions(self.run, pad_to_fixed_batch(self.model, self.x[:1]))

    def gradients(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradients at inputs `x` (M, C, H, W), and the scores: (T, M, C, H, W) float32 and (M, T).

        `rows` (M,) says which picture each input belongs to; None: they are the batch itself. No input's gradient
        depends on another, so one backward pass over the sum of the scores holds each one's own.
        """
        x, scores = self.forward(x, rows)
        return torch.stack(list(self.backward(x, scores))), scores.detach()

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A fresh leaf for inputs `x`, and the scores (M, T) that lead back to it."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return x, self.targets.scores(self.run(x.clone()), rows)  # a copy: the network may write into its input

    def backward(self, x: Tensor, scores: Tensor) -> Iterator[Tensor]:
        """The gradients (M, C, H, W) float32 of each target's scores, one backward pass after another."""
        for t in range(self.num_targets):
            gradient = None
            if scores.requires_grad:
                one = torch.zeros_like(scores)
                one[:, t] = 1
                more = t + 1 < self.num_targets
                (gradient,) = torch.autograd.grad(scores, x, one, retain_graph=more, allow_unused=True)
            yield torch.zeros_like(x, requires_grad=False).float() if gradient is None else gradient.float()

    @contextmanager
    def from_layer(self, image: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Only the part behind the layer: the block gets what the targets of one picture score, (M, T), for maps
        (M, C, h, w) in the place of the layer's output."""
        assert self.layer is not None
        with resume.resume_from_layer(self.model, self.layer.name, self.x[image : image + 1]) as run:

            def scores(maps: Tensor) -> Tensor:
                return self._target_scores(run(pad_to_fixed_batch(self.model, maps)), image)[: len(maps)]

            yield scores

    def layer_activations(self) -> Tensor:
        """The layer's output (B, C, h, w), float32, without gradients."""
        assert self.layer is not None
        with torch.no_grad(), capture.capture_layers(self.model, [self.layer.name], stop_early=True) as run:
            return run(self.x).maps[self.layer.name].float()

    def _target_scores(self, seen: ForwardResult, image: int | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            return self.targets.scores(seen, pad_to_fixed_batch(self.model, image))
        return self.targets.scores(seen, torch.full((len(seen.logits),), image, device=seen.logits.device))


def _with_probabilities(model: Model, seen: ForwardResult) -> ForwardResult:
    """Probabilities in the place of logits."""
    return replace(
        seen, logits=seen.logits.sigmoid() if model.final_activation == "sigmoid" else seen.logits.softmax(1)
    )
