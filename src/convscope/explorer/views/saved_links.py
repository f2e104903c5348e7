"""Links to the concepts and atlases in a store."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.explorer.service import concept_data
from convscope.explorer.service.networks import Network
from convscope.explorer.urls import Parts, UrlBuilder
from convscope.store.saved_results import SavedResult


def page_parts(network: Network, result: SavedResult) -> Parts:
    """Return the parts of the address of an atlas, or of a class's concepts.

    The concepts that `concept_data.saved_concepts` lists first for a class need no layer in their address.
    """
    if result.target is None or result.kind == "atlas":
        return ("m", network.key, "atlas", result.name)
    is_first = concept_data.saved_concepts(network, result.target)[0].name == result.name
    return ("m", network.key, "concepts", result.target, *(() if is_first else (result.layer,)))


@dataclass(frozen=True)
class SavedLink:
    """A link to the page of a saved result; `class_name` is None for atlases of all classes."""

    class_name: str | None
    layer: str
    page: str


@dataclass(frozen=True)
class SavedLinks:
    """Links to concepts and atlases."""

    concepts: list[SavedLink]
    atlases: list[SavedLink]


def saved_links(network: Network, urls: UrlBuilder, target: int | None = None) -> SavedLinks:
    """Return links to all concepts and atlases, or to those of a class and the atlases of all classes."""
    atlases = [
        result for result in concept_data.saved_atlases(network) if target is None or result.target in (None, target)
    ]
    return SavedLinks(
        concepts=[_link(network, urls, result) for result in concept_data.saved_concepts(network, target)],
        atlases=[_link(network, urls, result) for result in atlases],
    )


def _link(network: Network, urls: UrlBuilder, result: SavedResult) -> SavedLink:
    class_name = None if result.target is None else network.model.class_name(result.target)
    return SavedLink(class_name, result.layer, urls.page(*page_parts(network, result)))
