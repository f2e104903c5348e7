"""Peak memory for few and many images or units, each in its own process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

HEATMAPS = """
import convscope, pathlib, sys
model = convscope.load("lite0")
before = status("VmRSS")
photo = str(pathlib.Path(convscope.__file__).parent / "samples" / "red_panda.jpg")
convscope.heatmaps(model, [photo] * int(sys.argv[1]), memory=int(sys.argv[2]) << 20)
print(before, status("VmHWM"))
"""
PATTERNS = """
import convscope, sys
model = convscope.load("torchvision:vgg16", weights="random")
before = status("VmRSS")
units, budget = int(sys.argv[1]), int(sys.argv[2]) << 20
convscope.patterns(model, "features.11", range(units), recipe="plain", steps=1, memory=budget)
print(before, status("VmHWM"))
"""
# Enough steps for each size of the recipe's views.
CLASSES = """
import convscope, sys
model = convscope.load("lite0")
before = status("VmRSS")
convscope.patterns(model, "logits", range(int(sys.argv[1])), steps=10, memory=int(sys.argv[2]) << 20)
print(before, status("VmHWM"))
"""
# The maximum of getrusage is inherited from the parent process.
STATUS = """
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
"""


@dataclass(frozen=True)
class Peak:
    """In MiB: the budget, the memory before the call (torch and weights), and the peak."""

    name: str
    count: int
    budget: int
    before: float
    peak: float


def run() -> list[Peak]:
    cases = [("heatmaps", HEATMAPS, n, 512) for n in (2, 32, 256)]
    cases += [("patterns, `plain`, filters of VGG16", PATTERNS, n, 1024) for n in (2, 64, 256)]
    cases += [
        ("patterns, `robust`, classes of Lite0", CLASSES, n, budget) for n, budget in ((2, 512), (64, 512), (64, 2048))
    ]
    return [Peak(name, n, budget, *_measure(script, n, budget)) for name, script, n, budget in cases]


def _measure(script: str, count: int, budget: int) -> tuple[float, float]:
    command = [sys.executable, "-c", STATUS + script, str(count), str(budget)]
    before, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(before), float(peak)


def table(peaks: list[Peak]) -> list[str]:
    """Return the section of the README: text and tables."""
    return [
        "Memory of a process before the call, with torch and the weights, and its peak, for a given budget (`memory=`)",
        "of the difference. All in MiB.",
        "",
        "| | images or units | budget | before | peak | peak - before |",
        "| --- | --- | --- | --- | --- | --- |",
        *[
            f"| {p.name} | {p.count} | {p.budget} | {p.before:.0f} | {p.peak:.0f} | {p.peak - p.before:.0f} |"
            for p in peaks
        ],
    ]
