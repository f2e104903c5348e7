"""Images below the tables of the benchmarks: they show the numbers of the tables, and stay below them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
README = """# Benchmarks

## Grad-CAM

| network, batch | bare forward | convscope | captum |
| --- | --- | --- | --- |
| A, 8 (`layer4`) | 47.1 (1.00) | 47.7 (1.02 ±0.01) | 49.2 (1.05)<br>0e+00 |
| B, 1 (`bn2`) | 2.0 (1.00) | 2.1 (1.05) | 12.6 (6.30 ±1.20)<br>2e-07 |

Text behind the table.

## Faithfulness metrics

| metric | convscope, ms | time relative to convscope | difference |
| --- | --- | --- | --- |
| deletion, 84 steps | 7805 | Quantus 1.62 ±0.30, bare forward passes 0.98 | 1e-02 |
"""


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plots", BENCHMARKS / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plots"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_tables_are_read(plots: ModuleType) -> None:
    first, second = README.split("\n## ")[1:]
    bars = [(b.group, b.name, b.value, b.spread) for b in plots.bracketed(plots.tables(first)[0])]
    assert bars == [
        ("A, 8 (`layer4`)", "convscope", 1.02, 0.01),
        ("A, 8 (`layer4`)", "captum", 1.05, 0.0),
        ("B, 1 (`bn2`)", "convscope", 1.05, 0.0),
        ("B, 1 (`bn2`)", "captum", 6.3, 1.2),
    ]
    bars = [(b.group, b.name, b.text, b.spread) for b in plots.named(plots.tables(second)[0], 2)]
    assert bars == [
        ("deletion, 84 steps", "Quantus", "1.62", 0.3),
        ("deletion, 84 steps", "bare forward passes", "0.98", 0.0),
    ]
    rows = [["", "a", "b"], ["net, 8 (`x`)", "1.04 ±0.01<br>captum 3.4 ±0.2<br>torchcam 1.1", "1.02"]]
    bars = [(b.group, b.name, b.value, b.spread) for b in plots.named_by_column(rows)]
    assert bars == [("net, 8: a", "captum", 3.4, 0.2), ("net, 8: a", "torchcam", 1.1, 0.0)]


def test_bars_have_the_lengths_of_the_numbers(plots: ModuleType) -> None:
    bars = plots.bracketed(plots.tables(README)[0])
    axes = plots.draw(plots.PLOTS[0], bars).axes[0]
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
    assert ends == pytest.approx([1.02, 1.05, 1.05, 6.3])
    assert [text.get_text() for text in axes.texts] == ["1.02", "1.05", "1.05", "6.30"]
    (lines,) = axes.collections
    assert [segment[:, 0].tolist() for segment in lines.get_segments()] == [
        pytest.approx([1.01, 1.03]),
        pytest.approx([5.1, 7.5]),
    ]


def test_images_are_shown_below_their_tables(plots: ModuleType, tmp_path: Path) -> None:
    readme, images = tmp_path / "README.md", tmp_path / "images"
    readme.write_text(README, encoding="utf-8")
    written = plots.update(readme, images)
    assert [path.name for path in written] == ["grad-cam.png", "faithfulness.png"]
    text = readme.read_text(encoding="utf-8")
    assert re.search(r"2e-07 \|\n\n!\[Bar chart: [^\]]{20,}\]\(images/grad-cam.png\)\n\nText behind", text)
    assert plots.IMAGE_LINE.sub("", text) == README
    plots.update(readme, images)
    assert readme.read_text(encoding="utf-8") == text
    with Image.open(written[0]) as image:
        assert image.width < 1000


def test_the_images_of_the_benchmarks_are_those_of_their_tables() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[Bar chart: [^\]]+\]\(images/([\w-]+\.png)\)", text)
    stored = {path.name: path.stat().st_size for path in (BENCHMARKS / "images").iterdir()}
    assert sorted(shown) == sorted(stored)
    assert max(stored.values()) < 40_000
