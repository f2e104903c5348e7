"""The story of a network: what its layers look for, from the first to the last, seen and measured."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscope.engine.batching import MEMORY, Progress
from convscope.engine.layer_selection import select_by_depth
from convscope.engine.layer_table import Layer
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.featurevis.api import patterns
from convscope.featurevis.image_statistics import IMAGE_STATISTICS, most_distinct
from convscope.results import Result

CHAPTERS = 6  # layers, besides the classes


@dataclass(frozen=True, eq=False)
class Chapter:
    """One layer: the most distinct patterns (S, H, W, C) of `units`, and the measures of all that were drawn (U,)."""

    layer: str
    receptive_field: tuple[int, int] | None
    units: np.ndarray
    names: tuple[str, ...]
    images: np.ndarray
    statistics: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Story(Result):
    """Chapters from the first layer to the classes; `.table()` has the measures' medians, layer by layer."""

    chapters: tuple[Chapter, ...]
    seed: int

    def arrays(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for i, chapter in enumerate(self.chapters):
            found |= {f"{i}_images": chapter.images, f"{i}_units": chapter.units}
            found |= {f"{i}_{name.replace(' ', '_')}": values for name, values in chapter.statistics.items()}
        return found

    def parameters(self) -> dict[str, Any]:
        return {"seed": self.seed, "layers": [c.layer for c in self.chapters]}

    def table(self) -> list[dict[str, Any]]:
        """A row per layer: how far it sees, and each measure's median and quartiles over the units drawn."""
        rows = []
        for chapter in self.chapters:
            row: dict[str, Any] = {
                "layer": chapter.layer,
                "receptive field": chapter.receptive_field and " x ".join(map(str, chapter.receptive_field)),
            }
            for name, values in chapter.statistics.items():
                low, middle, high = np.percentile(values, (25, 50, 75))
                row |= {name: float(middle), f"{name}, quartiles": f"{low:.3g} to {high:.3g}"}
            rows.append(row)
        return rows

    def text_files(self) -> dict[str, str]:
        rows = self.table()
        out = io.StringIO()
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return {"story.csv": out.getvalue()}


def story(
    model: Model,
    layers: Sequence[str] | None = None,
    *,
    units: int = 24,
    num_shown: int = 6,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Story:
    """Draw units of layers from the first to the last, measure all of them, and keep the most distinct.

    Parameters
    ----------
    model
        From `convscope.load`.
    layers
        Names, in the order in which they are told. None: one for each resolution of the network, at most six, and
        the classes.
    units
        How many units of each layer are drawn, evenly spread over its channels.
    shown
        How many of them, the most distinct, are kept as pictures.
    seed, memory
        As of `patterns`.
    progress
        Called with the number of chapters done, a fraction within one, and the number in all.

    Raises
    ------
    ConvscopeError
        For an unknown layer.
    """
    if units < 2 or not 1 <= num_shown <= units:
        raise ConvscopeError(
            f"units is {units}, num_shown is {num_shown}; expected units >= 2, and num_shown from 1 to units"
        )
    names = _chapters(model) if layers is None else list(layers)
    if not names:
        raise ConvscopeError("there are no layers to tell of; give some that have units")
    rows = [None if name == LOGITS else model.layers.find(name) for name in names]
    chapters, notes = [], []
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):

        def tell(done: float, total: int, i: int = i) -> None:
            if progress is not None:
                progress(i + done / total, len(names))

        count = model.num_outputs if row is None else row.units
        picked = np.unique(np.linspace(0, (count or 1) - 1, min(units, count or 1)).round().astype(int))
        drawn = patterns(model, name, picked.tolist(), seed=seed, memory=memory, progress=tell)
        kept = most_distinct(drawn.images, num_shown)
        measures = {what: measure(drawn.images) for what, measure in IMAGE_STATISTICS.items()}
        called = tuple(drawn.names[k] for k in kept)
        chapters.append(Chapter(name, _sees(model, row), drawn.units[kept], called, drawn.images[kept], measures))
        notes += [f"{name}: {note}" for note in drawn.notes]
    return Story(model, tuple(chapters), seed, notes=tuple(notes))


def read_story(model: Model, read: Callable[[str], bytes]) -> Story:
    """A story that was saved; `read` gives the content of a file of its folder.

    Raises ConvscopeError if it cannot be read, or tells of another network.
    """
    try:
        manifest = json.loads(read("manifest.json"))
        made, told = manifest["model"], manifest["parameters"]
        with np.load(io.BytesIO(read("arrays.npz")), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if made["weights_sha256"] != model.weights_hash():
            raise ConvscopeError(f"the story that is kept is of {made['name']} with other weights than {model.name}")
        chapters = tuple(_chapter(model, layer, i, arrays) for i, layer in enumerate(told["layers"]))
        return Story(model, chapters, told["seed"], notes=tuple(manifest["notes"]))
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ConvscopeError(f"the story that is kept cannot be read ({error}); tell it anew") from error


def _chapter(model: Model, layer: str, i: int, arrays: dict[str, np.ndarray]) -> Chapter:
    """The inverse of `Story.arrays`."""
    row, units = None if layer == LOGITS else model.layers.find(layer), arrays[f"{i}_units"]
    names = tuple(model.class_name(int(u)) if row is None else f"{layer} {u}" for u in units)
    measures = {name: arrays[f"{i}_{name.replace(' ', '_')}"] for name in IMAGE_STATISTICS}
    return Chapter(layer, _sees(model, row), units, names, arrays[f"{i}_images"], measures)


def _chapters(model: Model) -> list[str]:
    rows = [row.name for row in select_by_depth(model, CHAPTERS, min_count=4)]
    return [*rows, LOGITS] if model.num_outputs else rows


def _sees(model: Model, row: Layer | None) -> tuple[int, int] | None:
    """The receptive field; None where it is the whole picture."""
    field = None if row is None else row.bounded_receptive_field(model.preprocessing.size)
    return None if field is None else (field[0], field[1])
