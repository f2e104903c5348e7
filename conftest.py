"""Doctests run in an empty folder; tests with a cluster, a browser or Keras are marked as slow."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _doctest_folder(request: pytest.FixtureRequest) -> None:
    """Run the examples of a docstring where they may write files."""
    if isinstance(request.node, pytest.DoctestItem):
        folder = request.getfixturevalue("tmp_path")
        assert isinstance(folder, Path)
        request.getfixturevalue("monkeypatch").chdir(folder)


SLOW = (
    "tests/distributed",
    "tests/docs",
    "tests/explorer/browser",
    "tests/scanning/test_decoding.py",
    "tests/sources/test_keras.py",
    "tests/test_chapter.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out."""
    for item in items:
        path = item.path.relative_to(config.rootpath).as_posix()
        if path.startswith(SLOW) or isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.slow)
