"""The description of the package: README.md with absolute addresses, since relative ones lead nowhere on PyPI.

Everything else is in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

FILES = "https://raw.githubusercontent.com/convscope/convscope/main/"
PAGES = "https://github.com/convscope/convscope/blob/main/"


def absolute_links(text: str) -> str:
    """Return Markdown in which relative addresses of images and links are absolute."""
    return re.sub(
        r"(?P<mark>!?)(?P<text>\[[^\]]*\])\((?!\w+:|#)(?P<path>[^)\s]+)\)",
        lambda match: f"{match['mark']}{match['text']}({FILES if match['mark'] else PAGES}{match['path']})",
        text,
    )


if __name__ == "__main__":
    setup(
        long_description=absolute_links(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
