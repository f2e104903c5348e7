"""Memory is kept while it is asked for, counted in pages that the system had to hand out, and given back at the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

import convscope
from convscope.engine.acceleration import retained
from convscope.engine.model import Model

# In a process of its own, where nothing that others hold lies between the blocks. Each activation has 36 MiB.
SCRIPT = """
from contextlib import suppress
from resource import RUSAGE_SELF, getpagesize, getrusage
import torch
from convscope.engine.acceleration.retained import retained

x = torch.zeros((9, 16, 256, 256), requires_grad=True)
net = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 1) for _ in range(4)]).requires_grad_(False)

def climbed(steps=8):
    "How much memory the system had to hand out meanwhile, and what the process holds then; in activations."
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.autograd.grad(net(x).sum(), x)
    handed = (getrusage(RUSAGE_SELF).ru_minflt - before) * getpagesize()
    with open("/proc/self/statm") as file:
        return handed / x.nbytes, int(file.read().split()[1]) * getpagesize() / x.nbytes

print(*climbed())
with suppress(ZeroDivisionError), retained():
    climbed()
    print(*climbed())
    1 / 0
print(0, climbed(0)[1])
print(*climbed())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux does")
def test_blocks_that_come_and_go_are_handed_out_once() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    (outside, held), (inside, kept), (_, left), (after, _) = np.loadtxt(done.stdout.splitlines())
    assert outside > 8 * 4  # of four outputs and their gradients, eight times
    assert inside < outside / 10
    assert kept > held + 5
    assert left < held
    assert after > 8  # some find a place in what the heap had grown to


@pytest.mark.parametrize(("platform", "library"), [("darwin", None), ("linux", object())], ids=["macOS", "musl"])
def test_where_the_library_is_another_nothing_is_asked_of_it(
    monkeypatch: pytest.MonkeyPatch, platform: str, library: object
) -> None:
    """Neither `mallopt` nor `malloc_trim`, which a library without them would answer with an AttributeError."""
    opened = []
    monkeypatch.setattr(retained, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(retained, "ctypes", SimpleNamespace(CDLL=lambda name: opened.append(name) or library))
    inside = False
    with retained.retained():
        inside = True
    assert inside
    assert opened == ([None] if platform == "linux" else [])


def test_patterns_are_drawn_with_it_and_end_it_also_when_they_are_ended(
    monkeypatch: pytest.MonkeyPatch, lite0: Model
) -> None:
    said: list[str] = []

    @contextmanager
    def told() -> Iterator[None]:
        said.append("kept")
        try:
            yield
        finally:
            said.append("given back")

    def ended(done: int, _: int) -> None:
        said.append("step")
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["convscope.featurevis.api"], "retained", told)
    with pytest.raises(KeyboardInterrupt):
        convscope.patterns(lite0, "bn1", [0], size=32, steps=3, progress=ended)
    assert said == ["kept", "step", "step", "given back"]
