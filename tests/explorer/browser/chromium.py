"""Find Chromium, and the arguments to start it with."""

from __future__ import annotations

import shutil

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def find_chromium() -> str | None:
    """Return the path of Chromium, or None if it is not installed (apt-get install chromium)."""
    return shutil.which("chromium") or shutil.which("chromium-browser")
