"""Index and read images in Parquet files and in the Arrow files of Hugging Face's `save_to_disk`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from convscope.datasets.index import DatasetIndex, Label, to_label
from convscope.datasets.storage import Storage, with_retries
from convscope.errors import ConvscopeError, require_extra

if TYPE_CHECKING:
    import pyarrow

_IMAGE_COLUMNS = ("image", "img", "picture", "bytes", "jpg", "jpeg", "png", "webp")  # preferred among binary columns
_LABEL_COLUMNS = ("label", "labels", "cls")
_ROWS_PER_READ = 32  # rows of a row group that are decompressed at a time


class ColumnNames(NamedTuple):
    """The columns of a table that hold images and labels."""

    image: str
    label: str | None


def find_columns(schema: pyarrow.Schema, location: str) -> ColumnNames:
    """Find the columns of images and labels in a schema.

    Images: a struct with a field "bytes", or binary. Labels: integers or strings named label, labels or cls. Raises
    ConvscopeError if no column holds images, or if several do and none has a known name.
    """
    binary = [str(column.name) for column in schema if _is_image_struct(column.type) or _is_binary(column.type)]
    known = [name for name in binary if name.lower() in _IMAGE_COLUMNS]
    candidates = binary if len(binary) == 1 else known[:1]
    if not candidates:
        columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
        raise ConvscopeError(
            f"{location} has {len(binary) or 'no'} columns of binary or struct<bytes, path>, and none is called "
            f"{', '.join(_IMAGE_COLUMNS)}: it has {columns}"
        )
    types = require_extra("pyarrow.types")
    tests = (types.is_integer, types.is_string, types.is_large_string, types.is_dictionary)
    labels = [column.name for column in schema if any(test(column.type) for test in tests)]
    return ColumnNames(candidates[0], next((name for name in _LABEL_COLUMNS if name in labels), None))


def read_class_names(schema: pyarrow.Schema, label: str) -> tuple[str, ...] | None:
    """Return the class names that Hugging Face stores in a schema, or None."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def byte_sizes(column: pyarrow.ChunkedArray) -> list[int]:
    """Return the size of each encoded image in a column, 0 for a missing one, without reading the images."""
    compute = require_extra("pyarrow.compute")
    content = compute.struct_field(column, "bytes") if _is_image_struct(column.type) else column
    return [int(size or 0) for size in compute.binary_length(content).to_pylist()]


def _is_binary(kind: pyarrow.DataType) -> bool:
    types = require_extra("pyarrow.types")
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_image_struct(kind: pyarrow.DataType) -> bool:
    types = require_extra("pyarrow.types")
    return bool(types.is_struct(kind) and any(f.name == "bytes" and _is_binary(f.type) for f in kind))


class _BlockCursor:
    """Reads a block of rows in ascending order, so that no row is decompressed twice.

    Holds a few rows in memory. Pickling gives a new cursor.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def __reduce__(self) -> tuple[type[_BlockCursor], tuple[()]]:
        return (_BlockCursor, ())

    def _reset(self) -> None:
        self._block, self._first = -1, 0
        self._batch: pyarrow.RecordBatch | None = None
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())

    def value(self, block: int, row: int, open_block: Callable[[], Iterator[pyarrow.RecordBatch]]) -> object:
        """Return the value in a row of a block; `open_block` reads the column of the block from its first row on."""
        with self._lock:
            try:
                if block != self._block or row < self._first:
                    self._reset()
                    self._block, self._batches = block, open_block()
                while self._batch is None or row >= self._first + len(self._batch):
                    self._first += 0 if self._batch is None else len(self._batch)
                    self._batch = next(self._batches, None)
                    if self._batch is None:
                        raise ConvscopeError("is missing: the file has changed")
                return self._batch.column(0)[row - self._first].as_py()
            except BaseException:
                self._reset()
                raise


# Reads a column of one block of a file: (storage, location, position of the block, column) -> batches of rows.
_ReadBlock = Callable[[Storage, str, int, str], "Iterator[pyarrow.RecordBatch]"]


@dataclass(frozen=True, eq=False)
class ColumnReader:
    """Reads images from a column of several files, which consist of blocks of rows.

    Attributes
    ----------
    read_block : callable
        Reads the rows of a block, some at a time.
    files : tuple of str
        Locations of the files.
    column : str
        The column that holds images.
    bounds : array of shape (B + 1,)
        The index of the first image of each block, and the number of all images.
    file_numbers, block_positions : array of shape (B,)
        For each block its file, and its position there: a row group's number or an offset in bytes.
    """

    read_block: _ReadBlock
    storage: Storage
    files: tuple[str, ...]
    column: str
    bounds: np.ndarray
    file_numbers: np.ndarray
    block_positions: np.ndarray
    in_memory = False
    _cursor: _BlockCursor = field(default_factory=_BlockCursor, repr=False)

    def read(self, index: int, name: str) -> object:  # noqa: ARG002 - part of the protocol
        """Return the encoded image in a row."""
        block = int(np.searchsorted(self.bounds, index, side="right")) - 1
        file = self.files[self.file_numbers[block]]
        open_block = partial(self.read_block, self.storage, file, int(self.block_positions[block]), self.column)
        read = partial(self._cursor.value, block, index - int(self.bounds[block]), open_block)
        value = read() if self.storage.local_path(file) is not None else with_retries(read)
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise ConvscopeError("holds no bytes")
        return content


def _read_row_group(storage: Storage, file: str, group: int, column: str) -> Iterator[pyarrow.RecordBatch]:
    parquet = require_extra("pyarrow.parquet")
    # Buffered without pre-buffering, Parquet is read page by page instead of a whole column of a row group.
    with storage.open(file) as stream, parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False) as table:
        yield from table.iter_batches(_ROWS_PER_READ, row_groups=[group], columns=[column], use_threads=False)


def _read_record_batch(storage: Storage, file: str, offset: int, column: str) -> Iterator[pyarrow.RecordBatch]:
    ipc = require_extra("pyarrow.ipc")
    with _open_arrow(storage, file) as stream:
        schema = ipc.read_schema(stream)
        stream.seek(offset)
        yield ipc.read_record_batch(ipc.read_message(stream), schema).select([column])


@dataclass
class _IndexBuilder:
    """Collects the rows of files block by block."""

    storage: Storage
    files: Sequence[str]
    read_block: _ReadBlock
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    file_numbers: list[int] = field(default_factory=list)
    block_positions: list[int] = field(default_factory=list)
    group_sizes: list[str] = field(default_factory=list)

    def add_block(self, file_number: int, position: int, rows: int) -> None:
        self.bounds.append(self.bounds[-1] + rows)
        self.file_numbers.append(file_number)
        self.block_positions.append(position)

    def add_labels(self, column: pyarrow.ChunkedArray) -> None:
        self.labels += map(to_label, column.to_pylist())

    def build(self, schema: pyarrow.Schema, columns: ColumnNames) -> DatasetIndex:
        bounds, file_numbers, positions = (
            np.array(values, np.int64) for values in (self.bounds, self.file_numbers, self.block_positions)
        )
        reader = ColumnReader(
            self.read_block, self.storage, tuple(self.files), columns.image, bounds, file_numbers, positions
        )
        index = DatasetIndex(self.names, reader, self.sizes, fingerprint_extra=" ".join(self.group_sizes))
        if columns.label is not None:
            index.labels, index.label_names = self.labels, read_class_names(schema, columns.label)
        return index


def index_parquet(storage: Storage, files: Sequence[str]) -> DatasetIndex:
    """Index the images of Parquet files, in the order of the files and rows; images are named "FILE#ROW".

    Only footers and labels are read: the number of rows and the sizes of the row groups stand for the content in the
    fingerprint. Raises ConvscopeError for missing and damaged files, and for files without images.
    """
    parquet, builder = require_extra("pyarrow.parquet"), _IndexBuilder(storage, files, _read_row_group)
    first: ColumnNames | None = None
    for number, file in enumerate(files):
        with _arrow_errors(file), storage.open(file) as stream, parquet.ParquetFile(stream) as table:
            schema, metadata = table.schema_arrow, table.metadata
            columns = find_columns(schema, file)
            if columns != (first := first or columns):
                raise ConvscopeError(
                    f"{file} has images in {columns.image!r} and labels in {columns.label!r}, "
                    f"{files[0]} in {first.image!r} and {first.label!r}; expected the same columns in all files"
                )
            if columns.label is not None:
                builder.add_labels(table.read(columns=[columns.label]).column(0))
            builder.names += [f"{file}#{row}" for row in range(metadata.num_rows)]
            for group in range(metadata.num_row_groups):
                builder.add_block(number, group, metadata.row_group(group).num_rows)
                builder.group_sizes.append(str(metadata.row_group(group).total_byte_size))
    return builder.build(schema, columns)


def index_saved_dataset(storage: Storage, folder: str) -> DatasetIndex:
    """Index the images of a data set that Hugging Face's `save_to_disk` wrote; images are named "FOLDER#ROW".

    Raises ConvscopeError for damaged data sets and for those without images.
    """
    ipc = require_extra("pyarrow.ipc")
    try:
        with storage.open(f"{folder}/state.json") as stream:
            files = [f"{folder}/{file['filename']}" for file in json.loads(stream.read())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConvscopeError(f"{folder}/state.json does not list the files of the data set: {error}") from error
    builder = _IndexBuilder(storage, files, _read_record_batch)
    for number, file in enumerate(files):
        with _arrow_errors(file), _open_arrow(storage, file) as stream:
            schema = ipc.read_schema(stream)
            columns = find_columns(schema, file)
            for offset, batch in _record_batches(stream, schema):
                builder.add_block(number, offset, len(batch))
                builder.sizes += byte_sizes(batch.column(columns.image))
                if columns.label is not None:
                    builder.add_labels(batch.column(columns.label))
    builder.names = [f"{folder}#{row}" for row in range(builder.bounds[-1])]
    return builder.build(schema, columns)


def require_one_split(storage: Storage, folder: str) -> None:
    """Raise ConvscopeError if a folder holds several splits of a Hugging Face data set."""
    if storage.kind(f"{folder}/dataset_dict.json") == "file":
        with storage.open(f"{folder}/dataset_dict.json") as stream:
            splits = json.loads(stream.read()).get("splits", [])
        raise ConvscopeError(f"{folder} holds the splits {', '.join(splits)}; give one of them: {folder}/{splits[0]}")


def _record_batches(stream: pyarrow.NativeFile, schema: pyarrow.Schema) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Yield the remaining record batches of a stream, each with its offset in bytes."""
    ipc = require_extra("pyarrow.ipc")
    while True:
        offset = stream.tell()
        try:
            message = ipc.read_message(stream)
        except EOFError:
            return
        yield offset, ipc.read_record_batch(message, schema)


def _open_arrow(storage: Storage, location: str) -> pyarrow.NativeFile:
    """Open an Arrow file; a local one is memory-mapped, so that only the used parts are read."""
    arrow = require_extra("pyarrow")
    path = storage.local_path(location)
    return arrow.memory_map(path) if path is not None else arrow.PythonFile(storage.open(location), "r")


@contextmanager
def _arrow_errors(location: str) -> Iterator[None]:
    """Convert errors of Arrow to ConvscopeError."""
    arrow = require_extra("pyarrow")
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise ConvscopeError(f"{location} cannot be read, it may be damaged: {error}") from error
