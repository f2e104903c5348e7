"""Merge the shards of a scan into a store, with one layer of one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convscope.datasets.catalogue import Catalogue
from convscope.engine.model import LOGITS, Model
from convscope.scanning.plan import ScanPlan
from convscope.scanning.shard import ScanTargets, ShardFile
from convscope.scanning.statistics import HISTOGRAM_EDGES, TopK, UnitStatistics, values_from_keys
from convscope.store.schema import ImageRows, LayerSummary, RankedExamples, write_store


@dataclass(frozen=True)
class ShardMerger:
    """Merges the shards of a finished scan in their order."""

    model: Model
    plan: ScanPlan
    targets: ScanTargets
    catalogue: Catalogue
    store: Path

    def write(self, manifest: Mapping[str, object]) -> None:
        """Write the tables of the store, and the manifest last."""
        files = [ShardFile(self.store, shard) for shard in range(self.plan.num_shards)]
        class_counts = self._class_counts(files)
        write_store(
            self.store,
            (self._layer(i, name, files, class_counts) for i, name in enumerate(self.targets.num_units)),
            self._images(files),
            sample_images=self.plan.sample_images(),
            class_counts=class_counts,
            input_size=self.model.preprocessing.image_size,
            shards=[self._shard_row(shard, file) for shard, file in enumerate(files)],
            manifest=dict(manifest),
        )

    def _shard_row(self, shard: int, file: ShardFile) -> dict[str, int | str]:
        images = self.plan.shard_images(shard)
        return {"shard": shard, "first": images[0], "last": images[-1], "sha256": file.sha256()}

    def _class_counts(self, files: list[ShardFile]) -> np.ndarray | None:
        """Count the usable images of each class (K,)."""
        names = self.catalogue.label_names
        if self.targets.labels is None or names is None:
            return None
        counts = np.zeros(len(names), np.int64)
        for file in files:
            statistics = file.layer_statistics(0)
            counts[statistics.labels.numpy()] += statistics.class_counts.numpy()
        return counts

    def _layer(self, number: int, name: str, files: list[ShardFile], class_counts: np.ndarray | None) -> LayerSummary:
        units = self.targets.num_units[name]
        merged = UnitStatistics.empty(units, self.plan.k)
        for file in files:
            merged.merge(file.layer_statistics(number))
        top, bottom = _ranked_examples(merged.top, 1), _ranked_examples(merged.bottom, -1)
        histogram = merged.histogram.numpy()
        active_bins = histogram[:, np.searchsorted(HISTOGRAM_EDGES, 0) + 1 :]
        layer = None if name == LOGITS else self.model.layers.find(name)
        return LayerSummary(
            name=name,
            kind="logits" if layer is None else layer.kind,
            shape=(units,) if layer is None else layer.shape,
            receptive_field=None if layer is None else layer.receptive_field,
            stride=None if layer is None else layer.stride,
            origin=None if layer is None else layer.origin,
            has_global_context=layer is None or layer.has_global_context,
            mean=merged.mean.numpy(),
            variance=merged.squared_deviations.numpy() / merged.num_positions,
            maximum=top.values[:, 0].astype(np.float64),
            minimum=bottom.values[:, 0].astype(np.float64),
            active=merged.num_active.numpy() / merged.num_positions,
            fires=active_bins.sum(1) / merged.num_images,
            histogram=histogram,
            top=top,
            bottom=bottom,
            sample=merged.sample_maxima.numpy(),
            sample_positions=merged.sample_positions.numpy(),
            class_means=None if class_counts is None else _class_means(merged, len(class_counts)),
        )

    def _images(self, files: list[ShardFile]) -> Iterator[ImageRows]:
        labels = self.targets.labels
        for shard, file in enumerate(files):
            ids = self.plan.shard_images(shard)
            failures = file.failures()
            yield ImageRows(
                names=self.catalogue.names[ids.start : ids.stop].to_pylist(),
                labels=None if labels is None else labels[ids.start : ids.stop],
                failed=[failures.get(image) for image in ids],
                **file.image_columns(),
            )


def _ranked_examples(top_k: TopK, sign: int) -> RankedExamples:
    values = sign * values_from_keys(top_k.keys)
    return RankedExamples(values.numpy(), top_k.images.numpy(), top_k.positions.numpy())


def _class_means(merged: UnitStatistics, num_classes: int) -> np.ndarray:
    """Return the means (U, K) float32 over the images of each class, NaN for a class without images."""
    means = np.full((merged.class_sums.shape[1], num_classes), np.nan, np.float32)
    means[:, merged.labels.numpy()] = (merged.class_sums.numpy() / merged.class_counts.numpy()[:, None]).T
    return means
