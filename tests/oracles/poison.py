"""Data sets and tasks that harm their process as real ones do: crash, hang, print, allocate. Importable by workers."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convscope.images.decode_worker import DecodedImage, Reply


def random_image(seed: int, shape: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@dataclass
class Poison:
    """A data set of `count` images; `acts` says what happens at some; every read leaves a file in `traces`."""

    count: int
    acts: dict[int, str]
    traces: Path | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if self.traces is not None:
            (self.traces / str(index)).touch()
        act = self.acts.get(index)
        if act == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if act == "hang":
            time.sleep(600)
        if act == "raise":
            raise RuntimeError("no\nluck")
        if act == "return None":
            return None
        if act == "exit once" and self.traces is not None and not (self.traces / "exited").exists():
            (self.traces / "exited").touch()
            os._exit(0)
        if act == "print":
            print("between replies", flush=True)  # noqa: T201
            os.write(1, b"and below Python")
        return random_image(index)


class Allocate:
    """A decode task that allocates as many MiB as the index says."""

    def decode(self, index: int, content: bytes | None = None) -> Reply:
        try:
            return DecodedImage(np.ones((index << 10, 1 << 10, 1), np.uint8)[:1])
        except MemoryError:
            return "takes too much memory"
