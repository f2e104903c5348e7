"""Interleaved timing: contenders take turns in one process; ratios are taken within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.utils.benchmark import Timer

THREADS = 2


@dataclass(frozen=True)
class Timed:
    """Median seconds of a contender, and its median ratio to the reference within a round."""

    seconds: float
    ratio: float


def interleaved(
    contenders: dict[str, Callable[[], object]],
    reference: str,
    rounds: int,
    *,
    threads: int = THREADS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timed]:
    """Time all contenders in turn, `rounds` times, after a warm-up round.

    Ratios within a round are not affected by drifts of the machine's speed.
    """
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=threads, label=name, timer=clock)
        for name, run in contenders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, timer in timers.items():
            duration = timer.timeit(1).median
            if turn:
                seconds[name].append(duration)
    return {
        name: Timed(
            statistics.median(durations),
            statistics.median(a / b for a, b in zip(durations, seconds[reference], strict=True)),
        )
        for name, durations in seconds.items()
    }
