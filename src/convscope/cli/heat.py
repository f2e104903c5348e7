"""Commands about heatmaps: make them, compare methods, put them to the test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    Prepare,
    Weights,
    app,
    finish,
    load,
    log,
    progress_bar,
    split_commas,
    table,
)
from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from convscope.attribution.result import Heatmaps
    from convscope.engine.model import Model

Target = Annotated[
    list[str] | None, typer.Option(help="A class, by index or name; may be given several times. Default: the top.")
]
Against = Annotated[list[str] | None, typer.Option(help="A class that is taken off: why the target rather than this?")]
LayerName = Annotated[
    str,
    typer.Option(metavar="LAYER", help="One, or several, with commas, that are fused; auto explains its choice."),
]
Method = Annotated[str, typer.Option(help="grad-cam, layer-cam, integrated-gradients, rise, ...: see docs/methods.md.")]
Smooth = Annotated[str | None, typer.Option(help="flips or noise: the mean over such views of the picture.")]
Scale = Annotated[
    str, typer.Option(help="Show the picture this many times as large, several with commas: 1,2,3 finds objects best.")
]
Fuse = Annotated[str, typer.Option(help="Of several layers or scales: mean, max or product.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same maps and figures.")]
Setting = Annotated[
    list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Of the method; may be given several times.")
]
Metrics = Annotated[str, typer.Option(help="Names, separated by commas: see docs/truth.md.")]
Masks = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where targets are: for each picture NAME.png or NAME_mask.png, white inside."),
]
Fill = Annotated[str, typer.Option(help="What takes the place of pixels taken away: blur, mean, zero or noise.")]
Steps = Annotated[int, typer.Option(min=1, help="Of deletion, insertion and ROAD.")]


@app.command()
def heatmap(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-heatmaps"),
    target: Target = None,
    layer: LayerName = "auto",
    method: Method = "grad-cam",
    against: Against = None,
    smooth: Smooth = None,
    scale: Scale = "1",
    fuse: Fuse = "mean",
    option: Setting = None,
    seed: Seed = 0,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Which places of pictures speak for a class."""
    net = load(model, weights, classes, preprocessing, device)
    with progress_bar("heatmaps") as progress:
        result = _heatmap(
            net,
            images,
            target,
            against,
            layer,
            scale,
            option,
            method=method,
            smooth=smooth,
            fuse=fuse,
            seed=seed,
            fit=fit,
            max_pixels=max_pixels,
            progress=progress,
        )
    if not as_json:
        log(f"layer {result.layer}: {result.layer_reason}")
    finish(result, out, as_json)


@app.command()
def evaluate(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-evaluation"),
    metrics: Metrics = "deletion,insertion",
    masks: Masks = None,
    fill: Fill = "blur",
    steps: Steps = 28,
    target: Target = None,
    layer: LayerName = "auto",
    method: Method = "grad-cam",
    against: Against = None,
    smooth: Smooth = None,
    scale: Scale = "1",
    fuse: Fuse = "mean",
    option: Setting = None,
    seed: Seed = 0,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Do heatmaps tell the truth? Make them, and measure it."""
    import convscope

    net = load(model, weights, classes, preprocessing, device)
    with progress_bar("heatmaps") as progress:
        heatmap = _heatmap(
            net,
            images,
            target,
            against,
            layer,
            scale,
            option,
            method=method,
            smooth=smooth,
            fuse=fuse,
            seed=seed,
            fit=fit,
            max_pixels=max_pixels,
            progress=progress,
        )
    with progress_bar("evaluate") as progress:
        result = convscope.evaluate(
            net,
            images,
            heatmap,
            split_commas(metrics),
            masks=_masks(masks, images),
            fill=fill,
            steps=steps,
            seed=seed,
            max_pixels=max_pixels,
            progress=progress,
        )
    if not as_json:
        log(f"layer {heatmap.layer}: {heatmap.layer_reason}")
        rows = [_figures(row) for row in result.rows()]
        table("", ("metric", "mean", "95 % interval", "better", "what it is"), rows, right=(1,))
    finish(result, out, as_json)


@app.command()
def compare(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-comparison"),
    methods: Annotated[
        str | None, typer.Option(help="Names, separated by commas. Default: the common ones and two controls.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layers", help="Names, separated by commas. Default: the automatic choice.")
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
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Which method, at which layer? A sheet of all of them, each with its faithfulness and its time."""
    import convscope
    from convscope.evaluation.comparison import METHODS

    net = load(model, weights, classes, preprocessing, device)
    with progress_bar("compare") as progress:
        result = convscope.compare(
            net,
            images,
            _targets(net, target, len(images)),
            methods=METHODS if methods is None else split_commas(methods),
            layers=None if layer is None else split_commas(layer),
            metrics=split_commas(metrics),
            masks=_masks(masks, images),
            against=_targets(net, against, len(images)),
            smooth=smooth,
            scale=_scales(scale),
            fuse=fuse,
            seed=seed,
            fit=fit,
            max_pixels=max_pixels,
            progress=progress,
        )
    if not as_json:
        rows = [
            (row["method"], row["layer"], f"{row['ms']:.0f}", *(f"{row[metric]:.3f}" for metric in result.metrics))
            for row in result.rows()
        ]
        headings = ("method", "layer", "ms a picture", *result.metrics)
        table("", headings, rows, right=range(2, len(headings)))
    finish(result, out, as_json)


def _heatmap(
    net: Model,
    images: list[str],
    target: list[str] | None,
    against: list[str] | None,
    layer: str,
    scale: str,
    option: list[str] | None,
    **more: Any,
) -> Heatmaps:
    """Heatmaps by options as they are written on the command line."""
    from convscope.attribution.api import heatmaps

    return heatmaps(
        net,
        images,
        _targets(net, target, len(images)),
        layer=_layers(layer),
        against=_targets(net, against, len(images)),
        scale=_scales(scale),
        **more,
        **_options(option),
    )


def _targets(net: Model, names: list[str] | None, count: int) -> list[list[int]] | None:
    return [[net.class_index(name) for name in names]] * count if names else None


def _layers(text: str) -> str | list[str]:
    names = split_commas(text)
    return names if len(names) > 1 else text


def _scales(text: str) -> list[float]:
    try:
        return [float(part) for part in split_commas(text)]
    except ValueError as error:
        raise ConvscopeError(f"--scale {text}: expected a number, or several with commas") from error


def _options(given: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE, where the value is JSON if it can be, and text if not."""
    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise ConvscopeError(f"--option {text}: expected NAME=VALUE")
        try:
            found[name.strip().replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip().replace("-", "_")] = value
    return found


def _masks(folder: Path | None, images: Sequence[str]) -> list[Any] | None:
    """The mask of each picture, bool (H, W): its file has the picture's name."""
    if folder is None:
        return None
    import numpy as np
    from PIL import Image

    found = []
    for name in images:
        stem = Path(name).stem
        file = next((f for f in (folder / f"{stem}.png", folder / f"{stem}_mask.png") if f.is_file()), None)
        if file is None:
            raise ConvscopeError(f"there is no mask for {name}: neither {stem}.png nor {stem}_mask.png in {folder}")
        try:
            with Image.open(file, formats=["PNG"]) as image:
                found.append(np.asarray(image.convert("L")) > 127)
        except OSError as error:
            raise ConvscopeError(f"mask {file} cannot be read: {error}") from error
    return found


def _figures(row: dict[str, Any]) -> tuple[str, ...]:
    interval = f"{row['low']:.3f} to {row['high']:.3f}"
    return row["metric"], f"{row['mean']:.3f}", interval, row["better"], row["says"]
