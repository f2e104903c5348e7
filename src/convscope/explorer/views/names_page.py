"""The page of named units: a table that is searched as the reader types."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.engine.model import LOGITS
from convscope.explorer.service.networks import Network
from convscope.explorer.views.page import Page, PageContext, Values
from convscope.store.unit_names import UnitNames

MAX_NAMES = 5000  # in a page


@dataclass(frozen=True)
class NameRow:
    """A named unit and its page."""

    layer: str
    unit: int
    name: str
    score: float
    runner_up: str
    page: str


def unit_name(context: PageContext, network: Network, layer: str, unit: int) -> NameRow | None:
    """Return the name of a unit; None if it has none that is better than chance."""
    names = _names(network)
    position = None if names is None else names.position(layer, unit)
    return None if names is None or position is None else _row(context, network, names, position)


def build(context: PageContext, network: Network) -> Page:
    """Build the page."""
    names = _names(network)
    order = [] if names is None else names.order.tolist()
    variables: Values = {
        "names": names,
        "example": context.default_image(network) if network.store is not None else None,
        "num_named": len(order),
        "rows": [_row(context, network, names, i) for i in order[:MAX_NAMES]] if names is not None else [],
    }
    title = f"Named units of {network.model.name}"
    return Page("names.html", title, network, context.page_data("names"), variables)


def _names(network: Network) -> UnitNames | None:
    return None if network.store is None else network.store.names()


def _row(context: PageContext, network: Network, names: UnitNames, i: int) -> NameRow:
    layer, unit = str(names.layer[i]), int(names.units[i])
    parts = ("class", unit) if layer == LOGITS else ("unit", layer, unit)
    return NameRow(
        layer=layer,
        unit=unit,
        name=str(names.names[i]),
        score=float(names.scores[i]),
        runner_up=str(names.runner_up[i]),
        page=context.urls.page("m", network.key, *parts),
    )
