"""Data sets that do to the process which reads them what real ones do: die, hang, print. Importable by any process."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


def picture(number: int, shape: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*shape, 3), np.uint8)


@dataclass
class Poison:
    """`count` pictures; what happens at some of them is in `acts`; every reading leaves a file in `traces`."""

    count: int
    acts: dict[int, str]
    traces: Path | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if self.traces is not None:
            (self.traces / str(index)).touch()
        act = self.acts.get(index)
        if act == "exit":
            os._exit(0)
        if act == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if act == "hang":
            time.sleep(600)
        if act == "raise":
            raise RuntimeError("no\nluck")
        if act == "nothing":
            return None
        if act == "once" and self.traces is not None and not (self.traces / "died").exists():
            (self.traces / "died").touch()
            os._exit(1)
        if act == "print":
            print("between replies", flush=True)  # noqa: T201
            os.write(1, b"and below Python")
        return picture(index)
