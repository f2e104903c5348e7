"""The class page: the unit page of a class, with its concepts, atlases and characteristic units."""

from __future__ import annotations

from dataclasses import replace

from convscope.engine.model import LOGITS
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.views import saved_links, store_views, unit_page
from convscope.explorer.views.page import Page, PageContext


def build(context: PageContext, network: Network, index: int, image: RegisteredImage | None, spec: PatternSpec) -> Page:
    """Build the page of a class."""
    urls = context.urls
    page = unit_page.build(context, network, LOGITS, index, image, spec)
    variables = {
        **page.variables,
        "characteristic_units": store_views.characteristic_units(network, urls, index),
        "saved": saved_links.saved_links(network, urls, index),
        "concepts_page": urls.page("m", network.key, "concepts", index),
    }
    title = f"{network.model.class_name(index)}, {network.model.name}"
    return replace(page, template="class.html", title=title, variables=variables)
