"""Suggestions for misspelled and incomplete names are what a user means."""

from __future__ import annotations

import pytest

from convscope.names import METHOD_NAMES
from convscope.sources.spec import imagenet_classes
from convscope.suggestions import similar_names, suggest

CLASSES = imagenet_classes()
LAYERS = [
    "conv_stem",
    "bn1",
    "bn1.act",
    *(f"blocks.{i}.{j}{end}" for i in range(3) for j in range(2) for end in ("", ".bn1", ".bn3", ".bn3.drop")),
    "bn2",
    "classifier",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("panda", ["lesser panda", "giant panda"]),
        ("pandas", ["lesser panda", "giant panda"]),
        ("panad", ["lesser panda", "giant panda"]),
        ("lesser pandas", ["lesser panda"]),
        ("redfox", ["red fox"]),
        ("golden retreiver", ["golden retriever"]),
        ("foxes", ["red fox", "kit fox", "Arctic fox", "grey fox", "fox squirrel", "wire-haired fox terrier"]),
        ("cats", ["tiger cat", "Persian cat", "Siamese cat", "Egyptian cat", "Madagascar cat"]),
        ("house", ["house finch", "birdhouse", "boathouse", "greenhouse"]),
        ("nope", []),
        ("xyzzy", []),
    ],
)
def test_classes(name: str, expected: list[str]) -> None:
    assert similar_names(name, CLASSES) == expected


def test_a_part_of_a_class_name() -> None:
    dogs = similar_names("dog", CLASSES)
    assert all(name.endswith(" dog") for name in dogs[:5])
    assert dogs[-1] == "hotdog"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BN2", ["bn2"]),
        ("blocks2", ["blocks.2.0", "blocks.2.1"]),
        ("block.2.1", ["blocks.2.1"]),
        ("bn3", [f"blocks.{i}.{j}.bn3" for i in range(3) for j in range(2)]),
        ("classifer", ["classifier"]),
        ("bn22", ["bn2"]),
        ("layer4", []),
        ("features.28", []),
    ],
)
def test_layers(name: str, expected: list[str]) -> None:
    assert similar_names(name, LAYERS)[: len(expected)] == expected
    assert expected or not similar_names(name, LAYERS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gradcem", "grad-cam"), ("integrated gradient", "integrated-gradients"), ("guided", "guided-")],
)
def test_methods(name: str, expected: str) -> None:
    assert similar_names(name, list(METHOD_NAMES))[0].startswith(expected)


@pytest.mark.parametrize("name", ["lime", "shap", ""])
def test_nothing_is_suggested_for_what_resembles_nothing(name: str) -> None:
    assert not similar_names(name, list(METHOD_NAMES))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("panda", ["giant panda", "lesser panda", "sandpanda"]),  # whole words before parts of words, and nothing else
        ("cat", ["tiger cat", "Persian cat", "polecat"]),
        ("Red Panda", ["lesser panda", "giant panda", "red fox"]),  # with a word in common
        ("bees", ["bee", "hartebeest"]),
        ("leser panda", ["lesser panda", "giant panda"]),
    ],
)
def test_order(name: str, expected: list[str]) -> None:
    names = ["sandal", "giant panda", "lesser panda", "sandpanda", "tiger cat", "Persian cat", "polecat", "red fox"]
    assert similar_names(name, [*names, "bee", "hartebeest"])[:3] == expected


def test_the_text_of_a_message() -> None:
    assert suggest("b1", ["a1", "b-1"]) == "nearest: b-1"
    assert suggest("fox", ["red fox", "kit fox", "fox squirrel"], 1) == "nearest: red fox and 2 more"
    assert suggest("xyz", list("abcdefgh")) == "known: a, b, c, d, e, f, g, h"
    assert suggest("xyz", list("abcdefghi")) == "known: a, b, c, d and 5 more"
    assert suggest("xyz", ["a", "a"]) == "known: a"
