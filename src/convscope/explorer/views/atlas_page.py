"""The atlas page: a map of icons that can be zoomed, with details of each cell."""

from __future__ import annotations

import numpy as np

from convscope.explorer.service import concept_data
from convscope.explorer.service.networks import Network
from convscope.explorer.service.schemas import JsonObject
from convscope.explorer.urls import UrlBuilder
from convscope.explorer.views import snippets
from convscope.explorer.views.page import Page, PageContext, Values
from convscope.explorer.views.saved_links import page_parts, saved_links
from convscope.explorer.views.saved_results_page import store_name
from convscope.plotting.grids import icon_scales

# Sizes in units of the SVG's view box.
CELL_WIDTH, CELL_HEIGHT = 100, 126  # the height leaves room for a label below the icon
GAP = 6  # between icons
MAX_LABEL_LENGTH = 19  # characters


def build(context: PageContext, network: Network, name: str) -> Page:
    """Build the page of the atlas called `name`. Raises UnknownResource if the store has none of that name."""
    urls = context.urls
    result = concept_data.find_atlas(network, name)
    arrays = concept_data.load_arrays(context.explorer, result)
    description = concept_data.describe_atlas(context.explorer, network, result, arrays)
    cells, grid = description["cells"], concept_data.icon_layout(arrays)
    _position_cells(cells, arrays, grid)
    for cell in cells:
        _add_links(urls, network, cell)
    sheet = {
        "src": urls.saved_sheet(network, result, "icons"),
        "side": grid["side"],
        "width": grid["columns"] * grid["side"],
        "height": grid["rows"] * grid["side"],
    }
    rows, columns = (arrays["cells"].max(0) + 1 - arrays["cells"].min(0)).tolist()
    size = [columns * CELL_WIDTH, rows * CELL_HEIGHT]
    data = context.page_data("atlas", sheet=sheet, cells=cells, size=size, cellSize=[CELL_WIDTH, CELL_HEIGHT])
    target_name = None if result.target is None else network.model.class_name(result.target)
    page_url = urls.page(*page_parts(network, result))
    variables: Values = {
        **description,
        "sheet": sheet,
        "size": size,
        "cell_width": CELL_WIDTH,
        "cell_height": CELL_HEIGHT,
        "max_label_length": MAX_LABEL_LENGTH,
        "target_name": target_name,
        "code": snippets.atlas(urls.source(network.source), store_name(urls, network), result.layer, result.target),
        "other_atlases": [link for link in saved_links(network, urls).atlases if link.page != page_url],
    }
    suffix = "" if target_name is None else f" for {target_name}"
    return Page("atlas.html", f"Atlas of {result.layer}{suffix}, {network.model.name}", network, data, variables)


def _position_cells(cells: list[JsonObject], arrays: dict[str, np.ndarray], grid: dict[str, int]) -> None:
    """Add to each cell the position of its icon on the sheet (x, y) and in the drawing (left, top, icon_*)."""
    first_row, first_column = arrays["cells"].min(0).tolist()
    scales = icon_scales(arrays["counts"])
    for i, cell in enumerate(cells):
        side = round(float((CELL_WIDTH - GAP) * scales[i]), 1)
        left = CELL_WIDTH * (cell["column"] - first_column)
        top = CELL_HEIGHT * (cell["row"] - first_row)
        cell |= {
            "x": i % grid["columns"] * grid["side"],
            "y": i // grid["columns"] * grid["side"],
            "left": left,
            "top": top,
            "icon_side": side,
            "icon_left": left + (CELL_WIDTH - side) / 2,
            "icon_top": top + CELL_WIDTH - GAP / 2 - side,
        }


def _add_links(urls: UrlBuilder, network: Network, cell: JsonObject) -> None:
    for row in cell["classes"]:
        row["page"] = urls.page("m", network.key, "class", row["index"])
    for image in cell["images"]:
        in_dataset = image["index"] is not None
        image["page"] = urls.page("m", network.key, "data", image["index"]) if in_dataset else ""
        image["src"] = urls.thumbnail(network, image["index"]) if in_dataset else ""
