"""What was drawn into a store beforehand: patterns (`convscope patterns -o STORE`), the story (`convscope story`)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.explorer.service.images import encode_image
from convscope.explorer.service.patterns import RECIPES, PatternSpec
from convscope.featurevis.layer_story import Story, read_story
from convscope.results import pattern_folders

if TYPE_CHECKING:
    from convscope.store.store import Store


@dataclass(frozen=True)
class _Drawn:
    """The patterns of a layer: how they were made, and what is said of each, by unit. stamp: another for later ones."""

    stamp: str
    recipe: str
    seed: int
    steps: int
    notes: list[str]
    rows: dict[int, dict[str, str]]


class StoredPatterns:
    """Drawings in a store; they are there from the moment on at which they are finished."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._layers: dict[str, _Drawn] = {}
        self._folders = pattern_folders(store.layers)

    def get_spec(self, layer: str, unit: int) -> PatternSpec | None:
        """How the unit's pattern was drawn; None if it was not."""
        drawn = self._drawn(layer)
        if drawn is None or unit not in drawn.rows or drawn.recipe not in RECIPES:
            return None
        return PatternSpec(layer, unit, recipe=drawn.recipe, seed=drawn.seed)

    def get_revision(self, spec: PatternSpec) -> str | None:
        """Another one once the pattern is drawn anew; None if this one was not drawn."""
        drawn = self._drawn(spec.layer)
        return None if drawn is None or spec != self.get_spec(spec.layer, spec.unit) else drawn.stamp

    def get_pattern(self, spec: PatternSpec) -> dict[str, Any] | None:
        """The pattern, told as `drawings.draw` tells it; None if this one was not drawn."""
        drawn = self._drawn(spec.layer)
        if drawn is None or spec != self.get_spec(spec.layer, spec.unit):
            return None
        image = self._store.unit(spec.layer, spec.unit).pattern()
        if image is None:
            return None
        row = drawn.rows[spec.unit]
        numbers = {name: float(row[name]) if row.get(name) else None for name in ("score", "noise", "reference")}
        return {
            "image": encode_image(image, "PNG"),
            "height": image.height,
            "width": image.width,
            **numbers,
            "notes": [note for note in drawn.notes if note.startswith((f"unit {spec.unit} ", f"class {spec.unit} "))],
            "steps": drawn.steps,
        }

    def get_story(self, model: Model) -> Story | None:
        """The story, if one is there. Raises ConvscopeError if it cannot be read, or is another network's."""
        if not self._there("story/manifest.json"):
            return None
        return read_story(model, lambda name: self._read(f"story/{name}"))

    def _drawn(self, layer: str) -> _Drawn | None:
        if layer not in self._folders:
            return None
        path = self._folders[layer]
        stamp = self._store.folder.file_version(f"{path}/manifest.json")  # which is written last
        known = self._layers.get(layer)
        if stamp is not None and (known is None or known.stamp != stamp):
            known = self._layers[layer] = self._told(path, stamp)
        return None if stamp is None else known

    def _told(self, path: str, stamp: str) -> _Drawn:
        manifest = self._store.folder.read_json(f"{path}/manifest.json")
        table = csv.DictReader(io.StringIO(self._read(f"{path}/units.csv").decode()))
        try:
            told = manifest["parameters"]
            rows = {int(row["unit"]): row for row in table}
            return _Drawn(stamp, told["recipe"], int(told["seed"]), int(told["steps"]), list(manifest["notes"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ConvscopeError(
                f"{path} in {self._store.address} holds no patterns that can be read: {error}"
            ) from error

    def _there(self, name: str) -> bool:
        return bool(self._store.folder.filesystem.exists(self._store.folder.path(name)))

    def _read(self, name: str) -> bytes:
        with self._store.folder.open(name) as file:
            return file.read()
