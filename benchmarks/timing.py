"""Interleaved timing: contenders take turns in one process; ratios are taken within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.benchmark import Timer

THREADS = 2


@dataclass(frozen=True)
class Timed:
    """Median seconds of a contender, and its median ratio to the reference within a round.

    `spread` is half the distance between the quartiles of the ratio, over the rounds.
    """

    seconds: float
    ratio: float
    spread: float = 0.0

    def text(self, digits: int = 2) -> str:
        """Return the ratio with its spread, as tables show it and ``plots.py`` reads it: ``1.05 ±0.02``."""
        spread = f"{self.spread:.{digits}f}"
        return f"{self.ratio:.{digits}f}" + (f" ±{spread}" if float(spread) else "")

    def times(self, seconds: float, ratio: float = 1.0) -> Timed:
        """Return the time of a part of the work: seconds and ratio multiplied by these factors."""
        return Timed(self.seconds * seconds, self.ratio * ratio, self.spread * ratio)

    def inverse(self) -> Timed:
        """Return the same as throughput: the ratio is that of the reference's time to this one's."""
        return Timed(self.seconds, 1 / self.ratio, self.spread / self.ratio**2)


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
    return {name: _summarise(durations, seconds[reference]) for name, durations in seconds.items()}


def _summarise(durations: Sequence[float], reference: Sequence[float]) -> Timed:
    ratios = [a / b for a, b in zip(durations, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timed(statistics.median(durations), statistics.median(ratios), (high - low) / 2)
