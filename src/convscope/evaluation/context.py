"""What a metric works with: one batch of images, their maps, and the network."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from convscope.attribution.batch_targets import BatchTargets
from convscope.engine.batching import balanced_chunks, pad_to_fixed_batch
from convscope.engine.capture import ForwardResult
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.evaluation.baselines import apply_fill
from convscope.images.geometry import Geometry

T = TypeVar("T")


class Scores(NamedTuple):
    """What a metric returns for a batch.

    Attributes
    ----------
    values : Tensor
        (B, T).
    curves : mapping of str to Tensor
        (B, T, steps + 1) by name.
    chance_level : Tensor or None
        (B, T): the expected value of a random map, where it is known.
    """

    values: Tensor
    curves: Mapping[str, Tensor] = MappingProxyType({})
    chance_level: Tensor | None = None


class Recompute(Protocol):
    """Compute maps again by the method that made them."""

    def __call__(self, x: Tensor, image_rows: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return maps (M, T, h, w) of inputs (M, C, H, W) that belong to rows (M,) of the batch."""


@dataclass(frozen=True, eq=False)
class EvaluationContext:
    """A batch of B images with T maps each, and cached quantities that several metrics share.

    Attributes
    ----------
    x : Tensor
        (B, C, H, W), network input, channels_last.
    attribution_maps : Tensor
        (B, T, h, w), as they were computed.
    batch_targets : BatchTargets
        What the maps explain.
    outputs : ForwardResult
        The network's output for the unmodified images.
    run : callable
        Runs a batch of inputs through the network.
    batch_size : int
        Inputs per call of `run`.
    seed : int
        Source of random numbers: the same for every image, whatever else is in the batch.
    geometry : sequence of Geometry
        Where each input lies in its image.
    masks : sequence of Tensor
        (T, H, W) bool per image: where the targets are.
    recompute : callable or None
        Computes maps again by the same method.
    report_progress : callable
        Called with the fraction of the work that is done, 0 to 1.
    """

    model: Model
    x: Tensor
    attribution_maps: Tensor
    batch_targets: BatchTargets
    outputs: ForwardResult
    run: Callable[[Tensor], ForwardResult]
    batch_size: int
    seed: int
    geometry: Sequence[Geometry]
    masks: Sequence[Tensor] = ()
    recompute: Recompute | None = None
    report_progress: Callable[[float], None] = lambda _: None
    cache: dict[Hashable, object] = field(default_factory=dict)

    @property
    def num_targets(self) -> int:
        """T."""
        return self.attribution_maps.shape[1]

    @property
    def heatmaps(self) -> Tensor:
        """The maps at the input's resolution, (B, T, H, W) float32, interpolated linearly."""
        return self.cached("heatmaps", lambda: Geometry.whole(self.x.shape[2:]).to_original(self.attribution_maps))

    @property
    def pixel_ranks(self) -> Tensor:
        """Each pixel's rank, (B, T, H, W) int32: 0 for the most relevant.

        Ties are broken at random from the seed, in the same order for every image: in reading order, a map with large
        areas of 0 would be scored by the content at its top.
        """
        return self.cached("pixel_ranks", lambda: rank_pixels(self.heatmaps, self.generator()))

    @property
    def image_rows(self) -> Tensor:
        """The numbers 0 to B - 1."""
        return torch.arange(len(self.x), device=self.x.device)

    @property
    def probabilities(self) -> Tensor:
        """The targets' probabilities for the unmodified images, (B, T)."""
        return self._unpadded(self.outputs, self.image_rows, self.target_probabilities)

    @property
    def target_scores(self) -> Tensor:
        """The targets' scores for the unmodified images, (B, T); see `raw_scores`."""
        return self._unpadded(self.outputs, self.image_rows, self.raw_scores)

    @property
    def logits(self) -> Tensor:
        """The targets' scores for the unmodified images without contrast classes, (B, T)."""
        return replace(self, batch_targets=replace(self.batch_targets, against=None)).target_scores

    def generator(self) -> torch.Generator:
        """Return a new generator on the CPU with the context's seed."""
        return torch.Generator().manual_seed(self.seed)

    def raw_scores(self, outputs: ForwardResult, image_rows: Tensor) -> Tensor:
        """Return the targets' scores (M, T): logits, differences of logits, or values of functions."""
        return self.batch_targets.scores(outputs, image_rows)

    def target_probabilities(self, outputs: ForwardResult, image_rows: Tensor) -> Tensor:
        """Return the targets' probabilities (M, T), or their values if the network computes values.

        For a class against others: the sigmoid of the difference of logits, i.e. the probability among these classes
        alone. A function or a box has no probability; its value is used.
        """
        if self.batch_targets.functions or self.batch_targets.boxes is not None:
            return self.raw_scores(outputs, image_rows)
        if self.batch_targets.against is not None:
            return self.raw_scores(outputs, image_rows).sigmoid()
        return self.model.probabilities(outputs.logits).gather(1, self.batch_targets.classes[image_rows])

    def score_inputs(
        self,
        image_rows: Tensor,
        make_inputs: Callable[[Tensor], Tensor],
        score: Callable[[ForwardResult, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Score M modified inputs, without gradients.

        Parameters
        ----------
        image_rows : Tensor
            (M,): the image that each input belongs to.
        make_inputs : callable
            Returns the inputs whose numbers, a part of 0 to M - 1, it is given.
        score : callable, optional
            `target_probabilities` (default) or `raw_scores`.

        Returns
        -------
        Tensor
            (M, T).
        """
        scores = [torch.empty(0, self.num_targets, device=image_rows.device)]
        for part in balanced_chunks(range(len(image_rows)), self.batch_size):
            numbers = torch.arange(part[0], part[-1] + 1, device=image_rows.device)
            outputs = self.run(pad_to_fixed_batch(self.model, make_inputs(numbers)))
            require_finite(self.model, outputs.logits, "the network's output for a modified image")
            scores.append(self._unpadded(outputs, image_rows[numbers], score or self.target_probabilities))
            self.report_progress((part[-1] + 1) / len(image_rows))
        return torch.cat(scores)

    def _unpadded(
        self, outputs: ForwardResult, image_rows: Tensor, score: Callable[[ForwardResult, Tensor], Tensor]
    ) -> Tensor:
        """Score a pass that may have been padded to a fixed batch size, and drop the padding."""
        padding = image_rows[-1:].expand(len(outputs.logits) - len(image_rows))
        return score(outputs, torch.cat([image_rows, padding]))[: len(image_rows)]

    def with_progress(self, start: float, fraction: float) -> EvaluationContext:
        """Return a context whose progress runs from `start` to `start + fraction` of this one's."""
        return replace(self, report_progress=lambda done: self.report_progress(start + fraction * done))

    def baseline(self, fill: str) -> Tensor:
        """Return the replacement of removed pixels, with the shape of `x`."""
        return self.cached(("baseline", fill), lambda: apply_fill(self.x, fill, self.generator()))

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the cached value of `make`, shared by all metrics."""
        if key not in self.cache:
            self.cache[key] = make()
        return cast(T, self.cache[key])


def rank_pixels(heatmaps: Tensor, generator: torch.Generator) -> Tensor:
    """Return each pixel's rank in its map (B, T, ...), int32: 0 for the most relevant; ties in random order."""
    flat = heatmaps.flatten(2)
    count = flat.shape[2]
    shuffled = torch.randperm(count, generator=generator).to(heatmaps.device)
    positions = shuffled[flat[..., shuffled].argsort(dim=2, descending=True, stable=True)]
    ranks = torch.arange(count, dtype=torch.int32, device=heatmaps.device).expand_as(positions)
    return torch.empty_like(ranks).scatter_(2, positions, ranks).view(heatmaps.shape)


def composite(mask: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Return `foreground` where `mask` (M, H, W) is true and `background` elsewhere; (M, C, H, W), channels_last."""
    return torch.where(mask[..., None], foreground.movedim(1, -1), background.movedim(1, -1)).movedim(-1, 1)
