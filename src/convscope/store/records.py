"""Small records that the store returns about units and images."""

from __future__ import annotations

from typing import NamedTuple

SIDES = ("top", "left", "bottom", "right")
Box = tuple[float, float, float, float]  # top, left, bottom, right


class ClassMean(NamedTuple):
    """A unit's mean activation on the images of one class of the data set.

    Attributes
    ----------
    name : str
        The class's name.
    label : int
        The class's index in the data set.
    mean : float
        Mean over all positions of all images of the class.
    images : int
        Number of images of the class.
    """

    name: str
    label: int
    mean: float
    images: int


class UnitCorrelation(NamedTuple):
    """A unit, and Pearson's r of its maxima on the sample with those of another unit."""

    layer: str
    unit: int
    r: float


class Prediction(NamedTuple):
    """One of the network's classes for an image, with its probability; of a regression, an output and its value."""

    name: str
    target: int
    probability: float


class UnitRank(NamedTuple):
    """The rank of an image among a unit's top examples.

    Attributes
    ----------
    layer, unit : str, int
        The unit.
    rank : int
        0 for the image with the unit's highest activation.
    value : float
        The unit's maximum on the image.
    box : tuple of int
        Top, left, bottom and right edge of the patch, in pixels of the network's input.
    """

    layer: str
    unit: int
    rank: int
    value: float
    box: tuple[int, int, int, int]
