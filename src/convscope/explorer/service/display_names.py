"""Names of files as text for display."""

from __future__ import annotations

import unicodedata


def display_name(name: str, max_length: int = 80) -> str:
    """Return the last part of a path in one line, without characters that hide, reorder or break text."""
    last = name.replace("\\", "/").rpartition("/")[2]
    visible = "".join(
        c for c in last if unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp")
    )
    text = " ".join(visible.split())
    return (text if len(text) <= max_length else f"{text[: max_length - 9]}…{text[-8:]}") or "image"
