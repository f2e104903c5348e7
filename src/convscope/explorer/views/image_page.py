"""The image page: predictions for an image, and heatmaps of the evidence for a class."""

from __future__ import annotations

from typing import Any

from convscope.attribution.registry import BASELINES, default_method, default_method_for_boxes, usable_methods
from convscope.explorer.service.compute import COLORMAPS, HeatmapOptions
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.service.schemas import DetectedBox
from convscope.explorer.service.state import SLOW_METHODS
from convscope.explorer.views import snippets
from convscope.explorer.views.page import Page, PageContext
from convscope.images.colormap import DIVERGING, SEQUENTIAL, color_stops

TOP_CLASSES = 5
MAX_BOXES = 20  # of one image


def build(context: PageContext, network: Network, image: RegisteredImage, target: int | None = None) -> Page:
    """Build the image page; `target` defaults to the top class."""
    urls, explorer = context.urls, context.explorer
    predictions = explorer.predictions(context.client, network, image)[:TOP_CLASSES]
    classes = [row["index"] for row in predictions]
    target = classes[0] if target is None else target
    targets = classes if target in classes else [*classes, target]
    heatmaps = {row["target"]: row for row in explorer.heatmap(context.client, network, image, targets)}
    sources = urls.source(network.source), urls.source(image.source)
    method = default_method(network.model)
    code = {k: snippets.heatmap(*sources, k, HeatmapOptions(method=method)) for k in heatmaps}
    boxes = explorer.detections(context.client, network, image)[:MAX_BOXES]
    layer = heatmaps[target]["layer"]
    data = context.page_data(
        "image",
        api=f"/api/models/{network.key}/images/{image.key}",
        model=network.key,
        image=image.key,
        target=target,
        layer=layer,
        method=method,
        heatmaps=heatmaps,
        noun=network.model.output_noun,
        hasValues=network.model.has_values,
        boxes=boxes,
        boxHeatmaps=[] if urls.live else [_box_heatmap(context, network, image, box, sources) for box in boxes],
        explanations={} if urls.live else {k: _explanation(context, network, image, k) for k in targets},
        words=_evidence_words(network),
        sequential=SEQUENTIAL,
        diverging=DIVERGING,
        colormaps={name: color_stops(name) for name in COLORMAPS},
        code=code,
        pages={k: urls.page("m", network.key, "image", image.key, "class", k) for k in heatmaps},
        classPages={k: urls.page("m", network.key, "class", k) for k in heatmaps},
    )
    variables = {
        "image": image,
        "photo": urls.photo(image, 1024),
        "predictions": predictions,
        "boxes": boxes,
        "target": target,
        "target_name": network.model.class_name(target),
        "layers": [other.name for other in network.layers if not other.is_pooling],
        "default_layer": layer,
        "methods": [name for name in usable_methods(network.model) if name not in BASELINES],
        "default_method": method,
        "slow_methods": SLOW_METHODS,
        "colormaps": COLORMAPS,
        "words": _evidence_words(network),
        "stages": [*network.main_layers, *network.feature_layers],
        "samples": explorer.images.samples,
        "code": code[target],
    }
    return Page("image.html", f"{image.name}, {network.model.name}", network, data, variables)


def _evidence_words(network: Network) -> dict[str, str]:
    """Return the words for positive and negative values of a heatmap."""
    if network.model.has_values:
        return {
            "setting": "Influence",
            "for": "raises the value",
            "against": "lowers the value",
            "both": "raises or lowers",
            "none": "no influence",
            "strongest": "raises the value most",
        }
    return {
        "setting": "Evidence",
        "for": "for the class",
        "against": "against the class",
        "both": "for and against",
        "none": "no evidence",
        "strongest": "strongest evidence",
    }


def _explanation(context: PageContext, network: Network, image: RegisteredImage, target: int) -> dict[str, Any]:
    """Return the units that carry a class's logit, with their pages, for pages that cannot ask a server."""
    record = context.explorer.explanation(context.client, network, image, target, None)
    parts = ("m", network.key, "unit", record["layer"])
    return {**record, "units": [{**row, "page": context.urls.page(*parts, row["unit"])} for row in record["units"]]}


def _box_heatmap(
    context: PageContext, network: Network, image: RegisteredImage, box: DetectedBox, sources: tuple[str, str]
) -> dict[str, Any]:
    """Return the default heatmap of a detected box, and the code that computes it."""
    options = HeatmapOptions(method=default_method_for_boxes(network.model), box=box["number"])
    (record,) = context.explorer.heatmap(context.client, network, image, [box["index"]], options)
    return {**record, "snippets": snippets.heatmap(*sources, box["index"], options)}
