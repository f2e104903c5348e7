"""`convscope activations`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.option_checks import choice
from convscope.cli.options import AsJson, ImageOptions, Images, ModelName, Out, Wide
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import open_image_arguments, split_commas
from convscope.cli.tables import Column, print_table

COLUMNS = (
    Column("layer", overflow="fold"),
    Column("maps"),
    Column("active", right=True),
    Column("maximum", right=True, priority=1),
    Column("constant maps", right=True, priority=2),
)


@command()
def activations(
    model: ModelName,
    images: Images,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS", help="Layers, separated by commas, or all. Default: the last of each resolution."
        ),
    ] = None,
    scaling: Annotated[
        str, choice("Contrast of each map: standardised, or from minimum to maximum.", "standard", "minmax")
    ] = "standard",
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-activations"),
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Write the feature maps of layers as image grids."""
    import convscope

    inputs = open_image_arguments(images)
    network = network_options.load(model)
    every_layer = [layer.name for layer in network.layers.unique_spatial()] if layers == "all" else None
    requested = None if layers is None else every_layer or split_commas(layers)
    with progress_bar("activations") as progress:
        result = convscope.activations(
            network,
            inputs,
            network_options.default_layers(requested, network),
            fit=reading.fit,
            scaling=scaling,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    folder = result.save(out)
    if not as_json:
        rows = [
            (r["layer"], r["maps"], f"{r['active']:.1%}", f"{r['maximum']:.3g}", str(r["dead channels"]))
            for r in result.rows()
        ]
        print_table("", COLUMNS, rows, wide=wide)
    finish(result, folder, as_json)
