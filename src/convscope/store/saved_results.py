"""Concepts, atlases and diagnoses saved in a store: where they are saved, and how they are read without the model."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.results import file_names
from convscope.store.io import Folder, Json, ParquetTable
from convscope.store.tables import StoreTables

# Groups of arrays of each kind whose first axes have the same length.
SAME_LENGTH = {
    "concepts": (
        ("bank", "importance", "ablation_effects", "examples", "patches"),
        ("heatmaps", "evaluated_indices", "thumbnails", "shapes"),
    ),
    "diagnosis": (
        ("labels", "predictions", "confidence", "label_quality"),
        ("examples", "thumbnails", "evidence"),
        ("changed.finding", "changed.before", "changed.after"),
    ),
    "atlas": (("cells", "counts", "icons", "classes", "effects"), ("positions", "sources", "cell_index")),
}


class StorableResult(Protocol):
    """Concepts, an atlas or a diagnosis."""

    @property
    def model(self) -> Model:
        """The model that the result is about."""

    @property
    def layer(self) -> str:
        """The layer it was computed at."""

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Save the result into a folder."""


@dataclass(frozen=True, eq=False)
class SavedResult:
    """Concepts, an atlas or a diagnosis in a store.

    Attributes
    ----------
    folder : Folder
        The store.
    kind : {"concepts", "atlas", "diagnosis"}
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
        """Index of its class; None for an atlas of all classes, and for a diagnosis."""
        target: int | None = self.manifest["parameters"].get("target")
        return target

    @property
    def image_names(self) -> list[str]:
        """Names of the images it was made from."""
        return list(self.manifest["parameters"]["image_names"])

    def file(self, name: str) -> bytes:
        """Read a file of its folder. Raises ConvscopeError if it is missing."""
        with self.folder.open(f"{self.kind}/{self.name}/{name}") as file:
            return file.read()

    def archive(self) -> bytes:
        """Read its arrays.npz as bytes. Raises ConvscopeError if the file is missing."""
        return self.file("arrays.npz")

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
        """List finished results: concepts by class, others by layer, then class. Raises ConvscopeError if invalid."""
        results = []
        for name in self._folder.list_names(self._kind):
            file_version = self._folder.file_version(f"{self._kind}/{name}/manifest.json")
            if file_version is not None:  # the manifest is written last
                results.append(self._load(name, file_version))
        return sorted(results, key=self._sort_key)

    def _sort_key(self, result: SavedResult) -> tuple[str, int]:
        return "" if self._kind == "concepts" else result.layer, -1 if result.target is None else result.target

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
    has_target = has_target or kind == "diagnosis"
    return isinstance(layer, str) and has_target and isinstance(images, list)


def save_path(store: StoreTables, result: StorableResult) -> Path:
    """Return the folder of a result inside a store. Raises ConvscopeError as `Store.save_result` does."""
    store.check_weights(result.model)
    folder = store.folder.local_path
    if folder is None:
        raise ConvscopeError(
            f"{store.address} is not on this machine's disk, and results are saved in local stores only; copy it first"
        )
    target = getattr(result, "target", None)
    layer, kind = file_names(result.model.layers.names)[result.layer], type(result).__name__.lower()
    if kind == "concepts":
        return folder / kind / f"{target}-{layer}"
    return folder / kind / (layer if target is None else f"{layer}-class{target}")


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
