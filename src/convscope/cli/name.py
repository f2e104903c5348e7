"""`convscope name`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.app import command
from convscope.cli.options import AsJson, Seed, Wide
from convscope.cli.output import finish, print_json, progress_bar
from convscope.cli.parsing import load_model, open_store_at, split_commas
from convscope.cli.store_options import Judge, StoreArgument
from convscope.cli.tables import Column, print_table
from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    import numpy as np

    from convscope.store.unit_names import UnitNames

MAX_ROWS = 20


@command(extra="scan", package="pyarrow")
def name(
    store: StoreArgument,
    words: Annotated[
        str,
        typer.Option(
            metavar="WORDS",
            help="A text file with one word per line; colors, textures, imagenet or wordnet; classes (of the judge); "
            "or labels (of the data set).",
        ),
    ],
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Scores of the images for the words, (images, words), as an .npy file."),
    ] = None,
    judge: Judge = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='The text that the judge gets for a word, such as "a photo of a {}".'),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers, separated by commas. Default: all of the store.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What the scores are: probability, softmax or sigmoid. Default: inferred from their range.",
        ),
    ] = None,
    level: Annotated[
        float, typer.Option(metavar="P", help="Fraction of the names that may be chance (false discovery rate).")
    ] = 0.01,
    compositions: Annotated[
        bool, typer.Option("--compositions", help="Also try two words with and, or, and not.")
    ] = False,
    seed: Seed = 0,
    *,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="Device of the judge: cpu, cuda or mps.")] = None,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Name the units of a store by the words that match their activations best.

    The table shows the names with the highest scores; all are written into the store, as names.parquet.
    """
    import convscope

    opened = open_store_at(store)
    matrix = None if scores is None else _read_scores(scores)
    network = None if judge is None else load_model(judge, None, None, None, device=device)
    with progress_bar("name units") as progress:
        result = convscope.name_units(
            opened,
            words,
            matrix,
            judge=network,
            template=template,
            layer=None if layers is None else split_commas(layers),
            output=output,
            level=level,
            compositions=compositions,
            seed=seed,
            progress=progress,
        )
    if as_json:
        print_json(result.rows())
    else:
        print_table(str(result).splitlines()[0], *_table(result), wide=wide)
    finish(result, None, as_json=False)


def _read_scores(path: Path) -> np.ndarray:
    import numpy as np

    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConvscopeError(f"{path} cannot be read as an .npy file: {error}") from error
    return array


def _table(result: UnitNames) -> tuple[list[Column], list[tuple[str, ...]]]:
    columns = [
        Column("layer", overflow="path"),
        Column("unit", right=True),
        Column("name", overflow="fold"),
        Column("score", right=True),
        Column("runner-up", overflow="fold", priority=1),
        Column("score", right=True, priority=1),
    ]
    cells: list[tuple[str, ...]] = [
        (
            str(result.layer[i]),
            str(result.units[i]),
            str(result.names[i]),
            f"{result.scores[i]:.2f}",
            str(result.runner_up[i]),
            f"{result.runner_up_scores[i]:.2f}",
        )
        for i in result.order[:MAX_ROWS]
    ]
    return columns, cells
