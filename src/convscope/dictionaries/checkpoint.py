"""The state of training in a file, from which a run that was interrupted resumes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from convscope.dictionaries.positions import PositionStore
from convscope.errors import ConvscopeError
from convscope.results import atomic_write

INTERVAL = 20.0  # seconds between two checkpoints


class Checkpoint:
    """A file with the state of training of one run.

    Parameters
    ----------
    path : Path
        The file; it is made with the first state.
    run : mapping
        What the training depends on beside the vectors: settings, seed, layer, weights of the network.

    Raises
    ------
    ConvscopeError
        If the file is no checkpoint, or that of another run.
    """

    def __init__(self, path: Path, run: Mapping[str, object]) -> None:
        self.path, self._run = path, {key: str(value) for key, value in run.items()}
        self._saved_at = time.monotonic()
        if path.exists():
            self._require_same(self._read()[0] | {"vectors": ""}, self._run | {"vectors": ""})

    def load(self, store: PositionStore) -> dict[str, Tensor] | None:
        """Return the state that was saved for these vectors; None if there is none."""
        if not self.path.exists():
            return None
        run, state = self._read()
        self._require_same(run, self._run_on(store))
        return state

    def save_if_due(self, store: PositionStore, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Save a state, if the last one is old enough."""
        if time.monotonic() - self._saved_at < INTERVAL:
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state().items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(save(tensors, {"run": json.dumps(self._run_on(store))}))
        except OSError as error:
            raise ConvscopeError(f"checkpoint: cannot write {self.path}: {error.strerror or error}") from error
        self._saved_at = time.monotonic()

    def remove(self) -> None:
        """Remove the file of a run that is done."""
        self.path.unlink(missing_ok=True)

    def _run_on(self, store: PositionStore) -> dict[str, str]:
        digest = hashlib.sha256(f"{store.count}".encode() + store.mean().numpy().tobytes())
        return self._run | {"vectors": digest.hexdigest()}

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        try:
            with safe_open(self.path, "pt") as file:
                run: dict[str, str] = json.loads(file.metadata()["run"])
                return run, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConvscopeError(f"checkpoint: {self.path} is not a checkpoint of a dictionary: {error}") from error

    def _require_same(self, settings: Mapping[str, str], expected: Mapping[str, str]) -> None:
        differing = [key for key in expected if settings.get(key) != expected[key]]
        if differing:
            key = differing[0]
            raise ConvscopeError(
                f"checkpoint: {self.path} is of a run with other {key} ({settings.get(key)}, now {expected[key]}); "
                "delete it to start over, or give another file"
            )
