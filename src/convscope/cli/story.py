"""`convscope story`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import AsJson, ModelName, Out, Seed
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import split_commas


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
    network_options: LayerNetworkOptions,
) -> None:
    """Show what units respond to from the first layer to the last, as a figure and a page.

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    import convscope

    network, store = network_options.load_with_store_in(out, model)
    names = network_options.default_layers(None if layers is None else split_commas(layers), network)
    with progress_bar("story") as progress:
        result = convscope.story(network, names, units=units, num_displayed=num_displayed, seed=seed, progress=progress)
    finish(result, result.save(out if store is None else out / "story"), as_json)
