"""`convscope search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import attach_stored
from convscope.cli.options import AsJson, Wide
from convscope.cli.output import log_note, print_json
from convscope.cli.parsing import load_model, open_store_at
from convscope.cli.store_options import Judge, StoreArgument
from convscope.cli.tables import Column, print_table


@command(extra="scan", package="pyarrow")
def search(
    store: StoreArgument,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help='What to search for, such as "striped fur", or an image file.')
    ],
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="Number of units.")] = 20,
    judge: Judge = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="For an image: the network that was scanned. Default: by its name."
        ),
    ] = None,
    *,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Find units of a store by their names, or those that an image excites.

    Names match by their words; with a judge that compares images with text, by meaning. For an image, relevance is the
    fraction of the scanned sample that excites the unit less.
    """
    opened = open_store_at(store)
    if Path(query).is_file():
        network = load_model(model or opened.manifest["model"]["name"], None, None, None)
        result = opened.search(Path(query), count, model=attach_stored(opened, network))
    else:
        result = opened.search(query, count, judge=None if judge is None else load_model(judge, None, None, None))
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
