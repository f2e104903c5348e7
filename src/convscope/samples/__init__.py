"""The sample photographs that come with the package (CC0; `LICENSES.md` says whose)."""

from __future__ import annotations

from importlib.resources import files


def photographs() -> list[str]:
    """Their paths."""
    return sorted(str(path) for path in files(__name__).iterdir() if path.name.endswith((".jpg", ".png")))
