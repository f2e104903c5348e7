"""`convscope activations`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import app
from convscope.cli.options import (
    MAX_PIXELS,
    AsJson,
    Classes,
    Device,
    Fit,
    Images,
    MaxPixels,
    ModelName,
    Out,
    PreprocessingJson,
    Weights,
)
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import load_model, split_commas


@app.command()
def activations(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-activations"),
    layers: Annotated[
        str | None, typer.Option(help="Layers, separated by commas, or all; by default the last of each resolution.")
    ] = None,
    scaling: Annotated[str, typer.Option(help="Contrast of each map: standard (standardised) or minmax.")] = "standard",
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Write the feature maps of layers as image grids."""
    import convscope

    network = load_model(model, weights, classes, preprocessing, device)
    every_layer = [layer.name for layer in network.layers.unique_spatial()] if layers == "all" else None
    names = None if layers is None else every_layer or split_commas(layers)
    with progress_bar("activations") as progress:
        result = convscope.activations(
            network, images, names, fit=fit, scaling=scaling, max_pixels=max_pixels, progress=progress
        )
    finish(result, out, as_json)
