"""Whole layers and networks without anybody watching: drawn in parts, of which a killed run loses at most one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from convscope.budget import Progress, chunks
from convscope.errors import ConvscopeError
from convscope.model import Model
from convscope.patterns import Patterns, patterns
from convscope.patterns.plan import find_recipe, pair, wanted
from convscope.results import replacing, versions, write_npz

PART = 32  # units that are drawn and written together


def in_parts(
    model: Model,
    layer: str,
    units: Sequence[int | str] | None,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Patterns:
    """`patterns`, 32 units at a time; each part is written below `folder` as soon as it is done.

    With `resume`, parts that are there, and were made with the same network and settings, are read and not drawn
    again. The result is the same, byte for byte, as if nothing had come between. The parts are to be removed with
    `forget` once the result itself has been saved. Raises ConvscopeError as `patterns` does, and if the folder cannot
    be written.
    """
    name, rule = find_recipe(options.get("recipe", "robust"), options.get("start"), options.get("space", "pixels"))
    numbers = wanted(model, layer, units, name, rule).numbers
    parts = list(chunks(numbers, PART))
    where = _parts(folder)
    found = []
    try:
        for i, part in enumerate(parts):
            key = {"layer": layer, "units": list(part), "model": model.describe(), "versions": versions()}
            key["options"] = {k: _told(v) for k, v in sorted(options.items())}
            file = where / f"{hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:32]}.npz"
            if resume and file.exists():
                found.append(_read(model, file))
            else:
                own = patterns(model, layer, part, progress=_share(progress, i, len(parts)), **options)
                where.mkdir(parents=True, exist_ok=True)
                _write(file, own)
                found.append(own)
            if progress is not None:
                progress(i + 1, len(parts))
    except OSError as error:
        raise ConvscopeError(f"cannot write into {folder}: {error.strerror or error}") from error
    return _joined(found)


def forget(folder: str | os.PathLike[str]) -> None:
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

    What cannot be told from the manifest (pictures to start from, or to compare with) is taken on trust.
    """
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    name, rule = find_recipe(options["recipe"], options.get("start"), "pixels")
    want = wanted(model, layer, units, name, rule)
    settings = {
        "layer": want.layer,
        "units": list(want.numbers),
        "recipe": name,
        "seed": options["seed"],
        "steps": rule.steps if options["steps"] is None else options["steps"],
    }
    if options["size"] is not None:
        settings["size"] = list(pair(options["size"]))
    made = manifest.get("parameters", {})
    like = json.loads(json.dumps(model.describe(), default=str))
    return bool(manifest.get("model") == like and all(made.get(key) == value for key, value in settings.items()))


def _parts(folder: str | os.PathLike[str]) -> Path:
    return Path(folder) / ".parts"


def _told(option: Any) -> Any:
    """An option in numbers and words; of arrays, what is in them."""
    if hasattr(option, "tobytes"):
        return hashlib.sha256(option.tobytes()).hexdigest()
    return option


def _share(progress: Progress | None, part: int, parts: int) -> Callable[[float, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(part + done / max(total, 1), parts)


def _write(file: Path, result: Patterns) -> None:
    said = json.dumps({"notes": result.notes, "failed": [list(f) for f in _failures(result)], **_plain(result)})
    with replacing(file) as out:
        write_npz(out, {"said": np.array(said), **result.arrays()})


def _plain(result: Patterns) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ("layer", "recipe", "seed", "steps", "step_size", "space")}


def _failures(result: Patterns) -> Iterator[tuple[str, str]]:
    return ((f.name, f.reason) for f in result.failed)


def _read(model: Model, file: Path) -> Patterns:
    from convscope.images import Failure

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
