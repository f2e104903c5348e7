"""Find a class by its name."""

from __future__ import annotations

from collections.abc import Sequence

from convscope.errors import ConvscopeError
from convscope.suggestions import suggest

MAX_CANDIDATES = 6  # classes that a message offers


def find_class(name: str, classes: Sequence[str]) -> int:
    """Return the index of the class called `name`; case and underscores do not matter.

    Of a name that lists synonyms, "tench, Tinca tinca", one is enough if no class has it as its whole name. A part of
    a name is not: "panda" may be several classes, and "house" is not the house finch.

    Raises
    ------
    ConvscopeError
        If no class or several classes are called so. The message offers those that contain the name first.
    """
    matches = _matches(name, classes)
    if not matches:
        raise ConvscopeError(f"class {name!r} is not in this model; {suggest(name, classes, MAX_CANDIDATES)}")
    if len(matches) > 1:
        raise ConvscopeError(f"class {name!r} is the name of several classes: {matches}; give the index")
    return matches[0]


def is_class_name(name: str, classes: Sequence[str]) -> bool:
    """Return whether any class is called `name`."""
    return bool(_matches(name, classes))


def _matches(name: str, classes: Sequence[str]) -> list[int]:
    normalized = _normalize(name)
    whole = [i for i, known in enumerate(classes) if _normalize(known) == normalized]
    return whole or [i for i, known in enumerate(classes) if normalized in map(_normalize, known.split(","))]


def _normalize(class_name: str) -> str:
    return class_name.replace("_", " ").strip().casefold()
