"""`convscope unit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.options import AsJson, Wide
from convscope.cli.output import log, print_json, printable
from convscope.cli.parsing import open_store_at
from convscope.cli.store_options import StoreArgument
from convscope.cli.tables import Column, print_table


@command(extra="scan", package="pyarrow")
def unit(
    store: StoreArgument,
    layer: Annotated[str, typer.Argument(metavar="LAYER", help="The unit's layer.")],
    name: Annotated[
        str, typer.Argument(metavar="UNIT", help="The unit's number in its layer, from 0; for logits also the class.")
    ],
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="Number of images.")] = 9,
    kind: Annotated[
        str,
        typer.Option(metavar="KIND", help="top, bottom, or decile: the median image of each tenth of the data set."),
    ] = "top",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Draw statistics, pattern and images into this PNG file."),
    ] = None,
    *,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Print a unit's statistics and the images of a scan that excite it most.

    An image counts with its largest activation, which lies at this row and column of the layer's map.
    """
    record = open_store_at(store).unit(layer, int(name) if name.isdecimal() else name)
    examples = record.examples(count, kind)
    if out is not None:
        from convscope.results import atomic_write

        with atomic_write(out) as file:
            record.figure().savefig(file, format="png")
    if as_json:
        statistics = {row["statistic"]: row["value"] for row in record.rows()}
        print_json({"name": record.description, **statistics, kind: examples.rows()})
    else:
        typer.echo(printable(str(record)))
        columns = [
            Column("image", overflow="path"),
            Column("activation", right=True),
            Column("row", right=True, priority=1),
            Column("column", right=True, priority=1),
        ]
        cells = [
            (row["image"], f"{row['activation']:.3f}", str(row["row"]), str(row["column"])) for row in examples.rows()
        ]
        print_table("", columns, cells, wide=wide)
    if out is not None:
        log(f"written to {out}")
