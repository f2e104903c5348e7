"""Computations on one image, with plain data as results.

Each function takes a model and its preprocessed input of shape (1, C, H, W).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convscope.attribution.api import heatmaps
from convscope.attribution.box_targets import box_target
from convscope.attribution.registry import has_mean_scores, is_signed
from convscope.attribution.result import Heatmaps, center, color_maximum, smooth_maps
from convscope.decomposition.nmf import encode
from convscope.detection.api import detect
from convscope.engine import capture
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.evaluation.api import evaluate
from convscope.evaluation.registry import get_metric
from convscope.explorer.service.images import RegisteredImage, encode_image
from convscope.explorer.service.schemas import (
    ChannelStatistics,
    DetectedBox,
    FaithfulnessRecord,
    HeatmapRecord,
    LayerSummary,
    MetricRecord,
    PackedMap,
    PositionRecord,
    Prediction,
    ReceptiveFieldGrid,
    SheetLayout,
    UnitValue,
)
from convscope.feature_maps import activations, is_constant_channel
from convscope.images.colormap import DIVERGING, SEQUENTIAL, ColorScale, lookup_table
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.plotting.activations import standardize
from convscope.plotting.grids import tile
from convscope.predictions import predict

COLORMAPS = (SEQUENTIAL, "viridis", "inferno", DIVERGING)  # of heatmaps
MAX_OVERLAY_SIZE = 2048  # pixels of the longer side
MAX_TILE_SIZE = 56  # pixels of a feature map on a sheet
EVALUATION_STEPS = 14  # of deletion and insertion
ProgressCallback = Callable[[float, int], None]


@dataclass(frozen=True)
class HeatmapOptions:
    """How a heatmap is computed: as the options of `convscope.heatmaps`."""

    layer: str | None = None
    method: str = "grad-cam"
    against: int | None = None
    box: int | None = None  # number of a detected box; then it is the target


DEFAULT_OPTIONS = HeatmapOptions()


def preprocess(model: Model, pixels: np.ndarray) -> Tensor:
    """Preprocess the whole image (H, W, 3) uint8 for a model, to (1, C, h, w)."""
    return next(iter(ImageBatchLoader(pixels, model.preprocessing).batches(1))).x


# --- predictions and heatmaps ---


def predictions(model: Model, x: Tensor, top: int = 5) -> list[Prediction]:
    """Return the most likely classes, best first."""
    result = predict(model, x, top=top)
    return [
        {
            "index": int(k),
            "name": model.class_name(int(k)),
            "probability": float(p),
            "logit": float(result.logits[0, k]),
        }
        for k, p in zip(result.indices[0], result.probabilities[0], strict=True)
    ]


def detections(model: Model, x: Tensor) -> list[DetectedBox]:
    """Return the boxes that a detector finds, best first."""
    result = detect(model, x, progress=False)
    height, width = x.shape[2:]
    return [
        {
            "number": n,
            "index": int(label),
            "name": model.class_name(int(label)),
            "score": float(score),
            "edges": (left / width, top / height, right / width, bottom / height),
        }
        for n, (label, score, (left, top, right, bottom)) in enumerate(
            zip(result.labels, result.scores, result.boxes.tolist(), strict=True)
        )
    ]


def heatmap(
    model: Model,
    x: Tensor,
    targets: Sequence[int],
    options: HeatmapOptions = DEFAULT_OPTIONS,
    report_progress: ProgressCallback | None = None,
) -> list[HeatmapRecord]:
    """Return a heatmap of each target, with the notes that concern it; of mean scores the excess over their mean."""
    result = _heatmaps(model, x, targets, options, report_progress)
    prefixes = [f"image 0, {name}: the map " for name in result.names[0]]
    values = result.values[0]
    displayed = center(torch.from_numpy(values)).numpy() if has_mean_scores(options.method) else values
    return [
        {
            "target": int(k),
            "box": options.box,
            "name": model.class_name(int(k)),
            "logit": float(result.logits[0, t]),
            "layer": result.layer,
            "layer_reason": result.layer_reason,
            "method": options.method,
            "against": options.against,
            "signed": is_signed(options.method) and bool((values[t] < 0).any()),
            "map": pack_map(displayed[t]),
            "notes": [n.removeprefix("image 0, ") for n in result.notes if n.startswith(prefixes[t])],
        }
        for t, k in enumerate(result.targets[0])
    ]


def faithfulness(
    model: Model,
    x: Tensor,
    target: int,
    options: HeatmapOptions = DEFAULT_OPTIONS,
    report_progress: ProgressCallback | None = None,
) -> FaithfulnessRecord:
    """Measure the faithfulness of a heatmap by deletion and insertion, with their curves."""
    result = _heatmaps(model, x, [target], options, report_progress)
    scores = evaluate(model, x, result, steps=EVALUATION_STEPS, progress=report_progress)
    rows: list[MetricRecord] = [
        {
            "metric": name,
            "mean": scores.mean(name),
            "better": get_metric(name).better,
            "description": get_metric(name).description,
            "curve": [float(f"{v:.6g}") for v in scores.curves[name][0, 0]],
        }
        for name in scores.values
    ]
    return {"rows": rows, "notes": list(scores.notes)}


def _heatmaps(
    model: Model,
    x: Tensor,
    targets: Sequence[int],
    options: HeatmapOptions,
    report_progress: ProgressCallback | None,
) -> Heatmaps:
    return heatmaps(
        model,
        x,
        [list(targets)] if options.box is None else box_target(detect(model, x, progress=False), options.box),
        layer=options.layer,
        method=options.method,
        against=options.against,
        progress=report_progress,
    )


def pack_map(values: np.ndarray) -> PackedMap:
    """Encode a map (h, w) as 16-bit integers in base64."""
    peak = float(np.abs(values).max(initial=0))
    integers = np.rint(values / peak * 32767) if peak > 0 else np.zeros_like(values)
    data = base64.b64encode(integers.astype("<i2").tobytes()).decode()
    return {"height": values.shape[0], "width": values.shape[1], "peak": peak, "data": data}


def unpack_map(packed: PackedMap) -> np.ndarray:
    """Decode a map, to the precision of `pack_map`; float32 (h, w)."""
    integers = np.frombuffer(base64.b64decode(packed["data"]), "<i2").astype(np.float32)
    return integers.reshape(packed["height"], packed["width"]) / 32767 * np.float32(packed["peak"])


def overlay(
    image: RegisteredImage, record: HeatmapRecord, opacity: float | None, colormap: str | None, signed: bool | None
) -> bytes:
    """Render a heatmap over an image as `Heatmaps.overlay` does, as PNG of at most `MAX_OVERLAY_SIZE` pixels."""
    pixels, at_input = np.asarray(image.resized(MAX_OVERLAY_SIZE)), record["layer"] == "input"
    signed = record["signed"] if signed is None else signed
    maps = torch.from_numpy(unpack_map(record["map"]))[None]
    if at_input:
        maps = smooth_maps(maps if signed else maps.clamp(min=0))
    values = Geometry.whole(pixels.shape[:2]).to_original(maps)[0].numpy()
    maximum = color_maximum(values, at_input, signed)
    scale = ColorScale(maximum, signed, colormap or (DIVERGING if signed else SEQUENTIAL))
    return encode_image(scale.overlay(pixels, values, opacity), "PNG")


# --- feature maps ---


def feature_maps(model: Model, x: Tensor, layer: str) -> np.ndarray:
    """Return the feature maps of a layer, float32 (C, H, W); (C, L, 1) of tokens, (C, 1, 1) without spatial axes."""
    return _three_axes(activations(model, x, [layer])[layer][0], model.layers.find(layer))


def _three_axes(values: np.ndarray, layer: Layer) -> np.ndarray:
    """Reshape one image's output of a layer to (C, H, W), whatever axes it has."""
    if values.ndim > 3:
        return values.reshape(len(values), -1, values.shape[-1])
    if values.ndim == 2 and not layer.layout.spatial_dims and layer.layout.channel_dim == 2:
        values = values.T  # tokens (L, C)
    return values.reshape(*values.shape, *[1] * (3 - values.ndim))


def relevance(model: Model, x: Tensor, layer: str, target: int) -> np.ndarray:
    """Return each channel's contribution to a logit: activation times gradient, summed over positions; (C,).

    At the last layers of a network that ends in global average pooling and a linear layer, the contributions add up to
    the logit minus its bias.
    """
    with capture.capture_layers(model, [layer], detach_at_layer=True) as forward:
        outputs = forward(x.to(model.device))
        (gradient,) = torch.autograd.grad(outputs.logits[0, target], outputs.maps[layer], allow_unused=True)
    if gradient is None:
        return np.zeros(model.layers.find(layer).units, np.float32)
    products = (outputs.maps[layer].detach() * gradient).float()[0]
    require_finite(model, products, f"layer {layer!r}")
    contributions: np.ndarray = _three_axes(products.cpu().numpy(), model.layers.find(layer)).sum((1, 2))
    return contributions


def concept_heatmap(maps: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Return the amount of each concept of a bank (R, C) at each position of maps (C, h, w), float32 (R, h, w)."""
    amounts: np.ndarray = encode(bank, torch.from_numpy(maps)[None])[0].numpy()
    return amounts


def channel_means(maps: np.ndarray) -> np.ndarray:
    """Return the mean of each channel of maps (C, ...) over positions, (C,)."""
    means: np.ndarray = maps.reshape(len(maps), -1).mean(1)
    return means


def channel_statistics(maps: np.ndarray) -> ChannelStatistics:
    """Compute statistics of each channel of maps (C, H, W)."""
    flat = maps.reshape(len(maps), -1)
    dead = is_constant_channel(flat[None])[0] if flat.shape[1] > 1 else flat[:, 0] == 0
    return {
        "mean": _round(channel_means(maps)),
        "max": _round(flat.max(1)),
        "active": _round((flat > 0).mean(1)),
        "dead": dead.tolist(),
    }


def layer_summary(maps: np.ndarray) -> LayerSummary:
    """Summarize maps (C, H, W) in three fractions."""
    statistics = channel_statistics(maps)
    sums = np.sort(maps.reshape(len(maps), -1).clip(min=0).sum(1))[::-1]
    total = float(sums.sum())
    return {
        "dead": float(np.mean(statistics["dead"])),
        "sparsity": float(1 - np.mean(statistics["active"])),
        "top_decile_share": float(sums[: max(1, len(sums) // 10)].sum()) / total if total > 0 else 0.0,
    }


def layer_summaries(
    model: Model, x: Tensor, layers: Sequence[str], report_progress: ProgressCallback, batch_size: int = 24
) -> dict[str, LayerSummary]:
    """Summarize many layers, `batch_size` of them in one forward pass."""
    summaries: dict[str, LayerSummary] = {}
    for start in range(0, len(layers), batch_size):
        outputs = activations(model, x, layers[start : start + batch_size])
        summaries |= {
            name: layer_summary(outputs[name][0].reshape(outputs[name].shape[1], -1)) for name in outputs.layers
        }
        report_progress(min(start + batch_size, len(layers)), len(layers))
    return summaries


def channel_sheet(maps: np.ndarray) -> tuple[Image.Image, SheetLayout]:
    """Draw maps (C, H, W) side by side, each on a color scale of its own; return the image and its layout."""
    height, width = maps.shape[1:]
    factor = max(1, -(-max(height, width) // MAX_TILE_SIZE))
    if factor > 1:
        maps = _downsample(maps, factor)
        height, width = maps.shape[1:]
    columns = int(np.ceil(np.sqrt(len(maps) * height / width)))
    image = Image.fromarray(tile(standardize(maps)[..., None], columns)[..., 0])
    image.putpalette(lookup_table("viridis").tobytes())
    columns = min(columns, len(maps))
    return image, {"columns": columns, "rows": -(-len(maps) // columns), "height": height, "width": width}


def _downsample(maps: np.ndarray, factor: int) -> np.ndarray:
    batch = torch.from_numpy(np.ascontiguousarray(maps))[None]
    return np.asarray(torch.nn.functional.avg_pool2d(batch, factor, ceil_mode=True)[0])


# --- positions and receptive fields ---


def units_at_position(
    model: Model, maps: np.ndarray, layer: str, row: int, column: int, top: int = 12
) -> PositionRecord:
    """Return the strongest units at a position of a layer, and the position's receptive field."""
    values = maps[:, row, column]
    strongest = np.argsort(-values, kind="stable")[:top]
    units: list[UnitValue] = [{"unit": int(u), "value": float(values[u])} for u in strongest if values[u] > 0]
    box = receptive_field_box(model, layer, row, column)
    return {"layer": layer, "row": row, "column": column, "units": units, "receptive_field": box}


def receptive_field_grid(model: Model, layer: str) -> ReceptiveFieldGrid | None:
    """Return the receptive fields of a layer's positions; None if they are not known."""
    record: Layer = model.layers.find(layer)
    if record.receptive_field is None or record.stride is None or record.origin is None:
        return None
    size = model.preprocessing.size
    return {
        "origin": [v / side for v, side in zip(record.origin, size, strict=True)],
        "stride": [v / side for v, side in zip(record.stride, size, strict=True)],
        "size": [v / side for v, side in zip(record.receptive_field, size, strict=True)],
    }


def receptive_field_box(model: Model, layer: str, row: int, column: int) -> list[float] | None:
    """Return a position's receptive field: top, left, bottom, right as fractions of the image; None if unknown."""
    grid = receptive_field_grid(model, layer)
    if grid is None:
        return None
    start = [o + i * s for o, i, s in zip(grid["origin"], (row, column), grid["stride"], strict=True)]
    stop = [a + size for a, size in zip(start, grid["size"], strict=True)]
    return [*(max(0.0, a) for a in start), *(min(1.0, b) for b in stop)]


def _round(values: np.ndarray) -> list[float]:
    return [float(f"{v:.4g}") for v in values]
