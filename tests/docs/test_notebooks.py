"""Every notebook runs from first to last, and each image that it shows has a text."""

from __future__ import annotations

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
    differences = [float(line.split()[-1]) for line in page.splitlines() if "difference from the book" in line]
    assert len(differences) == 5
    assert max(differences) < 1e-4
