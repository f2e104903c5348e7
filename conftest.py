"""Doctests of the package run in an empty folder, on one seed."""

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
