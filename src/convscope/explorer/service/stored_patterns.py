"""Patterns and stories that were computed beforehand into a store (`convscope patterns`, `convscope story`)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.explorer.service.images import encode_image
from convscope.explorer.service.patterns import RECIPES, PatternSpec
from convscope.explorer.service.schemas import PatternRecord
from convscope.featurevis.layer_story import Story, read_story
from convscope.results import pattern_folders

if TYPE_CHECKING:
    from convscope.store.store import Store


@dataclass(frozen=True)
class _LayerPatterns:
    """The patterns of a layer: their settings, and a table row for each unit. `revision` differs for later ones."""

    revision: str
    recipe: str
    seed: int
    steps: int
    notes: list[str]
    rows: dict[int, dict[str, str]]


class StoredPatterns:
    """Patterns in a store. Patterns that are added while the explorer runs are found."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._layers: dict[str, _LayerPatterns] = {}
        self._folders = pattern_folders(store.layers)

    def get_spec(self, layer: str, unit: int) -> PatternSpec | None:
        """Return how the unit's pattern was computed; None if there is none."""
        patterns = self._layer_patterns(layer)
        if patterns is None or unit not in patterns.rows or patterns.recipe not in RECIPES:
            return None
        return PatternSpec(layer, unit, recipe=patterns.recipe, seed=patterns.seed)

    def get_revision(self, spec: PatternSpec) -> str | None:
        """Return a value that changes when the pattern is computed anew; None if the store has no such pattern."""
        patterns = self._layer_patterns(spec.layer)
        return None if patterns is None or spec != self.get_spec(spec.layer, spec.unit) else patterns.revision

    def get_pattern(self, spec: PatternSpec) -> PatternRecord | None:
        """Return the pattern; None if the store has no such pattern."""
        patterns = self._layer_patterns(spec.layer)
        if patterns is None or spec != self.get_spec(spec.layer, spec.unit):
            return None
        image = self._store.unit(spec.layer, spec.unit).pattern()
        if image is None:
            return None
        row = patterns.rows[spec.unit]
        prefixes = (f"unit {spec.unit} ", f"class {spec.unit} ")
        return {
            "image": encode_image(image, "PNG"),
            "height": image.height,
            "width": image.width,
            "score": _number(row, "score"),
            "noise_score": _number(row, "noise_score"),
            "reference_score": _number(row, "reference_score"),
            "notes": [note for note in patterns.notes if note.startswith(prefixes)],
            "steps": patterns.steps,
            "layer": spec.layer,
            "unit": spec.unit,
            "variant": spec.variant,
            "recipe": spec.recipe,
            "seed": spec.seed,
        }

    def get_story(self, model: Model) -> Story | None:
        """Return the story; None if there is none. Raises ConvscopeError if it is damaged or of another model."""
        folder = self._store.folder
        if not folder.exists("story/manifest.json"):
            return None
        return read_story(model, lambda name: self._read(f"story/{name}"))

    def _layer_patterns(self, layer: str) -> _LayerPatterns | None:
        if layer not in self._folders:
            return None
        path = self._folders[layer]
        revision = self._store.folder.file_version(f"{path}/manifest.json")  # the file that is written last
        known = self._layers.get(layer)
        if revision is not None and (known is None or known.revision != revision):
            known = self._layers[layer] = self._load(path, revision)
        return None if revision is None else known

    def _load(self, path: str, revision: str) -> _LayerPatterns:
        manifest = self._store.folder.read_json(f"{path}/manifest.json")
        table = csv.DictReader(io.StringIO(self._read(f"{path}/units.csv").decode()))
        try:
            settings = manifest["parameters"]
            rows = {int(row["unit"]): row for row in table}
            recipe, seed, steps = settings["recipe"], int(settings["seed"]), int(settings["steps"])
            return _LayerPatterns(revision, recipe, seed, steps, list(manifest["notes"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ConvscopeError(f"{path} in {self._store.address} has no readable patterns: {error}") from error

    def _read(self, name: str) -> bytes:
        with self._store.folder.open(name) as file:
            return file.read()


def _number(row: dict[str, str], column: str) -> float | None:
    text = row.get(column)
    return float(text) if text else None
