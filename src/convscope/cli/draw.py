"""Commands that draw what a network wants to see: patterns of units, and the story of its layers."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscope.cli.options import (
    AsJson,
    Classes,
    Device,
    ModelName,
    Out,
    Prepare,
    Weights,
    app,
    finish,
    first,
    load,
    log,
    parse_units,
    print_json,
    progress_bar,
    report,
    split_commas,
    store_at,
)
from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from convscope.store.store import Store

Seed = Annotated[int, typer.Option(help="The same seed gives the same pictures.")]


@app.command()
def patterns(
    model: ModelName,
    layers: Annotated[
        str | None,
        typer.Option("--layer", "--layers", help="Layers' names, separated by commas; all; logits for the classes."),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(help="0-63, 3,7,9, all; for logits also names; logits:386,387. Default: the first 16."),
    ] = None,
    out: Out = Path("convscope-patterns"),
    recipe: Annotated[str, typer.Option(help="robust, plain (the textbook's), maco, dream, caricature.")] = "robust",
    size: Annotated[int | None, typer.Option(help="Pixels a side.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the ascent.")] = None,
    views: Annotated[int | None, typer.Option(help="Random views at each step; their mean is climbed.")] = None,
    patience: Annotated[int | None, typer.Option(help="End when so many steps have gained nothing.")] = None,
    start: Annotated[str | None, typer.Option(metavar="FILE", help="The photograph of dream and caricature.")] = None,
    reference: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Natural pictures to compare with; several times.")
    ] = None,
    negatives: Annotated[bool, typer.Option("--negatives", help="Also what the units want least, below.")] = False,
    frames: Annotated[int, typer.Option(help="Pictures on the way, as an animated WebP.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was ended.")] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Draw on a Ray cluster; local: start one here.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """The pictures that units want to see. Several layers get a folder each, and can be resumed.

    Where the folder is a store that `convscope scan` made of this network, they become a part of it.
    """
    net = load(model, weights, classes, preprocessing, device)
    store = store_at(out, net)
    chosen, asked = _asked(net, layers, units, store)
    settings = {
        "recipe": recipe, "size": size, "steps": steps, "views": views, "patience": patience, "start": start,
        "reference": reference, "frames": frames, "seed": seed,
    }  # fmt: skip
    if negatives and asked is None and _whole(recipe):
        raise ConvscopeError(f"--negatives goes with --units; recipe {recipe!r} would draw a layer as a whole")
    if ray is not None and asked is None and _whole(recipe):
        raise ConvscopeError(f"--ray goes with --units; recipe {recipe!r} would draw a layer as a whole")
    if store is not None or len(chosen) > 1:
        folders = _folders(chosen, out, store)
        with _cluster(ray):
            _many(net, folders, asked, settings, negatives, resume, ray, as_json)
        return
    result = _drawn(net, chosen[0], asked, out, settings, resume, ray)
    if negatives:
        _negatives(net, result, out, settings)
    finish(result, out, as_json)
    _forget(out)


def _cluster(ray: str | None) -> AbstractContextManager[None]:
    """One connection for all layers: to start a cluster takes seconds."""
    if ray is None:
        return nullcontext()
    from convscope.distributed.ray_pool import connected

    return connected(ray)


def _asked(net: Any, layers: str | None, units: str | None, store: Store | None) -> tuple[list[str], str | None]:
    """Layers and units as the user writes them; all layers are, of a store, those that were scanned."""
    prefix, colon, rest = (units or "").partition(":")
    if colon and prefix == "logits":
        if layers not in (None, "logits"):
            raise ConvscopeError(f"--units {units} are classes, no units of --layer {layers}; give one or the other")
        layers, units = "logits", rest
    chosen = split_commas(layers or "")
    if not chosen:
        raise ConvscopeError("give a --layer, or --units logits:CLASSES; `convscope layers MODEL` lists the layers")
    if chosen == ["all"] and store is not None:
        return list(store.layers), units
    if chosen == ["all"]:
        return [row.name for row in net.layers.distinct()] + (["logits"] if net.outputs else []), units
    return chosen, units


def _whole(recipe: str) -> bool:
    """Whether the recipe draws, where no units are given, for the layer as a whole."""
    from convscope.featurevis.recipes import RECIPES

    return recipe in RECIPES and RECIPES[recipe].objective is not None


def _units(net: Any, layer: str, asked: str | None, recipe: str) -> Any:
    if asked == "all" and _whole(recipe):
        return range(net.outputs if layer == "logits" else net.layers.find(layer).units)
    if asked is not None:
        return parse_units(asked)
    return None if _whole(recipe) else first(net, layer)


def _folders(layers: list[str], out: Path, store: Store | None) -> dict[str, Path]:
    """Where the patterns of each layer go. In a store they lie where its unit pages look for them."""
    from convscope.results import file_names, pattern_folders

    if store is None:
        return {layer: out / name for layer, name in file_names(layers).items()}
    folders = pattern_folders(store.layers)
    unknown = [layer for layer in layers if layer not in folders]
    if unknown:
        raise ConvscopeError(f"layer {unknown[0]!r} is not in the store {out}; it has {', '.join(folders)}")
    return {layer: out / folders[layer] for layer in layers}


def _drawn(
    net: Any, layer: str, asked: str | None, out: Path, settings: dict[str, Any], resume: bool, ray: str | None
) -> Any:
    import convscope
    from convscope.featurevis.resumable import run_resumable

    units = _units(net, layer, asked, settings["recipe"])
    with progress_bar(layer) as progress:
        if units is None and _whole(settings["recipe"]):
            return convscope.patterns(net, layer, progress=progress, **settings)
        return run_resumable(net, layer, units, out, resume=resume, ray=ray, progress=progress, **settings)


def _negatives(net: Any, result: Any, out: Path, settings: dict[str, Any]) -> None:
    """The same units with their sign turned, in a folder of their own, and both in one picture."""
    import convscope
    from convscope.featurevis.objectives import channel
    from convscope.plotting.figures import paired
    from convscope.results import atomic_write

    with progress_bar("negatives") as progress:
        least = convscope.patterns(
            net, [-channel(result.layer, int(u)) for u in result.units], progress=progress, **settings
        )
    least = replace(least, units=result.units)  # files are named after the units, not counted
    where = least.save(out / "negatives")
    with atomic_write(out / "pairs.png") as file:
        paired(result, least).save(file, format="PNG")
    log(f"what the units want least: {where}; both: {out / 'pairs.png'}")


def _many(
    net: Any,
    folders: dict[str, Path],
    asked: str | None,
    settings: dict[str, Any],
    negatives: bool,
    resume: bool,
    ray: str | None,
    as_json: bool,
) -> None:
    """A folder for each layer. A layer that cannot be drawn is named, and the others are."""
    from convscope.featurevis.resumable import is_done

    failed, complete, written = [], True, []
    for layer, where in folders.items():
        try:
            done = resume and is_done(where, net, layer, _units(net, layer, asked, settings["recipe"]), settings)
            if done and (where / "negatives" / "manifest.json").exists() >= negatives:
                log(f"{layer}: done before")
                written.append(where)
                continue
            result = _drawn(net, layer, asked, where, settings, resume, ray)
            if negatives:
                _negatives(net, result, where, settings)
        except ConvscopeError as error:
            failed.append(layer)
            log(f"failed: {layer}: {error}")
            continue
        for note in result.notes:
            log(f"note: {layer}: {note}")
        report(result.failed)
        complete = complete and not result.failed
        written.append(result.save(where))
        log(f"written to {where}")
        _forget(where)
    if as_json and written:
        print_json([json.loads((where / "manifest.json").read_text(encoding="utf-8")) for where in written])
    if len(failed) == len(folders):
        raise ConvscopeError("no layer could be drawn")
    if failed or not complete:
        raise typer.Exit(1)


def _forget(folder: Path) -> None:
    from convscope.featurevis.resumable import remove_parts

    remove_parts(folder)


@app.command()
def story(
    model: ModelName,
    out: Out = Path("convscope-story"),
    layers: Annotated[
        str | None, typer.Option("--layers", help="Names, separated by commas. Default: one for each resolution.")
    ] = None,
    units: Annotated[int, typer.Option(min=2, help="Units of each layer that are drawn and measured.")] = 24,
    shown: Annotated[int, typer.Option(min=1, help="The most distinct of them, shown.")] = 6,
    seed: Seed = 0,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """From the first layer to the last: what units look for, seen and measured, as a figure and a page.

    Where the folder is a store that `convscope scan` made of this network, it becomes a part of it.
    """
    import convscope

    net = load(model, weights, classes, preprocessing, device)
    store = store_at(out, net)
    with progress_bar("story") as progress:
        result = convscope.story(
            net,
            None if layers is None else split_commas(layers),
            units=units,
            shown=shown,
            seed=seed,
            progress=progress,
        )
    finish(result, out if store is None else out / "story", as_json)
