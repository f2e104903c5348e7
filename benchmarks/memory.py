"""Peak memory with few and with many pictures or units, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

HEATMAPS = """
import convscope, pathlib, sys
model = convscope.load("lite0")
photo = str(pathlib.Path(convscope.__file__).parent / "samples" / "red_panda.jpg")
convscope.heatmaps(model, [photo] * int(sys.argv[1]), memory=int(sys.argv[2]) << 20)
print(peak())
"""
PATTERNS = """
import convscope, sys
model = convscope.load("torchvision:vgg16", weights="random")
units, budget = int(sys.argv[1]), int(sys.argv[2]) << 20
convscope.patterns(model, "features.11", range(units), recipe="plain", steps=1, memory=budget)
print(peak())
"""
# getrusage will not do: its maximum is inherited from the process that started this one.
PEAK = """
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
"""


@dataclass(frozen=True)
class Peak:
    what: str
    count: int
    budget: int
    megabytes: float


def run() -> list[Peak]:
    """Budgets are in MiB; the process itself, with torch and the weights, takes its share besides."""
    cases = [("heatmaps", HEATMAPS, n, 512) for n in (2, 32, 256)]
    cases += [("patterns", PATTERNS, n, 1024) for n in (2, 64, 256)]
    return [Peak(what, n, budget, _peak(script, n, budget)) for what, script, n, budget in cases]


def _peak(script: str, count: int, budget: int) -> float:
    command = [sys.executable, "-c", PEAK + script, str(count), str(budget)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
