"""The network page: all layers as a table and as a graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from convscope.engine.layer_table import Layer, format_receptive_field
from convscope.explorer.service.networks import Network
from convscope.explorer.urls import UrlBuilder
from convscope.explorer.views import layout, store_views
from convscope.explorer.views.page import Page, PageContext, Values


@dataclass(frozen=True)
class LayerRow:
    """A layer in the table and the graph; `stride` and `field` are in pixels, `measures` by name."""

    name: str
    kind: str
    shape: tuple[int, ...]
    units: int
    receptive_field: str
    stride: float | None
    field: float | None
    parameters: int
    page: str
    measures: dict[str, float]


def build(context: PageContext, network: Network) -> Page:
    """Build the network page."""
    image = context.default_image(network)
    measures = store_views.layer_measures(network)
    if not context.urls.live and image is not None:
        # Values from the store's data set take precedence over those from a single image.
        for name, values in context.explorer.layer_summaries(context.client, network, image).items():
            measures[name] = values | measures.get(name, {})
    rows = [_layer_row(context.urls, network, layer, measures.get(layer.name, {})) for layer in network.layers]
    graph = layout.graph_layout([(layer.shape[1:] or (1,))[0] for layer in network.layers], network.edges)
    summaries = f"/api/models/{network.key}/images/{image.key}/layers" if image else None
    data = context.page_data("network", summaries=summaries, layers=[asdict(row) for row in rows], graph=asdict(graph))
    variables: Values = {"layers": rows, "image": image, "graph": graph}
    return Page("network.html", f"Layers of {network.model.name}", network, data, variables)


def receptive_field_text(network: Network, layer: Layer) -> str:
    """Format a layer's receptive field: its size in pixels, or 'the whole image'."""
    return format_receptive_field(layer.bounded_receptive_field(network.model.preprocessing.size), " × ")


def _layer_row(urls: UrlBuilder, network: Network, layer: Layer, measures: dict[str, float]) -> LayerRow:
    field = None if layer.receptive_field is None else max(layer.receptive_field)
    return LayerRow(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        units=layer.units,
        receptive_field=receptive_field_text(network, layer),
        stride=None if layer.stride is None else max(layer.stride),
        field=None if field is None else min(field, max(network.model.preprocessing.size)),
        parameters=layer.parameters,
        page=urls.page("m", network.key, "layer", layer.name),
        measures=measures,
    )
