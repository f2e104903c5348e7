"""Words of findings, and names of units in them."""

from __future__ import annotations

from typing import cast

import pytest

from convscope.diagnosis.finding import Finding
from convscope.diagnosis.named_units import name_units_of
from convscope.diagnosis.search import Search
from convscope.diagnosis.wording import describe_images, list_units
from convscope.store.unit_names import UnitNames

NAMES = {12: "striped fur", 4: "sky"}


class Names:
    """Names of the units of the layer "conv"."""

    def get(self, layer: str, unit: int) -> str | None:
        return NAMES.get(unit) if layer == "conv" else None


@pytest.mark.parametrize(
    ("units", "expected"),
    [([3], "unit 3"), ([12], "unit 12 (striped fur)"), ([12, 3, 4], "units 12 (striped fur), 3 and 4 (sky)")],
)
def test_units_are_listed_with_their_names(units: list[int], expected: str) -> None:
    assert list_units(units, NAMES) == expected


def test_files_are_described_by_a_clause() -> None:
    assert describe_images([("bits per pixel", False)], "cat") == "images of `cat` with small files for their size"
    assert describe_images([("brightness", True), ("bits per pixel", True)], None) == (
        "bright images with large files for their size"
    )


def test_names_of_units_are_added_to_sentences_and_evidence() -> None:
    units = [{"unit": unit, "difference": 1.0} for unit in (12, 3, 4, 9)]
    text = describe_images([], "cat", [12, 3, 4])
    finding = Finding("slice", f"{text}: wrong.", f"Add {text}.", (0,), (0,), 0.1, (0, 1), 0.01, {"units": units})
    search = Search("slice", "", 1, "", (finding,))
    (named,) = name_units_of(search, cast(UnitNames, Names()), "conv").findings
    assert named.summary == "images of `cat` that share units 12 (striped fur), 3 and 4 (sky): wrong."
    assert named.recommendation == "Add images of `cat` that share units 12 (striped fur), 3 and 4 (sky)."
    assert [row.get("name") for row in named.evidence["units"]] == ["striped fur", None, "sky", None]
    assert name_units_of(search, cast(UnitNames, Names()), "other").findings == (finding,)
    assert name_units_of(search, None, "conv") is search
