"""The page that lists all concepts and atlases in the store."""

from __future__ import annotations

from convscope.explorer.service.networks import Network
from convscope.explorer.urls import UrlBuilder
from convscope.explorer.views import snippets
from convscope.explorer.views.page import Page, PageContext, Values
from convscope.explorer.views.saved_links import saved_links


def build(context: PageContext, network: Network) -> Page:
    """Build the list of concepts and atlases, with the code that computes more."""
    variables: Values = {"saved": saved_links(network, context.urls), **computing_code(context.urls, network)}
    title = f"Concepts and atlases of {network.model.name}"
    return Page("saved_results.html", title, network, context.page_data("saved_results"), variables)


def computing_code(urls: UrlBuilder, network: Network, target: int | None = None) -> dict[str, snippets.Snippet | None]:
    """Return the code that computes concepts, an atlas and, if there is none, the store."""
    store, model = store_name(urls, network), urls.source(network.source)
    return {
        "concepts_code": snippets.concepts(model, store, target),
        "atlas_code": snippets.atlas(model, store),
        "scan_code": None if network.store else snippets.scan(model),
    }


def store_name(urls: UrlBuilder, network: Network) -> str:
    """Return the store's address; published pages do not disclose it."""
    return network.store.address if urls.live and network.store is not None else "STORE"
