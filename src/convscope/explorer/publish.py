"""Publish the explorer's pages as files: the templates of the live pages, relative links, no server."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from PIL import Image

from convscope.engine.batching import balanced_chunks
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.explorer.service import concept_data, diagnosis_data
from convscope.explorer.service.example_sheets import EXAMPLES_PER_UNIT, ExampleSheets
from convscope.explorer.service.images import RegisteredImage, encode_image
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.networks import Network
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.state import Explorer
from convscope.explorer.service.story_images import chapter_sheet, story_figure
from convscope.explorer.static_files import static_files
from convscope.explorer.urls import Parts, StaticUrls, page_file, patches_file
from convscope.explorer.views import (
    atlas_page,
    class_page,
    concepts_page,
    diagnosis_page,
    example_page,
    glossary_page,
    image_page,
    image_units_page,
    layer_page,
    names_page,
    network_page,
    saved_results_page,
    story_page,
    unit_page,
    units_page,
)
from convscope.explorer.views.page import Page, PageContext, render
from convscope.explorer.views.saved_links import page_parts
from convscope.featurevis.layer_story import Story
from convscope.images.failures import Failure
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.results import atomic_write, versions, write_json
from convscope.store.saved_results import SavedResult
from convscope.store.store import Store, open_store

UNITS_PER_TASK = 48  # units whose examples a worker process renders at a time
MAX_THUMBNAIL = 320  # pixels

BuildPage = Callable[[PageContext], Page]


def publish(
    models: Mapping[str, Model],
    store: Store,
    out: Path,
    *,
    images: Sequence[str] = (),
    cache_dir: Path | None = None,
    workers: int = 1,
    progress: ProgressOption = None,
) -> list[Failure]:
    """Write a site with the pages of a network, its layers, units and classes, and the examples in a store.

    Parameters
    ----------
    models : mapping of str to Model
        By the name that each was loaded by.
    store : Store
    out : Path
        Folder of the site; created if needed, existing files are replaced.
    images : sequence of str, optional
        Paths of the images that get pages of their own; the sample photographs if omitted.
    cache_dir : Path, optional
        Folder with generated patterns; those in it are shown.
    workers : int
        Number of processes that render examples; 0 renders them in this process.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)``.

    Returns
    -------
    list of Failure
        Units whose examples could not be rendered, and images and pages that could not be made.

    Raises
    ------
    ConvscopeError
        If the store was made with other weights, or the folder cannot be written.
    """
    explorer = Explorer(models, store=store, cache_dir=cache_dir, cache_bytes=1 << 30)
    try:
        if images:
            explorer.images.add_samples(images)
        else:
            explorer.add_samples()
        with progress_bar(progress, "publish") as report:
            return _SiteWriter(explorer, store, out).write(workers, report)
    except OSError as error:
        raise ConvscopeError(f"cannot write into {out}: {error.strerror or error}") from error
    finally:
        explorer.close()


class _SiteImages:
    """Renders the images that pages refer to; see `urls.ImageRenderer`."""

    def __init__(self, explorer: Explorer, store: Store, client: Client) -> None:
        self._explorer, self._client = explorer, client
        self.example_sheets = ExampleSheets(store)

    def photo(self, image: RegisteredImage, max_size: int) -> bytes:
        return encode_image(image.resized(max_size))

    def feature_maps(self, network: Network, image: RegisteredImage, layer: str) -> bytes:
        return self._explorer.feature_map_sheet(self._client, network, image, layer)[0]

    def pattern(self, network: Network, spec: PatternSpec) -> bytes:
        pattern = self._explorer.get_pattern(network, spec)
        if pattern is None:
            raise ConvscopeError(f"the pattern of {spec.layer} {spec.unit} is not available any more")
        return encode_image(Image.open(io.BytesIO(pattern["image"])), quality=88)

    def thumbnail(self, index: int) -> bytes:
        return self.example_sheets.thumbnail(index, MAX_THUMBNAIL)

    def story_chapter(self, network: Network, index: int) -> bytes:
        return chapter_sheet(self._story(network), index)

    def story_figure(self, network: Network) -> bytes:
        return story_figure(self._story(network))

    def saved_sheet(self, result: SavedResult, sheet: str) -> bytes:
        return diagnosis_data.render_saved(self._explorer, result, sheet)

    def _story(self, network: Network) -> Story:
        story = self._explorer.get_story(network)
        if story is None:
            raise ConvscopeError(f"the story of {network.model.name} is not available any more")
        return story


class _SiteWriter:
    """Writes one site."""

    def __init__(self, explorer: Explorer, store: Store, out: Path) -> None:
        self._explorer, self._store, self._out = explorer, store, out
        self._network = next(network for network in explorer.networks.values() if network.store is not None)
        self._layers = [name for name in store.layers if name in self._network.model.layers.names]
        self._client = Client("publish", float("inf"))
        self._images = _SiteImages(explorer, store, self._client)
        self._written: set[str] = set()
        self._failures: list[Failure] = []

    def write(self, workers: int, progress: Progress) -> list[Failure]:
        """Write all files; the manifest comes last. Returns what could not be made."""
        (self._out / "static").mkdir(parents=True, exist_ok=True)
        (self._out / "manifest.json").unlink(missing_ok=True)
        for name, content in static_files().items():
            self._write_file(f"static/{name}", content)
        units = [(layer, unit) for layer in self._scanned_layers() for unit in range(self._network.num_units(layer))]
        pages = list(self._planned_pages())
        done, total = 0, len(pages) + len(units)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn) if workers else nullcontext() as pool:
            tasks = [(self._sheet_task(pool, chunk), len(chunk)) for chunk in balanced_chunks(units, UNITS_PER_TASK)]
            for parts, build in pages:
                self._write_page(parts, build)
                advance(1)
            for task, count in tasks:
                self._failures += task()
                advance(count)
        self._write_manifest()
        return self._failures

    def _scanned_layers(self) -> list[str]:
        return [*self._layers, *([LOGITS] if LOGITS in self._store.layers else [])]

    def _planned_pages(self) -> Iterator[tuple[Parts, BuildPage]]:
        """Yield the address of every page and the function that builds it."""
        network, key = self._network, self._network.key
        samples = self._explorer.images.samples if network.takes_images and network.classifies() else []
        yield ("m", key), partial(network_page.build, network=network)
        yield ("m", key, "story"), partial(story_page.build, network=network)
        yield ("glossary",), glossary_page.build
        for image in samples:
            yield ("m", key, "image", image.key), partial(image_page.build, network=network, image=image)
            build = partial(image_units_page.build, network=network, image=image)
            yield ("m", key, "image", image.key, "units"), build
            for index in self._predicted_classes(image):
                build = partial(image_page.build, network=network, image=image, target=index)
                yield ("m", key, "image", image.key, "class", index), build
        for layer in self._layers:
            yield ("m", key, "layer", layer), partial(_layer_page, network=network, layer=layer)
            yield ("m", key, "units", layer), partial(_units_page, network=network, layer=layer)
            for unit in range(network.num_units(layer)):
                yield ("m", key, "unit", layer, unit), partial(_unit_page, network=network, layer=layer, unit=unit)
        for index in range(network.model.num_outputs or 0):
            yield ("m", key, "class", index), partial(_class_page, network=network, index=index)
        yield ("m", key, "names"), partial(names_page.build, network=network)
        yield ("m", key, "concepts"), partial(saved_results_page.build, network=network)
        for result in concept_data.saved_concepts(network):
            target = result.target or 0
            build = partial(concepts_page.build, network=network, target=target, layer=result.layer, image=None)
            yield page_parts(network, result), build
        for result in concept_data.saved_atlases(network):
            yield page_parts(network, result), partial(atlas_page.build, network=network, name=result.name)
        for position, result in enumerate(diagnosis_data.saved_diagnoses(network)):
            parts: Parts = ("m", key, "diagnosis", *((result.name,) if position else ()))
            yield parts, partial(diagnosis_page.build, network=network, name=result.name)
        for index in self._example_indices():
            yield ("m", key, "data", index), partial(example_page.build, network=network, index=index)
        if samples:
            yield (), partial(image_page.build, network=network, image=samples[0])
        else:
            yield (), partial(network_page.build, network=network)

    def _predicted_classes(self, image: RegisteredImage) -> list[int]:
        predictions = self._explorer.predictions(self._client, self._network, image)
        return [row["index"] for row in predictions]

    def _example_indices(self) -> list[int]:
        """Return the images of the data set that are examples of a unit, a cell of an atlas or a finding."""
        indices: set[int] = set()
        for layer in self._scanned_layers():
            top = self._store.top_images(layer, 0, self._store.unit_counts[layer])[:, :EXAMPLES_PER_UNIT]
            indices.update(top[top >= 0].tolist())
        for result in concept_data.saved_atlases(self._network):
            arrays = concept_data.load_arrays(self._explorer, result)
            description = concept_data.describe_atlas(self._explorer, self._network, result, arrays)
            cell_images = [image["index"] for cell in description["cells"] for image in cell["images"]]
            indices.update(index for index in cell_images if index is not None)
        for result in diagnosis_data.saved_diagnoses(self._network):
            numbers = concept_data.dataset_ids(self._explorer, self._network, result)
            images = diagnosis_data.displayed_images(result, concept_data.load_arrays(self._explorer, result))
            indices.update(index for image in images if (index := numbers[image]) is not None)
        return sorted(indices)

    def _is_planned(self, parts: Parts) -> bool:
        """Return whether the site has a page, without listing all pages."""
        if parts[:1] != ("m",) or len(parts) == 2:
            return True
        kind = parts[2]
        if kind == "concepts" and len(parts) > 3:
            return bool(concept_data.saved_concepts(self._network, int(parts[3])))
        if kind in ("layer", "units", "unit"):
            return parts[3] in self._layers
        if kind == "image" and len(parts) == 6:
            return parts[5] in self._predicted_classes(self._explorer.images.find(str(parts[3])))
        return True

    def _sheet_task(
        self, pool: ProcessPoolExecutor | None, units: Sequence[tuple[str, int]]
    ) -> Callable[[], list[Failure]]:
        """Return a function that waits for the sheets of some units, or writes them if there is no pool."""
        files = [
            (layer, unit, str(self._out / patches_file(self._network, layer, unit, "top"))) for layer, unit in units
        ]
        if pool is None:
            return partial(_write_sheets, self._images.example_sheets, files)
        return pool.submit(_write_sheets_in_worker, self._store.address, files).result

    def _write_page(self, parts: Parts, build: BuildPage) -> None:
        urls = StaticUrls(parts, self._is_planned, self._write_image, self._images)
        context = PageContext(self._explorer, self._client, urls)
        try:
            html = render(build(context), context)
            self._write_file(page_file(*parts), html.encode(errors="backslashreplace"))
        except ConvscopeError as error:
            self._failures.append(Failure(page_file(*parts), str(error)))

    def _write_image(self, name: str, render_image: Callable[[], bytes]) -> None:
        """Write an image that a page refers to, once; the page is written even if this fails."""
        if name not in self._written:
            self._written.add(name)
            try:
                self._write_file(name, render_image())
            except ConvscopeError as error:
                self._failures.append(Failure(name, str(error)))

    def _write_manifest(self) -> None:
        data = {name: self._store.manifest["data"][name] for name in ("images", "fingerprint")}
        model = self._network.model.describe()
        manifest = {"kind": "site", "model": model, "store": data, "versions": versions()}
        write_json(self._out / "manifest.json", manifest)

    def _write_file(self, name: str, content: bytes) -> None:
        _write(self._out / name, content)


def _layer_page(context: PageContext, network: Network, layer: str) -> Page:
    return layer_page.build(context, network, network.layer(layer), None)


def _units_page(context: PageContext, network: Network, layer: str) -> Page:
    return units_page.build(context, network, network.layer(layer), None)


def _unit_page(context: PageContext, network: Network, layer: str, unit: int) -> Page:
    spec = context.explorer.resolve_pattern(network, layer, unit)
    return unit_page.build(context, network, layer, unit, None, spec)


def _class_page(context: PageContext, network: Network, index: int) -> Page:
    spec = context.explorer.resolve_pattern(network, LOGITS, index)
    return class_page.build(context, network, index, None, spec)


_worker_sheets: dict[str, ExampleSheets] = {}  # in a worker process: by the store's address


def _write_sheets_in_worker(address: str, files: Sequence[tuple[str, int, str]]) -> list[Failure]:
    if address not in _worker_sheets:
        _worker_sheets[address] = ExampleSheets(open_store(address))
    return _write_sheets(_worker_sheets[address], files)


def _write_sheets(sheets: ExampleSheets, files: Sequence[tuple[str, int, str]]) -> list[Failure]:
    """Write the example sheets of units (layer, unit, file)."""
    failures = []
    for layer, unit, file in files:
        try:
            _write(Path(file), sheets.sheet(layer, unit))
        except ConvscopeError as error:
            failures.append(Failure(f"{layer} {unit}", str(error)))
    return failures


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)
