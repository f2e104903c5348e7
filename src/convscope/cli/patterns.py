"""`convscope patterns`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import AsJson, ListRecipes, ModelName, Out, Ray, Recipe, Seed
from convscope.cli.output import finish, log, log_detail, log_note, print_json, progress_bar, report_failures
from convscope.cli.parsing import parse_units, split_commas
from convscope.cli.tables import Column, print_table
from convscope.errors import ConvscopeError, require_int
from convscope.formatting import count_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convscope.engine.model import Model
    from convscope.featurevis.result import Patterns
    from convscope.progress import Progress
    from convscope.store.store import Store

DEFAULT_UNITS = 16
MAX_NAMED_UNITS = 6  # in one note


@command()
def patterns(
    model: ModelName,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layer", "--layers", metavar="LAYERS", help="Layers, separated by commas, or all; logits are the classes."
        ),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(
            metavar="UNITS",
            help="Such as 0-63, or 3,7,9, or all; classes also by name. logits:386 is short for --layer logits "
            "--units 386. Default: the first 16.",
        ),
    ] = None,
    recipe: Recipe = "robust",
    size: Annotated[
        int | None, typer.Option(metavar="N", help="Side of a pattern in pixels. Default: the recipe's.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of gradient ascent. Default: the recipe's.")
    ] = None,
    views: Annotated[
        int | None, typer.Option(metavar="N", help="Random views per step, averaged in the objective.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after this many steps without improvement.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="FILE", help="Photograph that the recipes dream and caricature start from.")
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A natural image to compare scores with; repeatable.")
    ] = None,
    negatives: Annotated[
        bool, typer.Option("--negatives", help="Also compute the image that minimises each unit.")
    ] = False,
    frames: Annotated[
        int, typer.Option(metavar="N", help="Number of intermediate images to save as an animated WebP.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    ray: Ray = None,
    seed: Seed = 0,
    _list_recipes: ListRecipes = False,
    *,
    out: Out = Path("convscope-patterns"),
    as_json: AsJson = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Compute the image that maximises each unit.

    Several layers are written to one folder each. If interrupted, rerun with --resume to continue.

    If the output folder is a store that `convscope scan` made of this network, the result is saved in it.
    """
    settings = {
        "recipe": recipe, "size": size, "steps": steps, "views": views, "patience": patience, "start": start,
        "reference": reference, "frames": frames, "seed": seed,
    }  # fmt: skip
    requested, unit_text = _split_request(layers, units)
    _check_settings(settings, unit_text, negatives, ray)
    network, store = network_options.load_with_store_in(out, model)
    layer_names = _all_layers(network, store) if requested == ["all"] else requested
    job = _PatternJob(network, unit_text, settings, negatives, resume, ray)
    if store is not None or len(layer_names) > 1:
        with _ray_connection(ray):
            job.run_layers(_layer_folders(layer_names, out, store), as_json)
        return
    with progress_bar(layer_names[0]) as progress:
        result = job.run(layer_names[0], out, progress)
    folder = result.save(out)
    if not as_json:
        _print_scores(result)
    finish(result, folder, as_json)
    job.remove_parts(out)


def _print_scores(result: Patterns) -> None:
    """Print the score of each pattern, and what is wrong with it."""
    columns = (
        Column("unit", overflow="fold"),
        Column("score", right=True),
        Column("score of noise", right=True, priority=1),
        Column("status"),
    )
    noise = [""] * len(result.scores) if result.noise_scores is None else [f"{s:.3g}" for s in result.noise_scores]
    scores = [f"{score:.3g}" for score in result.scores]
    print_table("", columns, list(zip(result.names, scores, noise, result.status, strict=True)))


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
        failed: list[str] = []
        results: dict[str, Patterns] = {}
        skipped: list[str] = []
        with progress_bar("patterns") as progress:
            for number, (layer, folder) in enumerate(folders.items()):
                part = partial_progress(progress, number, len(folders))
                try:
                    if self._is_done(layer, folder):
                        skipped.append(layer)
                        continue
                    result = self.run(layer, folder, part)
                    result.save(folder)
                except ConvscopeError as error:
                    failed.append(f"{layer}: {error}")
                    continue
                results[layer] = result
                self.remove_parts(folder)
        self._report(folders, results, skipped, failed)
        if as_json and len(failed) < len(folders):
            written = [folder for layer, folder in folders.items() if layer in results or layer in skipped]
            print_json([json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in written])
        if len(failed) == len(folders):
            raise ConvscopeError("no layer's patterns could be computed")
        if failed or any(result.failed for result in results.values()):
            raise typer.Exit(1)

    def run(self, layer: str, folder: Path, progress: Progress | None) -> Patterns:
        """Compute the patterns of one layer, and with `negatives` also save those of its negated units."""
        import convscope
        from convscope.featurevis.resumable import run_resumable

        units, num_runs = self._layer_units(layer), 2 if self.negatives else 1
        first = partial_progress(progress, 0, num_runs)
        if units is None and _has_layer_objective(self.settings["recipe"]):
            result = convscope.patterns(self.network, layer, progress=first, **self.settings)
        else:
            result = run_resumable(
                self.network,
                layer,
                units,
                folder,
                resume=self.resume,
                ray=self.ray,
                progress=first,
                **self.settings,
            )
        if self.negatives:
            self._save_negatives(result, folder, partial_progress(progress, 1, num_runs))
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

    def _report(
        self,
        folders: Mapping[str, Path],
        results: Mapping[str, Patterns],
        skipped: Sequence[str],
        failed: Sequence[str],
    ) -> None:
        """Print what was done, with the notes of all layers summed up."""
        if skipped:
            log(f"already done, skipped: {', '.join(skipped)}")
        for note in sum_up_notes([(layer, note) for layer, result in results.items() for note in result.notes]):
            log_note(note)
        for layer in results:
            log_detail(f"{layer}: written to {folders[layer]}")
        if results:
            count = sum(len(result.images) for result in results.values())
            parents = {folders[layer].parent for layer in results}
            done = f"{count_of(count, 'pattern')} of {count_of(len(results), 'layer')}"
            log(f"{done}; written to {', '.join(sorted(map(str, parents)))}")
        report_failures(failed)
        report_failures([f for result in results.values() for f in result.failed])

    def _save_negatives(self, result: Patterns, folder: Path, progress: Progress | None) -> None:
        """Save the patterns of the negated units in a subfolder, and both in one image."""
        import convscope
        from convscope.featurevis.objectives import channel
        from convscope.plotting.patterns import paired_pattern_grid
        from convscope.results import atomic_write

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


def _split_request(layers: str | None, units: str | None) -> tuple[list[str], str | None]:
    """Return the names of the layers, "all" among them, and the text of --units; refuse what no network can satisfy."""
    prefix, colon, rest = (units or "").partition(":")
    if colon and prefix == "logits":
        if layers not in (None, "logits"):
            raise ConvscopeError(f"--units {units} are classes, not units of --layer {layers}; give one or the other")
        layers, units = "logits", rest
    names = split_commas(layers or "")
    if not names:
        raise ConvscopeError("give a --layer, or --units logits:CLASSES; `convscope layers MODEL` lists the layers")
    if units is not None:
        parse_units(units)
    return names, units


def _check_settings(settings: Mapping[str, Any], units: str | None, negatives: bool, ray: str | None) -> None:
    """Refuse settings that do not go together, before a network is loaded."""
    from convscope.featurevis.request import find_recipe

    recipe = settings["recipe"]
    find_recipe(recipe, settings["start"] is not None, "pixels")
    if units is None and _has_layer_objective(recipe):
        for flag, used in (("--negatives", negatives), ("--ray", ray is not None)):
            if used:
                raise ConvscopeError(f"{flag} needs --units; recipe {recipe!r} would maximise the layer as a whole")
    for name in ("size", "steps", "views", "patience"):
        if settings[name] is not None:
            require_int(name, settings[name])


def _all_layers(network: Model, store: Store | None) -> list[str]:
    """Return the layers that a store has, or all that have spatial extent, and the logits."""
    if store is not None:
        return list(store.layers)
    names = [layer.name for layer in network.layers.unique_spatial()]
    return names + (["logits"] if network.num_outputs else [])


def partial_progress(progress: Progress | None, part: int, num_parts: int) -> Progress | None:
    """Return the callback for one of several parts of a task."""
    if progress is None:
        return None
    return lambda done, total: progress(part + done / max(total, 1), num_parts)


def sum_up_notes(notes: Sequence[tuple[str, str]]) -> list[str]:
    """Join notes on several layers: each kind of note is spelled out once, for the first unit that has it.

    Parameters
    ----------
    notes : sequence of (str, str)
        Layers and notes; a note on a unit starts with "unit 3" or "class 3".
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for layer, note in notes:
        unit = re.match(r"(?:unit|class) (\d+)", note)
        kind = re.sub(r"\d[\d.e+-]*", "#", note)
        groups.setdefault(kind, []).append((f"{layer} {unit[1]}" if unit else layer, f"{layer}: {note}"))
    return [_spell_out(group) for group in groups.values()]


def _spell_out(group: Sequence[tuple[str, str]]) -> str:
    (_, first), *others = group
    if not others:
        return first
    names = [name for name, _ in others[:MAX_NAMED_UNITS]] + ["..."] * (len(others) > MAX_NAMED_UNITS)
    return f"{first} Likewise {len(others)} more: {', '.join(names)}"


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
