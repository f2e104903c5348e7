"""The page of a layer's units: a table by effect on a class, name, score and statistics."""

from __future__ import annotations

from convscope.engine.layer_table import Layer
from convscope.explorer.service import compute
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.views import store_views
from convscope.explorer.views.image_page import TOP_CLASSES
from convscope.explorer.views.page import Page, PageContext, Values


def build(
    context: PageContext, network: Network, layer: Layer, image: RegisteredImage | None, target: int | None = None
) -> Page:
    """Build the page; effects are on `target`, by default the top class."""
    urls, explorer, client = context.urls, context.explorer, context.client
    image = image or context.default_image(network)
    columns = store_views.unit_columns(network, layer.name)
    data = context.page_data(
        "units",
        layer=layer.name,
        units=layer.units,
        unitPage=urls.page("m", network.key, "unit", layer.name, 0),
        tiles=store_views.unit_tiles(network, urls, layer.name),
    )
    variables: Values = {"layer": layer, "image": image, "target": None, "classes": {}, "columns": columns}
    if image is not None:
        maps = explorer.feature_maps(client, network, image, layer.name)
        columns["maximum"] = compute.channel_statistics(maps)["max"]
        data |= {"image": image.key, "api": f"/api/models/{network.key}/images/{image.key}"}
    if image is not None and network.classifies() and not network.detects:
        rows = explorer.predictions(client, network, image)[:TOP_CLASSES]
        classes = {row["index"]: row["name"] for row in rows}
        target = rows[0]["index"] if target is None else target
        classes.setdefault(target, network.model.class_name(target))
        variables |= {"target": target, "classes": classes}
        if not urls.live:
            effects = {k: explorer.unit_effects(client, network, image, layer.name, k) for k in classes}
            data["effects"] = {k: [float(f"{value:.4g}") for value in values] for k, values in effects.items()}
    data["columns"] = columns
    return Page("units.html", f"Units of {layer.name}, {network.model.name}", network, data, variables)
