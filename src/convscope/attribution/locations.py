"""Where the targets are in images: maps that follow objects, and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from convscope.arguments import check_arguments
from convscope.attribution.api import compute_heatmaps, resolve_method
from convscope.attribution.location_result import Locations
from convscope.attribution.map_boxes import find_boxes
from convscope.attribution.multiscale import validate_scales
from convscope.attribution.result import Heatmaps
from convscope.attribution.targets import ClassLabels, Targets
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_number, warns_of_failures
from convscope.images.loading import DEFAULT_MAX_PIXELS
from convscope.progress import ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model

SCALES = (1, 1.625)  # of the input, together 3.6 times its pixels
THRESHOLD = 0.35


@warns_of_failures
@check_arguments
def locate(
    model: ModelLike,
    images: object,
    targets: Targets | None = None,
    *,
    layer: LayerLike | Sequence[LayerLike] | None = None,
    threshold: float = THRESHOLD,
    fit: str = "squash",
    against: ClassLabels | None = None,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Locations:
    """Find where the targets are in images: a map and a box for each.

    The maps are Grad-CAM's at one and 1.625 times the network's input size, multiplied
    (``scale=(1, 1.625), fuse="product"``), and made to follow the edges of the image (``refine=True``). That takes less
    time than five forward passes, whatever the number of targets. A network that runs at its own size alone is used at
    that size, which a note says.

    A box is the bounding box of the largest connected region of a map above a fraction of its maximum (Zhou et al.,
    2016). The fraction, 35 %, gave the best boxes on 37 composites of photographs; the paper takes 20 % of maps that
    are not refined. There is one box for each target, also where an image shows several objects of a class, or none:
    low scores and probabilities tell.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        Any form that `convscope.predict` takes; N images.
    targets : class, sequence or callable, optional
        As in `convscope.heatmaps`: one class (index or name) for all images, one per image, or a list of T for each
        image; by default each image's top class.
    layer : str, Layer, nn.Module or sequence of these, optional
        As in `convscope.heatmaps`.
    threshold : float
        Fraction of a map's maximum above which positions belong to the box, 0 to 1.
    fit : {"squash", "crop"}
        Show the network the whole image, squashed to its input size, or the crop of its own evaluation.
    against : class or sequence of classes, optional
        As in `convscope.heatmaps`.
    memory : int
        Bytes that a batch's intermediate results may take.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        As in `convscope.heatmaps`.

    Returns
    -------
    Locations
        `Heatmaps` with ``boxes`` (N, T, 4) in pixels of the images, and their ``scores`` (N, T).

    Raises
    ------
    ConvscopeError
        As `convscope.heatmaps`; for a threshold out of range; for networks that take no images.

    References
    ----------
    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016, section 3.2 (boxes). Araslanov and
    Roth, Single-Stage Semantic Segmentation from Image Labels, CVPR 2020 (edges of the image).

    Examples
    --------
    >>> import convscope, convscope.samples
    >>> model = convscope.load("lite0")
    >>> locations = convscope.locate(model, convscope.samples.photographs()[0])
    >>> locations.boxes.shape
    (1, 1, 4)
    """
    require_number("threshold", threshold, minimum=0, maximum=1)
    model = as_model(model)
    spec = resolve_method(model, "grad-cam", layer, "product", {})
    scales, notes = _scales(model)
    with progress_bar(progress, "locate") as report:
        (maps,) = compute_heatmaps(
            model,
            images,
            targets,
            [spec],
            fit=fit,
            against=against,
            scale=scales,
            refine=True,
            memory=memory,
            max_pixels=max_pixels,
            progress=report,
        )
    return _with_boxes(maps, float(threshold), notes)


def _scales(model: Model) -> tuple[Sequence[float], tuple[str, ...]]:
    """Return the scales that the network runs at, and a note if these are not all."""
    try:
        return validate_scales(model, SCALES), ()
    except ConvscopeError:
        size = " x ".join(map(str, model.preprocessing.size))
        return (1,), (f"the network runs at its own size, {size}, alone: locations are less exact",)


def _with_boxes(maps: Heatmaps, threshold: float, notes: tuple[str, ...]) -> Locations:
    """Add boxes to maps."""
    fractions, scores = find_boxes(torch.from_numpy(maps.values), threshold)
    boxes = []
    for geometry, of_image in zip(maps.geometry, fractions, strict=True):
        height, width = geometry.image_size
        edges = geometry.boxes_to_original(of_image)
        boxes.append(torch.minimum(edges.clamp(min=0), edges.new_tensor([width, height] * 2)))
    values = {f.name: getattr(maps, f.name) for f in fields(maps)} | {"notes": (*maps.notes, *notes)}
    return Locations(**values, boxes=torch.stack(boxes).numpy(), scores=scores.numpy(), threshold=threshold)
