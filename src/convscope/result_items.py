"""Length, indexing and iteration of results: over their images, or over the units of patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any, ClassVar, Self, SupportsIndex, TypeAlias

import numpy as np

from convscope.errors import ConvscopeError
from convscope.formatting import base_name, count_of
from convscope.results import Result
from convscope.suggestions import suggest

ItemKey: TypeAlias = int | slice | str | Sequence[int]
"""An item's position or name, several positions, or a slice."""


class IndexedResult(Result):
    """A result on several images: each of them is a result too.

    ``len(result)`` is their number; ``result[0]``, ``result[2:5]``, ``result[[0, 3]]`` and ``result["cat.png"]`` are
    results on those images, with the notes on them and without ``failed``; iterating yields a result for each image.

    Attributes
    ----------
    ITEM_AXES : mapping of str to int
        The fields that hold something for each item, and the axis that counts the items.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = {}

    def item_names(self) -> Sequence[str]:
        """Return the names of the items."""
        names: Sequence[str] = getattr(self, "image_names", ())
        return names

    def _note_names(self) -> Sequence[str]:
        """Return what a note on an item begins with, one for each item."""
        return self.item_names()

    def _fields_of(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return the fields of a result on some of the items."""
        return {name: _take(getattr(self, name), axis, positions) for name, axis in self.ITEM_AXES.items()}

    def select(self, key: ItemKey) -> Self:
        """Return the result on some of the items.

        Parameters
        ----------
        key : int, slice, str or sequence of int
            Positions, or the name of an item; of an image also the end of its path, and its file name without suffix.

        Raises
        ------
        ConvscopeError
            For an unknown name.
        IndexError
            For a position out of range.
        """
        positions = self._positions(key)
        names = self._note_names()
        omitted = set(names) - {names[i] for i in positions}
        notes = tuple(note for note in self.notes if omitted.isdisjoint(_beginnings(note)))
        return replace(self, **self._fields_of(positions), notes=notes, failed=())

    def _positions(self, key: ItemKey) -> list[int]:
        """Return the positions that a key stands for."""
        count = len(self.item_names())
        if isinstance(key, slice):
            return list(range(count))[key]
        if isinstance(key, str):
            return [_find(key, self.item_names())]
        positions = [key] if isinstance(key, SupportsIndex) else list(key)
        for i in positions:
            if not -count <= i < count:
                raise IndexError(f"position {i} is out of range: this result has {count_of(count, 'item')}")
        return [range(count)[i] for i in positions]

    def __len__(self) -> int:
        return len(self.item_names())

    def __iter__(self) -> Iterator[Self]:
        return (self.select(i) for i in range(len(self)))


def _take(value: Any, axis: int, positions: Sequence[int]) -> Any:
    """Take positions of an axis of an array; of a mapping, of all its values; of a list or tuple, of itself."""
    if isinstance(value, np.ndarray):
        return value.take(positions, axis)
    if isinstance(value, Mapping):
        return {name: _take(array, axis, positions) for name, array in value.items()}
    return None if value is None else type(value)(value[i] for i in positions)


def _find(name: str, names: Sequence[str]) -> int:
    """Return the position of a name, or of the only path that ends in it, with or without its suffix."""
    spellings: tuple[Callable[[str], bool], ...] = (
        lambda known: known == name,
        lambda known: f"/{known}".endswith(f"/{name}"),
        lambda known: PurePath(base_name(known)).stem == name,
    )
    for is_called in spellings:
        matches = [i for i, known in enumerate(names) if is_called(known)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConvscopeError(
                f"{name!r} is the name of {len(matches)} items of this result: "
                f"{', '.join(names[i] for i in matches[:4])}; give a position or more of the path"
            )
    raise ConvscopeError(f"{name!r} is not in this result; {suggest(name, names)}")


def _beginnings(note: str) -> Iterator[str]:
    """Yield the beginnings of a note up to each space, comma and colon."""
    return (note[: match.start()] for match in re.finditer(r"[ ,:]", note))
