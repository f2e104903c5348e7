"""Sample photographs (CC0, sources in ``LICENSES.md``)."""

from __future__ import annotations

from importlib.resources import files


def photographs() -> list[str]:
    """Return the paths of the sample photographs.

    Examples
    --------
    >>> import convscope
    >>> len(convscope.samples.photographs())
    4
    """
    return sorted(str(path) for path in files(__name__).iterdir() if path.name.endswith((".jpg", ".png")))
