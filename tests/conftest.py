"""Shared by all tests: the bundled network, the sample photographs, and threads that leave room for others."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: threads that wait must not spin, or tests crawl when anything else runs beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KERAS_BACKEND", "torch")

import pytest
import torch

SAMPLES = Path(__file__).parents[1] / "src" / "convscope" / "samples"


@pytest.fixture(scope="session")
def lite0():
    """EfficientNet-Lite0 with its ImageNet weights."""
    import convscope

    return convscope.load("lite0")


@pytest.fixture(scope="session")
def photos() -> list[str]:
    """Paths of the four sample photographs: cat, crab, kingfisher, red panda."""
    return sorted(str(p) for p in SAMPLES.iterdir() if p.suffix in (".jpg", ".png"))


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _deterministic():
    """Each test draws from the same numbers, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """Each file begins with as many threads as the first; a fixture of its own may set others."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True, scope="session")
def _keras_home(tmp_path_factory):
    """Keras writes a configuration into its home folder: not into the user's."""
    os.environ["KERAS_HOME"] = str(tmp_path_factory.mktemp("keras"))
