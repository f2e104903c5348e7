"""Notebooks of the tutorials: read from Markdown, executed, and turned into pages with outputs.

An executed notebook is kept in ``build/notebooks`` under a hash of its code, so that the site is built without
executing it again. ``python docs/scripts/notebooks.py`` executes all that have changed.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
CACHE = ROOT / "build" / "notebooks"
CELL_SECONDS = 600  # longest time of one cell
OFFLINE = {
    "keras.applications.VGG16(include_top=False)": "__import__('tests.oracles.chapter', fromlist='_').keras_trunk()",
}
"""What a notebook downloads, and what is taken instead when it is executed here."""
IMAGE_KINDS = ("png", "jpeg")  # in which an output shows itself: figures with large PNG images have JPEG images alone
EMBEDDED_IMAGE = re.compile(r'<img alt="([^"]*)"([^>]*?) src="data:image/(\w+);base64,([^"]+)"')
PROGRESS_LINE = '<small style="opacity:.7">'


def sources() -> list[Path]:
    """Return the notebooks' sources."""
    return sorted(path for path in FOLDER.glob("*.md") if path.name != "index.md")


def read(path: Path) -> NotebookNode:
    """Read a notebook without outputs."""
    notebook: NotebookNode = jupytext.read(path, fmt="md")
    notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cache_path(name: str, notebook: NotebookNode) -> Path:
    """Return where the outputs of a notebook's code are kept."""
    code = "\0".join(cell.source for cell in code_cells(notebook))
    return CACHE / f"{name}-{hashlib.sha256(code.encode()).hexdigest()[:16]}.ipynb"


def execute(paths: Sequence[Path]) -> list[NotebookNode]:
    """Execute notebooks offline, each in an empty folder but all in one kernel, and keep them."""
    notebooks = [read(path) for path in paths]
    joined = nbformat.v4.new_notebook()
    with tempfile.TemporaryDirectory() as parent:
        for path, notebook in zip(paths, notebooks, strict=True):
            folder = Path(parent) / path.stem
            folder.mkdir()
            joined.cells.append(nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(folder)!r})"))
            joined.cells += [nbformat.v4.new_code_cell(_offline(cell.source)) for cell in code_cells(notebook)]
        NotebookClient(joined, timeout=CELL_SECONDS).execute(env=environment())
    results = iter(joined.cells)
    CACHE.mkdir(parents=True, exist_ok=True)
    for path, notebook in zip(paths, notebooks, strict=True):
        next(results)
        for number, cell in enumerate(code_cells(notebook), start=1):
            cell.outputs, cell.execution_count = next(results).outputs, number
        for old in CACHE.glob(f"{path.stem}-{'[0-9a-f]' * 16}.ipynb"):
            old.unlink()
        nbformat.write(notebook, cache_path(path.stem, notebook))
    return notebooks


def _offline(code: str) -> str:
    """Replace what is downloaded."""
    for download, stand_in in OFFLINE.items():
        code = code.replace(download, stand_in)
    return code


def environment() -> dict[str, str]:
    """Return the environment of a kernel: with the commands of this Python, and the stand-ins of `OFFLINE`."""
    added = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
    paths = {name: os.pathsep.join(filter(None, [path, os.environ.get(name)])) for name, path in added.items()}
    return {**os.environ, **paths}


def executed(path: Path) -> NotebookNode:
    """Return a notebook with its outputs, executed unless its code is unchanged."""
    notebook = read(path)
    kept = cache_path(path.stem, notebook)
    if not kept.exists():
        return execute([path])[0]
    for cell, old in zip(code_cells(notebook), code_cells(nbformat.read(kept, as_version=4)), strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return notebook


def extras(notebook: NotebookNode) -> str:
    """Return what to install for a notebook, such as "convscope[keras]"."""
    names = notebook.metadata.get("convscope", {}).get("extras", "")
    return f"convscope[{names}]" if names else "convscope"


def to_download(notebook: NotebookNode) -> str:
    """Return a notebook as a file that installs what it needs in its first cell."""
    copy = nbformat.from_dict(notebook)
    cells = [cell for cell in notebook.cells if "remove-cell" not in cell.metadata.get("tags", [])]
    install = nbformat.v4.new_code_cell(f'%pip install --quiet "{extras(notebook)}"')
    copy.cells = [install, *cells]
    text: str = nbformat.writes(copy)
    return text


def to_page(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the image files that it shows, which lie in a folder `name`."""
    parts, images = [], {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        if "remove-cell" in cell.metadata.get("tags", []):
            continue
        language, source = ("bash", cell.source[7:]) if cell.source.startswith("%%bash") else ("python", cell.source)
        parts.append(f"```{language}\n{source.strip()}\n```")
        for position, output in enumerate(cell.outputs):
            text, files = _render(output, f"{name}/{number}-{position}", cell.metadata.get("alt", ""))
            parts.append(text)
            images.update(files)
    return "\n\n".join(filter(None, parts)) + "\n", images


def missing_alt(notebook: NotebookNode) -> list[str]:
    """Return the cells that show an image without saying what is in it."""
    shows = [cell for cell in notebook.cells if cell.cell_type == "code" and any(map(_is_image, cell.outputs))]
    return [cell.source for cell in shows if not cell.metadata.get("alt")]


def _is_image(output: NotebookNode) -> bool:
    data = output.get("data", {})
    return any(f"image/{kind}" in data for kind in IMAGE_KINDS) or bool(
        EMBEDDED_IMAGE.search(data.get("text/html", ""))
    )


def _render(output: NotebookNode, stem: str, alt: str) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of an output, and its images."""
    data = output.get("data", {})
    for kind in IMAGE_KINDS:
        if f"image/{kind}" in data:
            file = f"{stem}.{kind}"
            image = f'<img alt="{html.escape(alt)}" src="{file}">'
            return f'<div class="output">{image}</div>', {file: base64.b64decode(data[f"image/{kind}"])}
    if PROGRESS_LINE in data.get("text/html", ""):
        return "", {}
    if "text/html" in data:
        text, images = _move_images(data["text/html"], stem, alt)
        return f'<div class="output">{re.sub(chr(10) + "+", chr(10), text)}</div>', images
    text = output.get("text") or data.get("text/plain", "")
    return (f'<div class="output"><pre>{_wrap_prose(text.rstrip())}</pre></div>', {}) if text.strip() else ("", {})


def _wrap_prose(text: str) -> str:
    """Let the lines of a printed text wrap that are sentences; those of tables scroll."""
    lines = (html.escape(line) for line in text.split("\n"))
    return "\n".join(line if "  " in line else f'<span class="prose">{line}</span>' for line in lines)


def _move_images(text: str, stem: str, alt: str) -> tuple[str, dict[str, bytes]]:
    """Write the images that HTML contains to files."""
    images: dict[str, bytes] = {}

    def move(match: re.Match[str]) -> str:
        own_alt, attributes, kind, content = match.groups()
        file = f"{stem}-{len(images)}.{kind}"
        images[file] = base64.b64decode(content)
        return f'<img alt="{html.escape(alt) or own_alt}"{attributes} src="{file}"'

    return EMBEDDED_IMAGE.sub(move, text), images


def changed() -> Iterator[Path]:
    """Yield the sources that have not been executed."""
    return (path for path in sources() if not cache_path(path.stem, read(path)).exists())


if __name__ == "__main__":
    execute(list(changed()))
