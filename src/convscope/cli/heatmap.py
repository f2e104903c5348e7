"""`convscope heatmap`."""

from __future__ import annotations

from pathlib import Path

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
    MaxPixels,
    Method,
    MethodOptions,
    ModelName,
    Out,
    PreprocessingJson,
    Scale,
    Seed,
    Smooth,
    Target,
    Weights,
)
from convscope.cli.output import finish, log, progress_bar
from convscope.cli.parsing import load_model, parse_classes, parse_layers, parse_method_options, parse_scales


@app.command()
def heatmap(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-heatmaps"),
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
    """Compute heatmaps of the evidence for classes in images."""
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
    if not as_json:
        log(f"layer {heatmaps.layer}: {heatmaps.layer_reason}")
    finish(heatmaps, out, as_json)
