"""Addresses of pages and images: on the live server, and between the files of a published site."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlencode

from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.service.patterns import PatternSpec
from convscope.results import file_names
from convscope.sources.api import BY_PREFIX
from convscope.store.saved_results import SavedResult

Parts = tuple[str | int, ...]
"""The parts of a page's address, as in ("m", "lite0", "unit", "conv1", 3)."""


class UrlBuilder(Protocol):
    """Addresses as seen from the page that is being built."""

    live: bool
    """Whether a server answers requests for more."""

    def source(self, name: str) -> str:
        """Return the name of an image or a network in code snippets; published pages do not disclose folders."""

    def page(self, *parts: str | int) -> str:
        """Return the address of a page, or '' if there is no such page."""

    def static(self, name: str) -> str:
        """Return the address of a script, a style sheet or an icon."""

    def photo(self, image: RegisteredImage, max_size: int) -> str:
        """Return the address of an image, its longer side at most `max_size` pixels."""

    def feature_maps(self, network: Network, image: RegisteredImage, layer: str) -> str:
        """Return the address of the sheet with all activation maps of a layer."""

    def pattern(self, network: Network, spec: PatternSpec) -> str:
        """Return the address of a pattern."""

    def patches(self, network: Network, layer: str, unit: int, kind: str) -> str:
        """Return the address of the sheet with a unit's examples: "top", "bottom" or "best"."""

    def thumbnail(self, network: Network, index: int) -> str:
        """Return the address of an image of the data set."""

    def story_chapter(self, network: Network, index: int) -> str:
        """Return the address of the patterns of one chapter of the story."""

    def story_figure(self, network: Network) -> str:
        """Return the address of the figure of the whole story."""

    def saved_sheet(self, network: Network, result: SavedResult, sheet: str) -> str:
        """Return the address of an image sheet of concepts or an atlas."""


class LiveUrls:
    """Addresses on the server.

    Addresses of images contain the version of the network or the result, so that no page shows an image of another.
    """

    live = True

    def __init__(self, assets_version: str) -> None:
        self._assets_version = assets_version

    def source(self, name: str) -> str:
        """Return the name unchanged."""
        return name

    def page(self, *parts: str | int) -> str:
        """Return the path of a page."""
        return "/" + "/".join(quote(str(part), safe="") for part in parts)

    def static(self, name: str) -> str:
        """Return the path of an asset; its version busts the browser's cache."""
        return f"/static/{name}?v={self._assets_version}"

    def photo(self, image: RegisteredImage, max_size: int) -> str:
        """Return the path of an image."""
        return self._image("photo", image=image.key, max_size=max_size)

    def feature_maps(self, network: Network, image: RegisteredImage, layer: str) -> str:
        """Return the path of a layer's activation maps."""
        return self._image("feature_maps", model=network.key, image=image.key, layer=layer, v=network.version)

    def pattern(self, network: Network, spec: PatternSpec) -> str:
        """Return the path of a pattern."""
        return self._image("pattern", model=network.key, **vars(spec), v=network.version)

    def patches(self, network: Network, layer: str, unit: int, kind: str) -> str:
        """Return the path of a unit's examples."""
        return self._image("patches", model=network.key, layer=layer, unit=unit, kind=kind, v=network.version)

    def thumbnail(self, network: Network, index: int) -> str:
        """Return the path of an image of the data set."""
        return self._image("thumbnail", index=index, v=network.version)

    def story_chapter(self, network: Network, index: int) -> str:
        """Return the path of a chapter's patterns."""
        return self._image("story_chapter", model=network.key, index=index, v=network.version)

    def story_figure(self, network: Network) -> str:
        """Return the path of the story's figure."""
        return self._image("story_figure", model=network.key, v=network.version)

    def saved_sheet(self, network: Network, result: SavedResult, sheet: str) -> str:
        """Return the path of an image sheet."""
        return self._image(
            "saved", model=network.key, kind=result.kind, name=result.name, sheet=sheet, v=result.version
        )

    def _image(self, route: str, **query: str | int) -> str:
        return f"/image/{route}?{urlencode(query)}"


class ImageRenderer(Protocol):
    """Renders the images that published pages refer to; each method returns the content of a file."""

    def photo(self, image: RegisteredImage, max_size: int) -> bytes:
        """Render an image."""

    def feature_maps(self, network: Network, image: RegisteredImage, layer: str) -> bytes:
        """Render all activation maps of a layer."""

    def pattern(self, network: Network, spec: PatternSpec) -> bytes:
        """Render a pattern."""

    def thumbnail(self, index: int) -> bytes:
        """Render an image of the data set."""

    def story_chapter(self, network: Network, index: int) -> bytes:
        """Render the patterns of one chapter of the story."""

    def story_figure(self, network: Network) -> bytes:
        """Render the figure of the whole story."""

    def saved_sheet(self, result: SavedResult, sheet: str) -> bytes:
        """Render an image sheet of concepts or an atlas."""


class StaticUrls:
    """Relative addresses between the files of a published site; images are written as pages refer to them.

    Parameters
    ----------
    parts : Parts
        The page that contains the addresses.
    is_planned : callable
        Whether the site has the page with the given parts.
    write : callable
        ``write(file, render)`` writes the content that ``render()`` returns to a file of the site.
    images : ImageRenderer
    """

    live = False

    def __init__(
        self,
        parts: Parts,
        is_planned: Callable[[Parts], bool],
        write: Callable[[str, Callable[[], bytes]], None],
        images: ImageRenderer,
    ) -> None:
        self._folder = posixpath.dirname(page_file(*parts)) or "."
        self._is_planned, self._write, self._images = is_planned, write, images

    def source(self, name: str) -> str:
        """Return the name of a bundled model, or the last part of a path."""
        return name if name.partition(":")[0] in BY_PREFIX else Path(name).name

    def page(self, *parts: str | int) -> str:
        """Return the relative path of a page, or '' if the site does not have it."""
        return self._relative(page_file(*parts)) if self._is_planned(parts) else ""

    def static(self, name: str) -> str:
        """Return the relative path of an asset."""
        return self._relative(f"static/{name}")

    def photo(self, image: RegisteredImage, max_size: int) -> str:
        """Return the relative path of an image."""
        return self._image(f"images/{image.key}-{max_size}.webp", lambda: self._images.photo(image, max_size))

    def feature_maps(self, network: Network, image: RegisteredImage, layer: str) -> str:
        """Return the relative path of a layer's activation maps."""
        file = f"m/{network.key}/feature_maps/{safe_name(layer)}-{image.key}.png"
        return self._image(file, lambda: self._images.feature_maps(network, image, layer))

    def pattern(self, network: Network, spec: PatternSpec) -> str:
        """Return the relative path of a pattern."""
        name = f"{safe_name(spec.layer)}-{spec.unit}-{spec.variant}-{spec.recipe}-{spec.seed}.webp"
        return self._image(f"m/{network.key}/patterns/{name}", lambda: self._images.pattern(network, spec))

    def patches(self, network: Network, layer: str, unit: int, kind: str) -> str:
        """Return the address of the sheet with a unit's examples, which the caller has to write."""
        return self._relative(patches_file(network, layer, unit, kind))

    def thumbnail(self, network: Network, index: int) -> str:
        """Return the relative path of an image of the data set."""
        return self._image(f"m/{network.key}/data/{index}.webp", lambda: self._images.thumbnail(index))

    def story_chapter(self, network: Network, index: int) -> str:
        """Return the relative path of a chapter's patterns."""
        file = f"m/{network.key}/story-{index}.png"
        return self._image(file, lambda: self._images.story_chapter(network, index))

    def story_figure(self, network: Network) -> str:
        """Return the relative path of the story's figure."""
        return self._image(f"m/{network.key}/story.png", lambda: self._images.story_figure(network))

    def saved_sheet(self, network: Network, result: SavedResult, sheet: str) -> str:
        """Return the relative path of an image sheet."""
        file = f"m/{network.key}/{result.kind}/{safe_name(result.name)}-{sheet}.webp"
        return self._image(file, lambda: self._images.saved_sheet(result, sheet))

    def _image(self, file: str, render: Callable[[], bytes]) -> str:
        self._write(file, render)
        return self._relative(file)

    def _relative(self, file: str) -> str:
        return quote(posixpath.relpath(file, self._folder), safe="/._-~")


@lru_cache(1 << 16)
def safe_name(part: str | int) -> str:
    """Return a name that every file system and web server accepts; different parts get different names."""
    text = str(part)
    name = file_names([text])[text]
    return name if name == text else f"{name}~{sum(text.encode()) % 997}"


def page_file(*parts: str | int) -> str:
    """Return the file of a page, relative to the root of the published site."""
    return "/".join(safe_name(part) for part in parts) + ".html" if parts else "index.html"


def patches_file(network: Network, layer: str, unit: int, kind: str) -> str:
    """Return the file of the sheet with a unit's examples."""
    return f"m/{network.key}/unit/{safe_name(layer)}/{unit}-{kind}.webp"
