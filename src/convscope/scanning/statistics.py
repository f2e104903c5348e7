"""Reduce feature maps to statistics that can be merged: top and bottom images, moments and histograms.

A unit is a channel of maps (N, U, H, W). For a unit and an image only the position of the maximum counts, and that of
the minimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_POWERS = 2.0 ** (np.arange(-16, 17) / 2)
HISTOGRAM_EDGES = np.concatenate([-_POWERS[::-1], [0.0], _POWERS]).astype(np.float32)
"""Bin i of a histogram holds EDGES[i - 1] < value <= EDGES[i]; the first and the last bin are open."""
HISTOGRAM_BINS = len(HISTOGRAM_EDGES) + 1

CHUNK_BYTES = 2 << 20  # of maps that are reduced at once on a CPU, so that they stay in the cache while read repeatedly
MAX_PENDING = 128  # images whose extremes wait before they are sorted in


class BatchReduction(NamedTuple):
    """Reductions of a batch of maps, each (N, U).

    Attributes
    ----------
    maxima, minima : float32 tensor
        Extremes over the map; `minima` is None where it was not needed.
    argmax, argmin : int32 tensor
        The first position (row * W + column) of each.
    shift : float32 tensor
        The value at the centre of the map.
    shifted_sum, shifted_sum_sq : float32 tensor
        Sums over the positions of the values minus `shift`, and of the squares of that.
    num_active : float32 tensor
        The number of positions above 0.
    """

    maxima: Tensor
    argmax: Tensor
    minima: Tensor | None
    argmin: Tensor | None
    shift: Tensor
    shifted_sum: Tensor
    shifted_sum_sq: Tensor
    num_active: Tensor

    def select(self, rows: Tensor) -> BatchReduction:
        """Keep only some of the images."""
        minima, argmin = (None if part is None else part[rows] for part in (self.minima, self.argmin))
        rest = (part[rows] for part in self[4:])
        return BatchReduction(self.maxima[rows], self.argmax[rows], minima, argmin, *rest)

    def moments(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Return the means and the sums of squared deviations over the positions: float64 (N, U), on the CPU.

        Float32 sums of squares of the values themselves would lose a variance that is small beside the mean. The shift
        is one of the P values, so that its own squared deviation is at most P times the variance.
        """
        shift, total, squares = (part.cpu().double() for part in (self.shift, self.shifted_sum, self.shifted_sum_sq))
        means = (shift * num_positions + total) / num_positions
        return means, (squares - total.square() / num_positions).clamp(min=0)


def reduce_maps(maps: Tensor, thresholds: Tensor | None = None) -> BatchReduction:
    """Reduce maps (N, U, H, W) or (N, U).

    Minima are skipped if no value of the batch lies below the threshold (U,) of its unit. Values that are not finite
    make `shifted_sum` not finite.
    """
    maps = maps.detach().float()
    maps = maps if maps.ndim == 4 else maps[:, :, None, None]
    maxima, argmax = _max_pool_all(maps)
    minima = argmin = None
    if thresholds is None or bool((maps.amin() < thresholds).any()):
        minima, argmin = _max_pool_all(-maps)
        minima = -minima
    values, shift = _flatten_maps(maps)
    image_bytes = values[0].numel() * values.element_size() if len(values) else 1
    size = max(1, CHUNK_BYTES // max(image_bytes, 1)) if maps.device.type == "cpu" else len(maps)
    buffer = torch.empty_like(values[:size])
    chunks = zip(torch.split(values, size), torch.split(shift, size), strict=True)
    parts = [_shifted_sums(part, part_shift, buffer[: len(part)]) for part, part_shift in chunks]
    return BatchReduction(
        maxima, argmax, minima, argmin, shift, *(torch.cat(part) for part in zip(*parts, strict=True))
    )


def reduce_maps_compilable(maps: Tensor) -> BatchReduction:
    """Reduce maps like `reduce_maps`, by plain reductions that a compiler fuses into a single pass."""
    maps = maps.float() if maps.ndim == 4 else maps.float()[:, :, None, None]
    values, shift = _flatten_maps(maps)
    shifted = values - shift[:, None]
    (maxima, argmax), (minima, argmin) = values.max(1), values.min(1)
    sums = shifted.sum(1), shifted.square().sum(1), (values > 0).float().sum(1)
    return BatchReduction(maxima, argmax.int(), minima, argmin.int(), shift, *sums)


def _flatten_maps(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (N, P, U), a view if channels lie last, and those at the centre (N, U)."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2), maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].contiguous()


def _max_pool_all(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of every map (N, U) and its first position, by one pooling over the whole map."""
    values, positions = F.max_pool2d(maps, (maps.shape[2], maps.shape[3]), return_indices=True)
    return values.flatten(1), positions.flatten(1).int()


def _shifted_sums(values: Tensor, shift: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum values (N, P, U) minus shift (N, U), the squares of that, and the number above 0; each (N, U)."""
    ones = values.new_ones(len(values), 1, values.shape[1])  # a product with ones is the fastest sum over positions
    shifted = torch.sub(values, shift[:, None], out=buffer)
    total = torch.bmm(ones, shifted)[:, 0]
    squares = torch.bmm(ones, shifted.square_())[:, 0]
    return total, squares, torch.bmm(ones, torch.gt(values, 0, out=buffer))[:, 0]


EMPTY_KEY = torch.iinfo(torch.int64).min  # the key of an empty slot: below all others


def sort_keys(values: Tensor, second: Tensor | None = None) -> Tensor:
    """Return int64 keys that sort as (value, second) do; without `second`, equal values have equal keys.

    The bits of a float sort as an integer if those of negative numbers are inverted; two floats fill 64 bits.
    """
    high = _ordered_bits(values) << 32
    return high if second is None else high | (_ordered_bits(second) + (1 << 31))


def _ordered_bits(values: Tensor) -> Tensor:
    bits = (values + 0.0).contiguous().view(torch.int32)  # -0 becomes 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def values_from_keys(keys: Tensor) -> Tensor:
    """Return the values of keys; 0 for an empty slot."""
    bits = (keys >> 32).int()
    values = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return values.masked_fill(keys == EMPTY_KEY, 0)


@dataclass
class TopK:
    """The k images with the highest keys of each unit, in descending order; of equal keys the earlier image first.

    Attributes
    ----------
    keys : int64 tensor of shape (U, k)
    images : int64 tensor of shape (U, k)
        Ids of images, -1 in an empty slot.
    positions : int32 tensor of shape (U, k)
        Positions in the maps, row * W + column.
    """

    keys: Tensor
    images: Tensor
    positions: Tensor

    @classmethod
    def empty(cls, units: int, k: int, device: torch.device | str = "cpu") -> TopK:
        """Return k empty slots for each unit."""
        keys = torch.full((units, k), EMPTY_KEY, device=device)
        return cls(keys, torch.full_like(keys, -1), torch.zeros((units, k), dtype=torch.int32, device=device))

    def add(self, keys: Tensor, images: Tensor, positions: Tensor) -> None:
        """Insert candidates (U, n). The result does not depend on the order of insertion.

        Units without a candidate that reaches the k-th best are skipped.
        """
        k = self.keys.shape[1]
        if keys.shape[1] == 0 or k == 0:
            return
        units = (keys.amax(1) >= self.keys[:, -1]).nonzero()[:, 0]
        if len(units) == 0:
            return
        all_keys = torch.cat([self.keys[units], keys[units]], 1)
        all_images = torch.cat([self.images[units], images[units]], 1)
        all_positions = torch.cat([self.positions[units], positions[units]], 1)
        order = all_images.argsort(1)
        order = order.gather(1, all_keys.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, :k])
        self.keys[units], self.images[units] = all_keys.gather(1, order), all_images.gather(1, order)
        self.positions[units] = all_positions.gather(1, order)

    def merge(self, other: TopK) -> None:
        """Insert the images of another selection."""
        self.add(other.keys, other.images, other.positions)


@dataclass
class UnitStatistics:
    """Statistics of a layer's U units over some images, which can be merged.

    Attributes
    ----------
    top, bottom : TopK
        Images by the maximum and then by the mean over the map, since many images reach the ceiling of an activation
        such as ReLU6; and images by the negated minimum.
    num_images, num_positions : int
        How many images and positions were reduced.
    mean, squared_deviations, num_active : float64 tensor of shape (U,)
        Over all positions: the mean, the sum of squared deviations from it, and the number of values above 0.
    histogram : int64 tensor of shape (U, HISTOGRAM_BINS)
        Of the images' maxima.
    labels : int64 tensor of shape (L,)
        The labels that occur, ascending.
    class_sums : float64 tensor of shape (L, U)
        Sums over the images of each label of the mean over positions.
    class_counts : int64 tensor of shape (L,)
        How many images have each label.
    sample_maxima, sample_positions : tensor of shape (U, r)
        The maximum on each image of the sample, NaN if the image failed, and its position.
    """

    top: TopK
    bottom: TopK
    num_images: int
    num_positions: int
    mean: Tensor
    squared_deviations: Tensor
    num_active: Tensor
    histogram: Tensor
    labels: Tensor
    class_sums: Tensor
    class_counts: Tensor
    sample_maxima: Tensor
    sample_positions: Tensor

    @classmethod
    def empty(cls, units: int, k: int, device: torch.device | str = "cpu", sample_size: int = 0) -> UnitStatistics:
        """Return the statistics of no images. The slots of `TopK` lie on `device`, all else on the CPU."""
        return cls(
            top=TopK.empty(units, k, device),
            bottom=TopK.empty(units, k, device),
            num_images=0,
            num_positions=0,
            mean=torch.zeros(units, dtype=torch.float64),
            squared_deviations=torch.zeros(units, dtype=torch.float64),
            num_active=torch.zeros(units, dtype=torch.float64),
            histogram=torch.zeros((units, HISTOGRAM_BINS), dtype=torch.int64),
            labels=torch.zeros(0, dtype=torch.int64),
            class_sums=torch.zeros((0, units), dtype=torch.float64),
            class_counts=torch.zeros(0, dtype=torch.int64),
            sample_maxima=torch.full((units, sample_size), torch.nan),
            sample_positions=torch.zeros((units, sample_size), dtype=torch.int32),
        )

    def merge(self, other: UnitStatistics) -> None:
        """Add the statistics of later images."""
        self.top.merge(other.top)
        self.bottom.merge(other.bottom)
        self.num_images += other.num_images
        self.merge_moments(other.num_positions, other.mean, other.squared_deviations)
        self.num_active += other.num_active
        self.histogram += other.histogram
        self.merge_classes(other.labels, other.class_sums, other.class_counts)
        self.sample_maxima = torch.cat([self.sample_maxima, other.sample_maxima], 1)
        self.sample_positions = torch.cat([self.sample_positions, other.sample_positions], 1)

    def merge_moments(self, num_positions: int, mean: Tensor, squared_deviations: Tensor) -> None:
        """Add the moments of other positions.

        References
        ----------
        T. Chan, G. Golub, R. LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
        equation 2.1.
        """
        if num_positions == 0:
            return
        fraction, difference = num_positions / (self.num_positions + num_positions), mean - self.mean
        self.mean = self.mean + fraction * difference
        between = fraction * self.num_positions * difference.square()
        self.squared_deviations = self.squared_deviations + squared_deviations + between
        self.num_positions += num_positions

    def merge_classes(self, labels: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Add the sums (l, U) and counts (l,) of labels (l,), ascending."""
        merged = torch.unique(torch.cat([self.labels, labels]))
        rows, other_rows = torch.searchsorted(merged, self.labels), torch.searchsorted(merged, labels)
        empty_sums, empty_counts = sums.new_zeros(len(merged), sums.shape[1]), counts.new_zeros(len(merged))
        self.class_sums = empty_sums.index_add_(0, rows, self.class_sums).index_add_(0, other_rows, sums)
        self.class_counts = empty_counts.index_add_(0, rows, self.class_counts).index_add_(0, other_rows, counts)
        self.labels = merged

    def to_tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors, by name, for `from_tensors`."""
        tensors: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, TopK):
                tensors |= {f"{field.name}_{part}": tensor for part, tensor in vars(value).items()}
            else:
                tensors[field.name] = value if isinstance(value, Tensor) else torch.tensor(value)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> UnitStatistics:
        """Rebuild statistics from `to_tensors`."""
        rest = dict(tensors)
        top, bottom = (TopK(*(rest.pop(f"{name}_{part.name}") for part in fields(TopK))) for name in ("top", "bottom"))
        num_images, num_positions = (int(rest.pop(name)) for name in ("num_images", "num_positions"))
        return cls(top, bottom, num_images, num_positions, **rest)


class OnlineStatistics:
    """Builds the statistics of a layer batch by batch; extremes of up to `MAX_PENDING` images are sorted in at once.

    Parameters
    ----------
    units : int
        Number of units.
    k : int
        Number of top and bottom images.
    sample : int64 tensor of shape (r,)
        Ids, ascending, of the images on which every unit's maximum is stored.
    device : torch.device or str
        Where the maps are.
    """

    def __init__(self, units: int, k: int, sample: Tensor, device: torch.device | str = "cpu") -> None:
        self.statistics = UnitStatistics.empty(units, k, device, len(sample))
        self._sample = sample
        self._edges = torch.from_numpy(HISTOGRAM_EDGES)
        self._pending_top: list[_Candidates] = []
        self._pending_bottom: list[_Candidates] = []

    @property
    def thresholds(self) -> Tensor:
        """The k-th lowest value of each unit (U,): a higher one cannot be among the lowest."""
        keys = self.statistics.bottom.keys
        last = keys[:, -1] if keys.shape[1] else torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        return torch.where(last == EMPTY_KEY, torch.inf, -values_from_keys(last))

    def add(self, reduction: BatchReduction, images: Tensor, num_positions: int, labels: Tensor) -> None:
        """Add the reductions of images with these ids and labels (n,), -1 if unknown, and this many positions a map."""
        statistics, count = self.statistics, len(images)
        if count == 0:
            return
        means, deviations = reduction.moments(num_positions)
        mean = means.mean(0)
        between = num_positions * (means - mean).square().sum(0)
        statistics.num_images += count
        statistics.merge_moments(count * num_positions, mean, deviations.sum(0) + between)
        statistics.num_active += reduction.num_active.cpu().double().sum(0)
        self._add_maxima(reduction, images)
        self._add_classes(means, labels)
        keys = sort_keys(reduction.maxima, means.float().to(reduction.maxima.device))
        self._pending_top.append((keys, images, reduction.argmax))
        if reduction.minima is not None and reduction.argmin is not None:
            self._pending_bottom.append((sort_keys(-reduction.minima), images, reduction.argmin))
        for pending, top_k in ((self._pending_top, statistics.top), (self._pending_bottom, statistics.bottom)):
            if sum(len(keys) for keys, *_ in pending) >= MAX_PENDING:
                _sort_in(pending, top_k)

    def finish(self) -> UnitStatistics:
        """Return the statistics of all images added."""
        _sort_in(self._pending_top, self.statistics.top)
        _sort_in(self._pending_bottom, self.statistics.bottom)
        return self.statistics

    def _add_maxima(self, reduction: BatchReduction, images: Tensor) -> None:
        """Count the maxima in the histogram and store those of images in the sample."""
        statistics = self.statistics
        bins = torch.bucketize(reduction.maxima.cpu(), self._edges)
        bins = bins + HISTOGRAM_BINS * torch.arange(reduction.maxima.shape[1])
        histogram = statistics.histogram
        histogram.view(-1).add_(torch.bincount(bins.flatten(), minlength=histogram.numel()))
        rows, columns = (images[:, None] == self._sample).nonzero(as_tuple=True)
        statistics.sample_maxima[:, columns] = reduction.maxima[rows].T.cpu()
        statistics.sample_positions[:, columns] = reduction.argmax[rows].T.cpu()

    def _add_classes(self, means: Tensor, labels: Tensor) -> None:
        known, rows = torch.unique(labels[labels >= 0], return_inverse=True)
        if len(known) == 0:
            return
        sums = torch.zeros((len(known), means.shape[1]), dtype=torch.float64).index_add_(0, rows, means[labels >= 0])
        self.statistics.merge_classes(known, sums, torch.bincount(rows, minlength=len(known)))


_Candidates = tuple[Tensor, Tensor, Tensor]  # keys (n, U), image ids (n,), positions (n, U)


def _sort_in(pending: list[_Candidates], top_k: TopK) -> None:
    if not pending:
        return
    keys, images, positions = (torch.cat(part) for part in zip(*pending, strict=True))
    top_k.add(keys.T.contiguous(), images.to(keys.device).expand(keys.shape[1], -1), positions.T.contiguous())
    pending.clear()
