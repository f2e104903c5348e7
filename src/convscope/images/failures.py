"""Inputs that could not be used, with the reason."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """An image that could not be used.

    Attributes
    ----------
    name : str
        The image's path, or "image 3".
    reason : str
        Why it could not be used. ``str(failure)`` is always one line.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"{self.name}: {self.reason}")


def one_line(text: str) -> str:
    """Escape line breaks and unprintable characters."""
    bad = ("Cc", "Cs", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in bad else c for c in text)
