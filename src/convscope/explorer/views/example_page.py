"""The example page: an image of the scanned data set, its predictions and the units that rank it high."""

from __future__ import annotations

from convscope.explorer.service.networks import Network
from convscope.explorer.views import store_views
from convscope.explorer.views.page import Page, PageContext


def build(context: PageContext, network: Network, index: int) -> Page:
    """Build the page of an image of the data set. Raises UnknownResource if the store has none with this index."""
    example = store_views.dataset_image(network, context.urls, index)
    data = context.page_data("example")
    return Page("example.html", f"{example.name}, image {index}", network, data, {"example": example})
