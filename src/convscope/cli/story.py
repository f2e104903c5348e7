"""`convscope story`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import app
from convscope.cli.options import AsJson, Classes, Device, ModelName, Out, PreprocessingJson, Seed, Weights
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import load_model, open_store_in, split_commas


@app.command()
def story(
    model: ModelName,
    out: Out = Path("convscope-story"),
    layers: Annotated[
        str | None, typer.Option(help="Layers, separated by commas. Default: one per resolution.")
    ] = None,
    units: Annotated[int, typer.Option(min=2, help="Units per layer whose patterns are computed and measured.")] = 24,
    num_displayed: Annotated[
        int, typer.Option("--num-shown", min=1, help="Patterns shown per layer: the most distinct ones.")
    ] = 6,
    seed: Seed = 0,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
) -> None:
    """Show what units respond to from the first layer to the last, as a figure and a page.

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    import convscope

    network = load_model(model, weights, classes, preprocessing, device)
    store = open_store_in(out, network)
    names = None if layers is None else split_commas(layers)
    with progress_bar("story") as progress:
        result = convscope.story(network, names, units=units, num_displayed=num_displayed, seed=seed, progress=progress)
    finish(result, out if store is None else out / "story", as_json)
