"""`convscope compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import app
from convscope.cli.options import (
    MAX_PIXELS,
    Against,
    AsJson,
    Classes,
    Device,
    Fit,
    Fuse,
    Images,
    Masks,
    MaxPixels,
    Metrics,
    ModelName,
    Out,
    PreprocessingJson,
    Scale,
    Seed,
    Smooth,
    Target,
    Weights,
)
from convscope.cli.output import finish, print_table, progress_bar
from convscope.cli.parsing import load_model, parse_classes, parse_scales, read_masks, split_commas


@app.command()
def compare(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-comparison"),
    methods: Annotated[
        str | None, typer.Option(help="Methods, separated by commas. Default: common ones and two baselines.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers, separated by commas. Default: chosen automatically.")
    ] = None,
    metrics: Metrics = "deletion,insertion",
    masks: Masks = None,
    target: Target = None,
    against: Against = None,
    smooth: Smooth = None,
    scale: Scale = "1",
    fuse: Fuse = "mean",
    seed: Seed = 0,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Compare methods and layers: heatmaps, faithfulness and time of each."""
    import convscope
    from convscope.evaluation.comparison import METHODS

    network = load_model(model, weights, classes, preprocessing, device)
    with progress_bar("compare") as progress:
        result = convscope.compare(
            network,
            images,
            parse_classes(network, target, len(images)),
            methods=METHODS if methods is None else split_commas(methods),
            layers=None if layers is None else split_commas(layers),
            metrics=split_commas(metrics),
            masks=read_masks(masks, images),
            against=parse_classes(network, against, len(images)),
            smooth=smooth,
            scale=parse_scales(scale),
            fuse=fuse,
            seed=seed,
            fit=fit,
            max_pixels=max_pixels,
            progress=progress,
        )
    if not as_json:
        rows = [
            (r["method"], r["layer"], f"{r['ms']:.0f}", *(f"{r[metric]:.3f}" for metric in result.metrics))
            for r in result.rows()
        ]
        headings = ("method", "layer", "ms per image", *result.metrics)
        print_table("", headings, rows, right=range(2, len(headings)))
    finish(result, out, as_json)
