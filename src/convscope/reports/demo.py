"""Everything on one page: what `convscope demo` makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from convscope.attribution.api import heatmaps
from convscope.engine.batching import Progress
from convscope.engine.layer_selection import select_by_depth
from convscope.engine.layer_table import Layer, format_receptive_field
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.feature_maps import activations, is_constant_channel, predict
from convscope.featurevis.api import patterns
from convscope.featurevis.result import Patterns
from convscope.images.colormap import lookup_table
from convscope.images.loading import Failure
from convscope.plotting.activations import activation_pages
from convscope.plotting.grids import pattern_grid
from convscope.results import atomic_write, file_names, versions, write_json

Bar = Callable[[str], AbstractContextManager[Progress | None]]

PATTERNS = 16  # filters a layer on the page
SHOWN = 64  # channels of an activation grid on the page
WIDTH = 640  # pixels of a photograph on the page


@dataclass(frozen=True)
class Shown:
    """One photograph on the page."""

    name: str
    photo: str
    overlay: str
    target: str
    classes: list[tuple[str, float]]


@dataclass(frozen=True)
class Grid:
    """One grid on the page. `sees` is the receptive field in pixels, None where it is the whole picture."""

    title: str
    file: str
    sees: str
    count: int
    text: str


def make(model: Model, images: Sequence[str], out: Path, *, seed: int, bar: Bar) -> list[Failure]:
    """Write the page and its pictures into `out`; returns the pictures that could not be used.

    Raises ConvscopeError if none can, or if `out` cannot be written.
    """
    try:
        return _make(model, images, out, seed=seed, bar=bar)
    except OSError as error:
        raise ConvscopeError(f"cannot write into {out}: {error.strerror or error}") from error


def _make(model: Model, images: Sequence[str], out: Path, *, seed: int, bar: Bar) -> list[Failure]:
    out.mkdir(parents=True, exist_ok=True)
    with bar("predictions") as progress:
        said = predict(model, list(images), progress=progress)
    with bar("heatmaps") as progress:
        heatmap = heatmaps(model, list(images), progress=progress)
    photos = []
    for n, (index, overlay) in enumerate(zip(heatmap.image_indices, heatmap.iter_overlays(), strict=True)):
        original = Image.fromarray(heatmap.image_source.original(index))
        photo, heated = f"photo_{n}.jpg", f"heatmap_{n}.jpg"
        _write(out / photo, _fitted(original))
        _write(out / heated, _fitted(overlay))
        best = list(zip(said.names[n], map(float, said.probabilities[n]), strict=True))
        photos.append(Shown(Path(heatmap.image_names[n]).name, photo, heated, heatmap.names[n][0], best))

    # The picture that the network is surest of is the one that is followed through the layers.
    lead = int(np.argmax(said.probabilities[:, 0]))
    stops = select_by_depth(model, 5)
    names = file_names(row.name for row in stops)
    with bar("activations") as progress:
        seen = activations(model, images[heatmap.image_indices[lead]], [row.name for row in stops], progress=progress)
    maps = []
    for row in stops:
        page = activation_pages(seen, row.name, limit=SHOWN)[0]
        file = f"activations_{names[row.name]}.png"
        _write(out / file, page)
        dead = int(is_constant_channel(seen[row.name]).sum())
        text = f"Channels that have nothing to say about this picture: {dead} of {row.units}"
        maps.append(Grid(row.name, file, _sees(model, row), row.units, text))

    grids = []
    for row in stops[:4]:
        with bar(f"patterns {row.name}") as progress:
            drawn = patterns(model, row.name, range(min(PATTERNS, row.units)), seed=seed, progress=progress)
        file = f"patterns_{names[row.name]}.png"
        _write(out / file, pattern_grid(drawn.images, columns=4))
        grids.append(Grid(row.name, file, _sees(model, row), len(drawn.units), "; ".join(drawn.notes)))
    wanted = list(dict.fromkeys(int(row[0]) for row in said.indices))[:8]
    with bar("patterns classes") as progress:
        classes = patterns(model, LOGITS, wanted, seed=seed, progress=progress)
    _write(out / "patterns_classes.png", pattern_grid(classes.images, columns=4))

    _page(out, model, photos, lead, maps, grids, classes, heatmap.layer, said.notes + heatmap.notes)
    manifest = {
        "kind": "demo",
        "model": model.describe(),
        "parameters": {"seed": seed, "heatmap_layer": heatmap.layer, "layers": [row.name for row in stops]},
        "predictions": [{"picture": p.name, "classes": p.classes} for p in photos],
        "failed": [{"name": f.name, "reason": f.reason} for f in said.failed],
        "versions": versions(),
    }
    write_json(out / "manifest.json", manifest)
    return list(said.failed)


def _page(
    out: Path,
    model: Model,
    photos: list[Shown],
    lead: int,
    maps: list[Grid],
    grids: list[Grid],
    classes: Patterns,
    layer: str,
    notes: tuple[str, ...],
) -> None:
    from jinja2 import Environment, PackageLoader

    pages = Environment(
        loader=PackageLoader("convscope.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    scale = ", ".join(f"rgb({r} {g} {b})" for r, g, b in lookup_table("jet")[::32].tolist())
    html = pages.get_template("demo.html").render(
        model=model,
        photos=photos,
        lead=photos[lead],
        maps=maps,
        grids=grids,
        classes=classes,
        layer=layer,
        notes=notes,
        heat_scale=scale,
    )
    with atomic_write(out / "index.html") as file:
        file.write(html.encode(errors="backslashreplace"))


def _sees(model: Model, row: Layer) -> str:
    return format_receptive_field(row.bounded_receptive_field(model.preprocessing.size))


def _fitted(image: Image.Image) -> Image.Image:
    """The picture at most `WIDTH` pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return small


def _write(path: Path, image: Image.Image) -> None:
    with atomic_write(path) as file:
        if path.suffix == ".jpg":
            image.save(file, format="JPEG", quality=90)
        else:
            image.save(file, format="PNG")
