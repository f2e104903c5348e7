"""One batch of pictures, their maps, and the network: all that a metric works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from convscope.attribution.targets import BatchTargets
from convscope.engine.batching import balanced_chunks, pad_to_fixed_batch
from convscope.engine.capture import ForwardResult
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.evaluation.baselines import filled
from convscope.images.geometry import Geometry

T = TypeVar("T")


class Scores(NamedTuple):
    """What a metric found for a batch: `values` (B, T); curves (B, T, steps + 1) under names; what chance gives."""

    values: Tensor
    curves: Mapping[str, Tensor] = MappingProxyType({})
    chance_level: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EvaluationContext:
    """B pictures, prepared: `x` (B, C, H, W), channels last; T maps of each, (B, T, h, w), as they were made.

    `run` puts inputs through the network, `size` of them at once. `seed` is what random draws come from: the same for
    every picture, whatever its neighbours. `seen` is what the network makes of the pictures as they are.
    `masks` are (T, H, W) bool for each picture, `again` makes the maps anew by the same method: of inputs (M, C, H, W),
    for pictures `rows` (M,) of the batch and, where they are not the maps' own, classes (M, T). `tell` is told the
    share of the work, 0 to 1, that is done.
    """

    model: Model
    x: Tensor
    maps: Tensor
    chosen: BatchTargets
    seen: ForwardResult
    run: Callable[[Tensor], ForwardResult]
    size: int
    seed: int
    geometry: Sequence[Geometry]
    masks: Sequence[Tensor] = ()
    recompute: Callable[..., Tensor] | None = None
    tell: Callable[[float], None] = lambda share: None
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """T."""
        return self.maps.shape[1]

    @property
    def heatmap(self) -> Tensor:
        """The maps at the input's resolution (B, T, H, W), linear between the places' centres, float32."""
        return self.cached("heat", lambda: Geometry.whole(self.x.shape[2:]).to_original(self.maps))

    @property
    def order(self) -> Tensor:
        """Each pixel's rank, (B, T, H, W) int32: 0 for the hottest.

        Pixels of equal heat are ranked in an order drawn from the seed, the same for every picture: in reading order, a
        map that is 0 over much of the picture would be judged by what is at its top.
        """
        return self.cached("order", lambda: pixel_ranks(self.heatmap, self.generator()))

    @property
    def rows(self) -> Tensor:
        """0 to B - 1."""
        return torch.arange(len(self.x), device=self.x.device)

    @property
    def probabilities(self) -> Tensor:
        """Of the pictures as they are, (B, T)."""
        return self._judged(self.seen, self.rows, self.probability)

    @property
    def target_scores(self) -> Tensor:
        """What the targets score for the pictures as they are, (B, T); see `raw`."""
        return self._judged(self.seen, self.rows, self.raw)

    @property
    def logits(self) -> Tensor:
        """What the targets score for the pictures as they are, (B, T), nothing taken off."""
        return replace(self, chosen=replace(self.chosen, against=None)).target_scores

    @property
    def sigmoid(self) -> bool:
        """Whether each class has a probability of its own."""
        return self.model.final_activation == "sigmoid" or self.seen.logits.shape[1] == 1

    def generator(self) -> torch.Generator:
        """A fresh generator on the CPU: the same draws for every picture."""
        return torch.Generator().manual_seed(self.seed)

    def raw(self, seen: ForwardResult, rows: Tensor) -> Tensor:
        """What the targets score, (M, T): logits, differences of logits, or what functions give."""
        return self.chosen.scores(seen, rows)

    def probability(self, seen: ForwardResult, rows: Tensor) -> Tensor:
        """The targets' probabilities (M, T): softmax; sigmoid where each class has one of its own.

        Of a class against others: the sigmoid of the difference, the share of the class if there were none but these.
        A function has no probability: it is what it gives.
        """
        if self.chosen.functions:
            return self.raw(seen, rows)
        if self.chosen.against is not None:
            return self.raw(seen, rows).sigmoid()
        shares = seen.logits.sigmoid() if self.sigmoid else seen.logits.softmax(1)
        return shares.gather(1, self.chosen.classes[rows])

    def scores(
        self,
        rows: Tensor,
        inputs: Callable[[Tensor], Tensor],
        of: Callable[[ForwardResult, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What the targets score for M inputs, (M, T), without gradients.

        `inputs(part)` makes those with the numbers `part`, a piece of 0 to M - 1; `rows` (M,) says which picture each
        belongs to; `of` is `probability`, if nothing else is said, or `raw`.
        """
        found = [torch.empty(0, self.count, device=rows.device)]
        for part in balanced_chunks(range(len(rows)), self.size):
            numbers = torch.arange(part[0], part[-1] + 1, device=rows.device)
            seen = self.run(pad_to_fixed_batch(self.model, inputs(numbers)))
            require_finite(self.model, seen.logits, "the network's output for a changed picture")
            found.append(self._judged(seen, rows[numbers], of or self.probability))
            self.tell((part[-1] + 1) / len(rows))
        return torch.cat(found)

    def _judged(self, seen: ForwardResult, rows: Tensor, of: Callable[[ForwardResult, Tensor], Tensor]) -> Tensor:
        """Scores of the pass's first rows, which belong to the pictures `rows`; the rest has filled it up."""
        return of(seen, torch.cat([rows, rows[-1:].expand(len(seen.logits) - len(rows))]))[: len(rows)]

    def with_progress(self, done: float, whole: float) -> EvaluationContext:
        """The same, whose share of the work begins at `done` and is `whole` in all."""
        return replace(self, tell=lambda share: self.tell(done + whole * share))

    def baseline(self, fill: str) -> Tensor:
        """What takes the place of pixels that are taken away, as `x`."""
        return self.cached(("baseline", fill), lambda: filled(self.x, fill, self.generator()))

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives: made once, for all metrics that share it."""
        if key not in self.memo:
            self.memo[key] = make()
        found: T = self.memo[key]
        return found


def pixel_ranks(heatmap: Tensor, draw: torch.Generator) -> Tensor:
    """Each pixel's rank in its map (B, T, ...), int32: 0 for the hottest; equal ones in an order drawn at random."""
    flat = heatmap.flatten(2)
    count = flat.shape[2]
    shuffled = torch.randperm(count, generator=draw).to(heatmap.device)
    positions = shuffled[flat[..., shuffled].argsort(dim=2, descending=True, stable=True)]
    ranks = torch.arange(count, dtype=torch.int32, device=heatmap.device).expand_as(positions)
    return torch.empty_like(ranks).scatter_(2, positions, ranks).view(heatmap.shape)


def composite(keep: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`first` where `keep` (M, H, W) is true and `second` elsewhere; (M, C, H, W) each, channels last."""
    return torch.where(keep[..., None], first.movedim(1, -1), second.movedim(1, -1)).movedim(-1, 1)
