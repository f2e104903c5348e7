"""Draw the images of docs/gallery.md: each by the code that stands under it.

``python docs/scripts/gallery.py [NAME ...]`` draws those that are missing, or the named ones.
"""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import convscope

DOCS = Path(__file__).parents[1]
ENTRY = re.compile(r"^!\[[^\]]*\]\((images/gallery/[^)]+)\)$\n+```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTH = 800  # pixels, at most


def entries() -> Iterator[tuple[Path, str]]:
    """Yield the file of each image and the code that draws it."""
    for file, code in ENTRY.findall((DOCS / "gallery.md").read_text(encoding="utf-8")):
        yield DOCS / file, code


def first_block() -> str:
    """Return the code at the top of the page, which all others need."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / "gallery.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)[0]


def run(code: str, namespace: dict[str, object]) -> object:
    """Run code, and return the value of its last line."""
    tree = ast.parse(code)
    last = tree.body.pop()
    if not isinstance(last, ast.Expr):
        raise TypeError(f"the last line is no figure: {ast.unparse(last)}")
    exec(compile(tree, "gallery", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "gallery", "eval"), namespace)


def to_image(figure: object) -> Image.Image:
    """Draw a figure."""
    if not isinstance(figure, Figure):
        raise TypeError(f"no figure: {figure!r}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=130)
    image = Image.open(buffer).convert("RGB")
    image.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
    return image


def main() -> None:
    """Draw what is not there yet, or what was named."""
    names, namespace = sys.argv[1:], {"convscope": convscope}
    wanted = [(path, code) for path, code in entries() if path.stem in names or not (names or path.exists())]
    with tempfile.TemporaryDirectory() as folder:
        for path in convscope.samples.photographs():
            shutil.copy(path, folder)
        os.chdir(folder)
        run(first_block() + "\nNone", namespace)
        for path, code in wanted:
            sys.stdout.write(f"{path.name}\n")
            path.parent.mkdir(parents=True, exist_ok=True)
            to_image(run(code, namespace)).save(path, quality=80, method=6)


if __name__ == "__main__":
    main()
