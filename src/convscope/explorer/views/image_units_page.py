"""The page of the units that an image excites more than most images of the store's sample do."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.engine.model import LOGITS
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.views import store_views
from convscope.explorer.views.page import Page, PageContext, Values
from convscope.explorer.views.store_views import UnitPatch

NUM_UNITS = 48


@dataclass(frozen=True)
class ImageUnitRow:
    """A unit, its name, the fraction of the sample that excites it less than the image, and its top patch."""

    layer: str
    unit: int
    name: str
    percentile: float
    page: str
    patch: UnitPatch | None


def build(context: PageContext, network: Network, image: RegisteredImage) -> Page:
    """Build the page. Raises UnknownResource if the network has no store."""
    urls = context.urls
    matches = context.explorer.units_of_image(context.client, network, image)[:NUM_UNITS]
    rows = []
    for match in matches:
        link = store_views.unit_link(network, urls, match.layer, match.unit, match.relevance)
        name = link.name or (match.name if match.layer == LOGITS else "")
        patch = store_views.best_patch(network, urls, match.layer, match.unit)
        rows.append(ImageUnitRow(match.layer, match.unit, name, match.relevance, link.page, patch))
    store = network.store
    variables: Values = {
        "image": image,
        "photo": urls.photo(image, 320),
        "rows": rows,
        "num_sample": 0 if store is None else len(store.sample_images),
        "samples": context.explorer.images.samples,
    }
    title = f"Units that respond to {image.name}, {network.model.name}"
    return Page("image_units.html", title, network, context.page_data("image_units"), variables)
