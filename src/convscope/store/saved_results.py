"""Concepts and atlases saved in a store: where they are saved, and how they are read without the model."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convscope.errors import ConvscopeError
from convscope.results import file_names
from convscope.store.io import Folder, Json, ParquetTable
from convscope.store.tables import StoreTables

if TYPE_CHECKING:
    from convscope.decomposition.result import Atlas, Concepts

# Groups of arrays of each kind whose first axes have the same length.
SAME_LENGTH = {
    "concepts": (
        ("bank", "importance", "ablation_effects", "examples", "patches"),
        ("heatmaps", "evaluated_indices", "thumbnails", "shapes"),
    ),
    "atlas": (("cells", "counts", "icons", "classes", "effects"), ("positions", "sources", "cell_index")),
}


@dataclass(frozen=True, eq=False)
class SavedResult:
    """Concepts or an atlas in a store.

    Attributes
    ----------
    folder : Folder
        The store.
    kind : {"concepts", "atlas"}
        What it is.
    name : str
        Name of its folder inside the store.
    version : str
        Changes whenever the content changes.
    manifest : dict
        How it was made.
    """

    folder: Folder = field(repr=False)
    kind: str
    name: str
    version: str
    manifest: Json = field(repr=False)

    @property
    def layer(self) -> str:
        """The layer it was computed at."""
        return str(self.manifest["parameters"]["layer"])

    @property
    def target(self) -> int | None:
        """Index of its class; None for an atlas of all classes."""
        target: int | None = self.manifest["parameters"]["target"]
        return target

    @property
    def image_names(self) -> list[str]:
        """Names of the images it was made from."""
        return list(self.manifest["parameters"]["image_names"])

    def archive(self) -> bytes:
        """Read its arrays.npz as bytes. Raises ConvscopeError if the file is missing."""
        with self.folder.open(f"{self.kind}/{self.name}/arrays.npz") as file:
            return file.read()

    def arrays(self) -> dict[str, np.ndarray]:
        """Read all arrays, by the names of the result's attributes. Raises ConvscopeError if missing or damaged."""
        content = io.BytesIO(self.archive())
        try:
            with np.load(content, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            for names in SAME_LENGTH[self.kind]:
                lengths = {key: len(arrays[key]) for key in names}
                if len(set(lengths.values())) > 1:
                    raise ValueError(f"arrays differ in length: {lengths}")
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            name = f"{self.kind}/{self.name}/arrays.npz in {self.folder.address}"
            raise ConvscopeError(f"{name} cannot be read: {error}") from error
        return arrays


class SavedResultIndex:
    """Lists the results of one kind in a store; reads a manifest again only if it has changed."""

    def __init__(self, folder: Folder, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._cache: dict[str, tuple[str, SavedResult]] = {}  # by name: version of the manifest's file, result

    def items(self) -> list[SavedResult]:
        """List finished results: concepts by class, atlases by layer, then class. Raises ConvscopeError if invalid."""
        results = []
        for name in self._folder.list_names(self._kind):
            file_version = self._folder.file_version(f"{self._kind}/{name}/manifest.json")
            if file_version is not None:  # the manifest is written last
                results.append(self._load(name, file_version))
        return sorted(results, key=self._sort_key)

    def _sort_key(self, result: SavedResult) -> tuple[str, int]:
        return result.layer if self._kind == "atlas" else "", -1 if result.target is None else result.target

    def _load(self, name: str, file_version: str) -> SavedResult:
        if name not in self._cache or self._cache[name][0] != file_version:
            self._cache[name] = (file_version, self._read(name, file_version))
        return self._cache[name][1]

    def _read(self, name: str, file_version: str) -> SavedResult:
        path = f"{self._kind}/{name}/manifest.json"
        manifest = self._folder.read_json(path)
        parameters = manifest.get("parameters") if isinstance(manifest, dict) else None
        if (
            not isinstance(parameters, dict)
            or manifest.get("kind") != self._kind
            or not _is_valid(parameters, self._kind)
        ):
            raise ConvscopeError(
                f"{path} in {self._folder.address} is not a manifest of {self._kind}; remove its folder"
            )
        content = json.dumps([file_version, manifest], sort_keys=True)
        version = hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()[:12]
        return SavedResult(self._folder, self._kind, name, version, manifest)


def _is_valid(parameters: Json, kind: str) -> bool:
    """Return whether a manifest names layer, class and images."""
    layer, target, images = (parameters.get(key) for key in ("layer", "target", "image_names"))
    has_target = isinstance(target, int) or (kind == "atlas" and target is None and "target" in parameters)
    return isinstance(layer, str) and has_target and isinstance(images, list)


def save_path(store: StoreTables, result: Concepts | Atlas) -> Path:
    """Return the folder of a result inside a store. Raises ConvscopeError as `Store.save_result` does."""
    store.check_weights(result.model)
    folder = store.folder.local_path
    if folder is None:
        raise ConvscopeError(
            f"{store.address} is not on this machine's disk, and results are saved in local stores only; copy it first"
        )
    layer, kind = file_names(result.model.layers.names)[result.layer], type(result).__name__.lower()
    if kind == "concepts":
        return folder / kind / f"{result.target}-{layer}"
    return folder / kind / (layer if result.target is None else f"{layer}-class{result.target}")


def ids_by_name(store: StoreTables, names: Sequence[str]) -> list[int | None]:
    """Find the ids of images of the store's data set by name; None for a name that is not in it.

    Local paths are compared as absolute paths.
    """
    paths = [_absolute(name) for name in names]
    requested, ids = set(paths), dict[str, int]()
    table = ParquetTable(store.folder, "images.parquet")
    for group in range(table.num_row_groups):
        rows = table.read([group], ["image", "name"])
        for image, name in zip(rows["image"].to_pylist(), rows["name"].to_pylist(), strict=True):
            path = _absolute(name)
            if path in requested:
                ids.setdefault(path, image)
    return [ids.get(path) for path in paths]


def _absolute(name: str) -> str:
    return name if "://" in name else os.path.abspath(name)
