"""Read and write the files of a store, in a local folder or at any fsspec address."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from convscope.errors import ConvscopeError, require_extra
from convscope.images.decode_worker import THUMBNAIL_SIDE

if TYPE_CHECKING:
    import pyarrow

Json: TypeAlias = dict[str, Any]  # a JSON object, or a row of a table: column name to value

SHEET_COLUMNS = 8  # thumbnails along each side of a sheet
THUMBNAILS_PER_SHEET = SHEET_COLUMNS * SHEET_COLUMNS
CACHED_SHEETS = 32  # decoded sheets held in memory: 56 MB


class Folder:
    """A folder or an fsspec address, and the files in it.

    Parameters
    ----------
    address : str or path
        A folder, or an address such as ``s3://bucket/store``.
    storage : mapping, optional
        fsspec's options for the address: keys, endpoints.

    Raises
    ------
    ConvscopeError
        For a kind of address that fsspec does not know.
    """

    def __init__(self, address: str | os.PathLike[str], storage: Mapping[str, object] | None = None) -> None:
        core = require_extra("fsspec.core")
        self._local_system = require_extra("fsspec.implementations.local").LocalFileSystem
        self.address = os.fspath(address)
        try:
            self._filesystem, self._root = core.url_to_fs(self.address, **(storage or {}))
        except (ValueError, ImportError) as error:
            raise ConvscopeError(f"{self.address!r} cannot be opened: {error}") from error

    @property
    def local_path(self) -> Path | None:
        """The folder on this machine's disk; None for other file systems."""
        return Path(self._root) if isinstance(self._filesystem, self._local_system) else None

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return bool(self._filesystem.exists(self._path(name)))

    def list_names(self, name: str) -> list[str]:
        """List the names in a subfolder, sorted; empty if there is no such subfolder."""
        try:
            paths = self._filesystem.ls(self._path(name), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def file_version(self, name: str) -> str | None:
        """Return a string that changes whenever the file is rewritten; None if there is no such file."""
        if not self.exists(name):
            return None
        info = self._filesystem.info(self._path(name))
        return str([info.get(key) for key in ("size", "mtime", "LastModified", "ETag")])

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for reading. Raises ConvscopeError if it is missing, unreadable or damaged."""
        arrow = require_extra("pyarrow")
        try:
            with self._filesystem.open(self._path(name), "rb") as file:
                yield file
        except FileNotFoundError as error:
            raise ConvscopeError(
                f"{self.address} has no {name}: the scan is not finished, or files were removed"
            ) from error
        except (OSError, arrow.ArrowInvalid) as error:
            raise ConvscopeError(f"{name} in {self.address} cannot be read: {error}") from error

    @contextmanager
    def atomic_write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing that appears under its name only once complete. Raises ConvscopeError on failure."""
        path = self._path(name)
        parent, _, last = path.rpartition("/")
        temporary = f"{parent}/.{last}.part"
        try:
            self._filesystem.makedirs(parent, exist_ok=True)
            try:
                with self._filesystem.open(temporary, "wb") as file:
                    yield file
                    file.flush()
                    if self.local_path is not None:
                        os.fsync(file.fileno())
                self._filesystem.mv(temporary, path)
            except BaseException:
                self._remove_path(temporary)
                raise
        except OSError as error:
            raise ConvscopeError(f"cannot write {name} into {self.address}: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self._remove_path(self._path(name))

    def read_json(self, name: str) -> Any:  # any JSON value
        """Read a JSON file."""
        with self.open(name) as file:
            try:
                return json.loads(file.read())
            except ValueError as error:
                raise ConvscopeError(f"{name} in {self.address} is not JSON: {error}") from error

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Write a JSON file."""
        with self.atomic_write(name) as file:
            file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))

    def read_array(self, name: str) -> np.ndarray:
        """Read a .npy file; pickles are refused."""
        with self.open(name) as file:
            try:
                return np.asarray(npy.read_array(file, allow_pickle=False))
            except ValueError as error:
                raise ConvscopeError(f"{name} in {self.address} is not a readable .npy file: {error}") from error

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Write a .npy file."""
        with self.atomic_write(name) as file:
            npy.write_array(file, array, allow_pickle=False)

    def write_rows(self, name: str, rows: IO[bytes], shape: tuple[int, int]) -> None:
        """Write a float32 .npy file of this shape from a file with its values, row by row."""
        with self.atomic_write(name) as file:
            npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            rows.seek(0)
            shutil.copyfileobj(rows, file)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _remove_path(self, path: str) -> None:
        if self._filesystem.exists(path):
            self._filesystem.rm_file(path)


class ParquetTable:
    """A Parquet file of which single row groups are read."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self._parquet = require_extra("pyarrow.parquet")
        self._bounds: dict[str, list[tuple[Any, Any]]] = {}

    @cached_property
    def metadata(self) -> pyarrow.parquet.FileMetaData:
        """The file's footer, read once."""
        with self.folder.open(self.name) as file:
            return self._parquet.read_metadata(file)

    @property
    def column_names(self) -> list[str]:
        """The names of all columns."""
        return list(self.metadata.schema.to_arrow_schema().names)

    @property
    def num_row_groups(self) -> int:
        """The number of row groups."""
        return int(self.metadata.num_row_groups)

    def read(self, groups: Sequence[int] | None = None, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """Read some columns of some row groups as one table; None reads all of them."""
        with self.folder.open(self.name) as file:
            source = self._parquet.ParquetFile(file, metadata=self.metadata, pre_buffer=True)
            selected = range(self.num_row_groups) if groups is None else groups
            return source.read_row_groups(list(selected), columns=columns and list(columns), use_threads=groups is None)

    def column_bounds(self, column: str) -> list[tuple[Any, Any]]:
        """Return a column's lowest and highest value in each row group, from the file's statistics."""
        if column not in self._bounds:
            meta = self.metadata
            position = [meta.schema.column(i).path for i in range(meta.num_columns)].index(column)
            statistics = [meta.row_group(g).column(position).statistics for g in range(meta.num_row_groups)]
            if not all(s is not None and s.has_min_max for s in statistics):
                raise ConvscopeError(
                    f"{self.name} in {self.folder.address} lacks statistics of column {column!r}; scan again"
                )
            self._bounds[column] = [(s.min, s.max) for s in statistics]
        return self._bounds[column]


class NpyRows:
    """A matrix in a .npy file of which a range of rows is read at a time."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name

    @cached_property
    def _header(self) -> tuple[tuple[int, int], np.dtype[np.generic], int]:
        """Shape, dtype, and the offset of the first value."""
        with self._folder.open(self._name) as file:
            try:
                version_1 = npy.read_magic(file) == (1, 0)
                read_header = npy.read_array_header_1_0 if version_1 else npy.read_array_header_2_0
                shape, fortran, dtype = read_header(file)
            except ValueError as error:
                raise ConvscopeError(f"{self._name} in {self._folder.address} is not a .npy file: {error}") from error
            if len(shape) != 2 or fortran or dtype.hasobject:
                raise ConvscopeError(f"{self._name} in {self._folder.address} holds {dtype} {shape}; expected a matrix")
            return shape, dtype, file.tell()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read the rows from `start` up to `stop`."""
        (count, width), dtype, offset = self._header
        stop = min(stop, count)
        num_bytes = (stop - start) * width * dtype.itemsize
        with self._folder.open(self._name) as file:
            file.seek(offset + start * width * dtype.itemsize)
            data = file.read(num_bytes)
        if len(data) != num_bytes:
            raise ConvscopeError(f"{self._name} in {self._folder.address} is truncated")
        return np.frombuffer(data, dtype).reshape(stop - start, width)


def sheet_name(image: int) -> str:
    """Return the name of the sheet that holds an image's thumbnail."""
    return f"thumbnails/{image // THUMBNAILS_PER_SHEET:05d}.webp"


class ThumbnailSheets:
    """The thumbnails of a store, 64 to a sheet. The sheets used last stay decoded."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._load_sheet = lru_cache(CACHED_SHEETS)(self._decode_sheet)

    def read(self, image: int) -> Image.Image:
        """Read an image's thumbnail, 96 x 96 pixels."""
        row, column = divmod(image % THUMBNAILS_PER_SHEET, SHEET_COLUMNS)
        top, left = row * THUMBNAIL_SIDE, column * THUMBNAIL_SIDE
        return self._load_sheet(sheet_name(image)).crop((left, top, left + THUMBNAIL_SIDE, top + THUMBNAIL_SIDE))

    def _decode_sheet(self, name: str) -> Image.Image:
        side = SHEET_COLUMNS * THUMBNAIL_SIDE
        with self._folder.open(name) as file, Image.open(file, formats=["WEBP"]) as sheet:
            if sheet.size != (side, side):
                raise ConvscopeError(
                    f"{name} in {self._folder.address} has {sheet.width} x {sheet.height} pixels; "
                    f"expected {side} x {side}"
                )
            return sheet.convert("RGB")
