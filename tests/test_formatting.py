"""Tables of text."""

from __future__ import annotations

import math

import numpy as np
import pytest

from convscope.formatting import base_name, count_of, format_table, shorten

ROWS = [
    {"name": "cat.png", "score": 12.3456, "count": 7, "remark": ""},
    {"name": "b", "score": -0.5, "count": 1000, "remark": None},
]


def test_columns_are_aligned_and_numbers_to_the_right() -> None:
    assert format_table(ROWS).splitlines() == [
        "name     score  count",
        "cat.png  12.35      7",
        "b        -0.50   1000",
    ]


def test_numbers_of_numpy_and_missing_ones() -> None:
    rows = [{"x": np.float32(0.25), "n": np.int64(3)}, {"x": math.nan, "n": None}, {"x": None, "n": 2}]
    assert format_table(rows).splitlines() == ["     x  n", "0.2500  3", "   nan", "        2"]


def test_wide_tables_fit() -> None:
    rows = [{"layer": "a" * 30, "kind": "b" * 60, "text": "c" * 60, "n": 1.5}]
    lines = format_table(rows, width=80).splitlines()
    assert max(map(len, lines)) == 80
    assert "a" * 30 in lines[1]  # names stay whole
    assert lines[1].count("…") == 2
    narrow = format_table([{str(i): "x" * 20 for i in range(9)}], width=80).splitlines()
    assert max(map(len, narrow)) <= 80
    assert narrow[-1] == "(not shown: 5, 6, 7, 8)"


def test_long_tables_are_cut() -> None:
    lines = format_table([{"i": i} for i in range(30)], max_rows=3).splitlines()
    assert lines[1:] == ["0", "1", "2", "... 27 more rows"]
    assert format_table([]) == ""


@pytest.mark.parametrize(
    ("count", "noun", "text"), [(1, "class", "1 class"), (2, "class", "2 classes"), (0, "note", "0 notes")]
)
def test_counts(count: int, noun: str, text: str) -> None:
    assert count_of(count, noun) == text


def test_short_names() -> None:
    assert base_name("a/b/cat.png") == "cat.png"
    assert base_name("image 3") == "image 3"
    assert shorten("abcdefghij", 5) == "ab…ij"
