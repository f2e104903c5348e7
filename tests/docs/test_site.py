"""The documentation's pages: every image says what it shows, every public name has its place, every page is listed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import convscope

pytest.importorskip("jupytext", reason="the extra 'docs' is not installed")

from docs.scripts import notebooks, reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_BYTES = 3_000_000  # of all images of the documentation
MARKDOWN_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)")
IMAGE_TAG = re.compile(r"<img\b[^>]*>")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_images_exist_and_have_alt_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for alt, address in MARKDOWN_IMAGE.findall(text):
        assert len(alt) > 10, f"{address} needs a text that says what it shows"
        assert (page.parent / address).exists(), address
    for tag in IMAGE_TAG.findall(text):
        assert re.search(r'\balt="[^"]{10,}"', tag), tag
        assert (page.parent / re.findall(r'\bsrc="([^"]+)"', tag)[0]).exists(), tag


def test_the_reference_has_every_public_name() -> None:
    pages = reference.pages()
    text = "\n".join(pages.values())
    missing = [name for name in convscope.__all__ if f"::: convscope.{name}\n" not in text + "\n"]
    assert set(missing) <= set(reference.MODULES)
    for name in reference.objective_names():
        assert f"::: convscope.objectives.{name}\n" in text
    assert "::: convscope.samples.photographs" in text


def test_the_reference_has_every_command_with_its_options() -> None:
    text = reference.pages()["reference/command-line.md"]
    for names in reference.PANELS.values():
        for name in names:
            assert f"### convscope {name}\n" in text
    assert re.search(r"\| `[^`]*--target[^`]*` \| \S", text)


def test_images_are_light() -> None:
    tracked = subprocess.run(["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    paths = [ROOT / name for name in tracked.split() if name.endswith((".jpg", ".png", ".webp", ".gif"))]
    assert sum(path.stat().st_size for path in paths if path.exists()) < MAX_BYTES


def test_the_navigation_lists_every_page() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES[1:]}
    assert pages - listed == set()
    assert listed - pages == {"benchmarks.md"}  # made of benchmarks/README.md


def test_every_notebook_is_in_the_list_of_tutorials() -> None:
    index = (notebooks.FOLDER / "index.md").read_text(encoding="utf-8")
    for path in notebooks.sources():
        assert f"({path.name})" in index
