"""`convscope atlas`."""

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
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import load_model, open_store_in


@app.command()
def atlas(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-atlas"),
    layer: Annotated[str | None, typer.Option(help="The layer. Default: the last spatial layer.")] = None,
    target: Annotated[str | None, typer.Option(help="A class: only activations that are evidence for it.")] = None,
    grid: Annotated[int, typer.Option(min=1, help="Cells per side.")] = 12,
    positions: Annotated[int, typer.Option(min=1, help="Random positions per image.")] = 4,
    min_count: Annotated[int, typer.Option(min=1, help="Minimum number of activations in a cell with an icon.")] = 4,
    size: Annotated[int, typer.Option(min=1, help="Side of an icon in pixels.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient ascent per icon.")] = 96,
    seed: Seed = 0,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Arrange a layer's activations over many images as a map of icons (requires the extra 'atlas').

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    import convscope

    network = load_model(model, weights, classes, preprocessing, device)
    store = open_store_in(out, network)
    with progress_bar("atlas") as progress:
        result = convscope.atlas(
            network, images, layer=layer, target=target, grid=grid, positions_per_image=positions, min_count=min_count,
            size=size, steps=steps, seed=seed, fit=fit, max_pixels=max_pixels, progress=progress,
        )  # fmt: skip
    if store is not None:
        from convscope.store.saved_results import save_path

        out = save_path(store, result)
    finish(result, out, as_json)
