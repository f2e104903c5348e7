"""`convscope evaluate`."""

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
    LayerNames,
    Masks,
    MaxPixels,
    Method,
    MethodOptions,
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
from convscope.cli.output import finish, log, print_table, progress_bar
from convscope.cli.parsing import (
    load_model,
    parse_classes,
    parse_layers,
    parse_method_options,
    parse_scales,
    read_masks,
    split_commas,
)


@app.command()
def evaluate(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-evaluation"),
    metrics: Metrics = "deletion,insertion",
    masks: Masks = None,
    fill: Annotated[str, typer.Option(help="Replacement of removed pixels: blur, mean, zero or noise.")] = "blur",
    steps: Annotated[int, typer.Option(min=1, help="Steps of deletion, insertion and ROAD.")] = 28,
    target: Target = None,
    layer: LayerNames = "auto",
    method: Method = "grad-cam",
    against: Against = None,
    smooth: Smooth = None,
    scale: Scale = "1",
    fuse: Fuse = "mean",
    option: MethodOptions = None,
    seed: Seed = 0,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Compute heatmaps and measure their faithfulness."""
    import convscope

    network = load_model(model, weights, classes, preprocessing, device)
    with progress_bar("heatmaps") as progress:
        heatmaps = convscope.heatmaps(
            network,
            images,
            parse_classes(network, target, len(images)),
            layer=parse_layers(layer),
            method=method,
            against=parse_classes(network, against, len(images)),
            smooth=smooth,
            scale=parse_scales(scale),
            fuse=fuse,
            seed=seed,
            fit=fit,
            max_pixels=max_pixels,
            progress=progress,
            **parse_method_options(option),
        )
    with progress_bar("evaluate") as progress:
        evaluation = convscope.evaluate(
            network,
            images,
            heatmaps,
            split_commas(metrics),
            masks=read_masks(masks, images),
            fill=fill,
            steps=steps,
            seed=seed,
            max_pixels=max_pixels,
            progress=progress,
        )
    if not as_json:
        from convscope.evaluation.result import format_interval

        log(f"layer {heatmaps.layer}: {heatmaps.layer_reason}")
        rows = [
            (r["metric"], f"{r['mean']:.3f}", format_interval(r["low"], r["high"]), r["better"], r["description"])
            for r in evaluation.rows()
        ]
        print_table("", ("metric", "mean", "95 % interval", "better", "description"), rows, right=(1,))
    finish(evaluation, out, as_json)
