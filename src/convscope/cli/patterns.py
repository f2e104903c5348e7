"""`convscope patterns`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscope.cli.app import app
from convscope.cli.options import AsJson, Classes, Device, ModelName, Out, PreprocessingJson, Seed, Weights
from convscope.cli.output import finish, log, print_json, progress_bar, report_failures
from convscope.cli.parsing import load_model, open_store_in, parse_units, split_commas
from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convscope.engine.model import Model
    from convscope.featurevis.result import Patterns
    from convscope.store.store import Store

DEFAULT_UNITS = 16


@app.command()
def patterns(
    model: ModelName,
    layers: Annotated[
        str | None,
        typer.Option("--layer", "--layers", help="Layers, separated by commas, or all; logits for the classes."),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(help="0-63, 3,7,9, all; for logits also names; logits:386,387. Default: the first 16."),
    ] = None,
    out: Out = Path("convscope-patterns"),
    recipe: Annotated[
        str, typer.Option(help="robust, plain, maco, dream or caricature: see docs/patterns.md.")
    ] = "robust",
    size: Annotated[int | None, typer.Option(help="Side of a pattern in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of gradient ascent.")] = None,
    views: Annotated[int | None, typer.Option(help="Augmented views per step, averaged in the objective.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after this many steps without improvement.")] = None,
    start: Annotated[str | None, typer.Option(metavar="FILE", help="Start image of dream and caricature.")] = None,
    reference: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A natural image to compare scores with; repeatable.")
    ] = None,
    negatives: Annotated[bool, typer.Option("--negatives", help="Also minimise the units.")] = False,
    frames: Annotated[int, typer.Option(help="Number of intermediate images, saved as an animated WebP.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Address of a Ray cluster to run on; local: start one on this machine."),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
) -> None:
    """Compute the image that maximises each unit.

    Several layers are written to one folder each. If interrupted, rerun with --resume to continue.

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    network = load_model(model, weights, classes, preprocessing, device)
    store = open_store_in(out, network)
    layer_names, unit_text = _parse_layers_and_units(network, layers, units, store)
    if unit_text is None and _has_layer_objective(recipe):
        for flag, used in (("--negatives", negatives), ("--ray", ray is not None)):
            if used:
                raise ConvscopeError(f"{flag} needs --units; recipe {recipe!r} would maximise the layer as a whole")
    settings = {
        "recipe": recipe, "size": size, "steps": steps, "views": views, "patience": patience, "start": start,
        "reference": reference, "frames": frames, "seed": seed,
    }  # fmt: skip
    job = _PatternJob(network, unit_text, settings, negatives, resume, ray)
    if store is not None or len(layer_names) > 1:
        with _ray_connection(ray):
            job.run_layers(_layer_folders(layer_names, out, store), as_json)
    else:
        finish(job.run(layer_names[0], out), out, as_json)
        job.remove_parts(out)


@dataclass(frozen=True)
class _PatternJob:
    """One call of the command: what is computed for each layer."""

    network: Model
    units: str | None
    settings: Mapping[str, Any]
    negatives: bool
    resume: bool
    ray: str | None

    def run_layers(self, folders: Mapping[str, Path], as_json: bool) -> None:
        """Compute and save the patterns of several layers; a layer that fails is named and the others are done."""
        failed, complete, written = [], True, []
        for layer, folder in folders.items():
            try:
                if self._is_done(layer, folder):
                    log(f"{layer}: already done, skipped")
                    written.append(folder)
                    continue
                result = self.run(layer, folder)
            except ConvscopeError as error:
                failed.append(layer)
                log(f"failed: {layer}: {error}")
                continue
            for note in result.notes:
                log(f"note: {layer}: {note}")
            report_failures(result.failed)
            complete = complete and not result.failed
            written.append(result.save(folder))
            log(f"written to {folder}")
            self.remove_parts(folder)
        if as_json and written:
            print_json([json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in written])
        if len(failed) == len(folders):
            raise ConvscopeError("no layer's patterns could be computed")
        if failed or not complete:
            raise typer.Exit(1)

    def run(self, layer: str, folder: Path) -> Patterns:
        """Compute the patterns of one layer, and with `negatives` also save those of its negated units."""
        import convscope
        from convscope.featurevis.resumable import run_resumable

        units = self._layer_units(layer)
        with progress_bar(layer) as progress:
            if units is None and _has_layer_objective(self.settings["recipe"]):
                result = convscope.patterns(self.network, layer, progress=progress, **self.settings)
            else:
                result = run_resumable(
                    self.network,
                    layer,
                    units,
                    folder,
                    resume=self.resume,
                    ray=self.ray,
                    progress=progress,
                    **self.settings,
                )
        if self.negatives:
            self._save_negatives(result, folder)
        return result

    def remove_parts(self, folder: Path) -> None:
        """Delete the parts from which an interrupted run would be resumed."""
        from convscope.featurevis.resumable import remove_parts

        remove_parts(folder)

    def _is_done(self, layer: str, folder: Path) -> bool:
        from convscope.featurevis.resumable import is_done

        if not (self.resume and is_done(folder, self.network, layer, self._layer_units(layer), self.settings)):
            return False
        return not self.negatives or (folder / "negatives" / "manifest.json").exists()

    def _layer_units(self, layer: str) -> Sequence[int | str] | None:
        count = self.network.num_outputs if layer == "logits" else self.network.layers.find(layer).units
        if self.units == "all" and _has_layer_objective(self.settings["recipe"]):
            return range(count or 0)
        if self.units is not None:
            return parse_units(self.units)
        return None if _has_layer_objective(self.settings["recipe"]) else range(min(DEFAULT_UNITS, count or 16))

    def _save_negatives(self, result: Patterns, folder: Path) -> None:
        """Save the patterns of the negated units in a subfolder, and both in one image."""
        import convscope
        from convscope.featurevis.objectives import channel
        from convscope.plotting.patterns import paired_pattern_grid
        from convscope.results import atomic_write

        with progress_bar("negatives") as progress:
            objectives = [-channel(result.layer, int(unit)) for unit in result.units]
            minima = convscope.patterns(self.network, objectives, progress=progress, **self.settings)
        minima = replace(minima, units=result.units)  # files are named after the units
        negatives = minima.save(folder / "negatives")
        with atomic_write(folder / "pairs.png") as file:
            paired_pattern_grid(result, minima).save(file, format="PNG")
        log(f"minima: {negatives}; maxima and minima: {folder / 'pairs.png'}")


def _ray_connection(ray: str | None) -> AbstractContextManager[object]:
    """Connect once for all layers: starting a cluster takes seconds."""
    if ray is None:
        return nullcontext()
    from convscope.distributed.ray_pool import connected

    return connected(ray)


def _parse_layers_and_units(
    network: Model, layers: str | None, units: str | None, store: Store | None
) -> tuple[list[str], str | None]:
    """Return the layers' names and the text of --units; "all" layers of a store are those that were scanned."""
    prefix, colon, rest = (units or "").partition(":")
    if colon and prefix == "logits":
        if layers not in (None, "logits"):
            raise ConvscopeError(f"--units {units} are classes, not units of --layer {layers}; give one or the other")
        layers, units = "logits", rest
    names = split_commas(layers or "")
    if not names:
        raise ConvscopeError("give a --layer, or --units logits:CLASSES; `convscope layers MODEL` lists the layers")
    if names == ["all"] and store is not None:
        return list(store.layers), units
    if names == ["all"]:
        names = [layer.name for layer in network.layers.unique_spatial()]
        return names + (["logits"] if network.num_outputs else []), units
    return names, units


def _has_layer_objective(recipe: str) -> bool:
    """Return whether the recipe maximises the layer as a whole when no units are given."""
    from convscope.featurevis.recipes import RECIPES

    return recipe in RECIPES and RECIPES[recipe].objective is not None


def _layer_folders(layers: list[str], out: Path, store: Store | None) -> dict[str, Path]:
    """Return the folder of each layer's patterns; in a store, where its unit pages look them up."""
    from convscope.results import file_names, pattern_folders

    if store is None:
        return {layer: out / name for layer, name in file_names(layers).items()}
    folders = pattern_folders(store.layers)
    unknown = [layer for layer in layers if layer not in folders]
    if unknown:
        raise ConvscopeError(f"layer {unknown[0]!r} is not in the store {out}; it has {', '.join(folders)}")
    return {layer: out / folders[layer] for layer in layers}
