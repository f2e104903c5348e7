"""The explorer's pages as files: the same templates, relative links, no server needed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from convscope.engine.batching import Progress, balanced_chunks
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.explorer.app import assets
from convscope.explorer.service import concept_data
from convscope.explorer.service.images import RegisteredImage, encode_image
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.state import Explorer, Network
from convscope.explorer.urls import Parts, StaticUrls, file_of
from convscope.explorer.views import concept_views
from convscope.explorer.views.pages import Page, Pages
from convscope.explorer.views.store_views import Views
from convscope.explorer.web.routes_images import chapter_sheet, story_figure
from convscope.images.loading import Failure
from convscope.results import atomic_write, versions, write_json
from convscope.store.saved_results import SavedResult
from convscope.store.store import Store, open_store

CHUNK = 48  # units whose examples one process cuts out at a time


def publish(
    models: Mapping[str, Model],
    store: Store,
    out: Path,
    *,
    images: Sequence[str] = (),
    keep: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[Failure]:
    """Write a site: the pages of the network, of the store's layers and units, of its classes and examples.

    pictures: with which the pages walk through the network; default: the sample photographs. keep: where patterns are
    kept; those that are there are shown. workers: processes that cut out examples. Returns the units whose examples
    could not be cut out, and the pictures and pages that could not be made. Raises ConvscopeError if the store was made
    with other weights, or the folder cannot be written.
    """
    explorer = Explorer(models, store=store, cache_dir=keep, cache_bytes=1 << 30)
    try:
        if images:
            explorer.images.add_samples(images)
        else:
            explorer.add_samples()
        return _SiteWriter(explorer, store, out).run(workers, progress)
    except OSError as error:
        raise ConvscopeError(f"cannot write into {out}: {error.strerror or error}") from error
    finally:
        explorer.close()


class _SiteWriter:
    """Writes one site."""

    def __init__(self, explorer: Explorer, store: Store, out: Path) -> None:
        self._explorer, self._store, self._out = explorer, store, out
        self._net = next(net for net in explorer.networks.values() if net.store is not None)
        self._layers = [name for name in store.layers if name in self._net.model.layers.names]
        self._written: set[str] = set()
        self._failed: list[Failure] = []
        self._views = Views(store)
        self._asker = Client("publish", float("inf"))

    def run(self, workers: int, progress: Progress | None) -> list[Failure]:
        out = self._out
        (out / "static").mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").unlink(missing_ok=True)
        for name, content in assets().items():
            self._put(f"static/{name}", content)
        todo = [(layer, unit) for layer in self._units_of() for unit in range(self._net.num_units(layer))]
        pages = list(self._planned_pages())
        total, done = len(pages) + len(todo), 0
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            names = {(layer, unit): self._patches_file(layer, unit) for layer, unit in todo}
            cutting = [
                pool.submit(_cut, self._store.address, str(out), [(*one, names[one]) for one in part])
                for part in balanced_chunks(todo, CHUNK)
            ]
            for parts, make in pages:
                try:
                    self._page(parts, make)
                except ConvscopeError as error:
                    self._failed.append(Failure(file_of(*parts), str(error)))
                done += 1
                if progress is not None:
                    progress(done, total)
            for work, part in zip(cutting, balanced_chunks(todo, CHUNK), strict=True):
                self._failed += work.result()
                done += len(part)
                if progress is not None:
                    progress(done, total)
        described = self._net.model.describe()
        data = {name: self._store.manifest["data"][name] for name in ("images", "fingerprint")}
        told = {"kind": "site", "model": described, "store": data, "versions": versions()}
        write_json(out / "manifest.json", told)
        return self._failed

    def _units_of(self) -> list[str]:
        return [*self._layers, *([LOGITS] if LOGITS in self._store.layers else [])]

    def _planned_pages(self) -> Iterator[tuple[Parts, Callable[[Pages], Page]]]:
        """Every page: its address, and how it is made."""
        net, key = self._net, self._net.key
        samples = self._explorer.images.samples if net.takes_images and net.classifies() else []
        yield ("m", key), lambda pages: pages.network(net)
        yield ("m", key, "story"), lambda pages: pages.story(net)
        yield ("glossary",), lambda pages: pages.glossary()
        for image in samples:
            yield ("m", key, "picture", image.key), partial(_image, net, image, None)
            for row in self._explorer.predictions(self._asker, net, image):
                yield (
                    ("m", key, "picture", image.key, "class", row["index"]),
                    partial(_image, net, image, row["index"]),
                )
        for layer in self._layers:
            yield ("m", key, "layer", layer), partial(_layer, net, layer)
            for unit in range(net.num_units(layer)):
                yield ("m", key, "unit", layer, unit), partial(_unit, net, layer, unit)
        for index in range(net.model.num_outputs or 0):
            yield ("m", key, "class", index), partial(_class, net, index)
        yield ("m", key, "concepts"), lambda pages: concept_views.index(pages, net)
        for one in concept_data.saved_concepts(net):
            yield concept_data.parts_of(net, one), partial(_concepts, net, one)
        for one in concept_data.saved_atlases(net):
            yield concept_data.parts_of(net, one), partial(_atlas, net, one.name)
        for number in self._shown():
            yield ("m", key, "data", number), partial(_example, net, number)
        first = samples[0] if samples else None
        yield (), (lambda pages: pages.network(net)) if first is None else partial(_image, net, first, None)

    def _shown(self) -> list[int]:
        """The pictures of the data set that units show as examples."""
        from convscope.explorer.views.store_views import COUNT

        found: set[int] = set()
        for layer in self._units_of():
            best = self._store.top_images(layer, 0, self._store.unit_counts[layer])[:, :COUNT]
            found |= {int(p) for p in best.ravel() if p >= 0}
        for one in concept_data.saved_atlases(self._net):
            cells = concept_data.describe_atlas(
                self._explorer, self._net, one, concept_data.load_arrays(self._explorer, one)
            )["cells"]
            numbers = {shown["number"] for cell in cells for shown in cell["pictures"]}
            found |= numbers - {None}
        return sorted(found)

    def _is_planned(self, parts: Parts) -> bool:
        """Whether a page is written; without asking for all that are."""
        if parts[:1] != ("m",) or len(parts) == 2:
            return True
        kind = parts[2]
        if kind == "concepts" and len(parts) > 3:
            return bool(concept_data.saved_concepts(self._net, int(parts[3])))
        if kind in ("layer", "unit"):
            return parts[3] in self._layers
        if kind == "picture" and len(parts) == 6:
            image = self._explorer.images.find(str(parts[3]))
            said = self._explorer.predictions(self._asker, self._net, image)
            return parts[5] in [row["index"] for row in said]
        return True

    def _page(self, parts: Parts, make: Callable[[Pages], Page]) -> None:
        site = StaticUrls(parts, self._is_planned, self._image, self._make)
        pages = Pages(self._explorer, self._asker, site)
        self._put(file_of(*parts), pages.render(make(pages)).encode(errors="backslashreplace"))

    def _image(self, name: str, make: Callable[[], bytes]) -> None:
        if name not in self._written and not name.endswith("-top.webp"):  # those are cut out by other processes
            self._written.add(name)
            try:
                self._put(name, make())
            except ConvscopeError as error:  # the page is worth having without it
                self._failed.append(Failure(name, str(error)))

    def _put(self, name: str, content: bytes) -> None:
        path = self._out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)

    def _patches_file(self, layer: str, unit: int) -> str:
        found: list[str] = []
        site = StaticUrls((), self._is_planned, lambda name, _: found.append(name), self._make)
        site.patches(self._net, layer, unit, "top")
        return found[0]

    def _make(self, route: str, **what: Any) -> bytes:
        """A picture's content."""
        if route == "photo":
            return encode_image(what["picture"].shown(what["longest"]))
        if route == "sheet":
            return self._explorer.feature_map_sheet(self._asker, what["net"], what["picture"], what["layer"])[0]
        if route == "thumbnail":
            return self._views.thumbnail(what["number"], 320)
        if route == "figure":
            return story_figure(self._explorer.get_story(what["net"]))
        if route == "chapter":
            return chapter_sheet(self._explorer.get_story(what["net"]), what["number"])
        if route == "kept":
            return concept_data.render_sheet(concept_data.load_arrays(self._explorer, what["one"]), what["which"])
        if route == "pattern":
            import io

            made = self._explorer.get_pattern(what["net"], what["what"]) or {}
            return encode_image(Image.open(io.BytesIO(made["image"])), quality=88)
        raise ValueError(route)


def _image(net: Network, image: RegisteredImage, target: int | None, pages: Pages) -> Page:
    return pages.image(net, image, target)


def _layer(net: Network, layer: str, pages: Pages) -> Page:
    return pages.layer(net, net.layer(layer), None)


def _unit(net: Network, layer: str, unit: int, pages: Pages) -> Page:
    return pages.unit(net, layer, unit, None, pages.explorer.resolve_pattern(net, layer, unit))


def _class(net: Network, index: int, pages: Pages) -> Page:
    return pages.class_(net, index, None, pages.explorer.resolve_pattern(net, LOGITS, index))


def _concepts(net: Network, one: SavedResult, pages: Pages) -> Page:
    return concept_views.concepts(pages, net, one.target or 0, one.layer, None)


def _atlas(net: Network, name: str, pages: Pages) -> Page:
    return concept_views.atlas(pages, net, name)


def _example(net: Network, number: int, pages: Pages) -> Page:
    return pages.example(net, number)


_open: dict[str, Views] = {}  # of a worker process: the store it reads


def _cut(address: str, out: str, units: Sequence[tuple[str, int, str]]) -> list[Failure]:
    """In a worker process: the examples of some units, each written to its file."""
    if address not in _open:
        _open[address] = Views(open_store(address))
    failed = []
    for layer, unit, name in units:
        path = Path(out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = _open[address].sheet(layer, unit, "top")
        except ConvscopeError as error:
            failed.append(Failure(f"{layer} {unit}", str(error)))
            continue
        with atomic_write(path) as file:
            file.write(content)
    return failed
