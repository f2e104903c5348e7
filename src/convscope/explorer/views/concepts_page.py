"""The page of a class's concepts: importance, patches and heatmaps."""

from __future__ import annotations

from convscope.explorer.service import compute, concept_data
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.views import snippets
from convscope.explorer.views.page import Page, PageContext, Values
from convscope.explorer.views.saved_links import page_parts
from convscope.explorer.views.saved_results_page import computing_code, store_name
from convscope.images.colormap import color_stops
from convscope.store.saved_results import SavedResult


def build(
    context: PageContext, network: Network, target: int, layer: str | None, image: RegisteredImage | None
) -> Page:
    """Build the page of a class's concepts at `layer`, or the code that computes them if there are none.

    Raises UnknownResource for a layer at which the class has no concepts.
    """
    data = context.page_data("concepts")
    class_name = network.model.class_name(target)
    variables: Values = {
        "target": target,
        "target_name": class_name,
        "concepts": None,
        **computing_code(context.urls, network, target),
    }
    results = concept_data.saved_concepts(network, target)
    if results or layer is not None:
        result = concept_data.find_concepts(network, target, layer)
        variables["layers"] = [(r.layer, context.urls.page(*page_parts(network, r))) for r in results]
        _add_concepts(context, network, result, data, variables)
        _add_image(context, network, result, image or context.default_image(network), data, variables)
    title = f"Concepts of {class_name}, {network.model.name}"
    return Page("concepts.html", title, network, data, variables)


def _add_concepts(context: PageContext, network: Network, result: SavedResult, data: Values, variables: Values) -> None:
    urls = context.urls
    arrays = concept_data.load_arrays(context.explorer, result)
    description = concept_data.describe_concepts(network, result, arrays)
    patches = concept_data.patch_tiles(arrays)
    thumbnails = concept_data.thumbnail_tiles(arrays)
    max_importance = max(concept["importance"] for concept in description["concepts"])
    for rank, concept in enumerate(description["concepts"]):
        concept["bar"] = max(0.0, concept["importance"] / max_importance) if max_importance > 0 else 0.0
        concept["patches"] = patches[rank]
        concept["top_images"] = concept_data.top_images(arrays, rank)
    evaluated = description["evaluated_images"]
    data["heatmaps"] = concept_data.packed_heatmaps(arrays)
    data["numImages"] = len(thumbnails)
    data["colormap"] = color_stops("jet")
    variables |= {
        **description,
        "patch_sheet": {
            "src": urls.saved_sheet(network, result, "patches"),
            "size": concept_data.patch_sheet_size(arrays),
        },
        "thumbnail_sheet": {
            "src": urls.saved_sheet(network, result, "thumbnails"),
            "size": concept_data.thumbnail_sheet_size(arrays),
        },
        "thumbnails": [{**tile, "name": row["name"]} for tile, row in zip(thumbnails, evaluated, strict=True)],
        "mean_logit": _mean([row["logit"] for row in evaluated]),
        "mean_reconstructed_logit": _mean([row["reconstructed_logit"] for row in evaluated]),
        "code": snippets.concepts(
            urls.source(network.source), store_name(urls, network), description["target"], result.layer
        ),
    }


def _add_image(
    context: PageContext,
    network: Network,
    result: SavedResult,
    image: RegisteredImage | None,
    data: Values,
    variables: Values,
) -> None:
    variables |= {"image": image, "samples": context.explorer.images.samples}
    if image is not None:
        heatmaps = concept_data.concept_heatmaps(context.explorer, context.client, network, image, result)
        data["imageHeatmaps"] = [compute.pack_map(heatmap) for heatmap in heatmaps]
        variables["photo"] = context.urls.photo(image, 640)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
