"""Tables of the README in Markdown."""

from __future__ import annotations


def header(*columns: str) -> list[str]:
    """Return the first two lines of a table: names of the columns, and the line below them."""
    return ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
