"""Patterns of whole layers in parts, so that an interrupted run can be resumed; on one machine or a Ray cluster."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.distributed import ray_pool
from convscope.engine.batching import balanced_chunks
from convscope.engine.capture import capture_layers
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.featurevis.api import patterns
from convscope.featurevis.defaults import Size
from convscope.featurevis.recipes import Recipe
from convscope.featurevis.request import (
    PatternRequest,
    StartImage,
    canvas_size,
    find_recipe,
    initial_images,
    parse_request,
    size_checker,
)
from convscope.featurevis.result import Patterns
from convscope.images.failures import Failure
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.results import atomic_write, versions, write_npz

UNITS_PER_PART = 32
SETTINGS = ("layer", "recipe", "seed", "steps", "step_size", "space", "views", "patience")  # saved with each part

Folder = str | os.PathLike[str]
Options = Mapping[str, Any]  # of `patterns`


def run_resumable(
    model: Model,
    layer: str,
    units: Sequence[int | str] | None,
    folder: Folder,
    *,
    resume: bool = False,
    ray: str | None = None,
    progress: ProgressOption = None,
    **options: Any,
) -> Patterns:
    """Run `convscope.patterns` for 32 units at a time, and save each part below `folder` when it is done.

    The result is the same, byte for byte, as that of an uninterrupted run. Call `remove_parts` once it is saved.

    Parameters
    ----------
    model : Model
    layer : str
    units : sequence of int or str, or None
        As of `convscope.patterns`.
    folder : path
        A local folder.
    resume : bool
        Read the parts that an earlier run with the same network and settings has saved.
    ray : str, optional
        Address of a Ray cluster, or ``"local"``: its workers run the parts, each with as many threads as this process,
        because the last bits depend on their number.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` in parts, with fractions.
    **options
        Of `convscope.patterns`.

    Raises
    ------
    ConvscopeError
        As `convscope.patterns`, and if the folder cannot be written.
    """
    recipe_name, recipe = find_recipe(
        options.get("recipe", "robust"), options.get("start") is not None, options.get("space", "pixels")
    )
    request = parse_request(model, layer, units, recipe_name, recipe)
    if not request.of_units:
        raise ConvscopeError(
            f"recipe {recipe_name!r} is for layer {layer!r} as a whole, which has no parts; give units"
        )
    parts = balanced_chunks(request.units, UNITS_PER_PART)
    job = _PartsJob(model, layer, parts, _split_start(options.get("start"), parts), options, torch.get_num_threads())
    files = [_parts_folder(folder) / name for name in job.file_names()]
    missing = [i for i, file in enumerate(files) if not (resume and zipfile.is_zipfile(file))]
    try:
        with progress_bar(progress, f"patterns {layer}") as report:
            for done, (i, content) in enumerate(job.run(missing, ray, report), len(parts) - len(missing) + 1):
                files[i].parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(files[i]) as out:
                    out.write(content)
                    out.flush()
                    os.fsync(out.fileno())
                report(done, len(parts))
    except OSError as error:
        raise ConvscopeError(f"cannot write into {folder}: {error.strerror or error}") from error
    return _concatenate([_read_part(model, file) for file in files])


@dataclass(frozen=True)
class _PartsJob:
    """The parts of a layer, to be run here or by remote workers."""

    model: Model
    layer: str
    parts: Sequence[Sequence[int]]
    starts: Sequence[StartImage | None]
    options: Options
    threads: int

    def file_names(self) -> list[str]:
        """Return a name for each part that depends on the network, the settings and the package versions."""
        key = {
            "layer": self.layer,
            "model": self.model.describe(),
            "versions": versions(),
            "threads": self.threads,
            "options": {name: _fingerprint(value) for name, value in sorted(self.options.items())},
        }
        keys = [json.dumps({**key, "units": list(part)}, default=str) for part in self.parts]
        return [f"{hashlib.sha256(part_key.encode()).hexdigest()[:32]}.npz" for part_key in keys]

    def run(self, missing: Sequence[int], ray: str | None, progress: Progress) -> Iterator[tuple[int, bytes]]:
        """Run the missing parts; yield the number and the file content of each one when it is done."""
        if ray is not None and missing:
            gpus = int(self.model.device.type == "cuda")
            yield from ray_pool.map_unordered(self.remote_task, missing, address=ray, cpus=self.threads, gpus=gpus)
            return
        done = len(self.parts) - len(missing)
        for position, i in enumerate(missing, done):
            yield i, self.run_part(i, partial(_report_part, progress, position, len(self.parts)))

    def run_part(self, number: int, progress: ProgressOption = None) -> bytes:
        """Run one part and return the content of its file."""
        options = {**self.options, "start": self.starts[number]}
        return _part_content(patterns(self.model, self.layer, self.parts[number], progress=progress, **options))

    def remote_task(self) -> Callable[[int], bytes]:
        """Return `run_part`; called once in each worker."""
        torch.set_num_threads(self.threads)
        return self.run_part


def _split_start(start: StartImage | None, parts: Sequence[Sequence[int]]) -> list[StartImage | None]:
    """Return the start of each part: its own rows, if there is an image for every unit."""
    count = sum(map(len, parts))
    if not isinstance(start, np.ndarray | Tensor) or start.ndim != 4 or len(start) != count:
        return [start] * len(parts)
    offsets = accumulate(map(len, parts), initial=0)
    return [start[offset : offset + len(part)] for offset, part in zip(offsets, parts, strict=False)]


def remove_parts(folder: Folder) -> None:
    """Remove the parts below `folder`."""
    shutil.rmtree(_parts_folder(folder), ignore_errors=True)


def is_done(folder: Folder, model: Model, layer: str, units: Sequence[int | str] | None, options: Options) -> bool:
    """Return whether `folder` contains the complete result of such a call of `convscope.patterns`.

    Start and reference images are not compared, because the manifest does not record them.
    """
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    recipe_name, recipe = find_recipe(options["recipe"], options.get("start") is not None, "pixels")
    request = parse_request(model, layer, units, recipe_name, recipe)
    steps, _ = recipe.schedule(request.receptive_field(model), model.preprocessing.image_size)
    expected = {
        "layer": request.layer,
        "units": list(request.units),
        "objectives": list(request.names),
        "recipe": recipe_name,
        "seed": options["seed"],
        "steps": steps if options["steps"] is None else options["steps"],
        "frames": options.get("frames", 0),
        "views": recipe.views if options.get("views") is None else options["views"],
        "patience": options.get("patience"),
    }
    saved = manifest.get("parameters", {})
    description = json.loads(json.dumps(model.describe(), default=str))
    if manifest.get("model") != description or any(saved.get(name) != value for name, value in expected.items()):
        return False
    return bool(saved.get("size") == list(_image_size(model, request, recipe, options)))


def _image_size(model: Model, request: PatternRequest, recipe: Recipe, options: Options) -> Size:
    """Return height and width of the images that `convscope.patterns` would return."""
    start_images = initial_images(options.get("start"), options["size"], len(request.units), model)
    if start_images is not None:
        return int(start_images.shape[-2]), int(start_images.shape[-1])
    with capture_layers(model, request.layers, stop_early=not request.needs_logits) as forward:
        check = size_checker(model, forward)
        return canvas_size(options["size"], recipe, request.receptive_field(model), model, check)


def _parts_folder(folder: Folder) -> Path:
    return Path(folder) / ".parts"


def _fingerprint(option: object) -> object:
    """Return an option for JSON; arrays, images and files by a hash of their content."""
    if isinstance(option, list | tuple):
        return [_fingerprint(item) for item in option]
    if isinstance(option, Tensor):
        option = option.detach().cpu().numpy()
    to_bytes = getattr(option, "tobytes", None)  # arrays and PIL images
    if to_bytes is not None:
        kind = [str(getattr(option, name, None)) for name in ("shape", "size", "mode")]
        return [*kind, hashlib.sha256(to_bytes()).hexdigest()]
    if isinstance(option, str | os.PathLike) and os.path.isfile(option):
        return [str(option), hashlib.sha256(Path(option).read_bytes()).hexdigest()]
    return option


def _report_part(progress: Progress, part: int, num_parts: int, done: float, total: int) -> None:
    progress(part + done / max(total, 1), num_parts)


def _part_content(result: Patterns) -> bytes:
    metadata = {
        "notes": result.notes,
        "failed": [(failure.name, failure.reason) for failure in result.failed],
        "settings": {name: getattr(result, name) for name in SETTINGS},
    }
    buffer = io.BytesIO()
    write_npz(buffer, {"metadata": np.array(json.dumps(metadata)), **result.arrays()})
    return buffer.getvalue()


def _read_part(model: Model, file: Path) -> Patterns:
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    metadata = json.loads(str(arrays.pop("metadata")))
    failed = tuple(Failure(name, reason) for name, reason in metadata["failed"])
    return Patterns(model, **arrays, **metadata["settings"], notes=tuple(metadata["notes"]), failed=failed)


def _concatenate(parts: Sequence[Patterns]) -> Patterns:
    """Join the results of parts of the same layer, in order."""
    first = parts[0]
    unit_axes = {"history": 1, "frames": 1}
    arrays: dict[str, Any] = {
        name: np.concatenate([part.arrays()[name] for part in parts], axis=unit_axes.get(name, 0))
        for name in first.arrays()
    }
    settings: dict[str, Any] = {
        f.name: getattr(first, f.name) for f in fields(first) if f.name not in (*arrays, "notes", "failed")
    }
    notes = tuple(note for part in parts for note in part.notes)
    failed = tuple(dict.fromkeys(failure for part in parts for failure in part.failed))
    return Patterns(**settings, **arrays, notes=notes, failed=failed)
