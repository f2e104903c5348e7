"""Tools that scan a data set, and query what a scan has stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from convscope.diagnosis.api import diagnose
from convscope.errors import ConvscopeError
from convscope.progress import Progress
from convscope.scanning.api import scan
from convscope.store.parquet import STATISTICS
from convscope.store.store import Store
from convscope.store.unit_record import EXAMPLE_KINDS
from convscope.tool_server.parameters import Fit, LayerName, ModelName, SaveName, Seed, StorePath
from convscope.tool_server.responses import Answer, figure_image
from convscope.tool_server.workspace import Workspace


@dataclass(frozen=True)
class StoreTools:
    """The tools scan, diagnose, store_summary, store_units, store_unit and store_image.

    Attributes
    ----------
    workspace : Workspace
    """

    workspace: Workspace

    def scan(
        self,
        dataset: Annotated[str, Field(description="A folder of images (of one folder per class), or a tar file.")],
        name: Annotated[str, Field(description="The store: name of a folder inside of the output folder.")],
        layers: Annotated[list[str] | None, Field(description="Layers. Default: the last of each resolution.")] = None,
        k: Annotated[int, Field(description="Examples for each unit.", ge=1, le=100)] = 20,
        fit: Fit = "squash",
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Run a data set through a network once, and store examples and statistics of every unit.

        A scan that is stopped by the time limit goes on when it is called again with the same arguments.
        """
        store = scan(
            self.workspace.model(model),
            self.workspace.files.dataset(dataset, self.workspace.limits.scanned_images),
            self.workspace.files.output(name),
            layers,
            k,
            fit=fit,
            workers=0,
            progress=progress,
        )
        return self._summary(store)

    def diagnose(
        self,
        dataset: Annotated[str, Field(description="A folder of images with a folder per class, or a tar file.")],
        layer: Annotated[str | None, Field(description="The layer to record. Default: that of heatmaps.")] = None,
        fit: Fit = "squash",
        seed: Seed = 0,
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Find tested reasons for the errors of a classifier on labelled images.

        Confusions, slices, shortcuts, wrong labels, duplicates and calibration, the most important first.
        """
        result = diagnose(
            self.workspace.model(model),
            self.workspace.files.dataset(dataset, self.workspace.limits.scanned_images),
            layer=layer,
            fit=fit,
            seed=seed,
            workers=0,
            progress=progress,
        )
        return self.workspace.answer(result, save)

    def store_summary(self, store: StorePath) -> Answer:
        """Summarize a store: network, data, layers, dead and duplicate units."""
        return self._summary(self.workspace.store(store))

    def store_units(
        self,
        store: StorePath,
        layer: LayerName,
        by: Annotated[str, Field(description=f"A statistic to sort by: {', '.join(STATISTICS)}.")] = "maximum",
        count: Annotated[int, Field(description="Number of units.", ge=1, le=100)] = 20,
        lowest: Annotated[bool, Field(description="The lowest values instead of the highest.")] = False,
    ) -> Answer:
        """List the units of a layer that a data set excites most (or least), by a statistic over the data set."""
        opened = self.workspace.store(store)
        if by not in STATISTICS:
            raise ConvscopeError(f"by is {by!r}; expected one of {', '.join(STATISTICS)}")
        start = opened.row_of_unit(layer, 0)
        columns = [column.to_numpy() for column in opened.units(STATISTICS).slice(start, opened.unit_counts[layer])]
        values = dict(zip(STATISTICS, columns, strict=True))
        order = np.argsort(values[by] if lowest else -values[by], kind="stable")[:count]
        rows = [
            {"unit": opened.unit_label(layer, int(unit)), **{name: values[name][unit] for name in STATISTICS}}
            for unit in order
        ]
        return Answer({"store": opened.address, "layer": layer, "by": by, "rows": rows})

    def store_unit(
        self,
        store: StorePath,
        layer: LayerName,
        unit: Annotated[int | str, Field(description="Number of the unit; of logits also the name of a class.")],
        examples: Annotated[int, Field(description="Number of examples.", ge=1, le=36)] = 9,
        kind: Annotated[str, Field(description=f"Which examples: {', '.join(EXAMPLE_KINDS)}.")] = "top",
    ) -> Answer:
        """Show what a unit responds to in a data set: examples, statistics, classes and similar units."""
        record = self.workspace.store(store).unit(layer, unit)
        selected = record.examples(examples, kind)
        content = {
            "unit": f"{layer}, {record.name}",
            "statistics": {row["statistic"]: row["value"] for row in record.rows()},
            "classes": [{"class": c.name, "mean": c.mean, "images": c.count} for c in record.classes()],
            "coactive": [{"unit": c.unit, "r": c.r} for c in record.coactive(5)],
            "examples": selected.rows(),
        }
        return Answer(content, figure_image(selected))

    def store_image(
        self,
        store: StorePath,
        image: Annotated[int, Field(description="Number of the image in the data set.", ge=0)],
        units: Annotated[int, Field(description="Number of units.", ge=1, le=100)] = 10,
    ) -> Answer:
        """Show an image of a data set: label, predictions, and the units for which it is a top example."""
        record = self.workspace.store(store).image(image)
        content: dict[str, Any] = {
            "image": record.name,
            "label": record.label,
            "failed": record.failed,
            "loss": record.loss,
            "predictions": record.rows(),
            "units": [
                {"layer": u.layer, "unit": u.unit, "rank": u.rank, "value": u.value} for u in record.units(units)
            ],
        }
        return Answer(content, figure_image(record))

    def _summary(self, store: Store) -> Answer:
        rows = self.workspace.limits.rows
        dead, duplicates = store.dead().rows(), store.duplicates().rows()
        return Answer(
            {
                "store": store.address,
                "model": store.manifest["model"]["name"],
                "images": store.num_images,
                "labels": store.labels and store.labels[:rows],
                "layers": [{"name": name, "units": count} for name, count in store.unit_counts.items()],
                "failed": [str(failure) for failure in store.failures(rows)],
                "dead_units": {"count": len(dead), "first": dead[:10]},
                "duplicates": {"count": len(duplicates), "first": duplicates[:10]},
            }
        )
