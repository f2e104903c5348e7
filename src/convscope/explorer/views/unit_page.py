"""The unit page: the pattern of a unit, its top patches and its activation map on an image."""

from __future__ import annotations

from convscope.engine.model import LOGITS
from convscope.explorer.service import compute
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.service.patterns import RECIPES, VARIANTS, PatternSpec
from convscope.explorer.service.schemas import PatternRecord
from convscope.explorer.views import names_page, snippets, store_views
from convscope.explorer.views.network_page import receptive_field_text
from convscope.explorer.views.page import Page, PageContext, Values
from convscope.images.colormap import color_stops


def build(
    context: PageContext, network: Network, layer: str, unit: int, image: RegisteredImage | None, spec: PatternSpec
) -> Page:
    """Build the page of a unit; a unit of the layer "logits" is a class."""
    urls = context.urls
    image = image or context.default_image(network)
    hidden_layer = None if layer == LOGITS else network.layer(layer)
    class_name = network.model.class_name(unit) if layer == LOGITS else None
    pattern = context.explorer.get_pattern(network, spec)
    data = context.page_data(
        "unit",
        layer=layer,
        unit=unit,
        events=f"/api/models/{network.key}/pattern/events",
        colormap=color_stops("viridis"),
    )
    is_spatial = hidden_layer is None or hidden_layer.is_spatial
    variables: Values = {
        "layer": layer,
        "unit": unit,
        "num_units": network.num_units(layer),
        "class_name": class_name,
        "receptive_field": hidden_layer and receptive_field_text(network, hidden_layer),
        "spec": spec,
        "variants": [variant for variant in VARIANTS if variant != "diverse" or is_spatial],
        "recipes": RECIPES,
        "pattern": pattern and {**_without_image(pattern), "src": urls.pattern(network, spec)},
        "statistics": store_views.unit_statistics(network, urls, layer, unit),
        "unit_name": names_page.unit_name(context, network, layer, unit),
        "code": snippets.pattern(urls.source(network.source), spec, network.model),
        "map": None,
        "image": image,
    }
    if image is not None and hidden_layer is not None:
        values = context.explorer.feature_maps(context.client, network, image, layer)[unit]
        table = compute.channel_statistics(values[None])
        data["map"] = compute.pack_map(values)
        data["changes"] = f"/api/models/{network.key}/images/{image.key}/logit-changes"
        variables["map"] = {
            "photo": urls.photo(image, 1024),
            **{name: table[name][0] for name in ("max", "mean", "dead")},
        }
    name = f"unit {unit} of {layer}" if class_name is None else f"class {class_name}"
    return Page("unit.html", f"{name}, {network.model.name}", network, data, variables)


def _without_image(pattern: PatternRecord) -> Values:
    return {name: value for name, value in pattern.items() if name != "image"}
