"""`convscope atlas`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import AsJson, ImageOptions, Images, ModelName, Out, Seed
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import open_image_arguments


@command(extra="atlas", package="umap")
def atlas(
    model: ModelName,
    images: Images,
    layer: Annotated[
        str | None, typer.Option(metavar="LAYER", help="The layer. Default: the layer of heatmaps.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Use only activations that are evidence for this class.")
    ] = None,
    grid: Annotated[int, typer.Option(metavar="N", min=1, help="Number of cells per side of the map.")] = 12,
    positions_per_image: Annotated[
        int, typer.Option("--positions", metavar="N", min=1, help="Random positions per image.")
    ] = 4,
    min_count: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of activations that a cell needs to get an icon.")
    ] = 4,
    size: Annotated[int, typer.Option(metavar="N", min=1, help="Side of an icon in pixels.")] = 128,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of gradient ascent per icon.")] = 96,
    seed: Seed = 0,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-atlas"),
    as_json: AsJson = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Arrange a layer's activations over many images as a map of icons.

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    import convscope

    inputs = open_image_arguments(images)
    network, store = network_options.load_with_store_in(out, model)
    with progress_bar("atlas") as progress:
        result = convscope.atlas(
            network,
            inputs,
            layer=network_options.default_layer(layer, network),
            target=target,
            grid=grid,
            positions_per_image=positions_per_image,
            min_count=min_count,
            size=size,
            steps=steps,
            seed=seed,
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    if store is not None:
        from convscope.store.saved_results import save_path

        out = save_path(store, result)
    finish(result, result.save(out), as_json)
