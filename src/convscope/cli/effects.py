"""`convscope effects`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.option_checks import choice
from convscope.cli.options import AsJson, ImageOptions, Images, ModelName, Out, Seed, Wide
from convscope.cli.output import finish, print_json, progress_bar
from convscope.cli.parsing import open_image_arguments, open_store_at, parse_targets, parse_units, read_text
from convscope.cli.tables import Column, print_table

if TYPE_CHECKING:
    from convscope.editing.result import Effects

MAX_ROWS = 20


@command()
def effects(
    model: ModelName,
    images: Images,
    layer: Annotated[str, typer.Option(metavar="LAYER", help="The layer whose units are removed.")],
    units: Annotated[str, typer.Option(metavar="UNITS", help="Such as 3,7 or 0-63.")] = "all",
    how: Annotated[
        str, choice("What replaces a unit: 0, its mean, or its map of another image.", "zero", "mean", "resample")
    ] = "zero",
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS", help="A class, by index or name; repeatable. Default: each image's top class."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The correct class of each image, one per line: measures the accuracy too."),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="IMAGES", help="Images for mean and resample; repeatable. Default: the same images."),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Also remove more and more units together, most evidence first.")
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="A scan with the layer: names of units, patterns, and top patches."),
    ] = None,
    patterns: Annotated[
        int, typer.Option(metavar="N", min=0, help="Also compute patterns of the N units with the largest effects.")
    ] = 0,
    seed: Seed = 0,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-effects"),
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Measure what changes when each unit of a layer is removed.

    The table shows the units with the largest mean absolute effects on the targets' logits; effects.csv holds all.
    """
    import convscope

    inputs = open_image_arguments(images)
    classes = None if labels is None else read_text(labels).split("\n")
    opened = None if store is None else open_store_at(store)
    network = network_options.load(model, opened)
    with progress_bar("effects") as progress:
        result = convscope.effects(
            network,
            inputs,
            layer,
            parse_units(units),  # type: ignore[arg-type]  # names are refused
            how=how,
            targets=parse_targets(network, target, len(inputs)),  # type: ignore[arg-type]
            labels=None if classes is None else [line.strip() for line in classes if line.strip()],
            reference=None if reference is None else open_image_arguments(reference),
            curve=curve,
            store=opened,
            fit=reading.fit,
            seed=seed,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    if patterns:
        with progress_bar("patterns") as progress:
            computed = convscope.patterns(network, result.layer, result.top(patterns), progress=progress)
        result = result.with_patterns(computed)
    folder = result.save(out)
    if as_json:
        print_json(result.rows())
    else:
        print_table(str(result).splitlines()[0], *_table(result), wide=wide)
    finish(result, folder, as_json=False)


def _table(result: Effects) -> tuple[list[Column], list[tuple[str, ...]]]:
    rows = result.rows()[:MAX_ROWS]
    has_names = any(result.unit_names)
    columns = [
        Column("unit", right=True),
        *([Column("name", overflow="fold")] if has_names else []),
        Column("absolute", right=True),
        Column("mean", right=True),
        Column("largest", right=True),
        Column("on", overflow="fold", priority=1),
    ]
    cells: list[tuple[str, ...]] = [
        (
            str(row["unit"]),
            *([row["name"]] if has_names else []),
            f"{row['mean absolute effect']:.3f}",
            f"{row['mean effect']:+.3f}",
            f"{row['largest effect']:+.3f}",
            row["on"],
        )
        for row in rows
    ]
    if result.accuracy is None:
        return columns, cells
    columns += [Column("accuracy", right=True), Column("95 % interval", right=True)]
    return columns, [
        (*cell, f"{row['accuracy change']:+.1%}", f"{row['low']:+.1%} to {row['high']:+.1%}")
        for cell, row in zip(cells, rows, strict=True)
    ]
