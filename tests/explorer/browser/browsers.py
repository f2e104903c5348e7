"""Where the browser is, and how it is started."""

from __future__ import annotations

import shutil

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium() -> str | None:
    """Chromium's program, if there is one on this machine (apt-get install chromium)."""
    return shutil.which("chromium") or shutil.which("chromium-browser")
