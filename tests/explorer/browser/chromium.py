"""Find Chromium, and the arguments to start it with."""

from __future__ import annotations

import shutil

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def find_chromium() -> str | None:
    """Return the path of Chromium or Chrome, or None if neither is installed (apt-get install chromium)."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)
