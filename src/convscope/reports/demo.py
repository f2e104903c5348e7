"""The page of `convscope demo`: predictions, heatmaps, activations and filter patterns of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from convscope.attribution.api import heatmaps
from convscope.attribution.result import Heatmaps
from convscope.engine.layer_selection import select_by_depth
from convscope.engine.layer_table import Layer, format_receptive_field
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.feature_maps import activations, is_constant_channel
from convscope.featurevis.api import patterns
from convscope.featurevis.result import Patterns
from convscope.images.colormap import lookup_table
from convscope.images.failures import Failure
from convscope.plotting.activations import activation_pages
from convscope.plotting.grids import pattern_grid
from convscope.predictions import Predictions, predict
from convscope.progress import Progress
from convscope.results import atomic_write, file_names, versions, write_json

ProgressBar = Callable[[str], AbstractContextManager[Progress]]

NUM_LAYERS = 5
NUM_PATTERN_LAYERS = 4
PATTERNS_PER_LAYER = 16
MAX_CLASS_PATTERNS = 8
MAX_CHANNELS = 64  # in an activation grid
PHOTO_SIDE = 640  # maximum longer side of a photograph, in pixels


@dataclass(frozen=True)
class PhotoCard:
    """A photograph, its heatmap and its predictions.

    Attributes
    ----------
    name : str
        File name of the original.
    photo, overlay : str
        Files on the page.
    target : str
        The class of the heatmap.
    classes : list of (str, float)
        The most likely classes and their probabilities.
    """

    name: str
    photo: str
    overlay: str
    target: str
    classes: list[tuple[str, float]]


@dataclass(frozen=True)
class GridCard:
    """A grid of activations or patterns of a layer.

    Attributes
    ----------
    layer : str
        The layer.
    file : str
        The image.
    receptive_field : str
        "11 x 11 pixels", or "the whole image".
    count : int
        Number of channels.
    remarks : str
        Text of the caption.
    """

    layer: str
    file: str
    receptive_field: str
    count: int
    remarks: str


@dataclass(frozen=True)
class _Page:
    """Content of the page."""

    photos: list[PhotoCard]
    lead: PhotoCard
    activation_grids: list[GridCard]
    pattern_grids: list[GridCard]
    class_patterns: Patterns
    heatmap_layer: str
    notes: tuple[str, ...]


def write_demo(
    model: Model, images: Sequence[str], folder: Path, *, seed: int, progress_bar: ProgressBar
) -> list[Failure]:
    """Compute all results and write the page with its images.

    Parameters
    ----------
    model : Model
        The network.
    images : sequence of str
        Paths of photographs.
    folder : pathlib.Path
        Output folder; created if it does not exist.
    seed : int
        Random seed of the patterns.
    progress_bar : callable
        Maps the name of a step to a context manager that yields a progress callback.

    Returns
    -------
    list of Failure
        The images that could not be used.

    Raises
    ------
    ConvscopeError
        If no image can be used, or if `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _Demo(model, images, folder, seed, progress_bar).write()
    except OSError as error:
        raise ConvscopeError(f"cannot write into {folder}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Demo:
    """Computes the results of a demo and writes them into a folder."""

    model: Model
    images: Sequence[str]
    folder: Path
    seed: int
    progress_bar: ProgressBar

    def write(self) -> list[Failure]:
        with self.progress_bar("predictions") as progress:
            predictions = predict(self.model, list(self.images), progress=progress)
        with self.progress_bar("heatmaps") as progress:
            maps = heatmaps(self.model, list(self.images), progress=progress)
        photos = self._write_photos(predictions, maps)
        lead = int(np.argmax(predictions.probabilities[:, 0]))  # the most confident prediction
        layers = select_by_depth(self.model, NUM_LAYERS)
        page = _Page(
            photos=photos,
            lead=photos[lead],
            activation_grids=self._write_activations(layers, self.images[maps.image_indices[lead]]),
            pattern_grids=self._write_patterns(layers[:NUM_PATTERN_LAYERS]),
            class_patterns=self._write_class_patterns(predictions),
            heatmap_layer=maps.layer,
            notes=predictions.notes + maps.notes,
        )
        self._write_page(page)
        manifest = {
            "kind": "demo",
            "model": self.model.describe(),
            "parameters": {
                "seed": self.seed,
                "heatmap_layer": maps.layer,
                "layers": [layer.name for layer in layers],
            },
            "predictions": [{"image": photo.name, "classes": photo.classes} for photo in photos],
            "failed": [{"name": failure.name, "reason": failure.reason} for failure in predictions.failed],
            "versions": versions(),
        }
        write_json(self.folder / "manifest.json", manifest)
        return list(predictions.failed)

    def _write_photos(self, predictions: Predictions, maps: Heatmaps) -> list[PhotoCard]:
        photos = []
        for n, (index, (overlay, _)) in enumerate(zip(maps.image_indices, maps.iter_overlays(), strict=True)):
            photo, overlay_file = f"photo_{n}.jpg", f"heatmap_{n}.jpg"
            self._write_jpeg(photo, Image.fromarray(maps.image_source.original(index)))
            self._write_jpeg(overlay_file, overlay)
            classes = list(zip(predictions.names[n], map(float, predictions.probabilities[n]), strict=True))
            photos.append(PhotoCard(Path(maps.image_names[n]).name, photo, overlay_file, maps.names[n][0], classes))
        return photos

    def _write_activations(self, layers: Sequence[Layer], image: str) -> list[GridCard]:
        with self.progress_bar("activations") as progress:
            maps = activations(self.model, image, [layer.name for layer in layers], progress=progress)
        names = file_names(layer.name for layer in layers)
        grids = []
        for layer in layers:
            file = f"activations_{names[layer.name]}.png"
            self._write_png(file, activation_pages(maps, layer.name, limit=MAX_CHANNELS)[0])
            constant = int(is_constant_channel(maps[layer.name]).sum())
            remarks = f"Constant channels: {constant} of {layer.units}"
            grids.append(GridCard(layer.name, file, self._receptive_field(layer), layer.units, remarks))
        return grids

    def _write_patterns(self, layers: Sequence[Layer]) -> list[GridCard]:
        names = file_names(layer.name for layer in layers)
        grids = []
        for layer in layers:
            units = range(min(PATTERNS_PER_LAYER, layer.units))
            with self.progress_bar(f"patterns {layer.name}") as progress:
                result = patterns(self.model, layer.name, units, seed=self.seed, progress=progress)
            file = f"patterns_{names[layer.name]}.png"
            self._write_png(file, pattern_grid(result.images, columns=4))
            remarks = "; ".join(result.notes)
            grids.append(GridCard(layer.name, file, self._receptive_field(layer), len(units), remarks))
        return grids

    def _write_class_patterns(self, predictions: Predictions) -> Patterns:
        """Write the patterns of the most likely class of each image."""
        classes = list(dict.fromkeys(int(top[0]) for top in predictions.indices))[:MAX_CLASS_PATTERNS]
        with self.progress_bar("patterns classes") as progress:
            result = patterns(self.model, LOGITS, classes, seed=self.seed, progress=progress)
        self._write_png("patterns_classes.png", pattern_grid(result.images, columns=4))
        return result

    def _receptive_field(self, layer: Layer) -> str:
        return format_receptive_field(layer.bounded_receptive_field(self.model.preprocessing.size))

    def _write_page(self, page: _Page) -> None:
        from jinja2 import Environment, PackageLoader

        environment = Environment(
            loader=PackageLoader("convscope.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        colors = ", ".join(f"rgb({r} {g} {b})" for r, g, b in lookup_table("jet")[::32].tolist())
        html = environment.get_template("demo.html").render(
            model=self.model, page=page, max_channels=MAX_CHANNELS, scale_colors=colors
        )
        with atomic_write(self.folder / "index.html") as file:
            file.write(html.encode(errors="backslashreplace"))

    def _write_jpeg(self, name: str, image: Image.Image) -> None:
        """Write an image, reduced to `PHOTO_SIDE`."""
        reduced = image.convert("RGB")
        reduced.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
        with atomic_write(self.folder / name) as file:
            reduced.save(file, format="JPEG", quality=90)

    def _write_png(self, name: str, image: Image.Image) -> None:
        with atomic_write(self.folder / name) as file:
            image.save(file, format="PNG")
