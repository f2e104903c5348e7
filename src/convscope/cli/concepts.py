"""`convscope concepts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import AsJson, ImageOptions, Images, ModelName, Out, Seed
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import open_image_arguments
from convscope.cli.tables import Column, print_table


@command(extra="concepts", package="sklearn")
def concepts(
    model: ModelName,
    images: Images,
    target: Annotated[str, typer.Option(metavar="CLASS", help="The class, by index or name.")],
    layer: Annotated[
        str | None, typer.Option(metavar="LAYER", help="A layer without negative values. Default: the last one.")
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Number of concepts.")] = 10,
    crop: Annotated[
        float,
        typer.Option(
            metavar="X", show_default=False, help="Side of a crop, as a fraction of the image's. Default: 1/3."
        ),
    ] = 1 / 3,
    crops: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of crops per image.")] = 32,
    only_predicted: Annotated[
        bool,
        typer.Option(
            "--only-predicted/--all-images", help="Leave out images that the network predicts as another class."
        ),
    ] = True,
    sobol_points: Annotated[
        int,
        typer.Option(metavar="N", min=2, help="Points of the Sobol sequence that measures importance; a power of two."),
    ] = 32,
    seed: Seed = 0,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-concepts"),
    as_json: AsJson = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Find the main concepts behind a class: patches, heatmaps and importance.

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    import convscope

    inputs = open_image_arguments(images)
    network, store = network_options.load_with_store_in(out, model)
    with progress_bar("concepts") as progress:
        result = convscope.concepts(
            network,
            inputs,
            target,
            layer=network_options.default_layer(layer, network),
            count=count,
            crop=crop,
            crops=crops,
            only_predicted=only_predicted,
            sobol_points=sobol_points,
            seed=seed,
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    if not as_json:
        figures = enumerate(zip(result.importance, result.ablation_effects, strict=True))
        rows = [(str(number), f"{importance:.3f}", f"{effect:+.2f}") for number, (importance, effect) in figures]
        columns = [Column(heading, right=True) for heading in ("concept", "importance", "drop of the logit")]
        print_table(f"{result.name} at {result.layer}", columns, rows)
    if store is not None:
        from convscope.store.saved_results import save_path

        out = save_path(store, result)
    finish(result, result.save(out), as_json)
