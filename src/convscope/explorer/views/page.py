"""Pages as data, and their rendering by templates; live and published pages share both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.networks import Network
from convscope.explorer.service.state import Explorer
from convscope.explorer.urls import UrlBuilder
from convscope.explorer.views.glossary import GLOSSARY
from convscope.store.unit_names import NAMES_FILE

Values = dict[str, object]
"""Values by name: variables of a template, or data of a script."""


@dataclass(frozen=True)
class Page:
    """A template and the values that fill it.

    Attributes
    ----------
    template : str
        A file of ``explorer/templates``.
    title : str
        The title of the browser's tab.
    network : Network
        The network that the page is about.
    data : dict
        What the page's scripts read, serialisable as JSON. ``kind`` names the kind of page.
    variables : dict
        Variables of the template.
    """

    template: str
    title: str
    network: Network
    data: Values
    variables: Values


@dataclass(frozen=True)
class PageContext:
    """What the pages are built from.

    Attributes
    ----------
    explorer : Explorer
    client : Client
        On whose behalf the network runs.
    urls : UrlBuilder
        Addresses as seen from the page.
    """

    explorer: Explorer
    client: Client
    urls: UrlBuilder

    def default_image(self, network: Network) -> RegisteredImage | None:
        """Return the first sample image, or None if there is none or the network takes no images."""
        samples = self.explorer.images.samples
        return samples[0] if samples and network.takes_images else None

    def has_names(self, network: Network) -> bool:
        """Return whether the store of a network has names of units."""
        return network.store is not None and network.store.folder.exists(NAMES_FILE)

    def has_diagnosis(self, network: Network) -> bool:
        """Return whether the store of a network has a diagnosis."""
        return network.store is not None and bool(network.store.diagnoses())

    def page_data(self, kind: str, **values: object) -> Values:
        """Return the data that every page's scripts need, and `values`."""
        return {"kind": kind, "live": self.urls.live, **values}


def render(page: Page, context: PageContext) -> str:
    """Render a page as HTML."""
    networks = list(context.explorer.networks.values())
    html: str = _ENVIRONMENT.get_template(page.template).render(
        **page.variables,
        title=page.title,
        network=page.network,
        data=page.data,
        urls=context.urls,
        glossary=GLOSSARY,
        networks=networks,
        name_counts=Counter(other.model.name for other in networks),
        store=page.network.store,
        has_diagnosis=context.has_diagnosis(page.network),
        has_names=context.has_names(page.network),
    )
    return html


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number to `digits` significant digits, without an exponent below one million; None as ''."""
    text = "" if value is None else f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value or 0) < 1e6 else text


def _define(term: str) -> str:
    return GLOSSARY[term]


_ENVIRONMENT = Environment(
    loader=PackageLoader("convscope.explorer"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    auto_reload=False,
)
_ENVIRONMENT.filters |= {"number": format_number, "definition": _define}
