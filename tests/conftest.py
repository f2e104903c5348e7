"""Fixtures of all tests: the bundled network and the sample photographs."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: waiting threads must not spin, or parallel tests slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KERAS_BACKEND", "torch")

import pytest
import torch

# Two processes share the files: those that take longest come first, so that neither waits for the other at the end.
LONGEST_FILES = (
    "docs/test_code_blocks.py",
    "docs/test_notebooks.py",
    "distributed/test_ray_scan.py",
    "figures/test_structure.py",
    "explorer/browser/test_effects.py",
    "distributed/test_autoscaling.py",
    "scanning/test_scan.py",
    "test_interrupt.py",
    "test_chapter.py",
    "explorer/browser/test_jupyterlab.py",
    "explorer/test_diagnosis_page.py",
    "distributed/test_ray_patterns.py",
)
SAMPLES = Path(__file__).parents[1] / "src" / "convscope" / "samples"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; all others keep their order."""
    ranks = {Path(__file__).parent / file: rank for rank, file in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def lite0():
    """Return EfficientNet-Lite0 with its ImageNet weights."""
    import convscope

    return convscope.load("lite0")


@pytest.fixture(scope="session")
def photos() -> list[str]:
    """Return the paths of the four sample photographs: cat, crab, kingfisher, red panda."""
    return sorted(str(p) for p in SAMPLES.iterdir() if p.suffix in (".jpg", ".png"))


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _deterministic():
    """Seed torch for each test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """Reset the number of threads for each file."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True, scope="session")
def _keras_home(tmp_path_factory):
    """Keep Keras from writing its configuration into the user's home folder."""
    os.environ["KERAS_HOME"] = str(tmp_path_factory.mktemp("keras"))
