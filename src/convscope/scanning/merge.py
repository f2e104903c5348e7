"""From the shards of a pass to a store: layer by layer, shard by shard in their order, one of each in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convscope.datasets.catalogue import Catalogue
from convscope.engine.model import LOGITS, Model
from convscope.scanning.plan import ScanPlan
from convscope.scanning.shard import ScanTargets, ShardFile
from convscope.scanning.statistics import HISTOGRAM_EDGES, UnitStatistics, unkeyed
from convscope.store.schema import ImageRows, LayerSummary, RankedExamples, write_store


@dataclass(frozen=True)
class Merge:
    """All that the tables of a store are made from."""

    model: Model
    plan: ScanPlan
    subject: ScanTargets
    catalogue: Catalogue
    store: Path

    def write(self, manifest: Mapping[str, Any]) -> None:
        """The tables, and the manifest as the last of all."""
        waiting = [ShardFile(self.store, shard) for shard in range(self.plan.shards)]
        counts = self._class_counts(waiting)
        shards = [
            {"shard": i, "first": self.plan.within(i)[0], "last": self.plan.within(i)[-1], "sha256": one.sha256()}
            for i, one in enumerate(waiting)
        ]
        write_store(
            self.store,
            (self._layer(i, name, waiting, counts) for i, name in enumerate(self.subject.layers)),
            self._images(waiting),
            sample_images=self.plan.sampled(),
            class_counts=counts,
            input_size=self.model.preprocessing.image_size,
            shards=shards,
            manifest=dict(manifest),
        )

    def _class_counts(self, waiting: list[ShardFile]) -> np.ndarray | None:
        """How many usable pictures each label has."""
        names = self.catalogue.label_names
        if self.subject.labels is None or names is None:
            return None
        counts = np.zeros(len(names), np.int64)
        for one in waiting:
            found = one.summary(0)
            counts[found.labels.numpy()] += found.class_images.numpy()
        return counts

    def _layer(self, number: int, name: str, waiting: list[ShardFile], counts: np.ndarray | None) -> LayerSummary:
        units = self.subject.layers[name]
        found = UnitStatistics.none(units, self.plan.k)
        for one in waiting:
            found.join(one.summary(number))
        highest, lowest = unkeyed(found.best.keys), -unkeyed(found.worst.keys)
        means = None
        if counts is not None:
            means = np.full((units, len(counts)), np.nan, np.float32)
            seen = found.class_images.numpy()
            means[:, found.labels.numpy()] = (found.class_totals.numpy() / seen[:, None]).T
        histogram = found.histogram.numpy()
        row = None if name == LOGITS else self.model.layers.find(name)
        return LayerSummary(
            name=name,
            kind="logits" if row is None else row.kind,
            shape=(units,) if row is None else row.shape,
            receptive_field=None if row is None else row.receptive_field,
            stride=None if row is None else row.stride,
            origin=None if row is None else row.origin,
            has_global_context=row is None or row.has_global_context,
            mean=found.mean.numpy(),
            variance=found.scatter.numpy() / found.positions,
            maximum=highest[:, 0].double().numpy(),
            minimum=lowest[:, 0].double().numpy(),
            active=found.active.numpy() / found.positions,
            fires=histogram[:, np.searchsorted(HISTOGRAM_EDGES, 0) + 1 :].sum(1) / found.images,
            histogram=histogram,
            top=RankedExamples(highest.numpy(), found.best.images.numpy(), found.best.positions.numpy()),
            bottom=RankedExamples(lowest.numpy(), found.worst.images.numpy(), found.worst.positions.numpy()),
            sample=found.sample.numpy(),
            sample_positions=found.sample_positions.numpy(),
            class_means=means,
        )

    def _images(self, waiting: list[ShardFile]) -> Iterator[ImageRows]:
        labels = self.subject.labels
        for shard, one in enumerate(waiting):
            ids = self.plan.within(shard)
            columns, reasons = one.images()
            yield ImageRows(
                names=self.catalogue.names[ids.start : ids.stop].to_pylist(),
                labels=None if labels is None else labels[ids.start : ids.stop],
                failed=[reasons.get(image) for image in ids],
                sizes=columns["sizes"],
                boxes=columns["boxes"],
                classes=columns["classes"],
                probabilities=columns["probabilities"],
                losses=columns["losses"],
            )
