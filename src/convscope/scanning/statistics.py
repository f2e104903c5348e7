"""What is kept of a layer's maps as pictures stream by: best and worst places, moments, a histogram; and how it merges.

A unit is a channel of maps (N, U, H, W). For a unit and a picture only the picture's best place counts, and its worst.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 2.0 ** (np.arange(-16, 17) / 2)
HISTOGRAM_EDGES = np.concatenate([-_STEPS[::-1], [0.0], _STEPS]).astype(np.float32)
"""Bin i of a histogram holds HISTOGRAM_EDGES[i - 1] < value <= HISTOGRAM_EDGES[i]; the first and the last are open."""
HISTOGRAM_BINS = len(HISTOGRAM_EDGES) + 1

CHUNK = 2 << 20  # bytes of maps that are reduced at once on a CPU: what is read several times is to stay in the cache
PENDING = 128  # pictures whose extremes wait before they are sorted in


class BatchReduction(NamedTuple):
    """What is read off a batch of maps: for every picture and unit (N, U).

    `highest` and `lowest` value, the first place (row * W + column) of each; the value in the middle; over the places,
    the sum of what they differ from it, the sum of the squares of that, and the number above 0. `lowest` is None where
    it was not asked for.
    """

    highest: Tensor
    highest_at: Tensor
    lowest: Tensor | None
    lowest_at: Tensor | None
    middle: Tensor
    total: Tensor
    squares: Tensor
    active: Tensor

    def select(self, rows: Tensor) -> BatchReduction:
        """Only some of the pictures."""
        lowest, lowest_at = (None if part is None else part[rows] for part in (self.lowest, self.lowest_at))
        rest = (part[rows] for part in self[4:])
        return BatchReduction(self.highest[rows], self.highest_at[rows], lowest, lowest_at, *rest)

    def moments(self, positions: int) -> tuple[Tensor, Tensor]:
        """Over so many places: the means, and the sums of squared differences from them; float64 (N, U), on the CPU.

        Float32 sums of squares of the values themselves would leave nothing of a variance that is small beside the
        mean. The middle is one of the P places, so that its own square is at most P times the variance.
        """
        middle, total, squares = (part.cpu().double() for part in (self.middle, self.total, self.squares))
        return (middle * positions + total) / positions, (squares - total.square() / positions).clamp(min=0)


def reduced(maps: Tensor, below: Tensor | None = None) -> BatchReduction:
    """`Reduced` from maps (N, U, H, W) or (N, U).

    below: values (U,); where no value of the batch lies below the least of them, the lowest are of no interest and are
    left out. What is not finite in a picture's maps is not finite in its total.
    """
    maps = maps.detach().float()
    maps = maps if maps.ndim == 4 else maps[:, :, None, None]
    highest, highest_at = _peaks(maps)
    lowest = lowest_at = None
    if below is None or bool((maps.amin() < below).any()):
        lowest, lowest_at = _peaks(-maps)
        lowest = -lowest
    positions, middle = _laid(maps)
    each = positions[0].numel() * positions.element_size() if len(positions) else 1
    size = max(1, CHUNK // max(each, 1)) if maps.device.type == "cpu" else len(maps)
    scratch = torch.empty_like(positions[:size])
    chunks = zip(torch.split(positions, size), torch.split(middle, size), strict=True)
    parts = [_sums(part, own, scratch[: len(part)]) for part, own in chunks]
    sums = (torch.cat(part) for part in zip(*parts, strict=True))
    return BatchReduction(highest, highest_at, lowest, lowest_at, middle, *sums)


def fused(maps: Tensor) -> BatchReduction:
    """`Reduced` by plain reductions, of which a compiler makes a single pass over the maps."""
    maps = maps.float() if maps.ndim == 4 else maps.float()[:, :, None, None]
    positions, middle = _laid(maps)
    apart = positions - middle[:, None]
    (highest, highest_at), (lowest, lowest_at) = positions.max(1), positions.min(1)
    sums = apart.sum(1), apart.square().sum(1), (positions > 0).float().sum(1)
    return BatchReduction(highest, highest_at.int(), lowest, lowest_at.int(), middle, *sums)


def _laid(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The places (N, P, U), a view where channels lie last, and the one in the middle (N, U)."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2), maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].contiguous()


def _peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The highest value of every map (N, U), and its first place: one pooling over all of it."""
    values, positions = F.max_pool2d(maps, (maps.shape[2], maps.shape[3]), return_indices=True)
    return values.flatten(1), positions.flatten(1).int()


def _sums(positions: Tensor, middle: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the places (N, P, U): the sum of what they are apart from the middle (N, U), of its squares, and the number
    above 0; each (N, U)."""
    ones = positions.new_ones(len(positions), 1, positions.shape[1])

    def summed(values: Tensor) -> Tensor:
        return torch.bmm(ones, values)[:, 0]  # the quickest way to add along the places

    apart = torch.sub(positions, middle[:, None], out=scratch)
    total = summed(apart)
    squares = summed(apart.square_())
    return total, squares, summed(torch.gt(positions, 0, out=scratch))


EMPTY = torch.iinfo(torch.int64).min  # the key of an empty slot: below all others


def sort_keys(values: Tensor, second: Tensor | None = None) -> Tensor:
    """Whole numbers that sort as (value, second) do; without `second` all of a value are alike.

    The bits of a float, those of negative ones turned round, sort as whole numbers; two of them fill 64 bits.
    """
    high = _ordered(values) << 32
    return high if second is None else high | (_ordered(second) + (1 << 31))


def _ordered(values: Tensor) -> Tensor:
    bits = (values + 0.0).contiguous().view(torch.int32)  # -0 becomes 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def unkeyed(keys: Tensor) -> Tensor:
    """The values of keys; 0 for an empty slot."""
    bits = (keys >> 32).int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32).masked_fill(keys == EMPTY, 0)


@dataclass
class TopK:
    """Of each unit the k pictures with the highest keys, (U, k) each: keys, descending, pictures and places in them.

    Of equal keys the earlier picture comes first. An empty slot has picture -1.
    """

    keys: Tensor
    images: Tensor
    positions: Tensor

    @classmethod
    def none(cls, units: int, k: int, device: torch.device | str = "cpu") -> TopK:
        keys = torch.full((units, k), EMPTY, device=device)
        return cls(keys, torch.full_like(keys, -1), torch.zeros((units, k), dtype=torch.int32, device=device))

    def add(self, keys: Tensor, images: Tensor, positions: Tensor) -> None:
        """Take in candidates (U, n). Units none of whose candidates reaches the k-th best are not looked at again.

        What comes out does not depend on the order in which pictures come in.
        """
        k = self.keys.shape[1]
        if keys.shape[1] == 0 or k == 0:
            return
        pick = (keys.amax(1) >= self.keys[:, -1]).nonzero()[:, 0]
        if len(pick) == 0:
            return
        both = torch.cat([self.keys[pick], keys[pick]], 1)
        ids = torch.cat([self.images[pick], images[pick]], 1)
        where = torch.cat([self.positions[pick], positions[pick]], 1)
        order = ids.argsort(1)
        order = order.gather(1, both.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, :k])
        self.keys[pick], self.images[pick] = both.gather(1, order), ids.gather(1, order)
        self.positions[pick] = where.gather(1, order)

    def merge(self, other: TopK) -> None:
        self.add(other.keys, other.images, other.positions)


@dataclass
class UnitStatistics:
    """What is known of a layer's units after some pictures; merging is `join`.

    `best` are ordered by the highest value and then by the mean over the map, for where an activation has a ceiling,
    many pictures reach it; `worst` by the negated lowest value. `pictures` and `places` count what was seen. Over all
    places go, in float64, `mean`, `scatter`, the sum of squared differences from the mean, and `active`, the number
    above 0. `class_totals` (L, U) and `class_pictures` (L,): sums over the pictures of each label in `labels` (L,),
    ascending, of the mean over places. `sample` (U, r) and `sample_places`: the highest value on the pictures that
    belong to the sample, in their order; NaN where a picture could not be used.
    """

    best: TopK
    worst: TopK
    images: int
    positions: int
    mean: Tensor
    scatter: Tensor
    active: Tensor
    histogram: Tensor
    labels: Tensor
    class_totals: Tensor
    class_images: Tensor
    sample: Tensor
    sample_positions: Tensor

    @classmethod
    def none(cls, units: int, k: int, device: torch.device | str = "cpu") -> UnitStatistics:
        return cls(
            best=TopK.none(units, k, device),
            worst=TopK.none(units, k, device),
            images=0,
            positions=0,
            mean=torch.zeros(units, dtype=torch.float64),
            scatter=torch.zeros(units, dtype=torch.float64),
            active=torch.zeros(units, dtype=torch.float64),
            histogram=torch.zeros((units, HISTOGRAM_BINS), dtype=torch.int64),
            labels=torch.zeros(0, dtype=torch.int64),
            class_totals=torch.zeros((0, units), dtype=torch.float64),
            class_images=torch.zeros(0, dtype=torch.int64),
            sample=torch.zeros((units, 0)),
            sample_positions=torch.zeros((units, 0), dtype=torch.int32),
        )

    def join(self, other: UnitStatistics) -> None:
        """Take in what was found on later pictures."""
        self.best.merge(other.best)
        self.worst.merge(other.worst)
        self.images += other.images
        self.join_moments(other.positions, other.mean, other.scatter)
        for name in ("active", "histogram"):
            getattr(self, name).add_(getattr(other, name))
        labels = torch.unique(torch.cat([self.labels, other.labels]))
        for name in ("class_totals", "class_images"):
            setattr(self, name, _joined_rows(labels, (self, other), name))
        self.labels = labels
        self.sample = torch.cat([self.sample, other.sample], 1)
        self.sample_positions = torch.cat([self.sample_positions, other.sample_positions], 1)

    def join_moments(self, positions: int, mean: Tensor, scatter: Tensor) -> None:
        """Take in the moments of other places: T. Chan, G. Golub, R. LeVeque, Updating Formulae and a Pairwise
        Algorithm for Computing Sample Variances, 1979, equation 2.1."""
        if positions == 0:
            return
        share, apart = positions / (self.positions + positions), mean - self.mean
        self.mean = self.mean + share * apart
        self.scatter = self.scatter + scatter + share * self.positions * apart.square()
        self.positions += positions

    def arrays(self) -> dict[str, Tensor]:
        """Everything as tensors, under names by which `of` finds it."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("best", "worst")}
        found = {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in plain.items()}
        for name in ("best", "worst"):
            found |= {f"{name}_{part}": tensor for part, tensor in vars(getattr(self, name)).items()}
        return {name: value.cpu().contiguous() for name, value in found.items()}

    @classmethod
    def of(cls, arrays: dict[str, Tensor]) -> UnitStatistics:
        given: dict[str, Any] = dict(arrays)
        for name in ("best", "worst"):
            given[name] = TopK(*(given.pop(f"{name}_{part.name}") for part in fields(TopK)))
        for name in ("images", "positions"):
            given[name] = int(given[name])
        return cls(**given)


def _joined_rows(labels: Tensor, parts: Iterable[UnitStatistics], name: str) -> Tensor:
    """Rows per label, those of the same label added."""
    found = None
    for part in parts:
        rows = getattr(part, name)
        found = torch.zeros((len(labels), *rows.shape[1:]), dtype=rows.dtype) if found is None else found
        found.index_add_(0, torch.searchsorted(labels, part.labels), rows)
    assert found is not None
    return found


class OnlineStatistics:
    """Builds a layer's `Summary` batch by batch. Extremes wait, `PENDING` pictures of them, to be sorted in at once."""

    def __init__(self, units: int, k: int, sample: Tensor, device: torch.device | str = "cpu") -> None:
        """sample: the pictures (r,), ascending, on which every unit's highest value is kept; NaN until it is known."""
        self.summary = UnitStatistics.none(units, k, device)
        self.summary.sample = torch.full((units, len(sample)), torch.nan)
        self.summary.sample_positions = torch.zeros((units, len(sample)), dtype=torch.int32)
        self._sample = sample
        self._edges = torch.from_numpy(HISTOGRAM_EDGES)
        self._waiting: list[_Candidates] = []
        self._waiting_low: list[_Candidates] = []

    @property
    def below(self) -> Tensor:
        """The k-th lowest value of each unit: no higher one has a chance to be among the lowest."""
        keys = self.summary.worst.keys
        last = keys[:, -1] if keys.shape[1] else torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        return torch.where(last == EMPTY, torch.inf, -unkeyed(last))

    def add(self, found: BatchReduction, images: Tensor, positions: int, labels: Tensor) -> None:
        """Take in what was read off n pictures.

        pictures: their ids (n,); places: of each map; labels (n,), -1 where there is none.
        """
        into, count = self.summary, len(images)
        if count == 0:
            return
        means, scatters = found.moments(positions)
        mean = means.mean(0)
        into.images += count
        into.join_moments(count * positions, mean, scatters.sum(0) + positions * (means - mean).square().sum(0))
        into.active += found.active.cpu().double().sum(0)
        bins = torch.bucketize(found.highest.cpu(), self._edges) + HISTOGRAM_BINS * torch.arange(found.highest.shape[1])
        into.histogram.view(-1).add_(torch.bincount(bins.flatten(), minlength=into.histogram.numel()))
        self._add_classes(means, labels)
        rows, columns = (images[:, None] == self._sample).nonzero(as_tuple=True)
        into.sample[:, columns] = found.highest[rows].T.cpu()
        into.sample_positions[:, columns] = found.highest_at[rows].T.cpu()
        self._waiting.append(
            (sort_keys(found.highest, means.float().to(found.highest.device)), images, found.highest_at)
        )
        if found.lowest is not None and found.lowest_at is not None:
            self._waiting_low.append((sort_keys(-found.lowest), images, found.lowest_at))
        for waiting, best in ((self._waiting, into.best), (self._waiting_low, into.worst)):
            if sum(len(keys) for keys, *_ in waiting) >= PENDING:
                _sort_in(waiting, best)

    def finish(self) -> UnitStatistics:
        """The summary of all that was added."""
        _sort_in(self._waiting, self.summary.best)
        _sort_in(self._waiting_low, self.summary.worst)
        return self.summary

    def _add_classes(self, means: Tensor, labels: Tensor) -> None:
        known, rows = torch.unique(labels[labels >= 0], return_inverse=True)
        if len(known) == 0:
            return
        into, units = self.summary, means.shape[1]
        totals = torch.zeros((len(known), units), dtype=torch.float64).index_add_(0, rows, means[labels >= 0])
        seen = torch.zeros(len(known), dtype=torch.int64).index_add_(0, rows, torch.ones_like(rows))
        own = UnitStatistics.none(units, 0)
        own.labels, own.class_totals, own.class_images = known, totals, seen
        labels = torch.unique(torch.cat([into.labels, known]))
        into.class_totals = _joined_rows(labels, (into, own), "class_totals")
        into.class_images = _joined_rows(labels, (into, own), "class_images")
        into.labels = labels


_Candidates = tuple[Tensor, Tensor, Tensor]  # keys (n, U), pictures (n,), places (n, U)


def _sort_in(waiting: list[_Candidates], best: TopK) -> None:
    if not waiting:
        return
    keys, images, positions = (torch.cat(part) for part in zip(*waiting, strict=True))
    best.add(keys.T.contiguous(), images.to(keys.device).expand(keys.shape[1], -1), positions.T.contiguous())
    waiting.clear()
