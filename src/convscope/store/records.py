"""What a store tells of units and pictures, as small tuples."""

from __future__ import annotations

from typing import NamedTuple


class ClassMean(NamedTuple):
    """A unit's mean activation, over places, on the pictures of one of the data set's classes; how many these are."""

    name: str
    label: int
    mean: float
    images: int


class UnitCorrelation(NamedTuple):
    """Another unit, and Pearson's r of the two units' maxima on the sample."""

    layer: str
    unit: int
    r: float


class Prediction(NamedTuple):
    """One of the network's classes for a picture, with its probability."""

    name: str
    target: int
    probability: float


class UnitRank(NamedTuple):
    """A unit among whose best pictures one stands: its rank there (0 is the best), the unit's value, what it sees.

    box: top, left, bottom, right, in pixels of the network's input.
    """

    layer: str
    unit: int
    rank: int
    value: float
    box: tuple[int, int, int, int]
