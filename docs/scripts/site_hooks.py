"""Hooks of mkdocs: pages that are generated, and checks of every page."""

from __future__ import annotations

import re
from typing import Any

import notebooks
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

BENCHMARKS = notebooks.ROOT / "benchmarks" / "README.md"
IMAGE_TAG = re.compile(r"<img\b[^>]*>")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of the reference in the navigation."""
    titles = [{title: f"reference/{page}.md"} for page, title in reference.topics()]
    pages = ["reference/index.md", *titles, {"Command line": "reference/command-line.md"}]
    for section in config.nav or []:
        if "Reference" in section:
            section["Reference"] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, the benchmarks, and the notebooks with their outputs."""
    generated: dict[str, str | bytes] = {**reference.pages(), "benchmarks.md": BENCHMARKS.read_text(encoding="utf-8")}
    generated.update({f"images/{path.name}": path.read_bytes() for path in (BENCHMARKS.parent / "images").iterdir()})
    for source in notebooks.sources():
        generated.update(notebook_files(source.stem, notebooks.executed(source), config))
    for address, content in generated.items():
        existing = files.get_file_from_path(address)
        if existing is not None:
            files.remove(existing)
        files.append(File.generated(config, address, content=content))
    return files


def notebook_files(name: str, notebook: Any, config: MkDocsConfig) -> dict[str, str | bytes]:
    """Return a notebook's page, its images, and the notebook itself."""
    text, images = notebooks.to_page(notebook, name)
    title, _, rest = text.partition("\n")
    links = [f"[Download the notebook]({name}.ipynb){{ .md-button }}"]
    address = (
        f"https://colab.research.google.com/github/{config.extra['repository']}/blob/gh-pages/tutorials/{name}.ipynb"
    )
    links.append(f"[Run it in Colab]({address}){{ .md-button }}")
    page = f"{title}\n\n{' '.join(links)}\n{rest}"
    files: dict[str, str | bytes] = {f"tutorials/{file}": content for file, content in images.items()}
    return {
        **files,
        f"tutorials/{name}.md": page,
        f"tutorials/{name}.ipynb": notebooks.to_download(notebook),
    }


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Add the formulas to the methods."""
    return reference.add_formulas(markdown) if page.file.src_uri == "method-gallery.md" else markdown


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Refuse images without a text that says what they show, and what is loaded from other hosts."""
    loaded = re.findall(r'<(?:script|img|link rel="stylesheet")\b[^>]*?(?:src|href)="(https?://[^"]+)', output)
    if loaded:
        raise PluginError(f"{page.file.src_uri}: loaded from other hosts: {loaded}")
    bare = [tag for tag in IMAGE_TAG.findall(output) if not re.search(r'\balt="[^"]+"', tag)]
    if bare:
        raise PluginError(f"{page.file.src_uri}: images without alt text: {bare}")
    return output
