"""The pages of concepts and atlases."""

from __future__ import annotations

from typing import Any

from convscope.explorer.service import compute, concept_data
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.state import Network
from convscope.explorer.urls import UrlBuilder
from convscope.explorer.views import snippets
from convscope.explorer.views.pages import Page, Pages
from convscope.images.colormap import lookup_table

CELL, ROW = 100, 126  # a cell of an atlas in its drawing: width, and height with room for a word below
GAP = 6  # between icons
SMALLEST = 0.45  # an icon's side, relative to its cell's, where it stands for few vectors
WORD = 19  # letters that have room below an icon


def index(pages: Pages, net: Network) -> Page:
    """All concepts and atlases that are kept, and how more are made."""
    more = {"net": net, "kept": concept_data.links(net, pages.site), **_makers(pages.site, net, None)}
    data = {"kind": "kept", "live": pages.site.live}
    return Page("kept.html", f"Concepts and atlases of {net.model.name}", data, more)


def concepts(pages: Pages, net: Network, target: int, layer: str | None, image: RegisteredImage | None) -> Page:
    """What a class is made of; where that is not known yet, how it is found out."""
    found = concept_data.saved_concepts(net, target)
    title = f"What {net.model.class_name(target)} is made of, {net.model.name}"
    data: dict[str, Any] = {"kind": "concepts", "live": pages.site.live}
    more: dict[str, Any] = {"net": net, "target": target, "target_name": net.model.class_name(target), "told": None}
    more |= _makers(pages.site, net, target)
    if not found and layer is None:
        return Page("concepts.html", title, data, more)
    one = concept_data.find_concepts(net, target, layer)
    arrays, image = concept_data.load_arrays(pages.explorer, one), image or pages.lead(net)
    told = concept_data.describe_concepts(net, one, arrays)
    highest = max(c["importance"] for c in told["concepts"])
    patches, views = concept_data.patch_tiles(arrays), concept_data.thumbnail_tiles(arrays)
    for r, concept in enumerate(told["concepts"]):
        concept["share"] = max(0.0, concept["importance"] / highest) if highest > 0 else 0.0
        concept["patches"], concept["most"] = patches[r], concept_data.top_images(arrays, r)
    data |= {
        "heats": concept_data.packed_heatmaps(arrays),
        "pictures": len(views),
        "palette": lookup_table("jet")[::8].tolist(),
    }
    more |= {
        "told": told,
        "layers": [(other.layer, pages.site.page(*concept_data.parts_of(net, other))) for other in found],
        "patches": {"src": pages.site.kept(net, one, "patches"), "size": concept_data.patch_sheet_size(arrays)},
        "views": {
            "src": pages.site.kept(net, one, "views"),
            "size": concept_data.thumbnail_sheet_size(arrays),
            "tiles": views,
        },
        "lines": snippets.concepts(pages.site.source(net.source), _store(pages.site, net), target, one.layer),
        "picture": image,
        "samples": pages.explorer.images.samples,
    }
    if image is not None:
        own = concept_data.concept_heatmaps(pages.explorer, pages.asker, net, image, one)
        data["current"] = [compute.pack_map(heatmap) for heatmap in own]
        more["photo"] = pages.site.photo(image, 640)
    return Page("concepts.html", title, data, more)


def atlas(pages: Pages, net: Network, name: str) -> Page:
    """An atlas: a map of icons, and what each stands for."""
    one, site = concept_data.find_atlas(net, name), pages.site
    arrays = concept_data.load_arrays(pages.explorer, one)
    told, laid = concept_data.describe_atlas(pages.explorer, net, one, arrays), concept_data.icon_layout(arrays)
    side, shares = laid["side"], (arrays["counts"] / arrays["counts"].max()) ** 0.5
    drawn = (CELL - GAP) * (SMALLEST + (1 - SMALLEST) * shares)
    corner, end = arrays["cells"].min(0), arrays["cells"].max(0) + 1
    for i, cell in enumerate(told["cells"]):
        cell["x"], cell["y"] = i % laid["columns"] * side, i // laid["columns"] * side
        cell["left"], cell["top"] = CELL * (cell["column"] - int(corner[1])), ROW * (cell["row"] - int(corner[0]))
        cell["side"] = round(float(drawn[i]), 1)
        for said in cell["classes"]:
            said["page"] = site.page("m", net.key, "class", said["index"])
        for shown in cell["pictures"]:
            known = shown["number"] is not None
            shown["page"] = site.page("m", net.key, "data", shown["number"]) if known else ""
            shown["src"] = site.thumbnail(net, shown["number"]) if known else ""
    sheet = {"src": site.kept(net, one, "icons"), "side": side}
    sheet |= {"width": laid["columns"] * side, "height": laid["rows"] * side}
    data = {"kind": "atlas", "live": site.live, "sheet": sheet, "cells": told["cells"]}
    down, across = (end - corner).tolist()
    data |= {"size": [across * CELL, down * ROW], "cell": [CELL, ROW]}
    own = site.page(*concept_data.parts_of(net, one))
    target_name = None if one.target is None else net.model.class_name(one.target)
    more = {
        "net": net,
        "told": told,
        "sheet": sheet,
        "cell": CELL,
        "row": ROW,
        "gap": GAP,
        "size": data["size"],
        "word": WORD,
        "target_name": target_name,
        "lines": snippets.atlas(site.source(net.source), _store(site, net), one.layer, one.target),
        "others": [other for other in concept_data.links(net, site)["atlases"] if other["page"] != own],
    }
    of = "" if target_name is None else f" for {target_name}"
    return Page("atlas.html", f"Atlas of {one.layer}{of}, {net.model.name}", data, more)


def _makers(site: UrlBuilder, net: Network, target: int | None) -> dict[str, Any]:
    """The lines that make what is not there."""
    store, name = _store(site, net), site.source(net.source)
    made = {"make_concepts": snippets.concepts(name, store, target), "make_atlas": snippets.atlas(name, store)}
    return {**made, "make_store": None if net.store else snippets.scan(name)}


def _store(site: UrlBuilder, net: Network) -> str:
    """The store as a user's line names it; on public pages it is not said where it lies."""
    return net.store.address if site.live and net.store is not None else "STORE"
