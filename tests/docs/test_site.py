"""The documentation's pages: every image says what it shows, every public name has its place, every page is listed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import convscope

pytest.importorskip("jupytext", reason="the extra 'docs' is not installed")

from convscope.attribution.registry import METHODS
from docs.scripts import gallery, notebooks, reference

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
    assert {"channel", "text", "Objective"} <= set(reference.objective_names())
    for name in reference.objective_names():
        assert f"::: convscope.objectives.{name}\n" in text
    assert "::: convscope.samples.photographs" in text


def test_the_reference_has_every_command_with_its_options() -> None:
    text = reference.pages()["reference/command-line.md"]
    for names in reference.PANELS.values():
        for name in names:
            assert f"### convscope {name}\n" in text
    assert re.search(r"\| `[^`]*--target[^`]*` \| \S", text)


def test_the_tour_names_every_function_and_command() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    commands = [name for names in reference.PANELS.values() for name in names]
    functions = [name for name in convscope.__all__ if name[0].islower()]
    assert [name for name in (*commands, *functions) if f"`{name}`" not in text] == []


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


def test_numbers_in_the_readme_stand_in_the_benchmarks() -> None:
    """Every number of a row with a link to a section of the benchmarks is found in that section."""
    sections = {}
    for part in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        sections[re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")] = text
    rows = re.findall(r"^\| \[.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 5
    for row in rows:
        (anchor,) = re.findall(r"benchmarks/README\.md#([\w-]+)\)", row)
        for number in re.findall(r"\b\d+\.\d+\b|\b\d+e-\d+\b", row):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", sections[anchor]), f"{number} in {anchor}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_every_image_of_the_gallery_has_code_that_draws_it() -> None:
    shown = {address for _, address in MARKDOWN_IMAGE.findall((ROOT / "docs" / "gallery.md").read_text("utf-8"))}
    drawn = {path.relative_to(ROOT / "docs").as_posix() for path, _ in gallery.entries()}
    assert shown - drawn == {"recipes.jpg"}  # by benchmarks/recipes.py


def test_every_method_has_a_section_and_an_image() -> None:
    text = (ROOT / "docs" / "method-gallery.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(METHODS)
    for name, section in sections.items():
        assert "**Use it**" in section
        assert f"images/methods/{name}.webp" in section or METHODS[name].needs_boxes
    with_formulas = reference.add_formulas(text)
    assert with_formulas.count("::: convscope.attribution.") == len(METHODS)
    assert with_formulas.count("**Other packages**") == len(reference.other_packages())


def test_methods_say_where_other_packages_disagree() -> None:
    others = reference.other_packages()
    assert {"grad-cam", "grad-cam++", "eigen-cam", "finer-cam", "legrad"} <= set(others)
    assert "captum" in others["grad-cam"]
    assert "torchcam" in others["grad-cam++"]


def test_every_page_of_the_reference_links_to_a_guide() -> None:
    for (page, _), _names in reference.topics().items():
        guide = ROOT / "docs" / reference.GUIDES[page]
        assert guide.exists()
        assert f"](../{guide.name})" in reference.pages()[f"reference/{page}.md"]
