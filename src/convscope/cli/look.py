"""Commands that look at a network: its layers, what it says, what it makes of pictures, what its units want to see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.options import (
    MAX_PIXELS,
    MODEL_HELP,
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
    print_json,
    progress_bar,
    report,
    split_commas,
    table,
)


@app.command()
def layers(
    model: ModelName,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """The table of layers: what each gives, how far it sees."""
    import dataclasses

    from convscope.engine.layer_table import HEADINGS

    net = load(model, weights, classes, preprocessing, device)
    if as_json:
        return print_json([{**dataclasses.asdict(row), "units": row.units} for row in net.layers])
    return table(f"{net.name}: {len(net.layers)} layers", HEADINGS, net.layers.format_rows(), right=(3, 6))


@app.command()
def predict(
    model: ModelName,
    images: Images,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FOLDER", help="Also write here.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes.")] = 5,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """What the network says about pictures."""
    import convscope

    net = load(model, weights, classes, preprocessing, device)
    with progress_bar("predict") as progress:
        result = convscope.predict(net, images, top, fit=fit, max_pixels=max_pixels, progress=progress)
    rows = [
        (name, f"{share:.1%}", label, str(index))
        for name, shares, labels, indices in zip(
            result.image_names, result.probabilities, result.names, result.indices, strict=True
        )
        for share, label, index in zip(shares, labels, indices, strict=True)
    ]
    if as_json:
        print_json(
            [
                {
                    "picture": name,
                    "classes": [
                        {"index": int(i), "name": label, "probability": float(p), "logit": float(logits[i])}
                        for i, label, p in zip(indices, labels, shares, strict=True)
                    ],
                }
                for name, indices, labels, shares, logits in zip(
                    result.image_names, result.indices, result.names, result.probabilities, result.logits, strict=True
                )
            ]
        )
    else:
        table("", ("picture", "share", "class", "index"), rows, right=(1, 3))
    finish(result, out, as_json, quiet=True)


@app.command()
def activations(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-activations"),
    layer: Annotated[str, typer.Option("--layers", help="Names, separated by commas; all: every one.")] = "all",
    scaling: Annotated[str, typer.Option(help="Of each map: standard, as the chapter does, or minmax.")] = "standard",
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """What layers make of pictures: a grid of feature maps each."""
    import convscope

    net = load(model, weights, classes, preprocessing, device)
    wanted = None if layer == "all" else split_commas(layer)
    with progress_bar("activations") as progress:
        result = convscope.activations(
            net, images, wanted, fit=fit, scaling=scaling, max_pixels=max_pixels, progress=progress
        )
    finish(result, out, as_json)


@app.command()
def demo(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = "lite0",
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGES]...", help="Default: four sample photographs.")
    ] = None,
    out: Out = Path("convscope-demo"),
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """Everything at once, on a page: predictions, heatmaps, activations and patterns of a network."""
    from convscope.reports.demo import make
    from convscope.samples import photographs

    with progress_bar("load") as progress:
        net = load(model, weights, classes, preprocessing, device)
        if progress is not None:
            progress(1, 1)
    failed = make(net, images or photographs(), out, seed=seed, bar=progress_bar)
    report(failed)
    if as_json:
        typer.echo((out / "manifest.json").read_text(encoding="utf-8"), nl=False)
    log(f"Done. Open {(out / 'index.html').resolve()}")
    if failed:
        raise typer.Exit(1)
