"""The story of a network: patterns and image statistics of its layers, from the first to the last."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np

from convscope.arguments import check_arguments
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike, as_layers, layer_name, select_by_depth
from convscope.engine.layer_table import Layer
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError, require_int, warns_of_failures
from convscope.featurevis.api import patterns
from convscope.featurevis.image_statistics import IMAGE_STATISTICS, image_statistics, most_distinct
from convscope.featurevis.result import Patterns
from convscope.formatting import Row, count_of
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.result_items import IndexedResult, ItemKey
from convscope.sources.coercion import ModelLike, as_model

MAX_LAYERS = 6  # by default, besides the classes


@dataclass(frozen=True, eq=False)
class Chapter:
    """One layer of a story.

    Attributes
    ----------
    layer : str
    receptive_field : (int, int) or None
        Height and width in pixels; None for the whole image.
    units : ndarray
        (S,): the units with the most distinct patterns.
    names : tuple of str
        Their names.
    images : ndarray
        Their patterns, uint8 (S, H, W, C).
    statistics : dict of str to ndarray
        Statistics of the patterns of all U units, (U,) each; see `convscope.featurevis.image_statistics`.
    """

    layer: str
    receptive_field: tuple[int, int] | None
    units: np.ndarray
    names: tuple[str, ...]
    images: np.ndarray
    statistics: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class Story(IndexedResult):
    """Patterns and statistics of layers, from the first to the classes.

    Attributes
    ----------
    chapters : tuple of Chapter
        One per layer.
    seed : int
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = {"chapters": 0}

    chapters: tuple[Chapter, ...]
    seed: int

    def item_names(self) -> Sequence[str]:
        """Return the names of the layers."""
        return [chapter.layer for chapter in self.chapters]

    def __getitem__(self, key: ItemKey) -> Self:
        return self.select(key)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the patterns, units and statistics of each chapter, numbered from 0."""
        arrays: dict[str, np.ndarray] = {}
        for i, chapter in enumerate(self.chapters):
            arrays |= {f"{i}_images": chapter.images, f"{i}_units": chapter.units}
            arrays |= {array_name(i, name): values for name, values in chapter.statistics.items()}
        return arrays

    def parameters(self) -> dict[str, Any]:
        """Return the settings for the manifest."""
        chapters = [
            {"layer": c.layer, "receptive_field": c.receptive_field, "names": c.names, "statistics": list(c.statistics)}
            for c in self.chapters
        ]
        return {"seed": self.seed, "layers": [chapter.layer for chapter in self.chapters], "chapters": chapters}

    def table(self) -> list[dict[str, str | float | None]]:
        """Return a row per layer: its receptive field, and median and quartiles of each statistic over the units."""
        rows = []
        for chapter in self.chapters:
            field = chapter.receptive_field and " x ".join(map(str, chapter.receptive_field))
            row: dict[str, str | float | None] = {"layer": chapter.layer, "receptive field": field}
            for name, values in chapter.statistics.items():
                low, median, high = np.percentile(values, (25, 50, 75))
                row |= {name: float(median), f"{name}, quartiles": f"{low:.3g} to {high:.3g}"}
            rows.append(row)
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """Return `table`."""
        return list(self.table())

    def _title(self) -> str:
        return count_of(len(self.chapters), "layer")

    def _display_rows(self) -> Sequence[Row]:
        headings = {"layer": "layer", "receptive field": "receptive field"}
        headings |= {name: name.partition(" ")[0] if " " in name else name for name in IMAGE_STATISTICS}
        return [{heading: row[name] for name, heading in headings.items()} for row in self.table()]

    def text_files(self) -> dict[str, str]:
        """Return `table` as ``story.csv``."""
        rows = self.table()
        out = io.StringIO()
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return {"story.csv": out.getvalue()}


@warns_of_failures
@check_arguments
def story(
    model: ModelLike,
    layers: LayerLike | Sequence[LayerLike] | None = None,
    *,
    units: int = 24,
    num_displayed: int = 6,
    seed: int = 0,
    memory: int = MEMORY,
    progress: ProgressOption = None,
) -> Story:
    """Optimise patterns of units in layers of increasing depth, and compute statistics of the images.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    layers : str, Layer, nn.Module or sequence of these, optional
        Layers as in `convscope.patterns`, in the order of the chapters. By default one layer for each resolution, at
        most six, and the classes.
    units : int
        Number of units per layer, 2 or more, evenly spaced over its channels.
    num_displayed : int
        Number of units per layer whose patterns are kept, at most: the most distinct ones.
    seed : int
        Seed of the random numbers.
    memory : int
        Bytes for the intermediate results of a batch.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` in layers, with fractions.

    Returns
    -------
    Story
        ``chapters``, one per layer; ``table()``.

    Raises
    ------
    ConvscopeError
        For an unknown layer, and for numbers out of range.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> story = convscope.story(model, ["conv_stem"], units=2, num_displayed=1)
    >>> story.chapters[0].receptive_field, story.chapters[0].images.shape
    ((3, 3), (1, 64, 64, 3))
    """
    model = as_model(model)
    units = require_int("units", units, minimum=2)
    num_displayed = min(require_int("num_displayed", num_displayed), units)
    names = _default_layers(model) if layers is None else [layer_name(model, layer) for layer in as_layers(layers)]
    if not names:
        raise ConvscopeError("layers is empty; give the names of layers that have units")
    layer_of_name = {name: None if name == LOGITS else model.layers.find(name) for name in names}
    chapters, notes = [], []
    with progress_bar(progress, "story") as report:
        for i, name in enumerate(names):
            result = patterns(
                model,
                name,
                _spaced_units(model, layer_of_name[name], units),
                seed=seed,
                memory=memory,
                progress=partial(_report_layer, report, i, len(names)),
            )
            chapters.append(_make_chapter(model, layer_of_name[name], result, num_displayed))
            notes += [f"{name}: {note}" for note in result.notes]
    return Story(model, tuple(chapters), seed, notes=tuple(notes))


def _report_layer(progress: Progress, layer: int, num_layers: int, done: float, total: int) -> None:
    progress(layer + done / total, num_layers)


def _spaced_units(model: Model, layer: Layer | None, count: int) -> list[int]:
    """Return at most `count` evenly spaced units of a layer, or classes (None)."""
    num_units = (model.num_outputs if layer is None else layer.units) or 1
    units = np.unique(np.linspace(0, num_units - 1, min(count, num_units)).round().astype(int))
    return [int(unit) for unit in units]


def _make_chapter(model: Model, layer: Layer | None, result: Patterns, num_displayed: int) -> Chapter:
    """Choose the most distinct patterns of a layer, and compute statistics of all."""
    distinct = most_distinct(result.images, num_displayed)
    return Chapter(
        layer=result.layer,
        receptive_field=_receptive_field(model, layer),
        units=result.units[distinct],
        names=tuple(result.names[k] for k in distinct),
        images=result.images[distinct],
        statistics=image_statistics(result.images),
    )


def read_story(model: Model, read: Callable[[str], bytes]) -> Story:
    """Return a saved story; ``read(name)`` returns the content of a file in its folder.

    Raises ConvscopeError if the story cannot be read, or belongs to a model with other weights.
    """
    try:
        manifest = json.loads(read("manifest.json"))
        saved_model, parameters = manifest["model"], manifest["parameters"]
        with np.load(io.BytesIO(read("arrays.npz")), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if saved_model["weights_sha256"] != model.weights_hash():
            raise ConvscopeError(f"the saved story is of {saved_model['name']} with other weights than {model.name}")
        chapters = tuple(_read_chapter(model, layer, i, arrays) for i, layer in enumerate(parameters["layers"]))
        return Story(model, chapters, parameters["seed"], notes=tuple(manifest["notes"]))
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ConvscopeError(f"the saved story cannot be read ({error}); generate it again") from error


def _read_chapter(model: Model, name: str, i: int, arrays: dict[str, np.ndarray]) -> Chapter:
    """Return chapter i from `Story.arrays`."""
    layer, units = None if name == LOGITS else model.layers.find(name), arrays[f"{i}_units"]
    names = tuple(model.class_name(int(unit)) if layer is None else f"{name} {unit}" for unit in units)
    statistics = {key: arrays[array] for key in IMAGE_STATISTICS if (array := array_name(i, key)) in arrays}
    return Chapter(name, _receptive_field(model, layer), units, names, arrays[f"{i}_images"], statistics)


def array_name(chapter: int, statistic: str) -> str:
    """Return the name under which a chapter's statistic is saved."""
    return f"{chapter}_{statistic.replace(' ', '_')}"


def _default_layers(model: Model) -> list[str]:
    names = [layer.name for layer in select_by_depth(model, MAX_LAYERS, min_count=4)]
    return [*names, LOGITS] if model.num_outputs else names


def _receptive_field(model: Model, layer: Layer | None) -> tuple[int, int] | None:
    """Return the receptive field; None if it covers the whole image."""
    field = None if layer is None else layer.bounded_receptive_field(model.preprocessing.size)
    return None if field is None else (field[0], field[1])
