"""`convscope story`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.options import AsJson, ModelName, NetworkOptions, Out, Seed
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import open_store_in, split_commas


@command()
def story(
    model: ModelName,
    layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers, separated by commas. Default: one per resolution.")
    ] = None,
    units: Annotated[
        int, typer.Option(metavar="N", min=2, help="Number of units per layer whose patterns are computed.")
    ] = 24,
    num_displayed: Annotated[
        int,
        typer.Option(
            "--num-shown", metavar="N", min=1, help="Number of patterns shown per layer: the most distinct ones."
        ),
    ] = 6,
    seed: Seed = 0,
    *,
    out: Out = Path("convscope-story"),
    as_json: AsJson = False,
    network_options: NetworkOptions,
) -> None:
    """Show what units respond to from the first layer to the last, as a figure and a page.

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    import convscope

    network = network_options.load(model)
    store = open_store_in(out, network)
    names = None if layers is None else split_commas(layers)
    with progress_bar("story") as progress:
        result = convscope.story(network, names, units=units, num_displayed=num_displayed, seed=seed, progress=progress)
    finish(result, result.save(out if store is None else out / "story"), as_json)
