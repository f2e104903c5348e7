"""Fair timing: contenders take turns in one process, and what counts is their ratio within a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from torch.utils.benchmark import Timer

THREADS = 2


@dataclass(frozen=True)
class Timed:
    """Median seconds of a contender, and its median ratio to the reference of the same round."""

    seconds: float
    ratio: float


def interleaved(contenders: dict[str, Callable[[], object]], reference: str, rounds: int) -> dict[str, Timed]:
    """Time all contenders in turn, `rounds` times, after one round that warms up.

    The machine's speed drifts; a ratio between neighbours of one round does not see it.
    """
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=THREADS, label=name) for name, run in contenders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, timer in timers.items():
            taken = timer.timeit(1).median
            if turn:
                seconds[name].append(taken)
    return {
        name: Timed(
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, seconds[reference], strict=True)),
        )
        for name, own in seconds.items()
    }
