"""Pictures in columns: Parquet files, and the Arrow files in which Hugging Face keeps a data set on disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope.datasets.readers_files import DatasetIndex, Label, as_label
from convscope.datasets.storage import Storage, with_retries
from convscope.errors import ConvscopeError, require_extra

if TYPE_CHECKING:
    import pyarrow

_IMAGES = ("image", "img", "picture", "bytes", "jpg", "jpeg", "png", "webp")  # which of several binary columns
_LABELS = ("label", "labels", "cls")
_ROWS = 32  # of a row group that are decompressed at a time


def image_column(schema: pyarrow.Schema, where: str) -> str:
    """The column that holds pictures, found by its type: a struct with "bytes" among its fields, or binary.

    Raises ConvscopeError if there is none, or if several are and no name tells which.
    """
    fits = [str(column.name) for column in schema if _is_struct(column.type) or _is_binary(column.type)]
    named = [name for name in fits if name.lower() in _IMAGES]
    best = fits if len(fits) == 1 else named[:1]
    if not best:
        found = ", ".join(f"{column.name} ({column.type})" for column in schema)
        raise ConvscopeError(
            f"{where} has {len(fits) or 'no'} columns of binary or struct<bytes, path>, and none is called "
            f"{', '.join(_IMAGES)}: it has {found}"
        )
    return best[0]


def label_column(schema: pyarrow.Schema) -> str | None:
    """The column of labels, whole numbers or names: label, labels or cls."""
    types = require_extra("pyarrow.types")
    tests = (types.is_integer, types.is_string, types.is_large_string, types.is_dictionary)
    fits = [column.name for column in schema if any(test(column.type) for test in tests)]
    return next((name for name in _LABELS if name in fits), None)


def class_names(schema: pyarrow.Schema, label: str) -> tuple[str, ...] | None:
    """The names of classes that Hugging Face keeps in a schema."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = told["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def byte_sizes(column: pyarrow.ChunkedArray) -> list[int]:
    """The length of each picture of a column, 0 where there is none; their bytes are not looked at."""
    compute = require_extra("pyarrow.compute")
    content = compute.struct_field(column, "bytes") if _is_struct(column.type) else column
    return [int(size or 0) for size in compute.binary_length(content).to_pylist()]


def _is_binary(kind: Any) -> bool:
    types = require_extra("pyarrow.types")
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_struct(kind: Any) -> bool:
    types = require_extra("pyarrow.types")
    return bool(types.is_struct(kind) and any(f.name == "bytes" and _is_binary(f.type) for f in kind))


class _Cursor:
    """Where the reading of a block of rows stands: rows that are asked for in ascending order are decompressed once.

    Of a block no more is in memory than a few rows. Goes to another process as a new one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Cursor, ())

    def _forget(self) -> None:
        self._block, self._first = -1, 0
        self._rows: Any = ()
        self._rest: Iterator[Any] = iter(())

    def value(self, block: int, row: int, begin: Callable[[], Iterator[pyarrow.RecordBatch]]) -> Any:
        """The value in a row of a block; `begin` gives the block's rows of that column from the first on."""
        with self._lock:
            try:
                if block != self._block or row < self._first:
                    self._forget()
                    self._block, self._rest = block, begin()
                while row >= self._first + len(self._rows):
                    self._first += len(self._rows)
                    self._rows = next(self._rest, None)
                    if self._rows is None:
                        raise ConvscopeError("is not there any more: the file has changed")
                return self._rows.column(0)[row - self._first].as_py()
            except BaseException:
                self._forget()
                raise


_Rows = Callable[[Storage, str, int, str], "Iterator[pyarrow.RecordBatch]"]  # of a file, a block and a column


@dataclass(frozen=True, eq=False)
class Columns:
    """Pictures in a column of several files, which consist of blocks of rows.

    rows: gives the rows of a block, some at a time; bounds: the first picture of each block, and the number of all;
    which: the file of each block; places: where in that file it is.
    """

    rows: _Rows
    storage: Storage
    files: tuple[str, ...]
    column: str
    bounds: np.ndarray
    which: np.ndarray
    places: np.ndarray
    held = False
    _cursor: _Cursor = field(default_factory=_Cursor, repr=False)

    def read(self, index: int, name: str) -> Any:
        block = int(np.searchsorted(self.bounds, index, side="right")) - 1
        file, place = self.files[self.which[block]], int(self.places[block])
        begin = partial(self.rows, self.storage, file, place, self.column)
        value = partial(self._cursor.value, block, index - int(self.bounds[block]), begin)
        found = value() if self.storage.local(file) is not None else with_retries(value)
        content = found.get("bytes") if isinstance(found, dict) else found
        if content is None:
            raise ConvscopeError("holds no bytes")
        return content


def _parquet_rows(storage: Storage, file: str, place: int, column: str) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a row group."""
    parquet = require_extra("pyarrow.parquet")
    # So it reads page by page what would else be a whole column of a row group.
    with storage.open(file) as stream, parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False) as opened:
        yield from opened.iter_batches(_ROWS, row_groups=[place], columns=[column], use_threads=False)


def _arrow_rows(storage: Storage, file: str, place: int, column: str) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a record batch, which lies at byte `place` of a stream."""
    ipc = require_extra("pyarrow.ipc")
    with _stream(storage, file) as stream:
        schema = ipc.read_schema(stream)
        stream.seek(place)
        yield ipc.read_record_batch(ipc.read_message(stream), schema).select([column])


@dataclass
class _Found:
    """What is known of the rows of files while they are gone through."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    which: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    content: list[str] = field(default_factory=list)

    def block(self, file: int, place: int, rows: int) -> None:
        self.bounds.append(self.bounds[-1] + rows)
        self.which.append(file)
        self.places.append(place)

    def listing(
        self, rows: _Rows, storage: Storage, files: Sequence[str], schema: pyarrow.Schema, columns: _Pair
    ) -> DatasetIndex:
        image, label = columns
        bounds, which, places = (np.array(values, np.int64) for values in (self.bounds, self.which, self.places))
        listing = DatasetIndex(
            self.names, Columns(rows, storage, tuple(files), image, bounds, which, places), self.sizes
        )
        listing.content = " ".join(self.content)
        if label is not None:
            listing.labels, listing.label_names = self.labels, class_names(schema, label)
        return listing


_Pair = tuple[str, str | None]  # the columns of pictures and of labels


def of_parquet(storage: Storage, files: Sequence[str]) -> DatasetIndex:
    """The pictures of Parquet files, in the order of the files and of their rows; "FILE#ROW" is a picture's name.

    Only footers and labels are read: a file's number of rows and the sizes of its row groups stand for its content.
    Raises ConvscopeError for files that are not there or damaged, and for those without pictures.
    """
    parquet, found = require_extra("pyarrow.parquet"), _Found()
    first: _Pair | None = None
    for number, file in enumerate(files):
        with _as_arrow(file), storage.open(file) as stream, parquet.ParquetFile(stream) as opened:
            schema, meta = opened.schema_arrow, opened.metadata
            columns = image_column(schema, file), label_column(schema)
            if columns != (first := first or columns):
                raise ConvscopeError(f"{file} has its pictures and labels in {columns}, {files[0]} in {first}")
            if columns[1] is not None:
                found.labels += map(as_label, opened.read(columns=[columns[1]]).column(0).to_pylist())
            found.names += [f"{file}#{row}" for row in range(meta.num_rows)]
            for group in range(meta.num_row_groups):
                found.block(number, group, meta.row_group(group).num_rows)
                found.content.append(str(meta.row_group(group).total_byte_size))
    return found.listing(_parquet_rows, storage, files, schema, columns)


def of_arrow(storage: Storage, folder: str) -> DatasetIndex:
    """The pictures of a data set that Hugging Face's `save_to_disk` left in a folder; "FOLDER#ROW" is a picture's name.

    Raises ConvscopeError for a folder of several splits, and for one that is damaged or has no pictures.
    """
    ipc, found = require_extra("pyarrow.ipc"), _Found()
    try:
        with storage.open(f"{folder}/state.json") as stream:
            files = [f"{folder}/{file['filename']}" for file in json.loads(stream.read())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConvscopeError(f"{folder}/state.json does not tell the files of the data set: {error}") from error
    for number, file in enumerate(files):
        with _as_arrow(file), _stream(storage, file) as stream:
            schema = ipc.read_schema(stream)
            columns = image_column(schema, file), label_column(schema)
            while (batch := _next(stream, schema)) is not None:
                place, rows = batch
                found.block(number, place, len(rows))
                found.sizes += byte_sizes(rows.column(columns[0]))
                if columns[1] is not None:
                    found.labels += map(as_label, rows.column(columns[1]).to_pylist())
    found.names = [f"{folder}#{row}" for row in range(found.bounds[-1])]
    return found.listing(_arrow_rows, storage, files, schema, columns)


def require_one_split(storage: Storage, folder: str) -> None:
    """Raises ConvscopeError, which names them, for a folder of several of Hugging Face's splits."""
    if storage.kind(f"{folder}/dataset_dict.json") == "file":
        with storage.open(f"{folder}/dataset_dict.json") as stream:
            splits = json.loads(stream.read()).get("splits", [])
        raise ConvscopeError(f"{folder} holds the splits {', '.join(splits)}; give one of them: {folder}/{splits[0]}")


def _next(stream: Any, schema: pyarrow.Schema) -> tuple[int, pyarrow.RecordBatch] | None:
    """The next record batch of a stream, and where it begins; None at the end."""
    ipc = require_extra("pyarrow.ipc")
    place = stream.tell()
    try:
        message = ipc.read_message(stream)
    except EOFError:
        return None
    return place, ipc.read_record_batch(message, schema)


def _stream(storage: Storage, address: str) -> Any:
    """An Arrow file; one on disk is mapped into memory, so that only what is used of it is read."""
    arrow = require_extra("pyarrow")
    path = storage.local(address)
    return arrow.memory_map(path) if path is not None else arrow.PythonFile(storage.open(address), "r")


@contextmanager
def _as_arrow(address: str) -> Iterator[None]:
    """What Arrow raises, in words."""
    arrow = require_extra("pyarrow")
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise ConvscopeError(f"{address} cannot be read, it may be damaged: {error}") from error
