"""Tables fit the terminal: columns are folded, shortened or left out, and --wide prints everything."""

from __future__ import annotations

import re

import pytest

from convscope.cli.tables import Column, fit_widths, print_table

LONG = "blocks.4.2.depthwise_convolution_with_a_name"


def displayed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, **options: bool) -> str:
    """Return a table of three columns as a terminal of a width shows it."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    columns = (
        Column("image", overflow="path"),
        Column("layer", overflow="fold"),
        Column("units", right=True, priority=1),
        Column("stride", right=True, priority=2),
    )
    rows = [("photographs/of/animals/kingfisher.jpg", LONG, "96", "8"), ("a.jpg", "bn1", "32", "2")]
    print_table("title", columns, rows, **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def test_columns_are_left_out_by_priority(capsys, monkeypatch):
    for width, headings in ((110, "image layer units stride"), (54, "image layer units"), (38, "image layer")):
        lines = displayed(capsys, monkeypatch, width).splitlines()
        assert lines[1].split() == headings.split()
        assert max(map(len, lines)) <= width


def test_paths_lose_their_beginning_and_names_are_folded(capsys, monkeypatch):
    text = displayed(capsys, monkeypatch, 60)
    _, headings, _, *rows = text.splitlines()
    assert re.search(r"^…[\w/]*als/kingfisher\.jpg ", text, re.M)
    layer = slice(headings.index("layer"), headings.index("units"))
    assert "".join(row[layer].strip() for row in rows) == LONG + "bn1"


def test_wide_prints_whole_cells(capsys, monkeypatch):
    text = displayed(capsys, monkeypatch, 40, wide=True)
    assert re.search(rf"photographs/of/animals/kingfisher\.jpg +{re.escape(LONG)} +96 +8", text)


def test_output_to_a_file_is_tab_separated(capsys):
    print_table("title", (Column("a", priority=1), Column("b")), [("[x]", "y" * 500)])
    assert capsys.readouterr().out == f"a\tb\n[x]\t{'y' * 500}\n"


def test_widths_are_shared_evenly():
    columns = (Column("a", overflow="fold"), Column("b", overflow="fold"), Column("c"))
    assert fit_widths(columns, [50, 50, 10], 70) == [28, 28, 10]
    assert fit_widths(columns, [18, 50, 10], 70) == [18, 38, 10]
    assert fit_widths(columns, [5, 6, 7], 70) == [5, 6, 7]
