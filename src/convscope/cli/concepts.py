"""`convscope concepts`."""

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
    Seed,
    Weights,
)
from convscope.cli.output import finish, print_table, progress_bar
from convscope.cli.parsing import load_model, open_store_in


@app.command()
def concepts(
    model: ModelName,
    images: Images,
    target: Annotated[str, typer.Option(help="The class, by index or name.")],
    out: Out = Path("convscope-concepts"),
    layer: Annotated[str | None, typer.Option(help="A layer without negative values. Default: the last one.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of concepts.")] = 10,
    crop: Annotated[float, typer.Option(help="Side of a crop, as a fraction of the image's.")] = 1 / 3,
    crops: Annotated[int, typer.Option(min=1, help="Maximum number of crops per image.")] = 32,
    only_predicted: Annotated[
        bool, typer.Option(help="Leave out images that the network predicts as another class.")
    ] = True,
    sobol_points: Annotated[
        int, typer.Option(min=2, help="Points of the Sobol sequence that measures importance; a power of two.")
    ] = 32,
    seed: Seed = 0,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Find the main concepts behind a class: patches, heatmaps and importance (requires the extra 'concepts').

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    import convscope

    network = load_model(model, weights, classes, preprocessing, device)
    store = open_store_in(out, network)
    with progress_bar("concepts") as progress:
        result = convscope.concepts(
            network, images, target, layer=layer, count=count, crop=crop, crops=crops, only_predicted=only_predicted,
            sobol_points=sobol_points, seed=seed, fit=fit, max_pixels=max_pixels, progress=progress,
        )  # fmt: skip
    if not as_json:
        figures = enumerate(zip(result.importance, result.ablation_effects, strict=True))
        rows = [(str(number), f"{importance:.3f}", f"{effect:+.2f}") for number, (importance, effect) in figures]
        print_table(f"{result.name} at {result.layer}", ("concept", "importance", "logit"), rows, right=(0, 1, 2))
    if store is not None:
        from convscope.store.saved_results import save_path

        out = save_path(store, result)
    finish(result, out, as_json)
