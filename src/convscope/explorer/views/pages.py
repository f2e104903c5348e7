"""What stands on each page: the same functions serve live pages and published ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from convscope.attribution.registry import METHODS
from convscope.engine.layer_table import Layer
from convscope.engine.model import LOGITS
from convscope.explorer.service import compute, concept_data
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.patterns import RECIPES, VARIANTS, PatternSpec
from convscope.explorer.service.state import SLOW_METHODS, Explorer, Network, main_layers
from convscope.explorer.urls import UrlBuilder
from convscope.explorer.views import layout, snippets, store_views
from convscope.explorer.views.glossary import WORDS
from convscope.featurevis.layer_story import Story
from convscope.images.colormap import lookup_table

SHOWN = 256  # channels of a layer that a page begins with
COLOURS = ("jet", "viridis", "inferno", "coolwarm")
CLASSES = 5


@dataclass(frozen=True)
class Page:
    """A template and what goes into it. `data` is for the page's scripts."""

    template: str
    title: str
    data: dict[str, Any]
    more: dict[str, Any]


class Pages:
    """All pages of an explorer, for one site and one who asks."""

    def __init__(self, explorer: Explorer, asker: Client, site: UrlBuilder) -> None:
        self.explorer, self.asker, self.site = explorer, asker, site

    # --- a picture ---

    def image(self, net: Network, image: RegisteredImage, target: int | None = None, beside: str = "") -> Page:
        """What the network says of a picture, and where it sees it."""
        said = self.explorer.predictions(self.asker, net, image)
        classes = [row["index"] for row in said[:CLASSES]]
        chosen = classes[0] if target is None else target
        asked = [*classes, *([] if chosen in classes else [chosen])]
        heatmaps = {h["target"]: h for h in self.explorer.heatmap(self.asker, net, image, asked)}
        named = self.site.source(net.source), self.site.source(image.source)
        data = {
            "kind": "picture",
            "live": self.site.live,
            "api": f"/api/models/{net.key}/pictures/{image.key}",
            "picture": image.key,
            "target": chosen,
            "layer": heatmaps[chosen]["layer"],
            "heats": heatmaps,
            "palettes": {name: lookup_table(name)[::8].tolist() for name in COLOURS},
            "lines": {k: snippets.heatmap(*named, k, None, "grad-cam", None) for k in heatmaps},
            "pages": {k: self.site.page("m", net.key, "picture", image.key, "class", k) for k in heatmaps},
            "classPages": {k: self.site.page("m", net.key, "class", k) for k in heatmaps},
        }
        spatial = [row for row in net.layers if not row.is_pooling]
        return Page(
            "picture.html",
            f"{image.name} seen by {net.model.name}",
            data,
            {
                "net": net,
                "picture": image,
                "photo": self.site.photo(image, 1024),
                "said": said[:CLASSES],
                "target": chosen,
                "target_name": net.model.class_name(chosen),
                "layers": [row.name for row in spatial],
                "chosen_layer": data["layer"],
                "methods": [m for m in METHODS if m not in ("random", "centred")],
                "slow": SLOW_METHODS,
                "colours": COLOURS,
                "walk": self._walk(net),
                "samples": self.explorer.images.samples,
            },
        )

    # --- the network ---

    def network(self, net: Network) -> Page:
        """All layers, as a table and as a drawing."""
        image = self.lead(net)
        rows = [self._row(net, row) for row in net.layers]
        measured = store_views.layer_measures(net)
        for row in rows:
            row["measured"] = measured.get(row["name"], {})
        if not self.site.live and image is not None:
            for name, values in self.explorer.layer_summaries(self.asker, net, image).items():
                row = next(row for row in rows if row["name"] == name)
                row["measured"] = values | row["measured"]  # what a data set told is not taken back by one picture
        drawn = layout.figure([(row.shape[1:] or (1,))[0] for row in net.layers], net.edges)
        data = {
            "kind": "network",
            "live": self.site.live,
            "summaries": f"/api/models/{net.key}/pictures/{image.key}/layers" if image else None,
            "layers": rows,
            "graph": drawn,
        }
        more = {"net": net, "rows": rows, "lead": image, "graph": drawn}
        return Page("network.html", f"{net.model.name}: its layers", data, more)

    def layer(self, net: Network, row: Layer, image: RegisteredImage | None, target: int | None = None) -> Page:
        """A layer: its channels on a picture, and what the data set says of its units."""
        image = image or self.lead(net)
        data: dict[str, Any] = {"kind": "layer", "live": self.site.live, "layer": row.name, "units": row.units}
        more: dict[str, Any] = {"net": net, "row": row, "picture": image, "around": self._around(net, row.name)}
        more |= {"sees": sees(net, row), "cells": [], "dead": 0, "kept": self._kept(net, row.name)}
        if image is not None:
            maps = self.explorer.feature_maps(self.asker, net, image, row.name)
            _, sheet = self.explorer.feature_map_sheet(self.asker, net, image, row.name)
            table = compute.channel_statistics(maps)
            if net.classifies():
                said = self.explorer.predictions(self.asker, net, image)
                target = said[0]["index"] if target is None else target
                speaks = self.explorer.relevance(self.asker, net, image, row.name, target)
                table["relevance"] = [float(f"{v:.4g}") for v in speaks]
                more |= {"target": target, "target_name": net.model.class_name(target), "said": said[:CLASSES]}
            data |= {
                "table": table,
                "picture": image.key,
                "api": f"/api/models/{net.key}/pictures/{image.key}",
                "grid": [maps.shape[1], maps.shape[2]],
                "field": compute.receptive_field_grid(net.model, row.name),
                "unitPage": self.site.page("m", net.key, "unit", row.name, 0),
            }
            if not self.site.live:
                data["places"] = _positions(maps)
            order = np.argsort(-np.array(table["max"]), kind="stable")
            more |= {
                "sheet": self.site.sheet(net, image, row.name),
                "measures": sheet,
                "photo": self.site.photo(image, 1024),
                "cells": [self._cell(net, row.name, int(u), sheet, table) for u in order],
                "first": SHOWN,
                "dead": sum(table["dead"]),
                "lines": snippets.activations(self.site.source(net.source), self.site.source(image.source), row.name),
                "orders": [k for k in ("max", "mean", "relevance") if k in table],
            }
        return Page("layer.html", f"{row.name} of {net.model.name}", data, more)

    def _cell(
        self, net: Network, layer: str, unit: int, sheet: dict[str, int], table: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "unit": unit,
            "x": unit % sheet["columns"] * sheet["width"],
            "y": unit // sheet["columns"] * sheet["height"],
            "dead": table["dead"][unit],
            "page": self.site.page("m", net.key, "unit", layer, unit),
        }

    # --- a unit ---

    def unit(self, net: Network, layer: str, unit: int, image: RegisteredImage | None, what: PatternSpec) -> Page:
        """A unit: what it wants, what excites it, what it makes of a picture."""
        image = image or self.lead(net)
        row = None if layer == LOGITS else net.layer(layer)
        made = self.explorer.get_pattern(net, what)
        about = store_views.unit_page(net, self.site, layer, unit)
        data: dict[str, Any] = {
            "kind": "unit",
            "live": self.site.live,
            "layer": layer,
            "unit": unit,
            "drawn": made is not None,
            "events": f"/api/models/{net.key}/pattern/events",
            "palettes": {"viridis": lookup_table("viridis")[::8].tolist()},
        }
        more: dict[str, Any] = {
            "net": net,
            "row": row,
            "layer": layer,
            "unit": unit,
            "count": net.num_units(layer),
            "sees": "the whole picture" if row is None else sees(net, row),
            "what": what,
            "looks": [look for look in VARIANTS if look != "diverse" or layer == LOGITS or (row and row.is_spatial)],
            "recipes": RECIPES,
            "pattern": self._pattern(net, what) if made else None,
            "about": about,
            "lines": snippets.pattern(self.site.source(net.source), what, net.model),
            "class_name": net.model.class_name(unit) if layer == LOGITS else None,
            "map": None,
            "picture": image,
        }
        if image is not None and row is not None:
            maps = self.explorer.feature_maps(self.asker, net, image, layer)
            table = compute.channel_statistics(maps[unit : unit + 1])
            data["map"] = compute.pack_map(maps[unit])
            more["map"] = {"photo": self.site.photo(image, 1024), "max": table["max"][0], "mean": table["mean"][0]}
            more["map"]["dead"] = table["dead"][0]
        called = f"class {net.model.class_name(unit)}" if layer == LOGITS else f"unit {unit} of {layer}"
        return Page("unit.html", f"{called}, {net.model.name}", data, more)

    def _pattern(self, net: Network, what: PatternSpec) -> dict[str, Any]:
        made = self.explorer.get_pattern(net, what) or {}
        return {**{k: v for k, v in made.items() if k != "image"}, "src": self.site.pattern(net, what)}

    def class_(self, net: Network, index: int, image: RegisteredImage | None, what: PatternSpec) -> Page:
        """A class: its pattern, the units that tell of it, and the pictures that the network takes for it."""
        page = self.unit(net, LOGITS, index, image, what)
        about = {**store_views.class_page(net, self.site, index), **self._made_of(net, index)}
        return Page("class.html", f"{net.model.class_name(index)}, {net.model.name}", page.data, {**page.more, **about})

    # --- the rest ---

    def story(self, net: Network) -> Page:
        """The network from its first layer to its classes."""
        told = self.explorer.get_story(net)
        chapters = [] if told is None else _chapters(told)
        for i, chapter in enumerate(chapters):
            chapter["src"] = self.site.chapter(net, i)
        figure = "" if told is None else self.site.figure(net)
        data = {"kind": "story", "live": self.site.live, "events": f"/api/models/{net.key}/story/events"}
        more = {"net": net, "chapters": chapters, "walk": self._walk(net), "told": told, "figure": figure}
        return Page("story.html", f"The story of {net.model.name}", data, more)

    def example(self, net: Network, number: int) -> Page:
        """A picture of the data set: what the network said of it, and which units it excites."""
        about = store_views.image_page(net, self.site, number)
        data = {"kind": "example", "live": self.site.live}
        return Page("example.html", f"{about['name']}, picture {number}", data, {"net": net, **about})

    def glossary(self) -> Page:
        return Page(
            "glossary.html", "Words", {"kind": "glossary", "live": self.site.live}, {"net": self.explorer.first}
        )

    def render(self, page: Page) -> str:
        """The page as HTML."""
        net: Network = page.more["net"]
        networks = list(self.explorer.networks.values())
        html: str = _ENVIRONMENT.get_template(page.template).render(
            **page.more,
            title=page.title,
            data=page.data,
            site=self.site,
            words=WORDS,
            networks=networks,
            shared_names=Counter(n.model.name for n in networks),
            store=net.store,
        )
        return html

    def lead(self, net: Network) -> RegisteredImage | None:
        """The picture to begin with, if there is any."""
        samples = self.explorer.images.samples
        return samples[0] if samples and net.takes_images else None

    def _made_of(self, net: Network, index: int) -> dict[str, Any]:
        """What the store keeps of a class: concepts and atlases; and where a live page says how they are made."""
        page = self.site.page("m", net.key, "concepts", index)
        return {"kept": concept_data.links(net, self.site, index), "concepts_page": page}

    def _walk(self, net: Network) -> list[str]:
        return main_layers(net)

    def _around(self, net: Network, layer: str) -> dict[str, str | None]:
        names = [row.name for row in net.layers]
        own = net.layer(layer)
        if (own.alias_of or layer) not in names:
            return {"before": None, "after": None}
        i = names.index(own.alias_of or layer)
        return {"before": names[i - 1] if i else None, "after": names[i + 1] if i + 1 < len(names) else None}

    def _kept(self, net: Network, layer: str) -> list[dict[str, Any]]:
        return store_views.layer_units(net, self.site, layer)

    def _row(self, net: Network, row: Layer) -> dict[str, Any]:
        field = None if row.receptive_field is None else max(row.receptive_field)
        stride = None if row.stride is None else max(row.stride)
        return {
            "name": row.name,
            "kind": row.kind,
            "shape": list(row.shape),
            "units": row.units,
            "sees": sees(net, row),
            "stride": stride,
            "field": None if field is None else min(field, max(net.model.preprocessing.size)),
            "parameters": row.parameters,
            "page": self.site.page("m", net.key, "layer", row.name),
        }


def sees(net: Network, row: Layer) -> str:
    """A receptive field in words."""
    if row.receptive_field is None or min(row.receptive_field) >= min(net.model.preprocessing.size):
        return "the whole picture"
    return " × ".join(map(str, row.receptive_field)) + " pixels"


def _positions(maps: np.ndarray, most: int = 1024, top: int = 6) -> dict[str, Any] | None:
    """For published pages: the strongest units at every place, row by row; None where there are too many places."""
    height, width = maps.shape[1:]
    if height * width > most:
        return None
    flat = maps.reshape(len(maps), -1)
    best = np.argsort(-flat, axis=0, kind="stable")[:top].T
    values = np.take_along_axis(flat, best.T, 0).T
    return {"units": best.tolist(), "values": [[float(f"{v:.3g}") for v in row] for row in values]}


def _chapters(told: Story) -> list[dict[str, Any]]:
    return [
        {
            "layer": chapter.layer,
            "sees": "the whole picture" if chapter.sees is None else " × ".join(map(str, chapter.sees)) + " pixels",
            "names": list(chapter.names),
            "units": [int(u) for u in chapter.units],
            "measured": {k: np.percentile(v, (25, 50, 75)).tolist() for k, v in chapter.measures.items()},
            "count": len(chapter.images),
            "height": chapter.images.shape[1],
            "width": chapter.images.shape[2],
        }
        for chapter in told.chapters
    ]


def _number(value: float | None, digits: int = 3) -> str:
    """A number for people, with no exponent where it can do without."""
    text = "" if value is None else f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value or 0) < 1e6 else text


def _explained(word: str) -> str:
    return WORDS[word]


_ENVIRONMENT = Environment(
    loader=PackageLoader("convscope.explorer"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    auto_reload=False,
)
_ENVIRONMENT.filters |= {"number": _number, "explained": _explained}
