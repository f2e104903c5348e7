"""The layer page: the activation maps of an image, and the top patches of the layer's units."""

from __future__ import annotations

import numpy as np

from convscope.engine.layer_table import Layer
from convscope.explorer.service import compute
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.views import snippets, store_views
from convscope.explorer.views.image_page import TOP_CLASSES
from convscope.explorer.views.network_page import receptive_field_text
from convscope.explorer.views.page import Page, PageContext, Values

MAPS_AT_FIRST = 256  # activation maps that a page shows before "Show all"
MAX_PUBLISHED_POSITIONS = 1024
PUBLISHED_UNITS_PER_POSITION = 6


def build(
    context: PageContext, network: Network, layer: Layer, image: RegisteredImage | None, target: int | None = None
) -> Page:
    """Build the layer page; relevance is for `target`, by default the top class."""
    image = image or context.default_image(network)
    data = context.page_data("layer", layer=layer.name, units=layer.units)
    variables: Values = {
        "layer": layer,
        "image": image,
        "neighbours": _neighbours(network, layer),
        "receptive_field": receptive_field_text(network, layer),
        "unit_patches": store_views.unit_patches(network, context.urls, layer.name),
        "num_dead": 0,
    }
    if image is not None:
        image_data, image_variables = _on_image(context, network, layer, image, target)
        data |= image_data
        variables |= image_variables
    return Page("layer.html", f"{layer.name}, {network.model.name}", network, data, variables)


def _on_image(
    context: PageContext, network: Network, layer: Layer, image: RegisteredImage, target: int | None
) -> tuple[Values, Values]:
    """Return the page's data and variables that depend on the image."""
    urls, explorer, client = context.urls, context.explorer, context.client
    maps = explorer.feature_maps(client, network, image, layer.name)
    _, sheet = explorer.feature_map_sheet(client, network, image, layer.name)
    statistics = compute.channel_statistics(maps)
    table: Values = {**statistics}
    variables: Values = {}
    if network.classifies():
        predictions = explorer.predictions(client, network, image)[:TOP_CLASSES]
        target = predictions[0]["index"] if target is None else target
        relevance = explorer.relevance(client, network, image, layer.name, target)
        table["relevance"] = [float(f"{value:.4g}") for value in relevance]
        target_name = network.model.class_name(target)
        variables |= {"target": target, "target_name": target_name, "predictions": predictions}
    data: Values = {
        "table": table,
        "image": image.key,
        "api": f"/api/models/{network.key}/images/{image.key}",
        "grid": [maps.shape[1], maps.shape[2]],
        "field": compute.receptive_field_grid(network.model, layer.name),
        "unitPage": urls.page("m", network.key, "unit", layer.name, 0),
    }
    if not urls.live:
        data["positions"] = _strongest_units(maps)
    order = np.argsort(-np.array(statistics["max"]), kind="stable")
    variables |= {
        "sheet_url": urls.feature_maps(network, image, layer.name),
        "sheet": sheet,
        "photo": urls.photo(image, 1024),
        "maps": [
            {
                "unit": unit,
                "x": unit % sheet["columns"] * sheet["width"],
                "y": unit // sheet["columns"] * sheet["height"],
                "dead": statistics["dead"][unit],
                "page": urls.page("m", network.key, "unit", layer.name, unit),
            }
            for unit in order.tolist()
        ],
        "maps_at_first": MAPS_AT_FIRST,
        "num_dead": sum(statistics["dead"]),
        "code": snippets.activations(urls.source(network.source), urls.source(image.source), layer.name),
        "sort_keys": [key for key in ("max", "mean", "relevance") if key in table],
    }
    return data, variables


def _neighbours(network: Network, layer: Layer) -> dict[str, str | None]:
    """Return the names of the previous and the next layer."""
    names = [other.name for other in network.layers]
    name = layer.alias_of or layer.name
    if name not in names:
        return {"previous": None, "next": None}
    i = names.index(name)
    return {"previous": names[i - 1] if i else None, "next": names[i + 1] if i + 1 < len(names) else None}


def _strongest_units(maps: np.ndarray) -> dict[str, list[list[float]]] | None:
    """Return the strongest units at each position, row by row, for pages that cannot ask a server.

    Returns None for maps with more than `MAX_PUBLISHED_POSITIONS` positions.
    """
    height, width = maps.shape[1:]
    if height * width > MAX_PUBLISHED_POSITIONS:
        return None
    flat = maps.reshape(len(maps), -1)
    units = np.argsort(-flat, axis=0, kind="stable")[:PUBLISHED_UNITS_PER_POSITION].T
    values = np.take_along_axis(flat, units.T, 0).T
    return {"units": units.tolist(), "values": [[float(f"{value:.3g}") for value in row] for row in values]}
