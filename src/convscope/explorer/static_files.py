"""Scripts, style sheet and icon of the explorer's pages."""

from __future__ import annotations

from importlib.resources import files

MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def static_files() -> dict[str, bytes]:
    """Return the content of each file, by name."""
    folder = files("convscope.explorer").joinpath("static")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith(tuple(MEDIA_TYPES))}


def media_type(name: str) -> str:
    """Return the media type of a file."""
    return MEDIA_TYPES[name[name.rindex(".") :]]
