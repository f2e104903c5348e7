"""Whole layers and networks without anybody watching: drawn in parts, of which a killed run loses at most one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.engine import capture
from convscope.engine.batching import Progress, balanced_chunks
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.featurevis.api import patterns
from convscope.featurevis.recipes import Recipe
from convscope.featurevis.request import (
    PatternRequest,
    canvas_size,
    find_recipe,
    initial_images,
    parse_request,
    size_checker,
)
from convscope.featurevis.result import Patterns
from convscope.results import atomic_write, versions, write_npz

UNITS_PER_PART = 32  # units that are drawn and written together


def run_resumable(
    model: Model,
    layer: str,
    units: Sequence[int | str] | None,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    ray: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Patterns:
    """`patterns`, 32 units at a time; each part is written below `folder` as soon as it is done.

    With `resume`, parts that are there, and were made with the same network and settings, are read and not drawn
    again. With `ray`, the address of a cluster or "local", parts are drawn by its actors, with as many threads each as
    this process has: the last bits depend on their number. The result is the same, byte for byte, as if nothing had
    come between. The parts are to be removed with `forget` once the result itself has been
    saved. Raises ConvscopeError as `patterns` does, and if the folder cannot be written.
    """
    name, rule = find_recipe(options.get("recipe", "robust"), options.get("start"), options.get("space", "pixels"))
    want = parse_request(model, layer, units, name, rule)
    if not want.of_units:
        raise ConvscopeError(f"recipe {name!r} draws layer {layer!r} as a whole, which has no parts; name units of it")
    parts = list(balanced_chunks(want.units, UNITS_PER_PART))
    work = _Work(model, layer, parts, _starts(options.get("start"), parts), options, torch.get_num_threads())
    where = _parts(folder)
    made = {"layer": layer, "model": model.describe(), "versions": versions(), "threads": work.threads}
    made["options"] = {k: _told(v) for k, v in sorted(options.items())}
    keys = [json.dumps({**made, "units": list(part)}, default=str) for part in parts]
    files = [where / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz" for key in keys]
    missing = [i for i, file in enumerate(files) if not (resume and zipfile.is_zipfile(file))]
    try:
        before = len(parts) - len(missing)
        for done, (i, content) in enumerate(_drawn(work, missing, before, ray, progress), before + 1):
            where.mkdir(parents=True, exist_ok=True)
            with atomic_write(files[i]) as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            if progress is not None:
                progress(done, len(parts))
    except OSError as error:
        raise ConvscopeError(f"cannot write into {folder}: {error.strerror or error}") from error
    return _joined([_read(model, file) for file in files])


@dataclass(frozen=True)
class _Work:
    """Parts to be drawn, here or elsewhere."""

    model: Model
    layer: str
    parts: Sequence[Sequence[int]]
    starts: Sequence[Any]
    options: Mapping[str, Any]
    threads: int

    def part(self, number: int, progress: Progress | None = None) -> bytes:
        """The content of a part's file."""
        given = {**self.options, "start": self.starts[number]}
        return _content(patterns(self.model, self.layer, self.parts[number], progress=progress, **given))

    def remote_task(self) -> Callable[[int], bytes]:
        """What an actor of a cluster does."""
        torch.set_num_threads(self.threads)
        return self.part


def _drawn(
    work: _Work, missing: Sequence[int], before: int, ray: str | None, progress: Progress | None
) -> Iterator[tuple[int, bytes]]:
    """Missing parts, as they are done."""
    if ray is None or not missing:
        for done, i in enumerate(missing, before):
            yield i, work.part(i, _share(progress, done, len(work.parts)))
        return
    from convscope.distributed.ray_pool import map_unordered

    gpus = int(work.model.device.type == "cuda")
    yield from map_unordered(work.remote_task, missing, address=ray, cpus=work.threads, gpus=gpus)


def _starts(start: Any, parts: Sequence[Sequence[int]]) -> list[Any]:
    """What each part starts from: its own rows, if there is a picture for every unit."""
    count = sum(map(len, parts))
    if getattr(start, "ndim", 0) != 4 or len(start) != count:
        return [start] * len(parts)
    begins = accumulate(map(len, parts), initial=0)
    return [start[begin : begin + len(part)] for begin, part in zip(begins, parts, strict=False)]


def remove_parts(folder: str | os.PathLike[str]) -> None:
    """Remove the parts below `folder`."""
    shutil.rmtree(_parts(folder), ignore_errors=True)


def is_done(
    folder: str | os.PathLike[str],
    model: Model,
    layer: str,
    units: Sequence[int | str] | None,
    options: Mapping[str, Any],
) -> bool:
    """Whether what `patterns` would make of this is saved in `folder`, whole, from the same network.

    What cannot be told from the manifest (pictures to start from or to compare with) is taken on trust.
    """
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    name, rule = find_recipe(options["recipe"], options.get("start"), "pixels")
    want = parse_request(model, layer, units, name, rule)
    steps, _ = rule.schedule(want.receptive_field(model), model.preprocessing.image_size)
    settings = {
        "layer": want.layer,
        "units": list(want.units),
        "objectives": list(want.names),
        "recipe": name,
        "seed": options["seed"],
        "steps": steps if options["steps"] is None else options["steps"],
        "frames": options.get("frames", 0),
        "views": rule.views if options.get("views") is None else options["views"],
        "patience": options.get("patience"),
    }
    made = manifest.get("parameters", {})
    like = json.loads(json.dumps(model.describe(), default=str))
    if manifest.get("model") != like or any(made.get(key) != value for key, value in settings.items()):
        return False
    return bool(made.get("size") == list(_sides(model, want, rule, options)))


def _sides(model: Model, want: PatternRequest, rule: Recipe, options: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of what `patterns` would draw."""
    first = initial_images(options.get("start"), options["size"], len(want.units), model)
    if first is not None:
        return int(first.shape[-2]), int(first.shape[-1])
    with capture.capture_layers(model, want.layers, stop_early=not want.to_logits) as run:
        return canvas_size(options["size"], rule, want.receptive_field(model), model, size_checker(model, run))


def _parts(folder: str | os.PathLike[str]) -> Path:
    return Path(folder) / ".parts"


def _told(option: Any) -> Any:
    """An option in numbers and words; of arrays and files, what is in them."""
    if isinstance(option, list | tuple):
        return [_told(one) for one in option]
    if isinstance(option, Tensor):
        option = option.detach().cpu().numpy()
    if hasattr(option, "tobytes"):
        kind = [str(getattr(option, name, None)) for name in ("shape", "size", "mode")]  # of arrays and of pictures
        return [*kind, hashlib.sha256(option.tobytes()).hexdigest()]
    if isinstance(option, str | os.PathLike) and os.path.isfile(option):
        return [str(option), hashlib.sha256(Path(option).read_bytes()).hexdigest()]
    return option


def _share(progress: Progress | None, part: int, parts: int) -> Callable[[float, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(part + done / max(total, 1), parts)


def _content(result: Patterns) -> bytes:
    said = json.dumps({"notes": result.notes, "failed": [list(f) for f in _failures(result)], **_plain(result)})
    buffer = io.BytesIO()
    write_npz(buffer, {"said": np.array(said), **result.arrays()})
    return buffer.getvalue()


def _plain(result: Patterns) -> dict[str, Any]:
    return {
        name: getattr(result, name)
        for name in ("layer", "recipe", "seed", "steps", "step_size", "space", "views", "patience")
    }


def _failures(result: Patterns) -> Iterator[tuple[str, str]]:
    return ((f.name, f.reason) for f in result.failed)


def _read(model: Model, file: Path) -> Patterns:
    from convscope.images.loading import Failure

    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    said = json.loads(str(arrays.pop("said")))
    failed = tuple(Failure(*pair) for pair in said.pop("failed"))
    return Patterns(model, **arrays, **{**said, "notes": tuple(said["notes"])}, failed=failed)


def _joined(parts: Sequence[Patterns]) -> Patterns:
    """Results of the same layer, one behind the other."""
    first = parts[0]
    along = {"history": 1, "frames": 1}
    arrays: dict[str, Any] = {
        name: np.concatenate([part.arrays()[name] for part in parts], axis=along.get(name, 0))
        for name in first.arrays()
    }
    rest: dict[str, Any] = {
        f.name: getattr(first, f.name) for f in fields(first) if f.name not in (*arrays, "notes", "failed")
    }
    notes = tuple(note for part in parts for note in part.notes)
    return Patterns(**{**rest, **arrays}, notes=notes, failed=_once(part.failed for part in parts))


def _once(failures: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(failure for some in failures for failure in some))
