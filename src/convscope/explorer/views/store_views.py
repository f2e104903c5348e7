"""What a store adds to the pages: examples, distributions, classes, similar units; pictures of the data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from convscope.engine.model import LOGITS
from convscope.explorer.service.images import UnknownResource, encode_image
from convscope.explorer.service.state import Network
from convscope.explorer.service.uploads import plain_name
from convscope.explorer.urls import UrlBuilder
from convscope.scanning.statistics import HISTOGRAM_EDGES

if TYPE_CHECKING:
    from convscope.store.examples import Example, ImageView
    from convscope.store.store import Store

SIDE = 96  # pixels of a tile
COUNT = 9  # examples on a page
LISTED = 48  # units on a layer's page


def unit_page(net: Network, site: UrlBuilder, layer: str, unit: int) -> dict[str, Any] | None:
    """A unit in the data set; None without a store that knows its layer."""
    store = net.store
    if store is None or layer not in store.layers:
        return None
    own = store.unit(layer, unit)
    told, examples = own.statistics, own.examples(COUNT)
    dead = told["dead"] and layer != LOGITS  # a class whose score never is above 0 is no dead one
    bins, low, high = _spread(told["histogram"])
    classes = own.classes(5)
    most = max((c.mean for c in classes), default=0.0)
    near = own.similar(8) if site.live else own.coactive(8)
    facts = {
        "highest": f"{told['maximum']:.4g}",
        "mean": f"{told['mean']:.4g}",
        "answers at": f"{100 * told['active']:.1f} % of all places",
        "answers on": f"{100 * told['fires']:.1f} % of all pictures",
    }
    if told["selectivity"] is not None:
        facts["selectivity"] = f"{told['selectivity']:.2f}"
    return {
        "pictures": f"{store.num_images:,}",
        "warnings": ["This unit is dead: on none of the pictures did it answer."] if dead else [],
        "examples": [_shown(net, site, example, i) for i, example in enumerate(examples)],
        "src": site.patches(net, layer, unit, "top") if len(examples) else None,
        "sheet": (SIDE * max(1, len(examples)), 2 * SIDE),
        "side": SIDE,
        "bins": bins,
        "low": low,
        "high": high,
        "facts": facts,
        "classes": [
            {
                "name": c.name,
                "mean": c.mean,
                "share": max(0.0, c.mean / most) if most > 0 else 0.0,
                "page": _class_page(net, site, c.name),
            }
            for c in classes
        ],
        "similar": [
            {"layer": s.layer, "unit": s.unit, "r": s.r, "page": _unit_link(net, site, s.layer, s.unit)} for s in near
        ],
    }


def _shown(net: Network, site: UrlBuilder, example: Example, index: int) -> dict[str, Any]:
    return {
        "value": example.value,
        "name": plain_name(example.name),
        "x": index * SIDE,
        "page": site.page("m", net.key, "data", example.image),
    }


def _spread(histogram: Sequence[int]) -> tuple[list[float], str, str]:
    """The occupied bins of a histogram, heights as shares of the highest, and the values at its ends."""
    counts = np.asarray(histogram, np.float64)
    occupied = np.flatnonzero(counts)
    if not len(occupied):
        return [0.0], "", ""
    first, last = int(occupied[0]), int(occupied[-1])
    ends = [-np.inf, *map(float, HISTOGRAM_EDGES), np.inf]
    heights = (counts[first : last + 1] / counts.max()).round(3).tolist()
    return heights, _end(ends[first]), _end(ends[last + 1])


def _end(value: float) -> str:
    return "no limit" if np.isinf(value) else f"{value:.3g}"


def layer_units(net: Network, site: UrlBuilder, layer: str) -> list[dict[str, Any]]:
    """The layer's units that prefer something most, each with the patch that excites it most."""
    store = net.store
    if store is None or layer not in store.layers:
        return []
    table = store.units(["layer", "unit", "fires", "selectivity", "dead"])
    rows = table.filter(_equal(table["layer"], layer)).to_pylist()
    order = sorted(rows, key=lambda r: (-(r["selectivity"] or 0), -r["fires"], r["unit"]))[:LISTED]
    kind = "best" if site.live else "top"
    width = SIDE * (1 if site.live else COUNT)
    return [
        {
            "unit": row["unit"],
            "dead": row["dead"],
            "page": site.page("m", net.key, "unit", layer, row["unit"]),
            "src": site.patches(net, layer, row["unit"], kind),
            "sheet": (width, SIDE * (1 if site.live else 2)),
            "x": 0,
            "y": 0,
            "side": SIDE,
            "label": f"unit {row['unit']}",
        }
        for row in order
    ]


def _equal(column: Any, value: str) -> Any:
    import pyarrow.compute as compute

    return compute.equal(column, value)


def layer_measures(net: Network) -> dict[str, dict[str, float]]:
    """Of each layer in the store: the share of dead units, mean sparsity and selectivity."""
    store = net.store
    if store is None:
        return {}
    table = store.units(["layer", "dead", "active", "selectivity"]).to_pandas()
    found: dict[str, dict[str, float]] = {}
    for name, rows in table.groupby("layer", observed=True):
        found[str(name)] = {"dead": float(rows["dead"].mean()), "sparsity": float(1 - rows["active"].mean())}
        if rows["selectivity"].notna().any():
            found[str(name)]["selectivity"] = float(rows["selectivity"].mean())
    return found


def class_page(net: Network, site: UrlBuilder, index: int) -> dict[str, Any]:
    """The units that tell of a class: whose mean on its pictures is highest, beside their mean on all."""
    store = net.store
    name = net.model.class_name(index)
    if store is None or not store.labels or name not in store.labels:
        return {"telling": []}
    label = store.labels.index(name)
    table = store.units(["layer", "unit", "mean", "classes", "class_means"]).to_pylist()
    found = []
    for row in table:
        if row["layer"] != LOGITS and row["classes"] and row["classes"][0] == label and row["mean"] > 0:
            found.append((row["class_means"][0] / row["mean"], row["layer"], row["unit"]))
    best = sorted(found, key=lambda r: (-r[0], r[1], r[2]))[:12]
    return {
        "telling": [
            {"ratio": ratio, "layer": layer, "unit": unit, "page": _unit_link(net, site, layer, unit)}
            for ratio, layer, unit in best
        ]
    }


def image_page(net: Network, site: UrlBuilder, number: int) -> dict[str, Any]:
    """A picture of the data set. Raises MissingError where there is none of that number."""
    if net.store is None or not 0 <= number < net.store.num_images:
        raise UnknownResource(f"there is no picture {number} in the data set here")
    own = net.store.image(number)
    return {
        "number": number,
        "name": plain_name(own.name),
        "src": site.thumbnail(net, number),
        "size": (own.facts["height"] or SIDE, own.facts["width"] or SIDE),
        "label": own.label,
        "loss": own.loss,
        "failed": own.failed,
        "can_open": own.failed is None and net.takes_images,
        "said": [
            {"name": p.name, "probability": p.probability, "page": site.page("m", net.key, "class", p.target)}
            for p in own.predictions
        ],
        "units": [
            {"layer": s.layer, "unit": s.unit, "rank": s.rank, "page": _unit_link(net, site, s.layer, s.unit)}
            for s in (own.units(10) if site.live else [])  # a search through all units: too much for every picture
        ],
    }


def _unit_link(net: Network, site: UrlBuilder, layer: str, unit: int) -> str:
    if layer == LOGITS:
        return site.page("m", net.key, "class", unit)
    return site.page("m", net.key, "unit", layer, unit)


def _class_page(net: Network, site: UrlBuilder, name: str) -> str:
    """The network's class of that name; the data set's own classes need not be the network's."""
    index = net.class_indices.get(name)
    return "" if index is None else site.page("m", net.key, "class", index)


# --- pictures of pictures ---


class Views:
    """The latest views of a store's pictures, decoded; up to `room` bytes."""

    def __init__(self, store: Store, room: int = 1 << 28) -> None:
        from convscope.explorer.service.cache import Cache

        self._store, self._cache = store, Cache(room)

    def get(self, image: int) -> ImageView:
        return self._kept(image, lambda: self._store.view(image))

    def _kept(self, image: int, make: Callable[[], ImageView]) -> ImageView:
        view: ImageView | None = self._cache.get(image)
        if view is None:
            view = make()
            self._cache.put(image, view)
        return view

    def sheet(self, layer: str, unit: int, kind: str = "top") -> bytes:
        """A unit's examples as WEBP: patches side by side and, below them, the whole pictures; "best": one patch."""
        count = 1 if kind == "best" else COUNT
        examples = self._store.unit(layer, unit).examples(count, "top" if kind == "best" else kind)
        sheet = Image.new("RGB", (SIDE * max(1, len(examples)), SIDE * (1 if kind == "best" else 2)), "gray")
        for i, example in enumerate(examples):
            view = self._kept(example.image, example.view)  # which knows already what the store says of the picture
            sheet.paste(_squared(view.crop(example.box)), (i * SIDE, 0))
            if kind != "best":
                sheet.paste(_squared(view.framed(example.box)), (i * SIDE, SIDE))
        return encode_image(sheet, quality=78)

    def thumbnail(self, number: int, longest: int = 640) -> bytes:
        image = self.get(number).image.copy()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return encode_image(image)


def _squared(image: Image.Image) -> Image.Image:
    return ImageOps.pad(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR, color="gray")
