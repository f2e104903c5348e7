"""The schemas of a store's Parquet files, and writers whose bytes depend only on the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np

from convscope.errors import require_extra
from convscope.store.io import Folder
from convscope.store.records import SIDES

if TYPE_CHECKING:
    import pyarrow

IMAGES_PER_ROW_GROUP = 4096  # of images.parquet

Columns: TypeAlias = Mapping[str, np.ndarray | Sequence[object]]  # of a table, by name

STATISTICS = ("mean", "variance", "maximum", "minimum", "active", "fires")
BOX_COLUMNS = tuple(f"box_{side}" for side in SIDES)
DICTIONARY_COLUMNS = ("layer", "unit", "kind", "rank", "row", "column", *SIDES, "dead")  # with repeated values


def _schema(**types: str) -> pyarrow.Schema:
    """Make a schema from names and types; "list T" is a list of T."""
    arrow = require_extra("pyarrow")

    def arrow_type(name: str) -> pyarrow.DataType:
        item = arrow.type_for_alias(name.removeprefix("list "))
        return arrow.list_(item) if name.startswith("list ") else item

    return arrow.schema([(name, arrow_type(kind)) for name, kind in types.items()])


@cache
def units_schema() -> pyarrow.Schema:
    """Return the schema of units.parquet."""
    return _schema(
        layer="string",
        unit="int32",
        **dict.fromkeys(STATISTICS, "double"),
        dead="bool",
        histogram="list int64",
        deciles="list float",
        selectivity="float",
        classes="list int32",
        class_means="list float",
        coactive="list int32",
        coactivation="list float",
    )


@cache
def topk_schema() -> pyarrow.Schema:
    """Return the schema of topk.parquet."""
    head = {"layer": "string", "unit": "int32", "kind": "string", "rank": "int32", "value": "float", "image": "int64"}
    return _schema(**head, **dict.fromkeys(("row", "column", *SIDES), "int32"))


def images_schema() -> pyarrow.Schema:
    """Return the schema of images.parquet."""
    head = {"image": "int64", "name": "string", "label": "int32", "failed": "string", "height": "int32"}
    box = dict.fromkeys(BOX_COLUMNS, "float")
    return _schema(**head, width="int32", **box, classes="list int32", probabilities="list float", loss="float")


def shards_schema() -> pyarrow.Schema:
    """Return the schema of shards.parquet."""
    return _schema(shard="int64", first="int64", last="int64", sha256="string")


def names_schema() -> pyarrow.Schema:
    """Return the schema of names.parquet."""
    names = {"name": "string", "score": "float", "runner_up": "string", "runner_up_score": "float"}
    return _schema(layer="string", unit="int32", **names, wpmi="float", p_value="double", named="bool")


def parquet_writer(file: IO[bytes], schema: pyarrow.Schema) -> pyarrow.parquet.ParquetWriter:
    """Open a writer whose bytes depend only on the rows and on the version of pyarrow."""
    dictionary = [name for name in schema.names if name in DICTIONARY_COLUMNS]
    parquet = require_extra("pyarrow.parquet")
    return parquet.ParquetWriter(file, schema, compression="zstd", write_statistics=True, use_dictionary=dictionary)


def make_table(columns: Columns, schema: pyarrow.Schema) -> pyarrow.Table:
    """Make a table of this schema from columns by name."""
    return schema.empty_table().from_pydict({name: columns[name] for name in schema.names}, schema=schema)


def write_table(store: Folder, name: str, schema: pyarrow.Schema, parts: Iterable[Columns]) -> int:
    """Write parts of a table in row groups of fixed size and return the number of rows.

    A column `image` is filled with consecutive ids.
    """
    arrow = require_extra("pyarrow")
    size = IMAGES_PER_ROW_GROUP
    with store.atomic_write(name) as file, parquet_writer(file, schema) as writer:
        buffer, count = schema.empty_table(), 0
        for part in parts:
            rows = len(part[schema.names[-1]])
            numbered = {"image": np.arange(count, count + rows), **part}
            buffer = arrow.concat_tables([buffer, make_table(numbered, schema)])
            count += rows
            complete = len(buffer) // size * size
            if complete:
                writer.write_table(buffer.slice(0, complete).combine_chunks(), row_group_size=size)
                buffer = buffer.slice(complete)
        if len(buffer):
            writer.write_table(buffer.combine_chunks(), row_group_size=size)
    return count
