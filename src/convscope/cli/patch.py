"""`convscope patch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.option_checks import choice
from convscope.cli.options import AsJson, ImageOptions, ModelName, Out
from convscope.cli.output import finish, log, print_json, progress_bar
from convscope.cli.parsing import parse_units
from convscope.cli.tables import Column, print_table

MAX_ROWS = 20


@command()
def patch(
    model: ModelName,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The image whose activations are moved.")],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="The image whose pass receives the activations.")
    ],
    layer: Annotated[str, typer.Option(metavar="LAYER", help="The layer whose output is moved.")],
    by: Annotated[
        str, choice("Move one unit, one position, or one unit at one position at a time.", "unit", "position", "both")
    ] = "unit",
    units: Annotated[str, typer.Option(metavar="UNITS", help="Such as 3,7 or 0-63.")] = "all",
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="A class, by index or name. Default: the source's top class rather than the destination's.",
        ),
    ] = None,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-patch"),
    as_json: AsJson = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Move parts of a layer's output from one image to another, and measure the change.

    Each unit or position of the layer's output for SOURCE replaces that for DESTINATION in turn; the effect is the
    change of the target's score. The table shows the largest effects; patching.csv holds all.
    """
    import convscope

    network = network_options.load(model)
    with progress_bar("patch") as progress:
        result = convscope.patch(
            network,
            source,
            destination,
            layer,
            by=by,  # type: ignore[arg-type]  # checked by the option
            units=parse_units(units),  # type: ignore[arg-type]  # names are refused
            targets=target,
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    folder = result.save(out)
    rows = result.rows()
    if as_json:
        print_json(rows)
    else:
        visible = rows[:MAX_ROWS]
        columns = [Column(name, right=True) for name in visible[0]]
        formats = {"effect": "+.3f", "share": "+.1%"}
        cells = [tuple(format(value, formats.get(name, "")) for name, value in row.items()) for row in visible]
        print_table(str(result).splitlines()[0], columns, cells)
        log(f"score of {result.target_name}: {result.destination_score:.2f}, of the source {result.source_score:.2f}")
        joint = zip(result.counts, result.joint_effects, strict=True)
        log("effect of the largest together: " + ", ".join(f"{count}: {effect:+.2f}" for count, effect in joint))
    finish(result, folder, as_json=False)
