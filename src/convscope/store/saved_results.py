"""Concepts and atlases that lie in a store: where they are put, and how they are read, without the network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope.errors import ConvscopeError
from convscope.results import file_names
from convscope.store.io import Folder, ParquetTable

if TYPE_CHECKING:
    from convscope.decomposition.activation_atlas import Atlas
    from convscope.decomposition.craft import Concepts
    from convscope.store.store import Store

# What each kind has one row for: arrays whose first axis must agree.
ALIKE = {
    "concepts": (
        ("bank", "importance", "ablation_effects", "examples", "patches"),
        ("heatmaps", "evaluated_indices", "thumbnails", "shapes"),
    ),
    "atlas": (("cells", "counts", "icons", "classes", "effects"), ("positions", "sources", "cell_index")),
}


@dataclass(frozen=True, eq=False)
class SavedResult:
    """A result in a store. kind: "concepts" or "atlas"; name: of its folder there; version: another for other content.

    manifest: what made it. layer, target: of what; an atlas may be of no class.
    """

    folder: Folder = field(repr=False)
    kind: str
    name: str
    version: str
    manifest: dict[str, Any] = field(repr=False)

    @property
    def layer(self) -> str:
        return str(self.manifest["parameters"]["layer"])

    @property
    def target(self) -> int | None:
        number: int | None = self.manifest["parameters"]["target"]
        return number

    @property
    def image_names(self) -> list[str]:
        """The names of the pictures it was made from."""
        return list(self.manifest["parameters"]["image_names"])

    def archive(self) -> bytes:
        """The file with all arrays, as it is. Raises ConvscopeError where it is missing."""
        with self.folder.open(f"{self.kind}/{self.name}/arrays.npz") as file:
            return file.read()

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays, as the result had them. Raises ConvscopeError where they are missing or damaged."""
        content = io.BytesIO(self.archive())
        try:
            with np.load(content, allow_pickle=False) as archive:
                found = {key: archive[key] for key in archive.files}
            for names in ALIKE[self.kind]:
                lengths = {key: len(found[key]) for key in names}
                if len(set(lengths.values())) > 1:
                    raise ValueError(f"the lengths of its arrays differ: {lengths}")
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            name = f"{self.kind}/{self.name}/arrays.npz in {self.folder.address}"
            raise ConvscopeError(f"{name} cannot be read: {error}") from error
        return found


class SavedResultIndex:
    """The results of one kind in a store, as they are now; a manifest that has not changed is not read again."""

    def __init__(self, folder: Folder, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._known: dict[str, tuple[str, SavedResult]] = {}

    def items(self) -> list[SavedResult]:
        """By layer and class; concepts by class first. Raises ConvscopeError for a manifest that makes no sense."""
        try:
            paths = self._folder.filesystem.ls(self._folder.path(self._kind), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = []
        for name in sorted(path.rstrip("/").rpartition("/")[2] for path in paths):
            stamp = self._folder.file_version(f"{self._kind}/{name}/manifest.json")
            if stamp is not None:  # else it was not finished
                found.append(self._item(name, stamp))
        atlas = self._kind == "atlas"
        return sorted(found, key=lambda one: (one.layer if atlas else "", -1 if one.target is None else one.target))

    def _item(self, name: str, stamp: str) -> SavedResult:
        if name not in self._known or self._known[name][0] != stamp:
            self._known[name] = (stamp, self._read(name, stamp))
        return self._known[name][1]

    def _read(self, name: str, stamp: str) -> SavedResult:
        path = f"{self._kind}/{name}/manifest.json"
        manifest = self._folder.read_json(path)
        told = manifest.get("parameters") if isinstance(manifest, dict) else None
        if not isinstance(told, dict) or manifest.get("kind") != self._kind or not _told(told, self._kind):
            raise ConvscopeError(f"{path} in {self._folder.address} is no manifest of {self._kind}; remove its folder")
        words = json.dumps([stamp, manifest], sort_keys=True)
        version = hashlib.sha256(words.encode(errors="backslashreplace")).hexdigest()[:12]
        return SavedResult(self._folder, self._kind, name, version, manifest)


def _told(parameters: dict[str, Any], kind: str) -> bool:
    """Whether layer, class and pictures are named."""
    layer, target, images = (parameters.get(key) for key in ("layer", "target", "image_names"))
    number = isinstance(target, int) or (kind == "atlas" and target is None and "target" in parameters)
    return isinstance(layer, str) and number and isinstance(images, list)


def save_path(store: Store, result: Concepts | Atlas) -> Path:
    """The folder in the store that a result is saved in; `Store.keep` says what is raised."""
    store.check_weights(result.model)
    if store.folder.local_path is None:
        raise ConvscopeError(f"results can be put into a store in a folder on a disk; {store.address} is none")
    layer, kind = file_names(result.model.layers.names)[result.layer], type(result).__name__.lower()
    if kind == "concepts":
        return store.folder.local_path / kind / f"{result.target}-{layer}"
    return store.folder.local_path / kind / (layer if result.target is None else f"{layer}-class{result.target}")


def ids_by_name(store: Store, names: Sequence[str]) -> list[int | None]:
    """Which pictures of the store's data set have these names; None for a name that none has.

    Local files have the same name however it was written: relative to the working folder, say.
    """
    wanted, found = {_absolute(name) for name in names}, dict[str, int]()
    table = ParquetTable(store.folder, "images.parquet")
    for group in range(table.num_row_groups):
        rows = table.read([group], ["image", "name"])
        for image, name in zip(rows["image"].to_pylist(), rows["name"].to_pylist(), strict=True):
            if (own := _absolute(name)) in wanted:
                found.setdefault(own, image)
    return [found.get(_absolute(name)) for name in names]


def _absolute(name: str) -> str:
    return name if "://" in name else os.path.abspath(name)
