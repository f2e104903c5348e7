"""Classes by name: whole names first, then synonyms."""

from __future__ import annotations

import pytest

from convscope import ConvscopeError
from convscope.engine.class_names import find_class, is_class_name

CLASSES = ("tench, Tinca tinca", "Cardigan, Cardigan Welsh corgi", "cardigan", "crane", "crane", "house finch, linnet")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("tench", 0),
        ("tinca_tinca", 0),
        ("Tench, Tinca tinca", 0),
        ("cardigan", 2),
        ("Linnet", 5),
        ("cardigan welsh corgi", 1),
    ],
)
def test_a_whole_name_or_one_synonym(name: str, index: int) -> None:
    assert find_class(name, CLASSES) == index
    assert is_class_name(name, CLASSES)


@pytest.mark.parametrize(("name", "message"), [("crane", "several classes"), ("house", "nearest: house finch")])
def test_no_parts_of_names_and_no_ambiguous_ones(name: str, message: str) -> None:
    with pytest.raises(ConvscopeError, match=message):
        find_class(name, CLASSES)
