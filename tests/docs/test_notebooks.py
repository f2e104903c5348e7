"""Every notebook runs from first to last, and each image that it shows has a text."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="the extra 'docs' is not installed")

from docs.scripts import notebooks


@pytest.mark.parametrize("path", notebooks.sources(), ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    executed = notebooks.execute(path)
    assert notebooks.missing_alt(executed) == []
    page, images = notebooks.to_page(executed, path.stem)
    assert all(content for content in images.values())
    assert all(f'src="{file}"' in page for file in images)
    assert "data:image" not in page
