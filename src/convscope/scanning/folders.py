"""The folder of a pass over a data set: one process at a time writes it, and its identity is checked on resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from convscope.errors import ConvscopeError
from convscope.results import write_json
from convscope.scanning.plan import IDENTITY_KEYS, require_same_run

PLAN_FILE = "plan.json"
"""The identity of a run that is not finished."""


def begin_run(folder: Path, finished: str, identity: Mapping[str, object], run: str = "scan") -> bool:
    """Return whether a run is finished; otherwise begin or resume it.

    Parameters
    ----------
    folder : Path
    finished : str
        The file in it, with the identity, that exists if the run is finished.
    identity : mapping
        What two runs must have in common to share the folder.
    run : str
        What the folder is of, in messages.

    Raises
    ------
    ConvscopeError
        If the folder belongs to another run.
    """
    for name in (finished, PLAN_FILE):
        if (folder / name).exists():
            require_same_run(read_identity(folder / name), identity, str(folder), run)
            return name == finished
    write_json(folder / PLAN_FILE, identity)
    return False


def read_identity(file: Path) -> dict[str, object]:
    """Read the identity of a run, under `IDENTITY_KEYS`. Raises ConvscopeError for a damaged file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvscopeError(f"{file} is damaged: {error}; give another folder, or remove this one") from error
    return {key: content.get(key) for key in IDENTITY_KEYS}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make and lock a folder, and convert errors of the disk to ConvscopeError."""
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            yield
    except Timeout as error:
        raise ConvscopeError(f"{folder} is being written by another process; wait, or give another folder") from error
    except OSError as error:
        raise ConvscopeError(f"cannot write into {folder}: {error.strerror or error}; rerun to resume") from error
