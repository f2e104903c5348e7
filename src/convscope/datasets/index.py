"""Define what every data set is reduced to: names of images, their labels and a reader."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Label = str | int | None  # a class name, a class number (negative: unknown), or unknown


class ImageReader(Protocol):
    """Reads single images of a data set. Picklable, because decode workers get a copy."""

    @property
    def in_memory(self) -> bool:
        """Whether the images are in memory; then they are sent to workers one by one, and the reader is not."""

    def read(self, index: int, name: str) -> object:
        """Return an encoded file as bytes, a PIL image or an array."""


@dataclass
class DatasetIndex:
    """List the images of a data set without decoding them.

    Attributes
    ----------
    names : sequence of str
        A unique name for each of the N images.
    reader : ImageReader
        Reads an image by its index and name.
    sizes : sequence of int
        Size of each file in bytes; empty where it does not identify the content.
    labels : sequence of Label or None
        The label of each image; None if no image has one.
    label_names : tuple of str or None
        The classes that integer labels index; None to derive the classes from the labels that occur.
    fingerprint_extra : str
        Further text that identifies the content, such as a digest.
    notes : list of str
        Remarks for the user, such as files left out.
    """

    names: Sequence[str]
    reader: ImageReader
    sizes: Sequence[int] | np.ndarray = ()
    labels: Sequence[Label] | None = None
    label_names: tuple[str, ...] | None = None
    fingerprint_extra: str = ""
    notes: list[str] = field(default_factory=list)


def labels_or_none(labels: list[Label]) -> list[Label] | None:
    """Return the labels, or None if every one is unknown."""
    return labels if any(label is not None for label in labels) else None


def parse_label(text: str) -> Label:
    """Parse a written label: an integer, a name, or nothing."""
    text = text.strip()
    return int(text) if text.removeprefix("-").isdecimal() else text or None


def to_label(value: object) -> Label:
    """Convert a value of a data set to a label: a name, an integer of any type, otherwise None."""
    if isinstance(value, str):
        return parse_label(value)
    try:
        return operator.index(value)  # type: ignore[arg-type] # raises TypeError for anything but an integer
    except TypeError:
        return None
