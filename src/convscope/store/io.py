"""The files of a store, in a folder or at any fsspec address: written whole or not at all, read piece by piece."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from convscope.errors import ConvscopeError, require_extra

if TYPE_CHECKING:
    import pyarrow

THUMBNAIL_SIDE, SHEET_COLUMNS = 96, 8  # pixels of a thumbnail's side; thumbnails on a sprite's side
THUMBNAILS_PER_SHEET = SHEET_COLUMNS * SHEET_COLUMNS
CACHED_SHEETS = 32  # that stay decoded: 56 MB


class Folder:
    """A folder or an fsspec address with files in it.

    storage: fsspec's options for the address (keys, endpoints). Raises ConvscopeError for an unknown kind of address.
    """

    def __init__(self, address: str | os.PathLike[str], storage: Mapping[str, Any] | None = None) -> None:
        core = require_extra("fsspec.core")
        self._local = require_extra("fsspec.implementations.local").LocalFileSystem
        self.address = os.fspath(address)
        try:
            self.filesystem, self._root = core.url_to_fs(self.address, **(storage or {}))
        except (ValueError, ImportError) as error:
            raise ConvscopeError(f"{self.address!r} cannot be opened: {error}") from error

    @property
    def local_path(self) -> Path | None:
        """The folder on the disk; None where it is elsewhere."""
        return Path(self._root) if isinstance(self.filesystem, self._local) else None

    def path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def file_version(self, name: str) -> str | None:
        """What changes when the file is written anew; None where there is none."""
        if not self.filesystem.exists(self.path(name)):
            return None
        info = self.filesystem.info(self.path(name))
        return str([info.get(key) for key in ("size", "mtime", "LastModified", "ETag")])

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file to read. Raises ConvscopeError where it is missing, cannot be read or is damaged."""
        arrow = require_extra("pyarrow")
        try:
            with self.filesystem.open(self.path(name), "rb") as file:
                yield file
        except FileNotFoundError as error:
            raise ConvscopeError(f"{self.address} has no {name}: no finished scan, or files were taken out") from error
        except (OSError, arrow.ArrowInvalid) as error:
            raise ConvscopeError(f"{name} in {self.address} cannot be read: {error}") from error

    @contextmanager
    def atomic_write(self, name: str) -> Iterator[IO[bytes]]:
        """A file that takes its name only once it is written whole. Raises ConvscopeError where that fails."""
        path = self.path(name)
        parent, _, last = path.rpartition("/")
        temporary = f"{parent}/.{last}.part"
        try:
            self.filesystem.makedirs(parent, exist_ok=True)
            try:
                with self.filesystem.open(temporary, "wb") as file:
                    yield file
                    file.flush()
                    if isinstance(self.filesystem, self._local):
                        os.fsync(file.fileno())
                self.filesystem.mv(temporary, path)
            except BaseException:
                self._remove(temporary)
                raise
        except OSError as error:
            raise ConvscopeError(f"cannot write {name} into {self.address}: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        self._remove(self.path(name))

    def _remove(self, path: str) -> None:
        if self.filesystem.exists(path):
            self.filesystem.rm_file(path)

    def read_json(self, name: str) -> Any:
        with self.open(name) as file:
            try:
                return json.loads(file.read())
            except ValueError as error:
                raise ConvscopeError(f"{name} in {self.address} is no JSON: {error}") from error

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        with self.atomic_write(name) as file:
            file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))

    def read_array(self, name: str) -> np.ndarray:
        """What a .npy file holds; never a pickle."""
        with self.open(name) as file:
            try:
                return np.asarray(npy.read_array(file, allow_pickle=False))
            except ValueError as error:
                raise ConvscopeError(f"{name} in {self.address} is no array that can be read: {error}") from error

    def write_array(self, name: str, array: np.ndarray) -> None:
        with self.atomic_write(name) as file:
            npy.write_array(file, array, allow_pickle=False)

    def write_rows(self, name: str, rows: IO[bytes], shape: tuple[int, int]) -> None:
        """A .npy file of float32 in this shape, whose values are in another file, row by row."""
        with self.atomic_write(name) as file:
            npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            rows.seek(0)
            shutil.copyfileobj(rows, file)


class ParquetTable:
    """A Parquet file, sorted by some column, of which only the row groups that are asked for are read."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self._parquet = require_extra("pyarrow.parquet")
        self._bounds: dict[str, list[tuple[Any, Any]]] = {}

    @cached_property
    def metadata(self) -> Any:
        """The file's footer: read once."""
        with self.folder.open(self.name) as file:
            return self._parquet.read_metadata(file)

    @property
    def num_row_groups(self) -> int:
        return int(self.metadata.num_row_groups)

    def read(self, groups: Sequence[int] | None = None, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """Some columns (None: all) of some row groups (None: all), as one table."""
        with self.folder.open(self.name) as file:
            source = self._parquet.ParquetFile(file, metadata=self.metadata, pre_buffer=True)
            chosen = range(self.num_row_groups) if groups is None else groups
            return source.read_row_groups(list(chosen), columns=columns and list(columns), use_threads=groups is None)

    def column_bounds(self, column: str) -> list[tuple[Any, Any]]:
        """Lowest and highest value of a column in each row group, from the file's statistics."""
        if column not in self._bounds:
            meta = self.metadata
            position = [meta.schema.column(i).path for i in range(meta.num_columns)].index(column)
            found = [meta.row_group(g).column(position).statistics for g in range(meta.num_row_groups)]
            if not all(s is not None and s.has_min_max for s in found):
                raise ConvscopeError(f"{self.name} in {self.folder.address} lacks statistics of {column}: scan anew")
            self._bounds[column] = [(s.min, s.max) for s in found]
        return self._bounds[column]


class NpyRows:
    """A matrix in a .npy file, read some rows at a time."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name

    @cached_property
    def _header(self) -> tuple[tuple[int, int], np.dtype[Any], int]:
        with self._folder.open(self._name) as file:
            try:
                first = npy.read_magic(file) == (1, 0)
                shape, fortran, dtype = (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(file)
            except ValueError as error:
                raise ConvscopeError(f"{self._name} in {self._folder.address} is no .npy file: {error}") from error
            if len(shape) != 2 or fortran or dtype.hasobject:
                raise ConvscopeError(f"{self._name} in {self._folder.address} holds {dtype} {shape}; expected a matrix")
            return shape, dtype, file.tell()

    @property
    def shape(self) -> tuple[int, int]:
        return self._header[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` up to `stop`."""
        (count, width), dtype, offset = self._header
        stop = min(stop, count)
        with self._folder.open(self._name) as file:
            file.seek(offset + start * width * dtype.itemsize)
            data = file.read((stop - start) * width * dtype.itemsize)
        if len(data) != (stop - start) * width * dtype.itemsize:
            raise ConvscopeError(f"{self._name} in {self._folder.address} is cut off")
        return np.frombuffer(data, dtype).reshape(stop - start, width)


def sheet_name(image: int) -> str:
    """The sprite that a picture's thumbnail is on."""
    return f"thumbnails/{image // THUMBNAILS_PER_SHEET:05d}.webp"


class ThumbnailSheets:
    """The thumbnails of a store. The sprites that were used last stay decoded, for their neighbours."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._sprite = lru_cache(CACHED_SHEETS)(self._decoded)

    def read(self, image: int) -> Image.Image:
        """A picture's thumbnail."""
        top, left = (
            image % THUMBNAILS_PER_SHEET // SHEET_COLUMNS * THUMBNAIL_SIDE,
            image % SHEET_COLUMNS * THUMBNAIL_SIDE,
        )
        return self._sprite(sheet_name(image)).crop((left, top, left + THUMBNAIL_SIDE, top + THUMBNAIL_SIDE))

    def _decoded(self, name: str) -> Image.Image:
        with self._folder.open(name) as file, Image.open(file, formats=["WEBP"]) as page:
            if page.size != (SHEET_COLUMNS * THUMBNAIL_SIDE, SHEET_COLUMNS * THUMBNAIL_SIDE):
                where = f"{name} in {self._folder.address}"
                raise ConvscopeError(f"{where} is {page.width} x {page.height}; expected 768 x 768")
            return page.convert("RGB")
