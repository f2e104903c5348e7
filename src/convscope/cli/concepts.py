"""Commands about what many pictures share: the concepts of a class, and the atlas of a layer."""

from __future__ import annotations

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
    progress_bar,
    store_at,
    table,
)

if TYPE_CHECKING:
    from convscope.engine.model import Model
    from convscope.store.store import Store

Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]


@app.command()
def concepts(
    model: ModelName,
    images: Images,
    target: Annotated[str, typer.Option(help="The class, by index or name.")],
    out: Out = Path("convscope-concepts"),
    layer: Annotated[str | None, typer.Option(help="A rectified layer. Default: the last one.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many concepts.")] = 10,
    crop: Annotated[float, typer.Option(help="A crop's sides, as a share of the picture's.")] = 1 / 3,
    crops: Annotated[int, typer.Option(min=1, help="At most so many a picture.")] = 32,
    only_predicted: Annotated[
        bool, typer.Option(help="Keep out pictures that the network counts to another class.")
    ] = True,
    masks: Annotated[int, typer.Option(min=2, help="Points at which importance is measured, a power of two.")] = 32,
    seed: Seed = 0,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Of which few concepts a class is made: patches, heat, and how much each one counts.

    Where the folder is a store that `convscope scan` made of this network, they become a part of it.
    """
    import convscope

    net, store = _begun(out, model, weights, classes, preprocessing, device)
    settings: dict[str, Any] = {
        "layer": layer, "count": count, "crop": crop, "crops": crops, "only_predicted": only_predicted, "masks": masks,
        "seed": seed, "fit": fit, "max_pixels": max_pixels,
    }  # fmt: skip
    with progress_bar("concepts") as progress:
        result = convscope.concepts(net, images, target, progress=progress, **settings)
    if not as_json:
        figures = zip(result.importance, result.ablation_effects, strict=True)
        rows = [(str(r), f"{index:.3f}", f"{effect:+.2f}") for r, (index, effect) in enumerate(figures)]
        table(f"{result.name} at {result.layer}", ("concept", "importance", "logit"), rows, right=(0, 1, 2))
    _put(result, store, out, as_json)


@app.command()
def atlas(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-atlas"),
    layer: Annotated[str | None, typer.Option(help="Default: the last one with places.")] = None,
    target: Annotated[str | None, typer.Option(help="A class: only activations that speak for it.")] = None,
    grid: Annotated[int, typer.Option(min=1, help="Cells a side.")] = 12,
    positions: Annotated[int, typer.Option(min=1, help="Random places of each picture.")] = 4,
    least: Annotated[int, typer.Option(min=1, help="Activations that a cell must hold to be drawn.")] = 4,
    size: Annotated[int, typer.Option(min=1, help="Pixels a side of an icon.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the ascent of an icon.")] = 96,
    seed: Seed = 0,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """What a layer tells apart: its activations over many pictures as a map of icons (needs convscope[atlas]).

    Where the folder is a store that `convscope scan` made of this network, it becomes a part of it.
    """
    import convscope

    net, store = _begun(out, model, weights, classes, preprocessing, device)
    settings: dict[str, Any] = {
        "layer": layer, "target": target, "grid": grid, "places": positions, "least": least, "size": size, "steps": steps,
        "seed": seed, "fit": fit, "max_pixels": max_pixels,
    }  # fmt: skip
    with progress_bar("atlas") as progress:
        result = convscope.atlas(net, images, progress=progress, **settings)
    _put(result, store, out, as_json)


def _begun(out: Path, *model: Any) -> tuple[Model, Store | None]:
    """The network, and the store that the results go into, if the folder is one. Told apart before any work."""
    net = load(*model)
    return net, store_at(out, net)


def _put(result: Any, store: Store | None, out: Path, as_json: bool) -> None:
    if store is not None:
        from convscope.store.saved_results import save_path

        out = save_path(store, result)
    finish(result, out, as_json)
