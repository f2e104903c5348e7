"""The unit page: the pattern of a unit, its top patches and its activation map on an image."""

from __future__ import annotations

from typing import get_args

from convscope.engine.model import LOGITS
from convscope.explorer.service import compute
from convscope.explorer.service.dictionary_features import nearest_features
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.service.patterns import RECIPES, VARIANTS, PatternSpec
from convscope.explorer.service.removals import How, largest_changes
from convscope.explorer.service.schemas import LogitChange, PatternRecord
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
        "nearest_features": [
            store_views.unit_link(network, urls, layer, other, cosine)
            for other, cosine in nearest_features(network.model, layer, unit, store_views.NUM_SIMILAR)
        ],
        "code": snippets.pattern(urls.source(network.source), spec, network.model),
        "map": None,
        "image": image,
    }
    if image is not None and hidden_layer is not None:
        values = context.explorer.feature_maps(context.client, network, image, layer)[unit]
        table = compute.channel_statistics(values[None])
        data["map"] = compute.pack_map(values)
        if urls.live:
            data["changesApi"] = f"/api/models/{network.key}/images/{image.key}/logit-changes"
        elif network.classifies() and not network.detects:
            data["changes"] = _logit_changes(context, network, image, layer, unit)
        variables["map"] = {
            "photo": urls.photo(image, 1024),
            **{name: table[name][0] for name in ("max", "mean", "dead")},
        }
    name = f"unit {unit} of {layer}" if class_name is None else f"class {class_name}"
    return Page("unit.html", f"{name}, {network.model.name}", network, data, variables)


def _logit_changes(
    context: PageContext, network: Network, image: RegisteredImage, layer: str, unit: int
) -> dict[str, list[LogitChange]]:
    """Return the largest changes of logits without a unit, by what replaces it, for pages that cannot ask a server."""
    changes = {}
    for how in get_args(How):
        before, after = context.explorer.logits_without_units(context.client, network, image, layer, how)
        changes[how] = largest_changes(network.model, before, after[unit])
    return changes


def _without_image(pattern: PatternRecord) -> Values:
    return {name: value for name, value in pattern.items() if name != "image"}
