"""`convscope search`."""

from __future__ import annotations

from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.options import AsJson, Wide
from convscope.cli.output import log_note, print_json
from convscope.cli.parsing import load_model, open_store_at
from convscope.cli.store_options import Judge, StoreArgument
from convscope.cli.tables import Column, print_table


@command(extra="scan", package="pyarrow")
def search(
    store: StoreArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help='What to search for, such as "striped fur".')],
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="Number of units.")] = 20,
    judge: Judge = None,
    *,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Find units of a store by their names.

    Names match by their words; with a judge that compares images with text, by meaning.
    """
    opened = open_store_at(store)
    result = opened.search(text, count, judge=None if judge is None else load_model(judge, None, None, None))
    if as_json:
        print_json(result.rows())
        return
    columns = [
        Column("layer", overflow="path"),
        Column("unit", right=True),
        Column("name", overflow="fold"),
        Column("score", right=True, priority=1),
        Column("relevance", right=True),
    ]
    cells = [
        (m.layer, str(m.unit), m.name, "" if m.score is None else f"{m.score:.2f}", f"{m.relevance:.2f}")
        for m in result
    ]
    print_table(str(result).splitlines()[0], columns, cells, wide=wide)
    for note in result.notes:
        log_note(note)
