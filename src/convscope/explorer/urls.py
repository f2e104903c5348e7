"""Addresses of pages and pictures: the live explorer's, and those between the files of a published one."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.state import Network
from convscope.results import file_names
from convscope.sources.api import BY_PREFIX
from convscope.store.saved_results import SavedResult


class UrlBuilder(Protocol):
    """Where things are, as seen from the page that is being made."""

    live: bool

    def source(self, name: str) -> str:
        """A picture or network as a user's line names it; on public pages it is not said where files lie."""

    def page(self, *parts: str | int) -> str:
        """A page's address: ("m", "lite0", "unit", "conv1", 3), say. Empty where there is no such page."""

    def static(self, name: str) -> str:
        """A file of ours: style, scripts."""

    def photo(self, image: RegisteredImage, longest: int) -> str: ...

    def sheet(self, net: Network, image: RegisteredImage, layer: str) -> str: ...

    def pattern(self, net: Network, what: PatternSpec) -> str: ...

    def patches(self, net: Network, layer: str, unit: int, kind: str) -> str: ...

    def thumbnail(self, net: Network, number: int) -> str: ...

    def chapter(self, net: Network, number: int) -> str: ...

    def kept(self, net: Network, one: SavedResult, which: str) -> str:
        """A sheet of pictures of concepts or of an atlas."""

    def figure(self, net: Network) -> str: ...


class LiveUrls:
    """Addresses on the server. Pictures' carry the network's version: none of another stands by a page's numbers."""

    live = True

    def __init__(self, assets: str) -> None:
        self._assets = assets

    def source(self, name: str) -> str:
        return name

    def page(self, *parts: str | int) -> str:
        return "/" + "/".join(quote(str(part), safe="") for part in parts)

    def static(self, name: str) -> str:
        return f"/static/{name}?v={self._assets}"

    def photo(self, image: RegisteredImage, longest: int) -> str:
        return self._image("photo", picture=image.key, longest=longest)

    def sheet(self, net: Network, image: RegisteredImage, layer: str) -> str:
        return self._image("sheet", model=net.key, picture=image.key, layer=layer, v=net.version)

    def pattern(self, net: Network, what: PatternSpec) -> str:
        return self._image("pattern", model=net.key, **vars(what), v=net.version)

    def patches(self, net: Network, layer: str, unit: int, kind: str) -> str:
        return self._image("patches", model=net.key, layer=layer, unit=unit, kind=kind, v=net.version)

    def thumbnail(self, net: Network, number: int) -> str:
        return self._image("thumbnail", number=number, v=net.version)

    def chapter(self, net: Network, number: int) -> str:
        return self._image("chapter", model=net.key, number=number, v=net.version)

    def figure(self, net: Network) -> str:
        return self._image("story", model=net.key, v=net.version)

    def kept(self, net: Network, one: SavedResult, which: str) -> str:
        return self._image("kept", model=net.key, kind=one.kind, name=one.name, which=which, v=one.version)

    def _image(self, route: str, **what: Any) -> str:
        return f"/image/{route}?{urlencode(what)}"


Parts = tuple[str | int, ...]
Write = Callable[[str, Callable[[], bytes]], None]


class StaticUrls:
    """Relative addresses between files, as seen from the page `parts`; none for pages that are not `planned`.

    Pictures are written as they are mentioned.
    """

    live = False

    def __init__(
        self, parts: Parts, planned: Callable[[Parts], bool], write: Write, make: Callable[..., bytes]
    ) -> None:
        self._from = posixpath.dirname(file_of(*parts))
        self._planned, self._write, self._make = planned, write, make

    def source(self, name: str) -> str:
        return name if name.partition(":")[0] in BY_PREFIX else Path(name).name

    def page(self, *parts: str | int) -> str:
        return self._relative(file_of(*parts)) if self._planned(parts) else ""

    def static(self, name: str) -> str:
        return self._relative(f"static/{name}")

    def photo(self, image: RegisteredImage, longest: int) -> str:
        return self._image(f"pictures/{image.key}-{longest}.webp", "photo", picture=image, longest=longest)

    def sheet(self, net: Network, image: RegisteredImage, layer: str) -> str:
        name = f"m/{net.key}/sheets/{clean(layer)}-{image.key}.png"
        return self._image(name, "sheet", net=net, picture=image, layer=layer)

    def pattern(self, net: Network, what: PatternSpec) -> str:
        name = f"m/{net.key}/patterns/{clean(what.layer)}-{what.unit}-{what.variant}-{what.recipe}-{what.seed}.webp"
        return self._image(name, "pattern", net=net, what=what)

    def patches(self, net: Network, layer: str, unit: int, kind: str) -> str:
        name = f"m/{net.key}/unit/{clean(layer)}/{unit}-{kind}.webp"
        return self._image(name, "patches", layer=layer, unit=unit, kind=kind)

    def thumbnail(self, net: Network, number: int) -> str:
        return self._image(f"m/{net.key}/data/{number}.webp", "thumbnail", number=number)

    def chapter(self, net: Network, number: int) -> str:
        return self._image(f"m/{net.key}/story-{number}.png", "chapter", net=net, number=number)

    def figure(self, net: Network) -> str:
        return self._image(f"m/{net.key}/story.png", "figure", net=net)

    def kept(self, net: Network, one: SavedResult, which: str) -> str:
        name = f"m/{net.key}/{one.kind}/{clean(one.name)}-{which}.webp"
        return self._image(name, "kept", one=one, which=which)

    def _image(self, name: str, route: str, **what: Any) -> str:
        self._write(name, lambda: self._make(route, **what))
        return self._relative(name)

    def _relative(self, target: str) -> str:
        return quote(posixpath.relpath(target, self._from or "."), safe="/._-~")


@lru_cache(1 << 16)
def clean(part: str | int) -> str:
    """A part of a file's name that any file system and any web server takes; see `results.file_names`."""
    text = str(part)
    plain = file_names([text])[text]
    # Two names that differ only in what a file's name cannot hold must not meet.
    return plain if plain == text else f"{plain}~{sum(text.encode()) % 997}"


def file_of(*parts: str | int) -> str:
    """The file of a page, from the top of the published folder."""
    return "/".join(clean(part) for part in parts) + ".html" if parts else "index.html"
