"""Every notebook runs from first to last, and each image that it shows has a text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupytext", reason="the extra 'docs' is not installed")

from docs.scripts import notebooks

SOURCES = notebooks.sources()
STEMS = [path.stem for path in SOURCES]


@pytest.fixture(scope="module")
def executed() -> dict[str, Any]:
    """Return all notebooks after their execution; an error in a cell raises."""
    return dict(zip(STEMS, notebooks.execute(SOURCES), strict=True))


@pytest.mark.parametrize("name", STEMS)
def test_notebook_runs_and_describes_its_images(name: str, executed: dict[str, Any]) -> None:
    assert notebooks.missing_alt(executed[name]) == []
    page, images = notebooks.to_page(executed[name], name)
    assert all(images.values())
    assert all(f'src="{file}"' in page for file in images)
    assert "data:image" not in page


@pytest.mark.parametrize("name", STEMS)
def test_outputs_are_kept_for_the_site(name: str, executed: dict[str, Any]) -> None:
    kept = notebooks.executed(notebooks.FOLDER / f"{name}.md")
    outputs = [[cell.outputs for cell in notebooks.code_cells(notebook)] for notebook in (kept, executed[name])]
    assert outputs[0] == outputs[1]


def test_agreement_with_the_book(executed: dict[str, Any]) -> None:
    """The tutorial claims that its numbers are the book's."""
    page, _ = notebooks.to_page(executed["what-convnets-learn"], "book")
    differences = [float(number) for number in re.findall(r"difference from the book (\d+e[+-]\d+)", page)]
    assert len(differences) == 5
    assert max(differences) < 1e-4


def test_site_builds_without_a_warning(executed: dict[str, Any], tmp_path: Path) -> None:
    """Links, anchors, alt texts and the navigation are checked by the build itself."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=notebooks.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for name, notebook in executed.items():
        page = (tmp_path / "tutorials" / f"{name}.html").read_text(encoding="utf-8")
        _, images = notebooks.to_page(notebook, name)
        assert all((tmp_path / "tutorials" / file).read_bytes() == content for file, content in images.items())
        assert page.count("<img") >= len(images)
        assert f'href="{name}.ipynb"' in page
    assert "convscope.heatmaps" in (tmp_path / "reference" / "heatmaps.html").read_text(encoding="utf-8")
    assert "Selvaraju" in (tmp_path / "method-gallery.html").read_text(encoding="utf-8")
