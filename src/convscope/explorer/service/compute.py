"""What the network says of a picture, as plain data: each a function of a model and its prepared input (1, C, H, W)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convscope.attribution.api import heatmaps
from convscope.decomposition.craft import encode
from convscope.engine import capture
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.evaluation.api import evaluate
from convscope.feature_maps import activations, is_constant_channel, predict
from convscope.images.colormap import lookup_table
from convscope.images.loading import ImageBatchLoader
from convscope.plotting.figures import standard, tile

MAX_TILE_SIZE = 56  # pixels of a map on a sheet, at most
ProgressCallback = Callable[[float, int], None]


def preprocess(model: Model, pixels: np.ndarray) -> Tensor:
    """The whole picture as the network takes it, (1, C, H, W)."""
    return next(iter(ImageBatchLoader(pixels, model.preprocessing).batches(1))).x


def predictions(model: Model, x: Tensor, top: int = 5) -> list[dict[str, Any]]:
    """The likeliest classes, best first: index, name, probability, logit."""
    said = predict(model, x, top=top)
    return [
        {"index": int(k), "name": model.class_name(int(k)), "probability": float(p), "logit": float(said.logits[0, k])}
        for k, p in zip(said.indices[0], said.probabilities[0], strict=True)
    ]


def heatmap(
    model: Model,
    x: Tensor,
    targets: Sequence[int],
    *,
    layer: str | None = None,
    method: str = "grad-cam",
    against: int | None = None,
    report_progress: ProgressCallback | None = None,
) -> list[dict[str, Any]]:
    """Evidence for each target: `map` (see `packed`), the layer and why it, what is to be said in words."""
    found = heatmaps(model, x, [list(targets)], layer=layer, method=method, against=against, progress=report_progress)
    own = [f"image 0, {name}: the map " for name in found.names[0]]
    return [
        {
            "target": int(k),
            "name": model.class_name(int(k)),
            "logit": float(found.logits[0, t]),
            "layer": found.layer,
            "why": found.layer_reason,
            "method": method,
            "against": against,
            "map": pack_map(found.values[0, t]),
            "notes": [n.removeprefix("image 0, ") for n in found.notes if n.startswith(own[t])],
        }
        for t, k in enumerate(found.targets[0])
    ]


def pack_map(values: np.ndarray) -> dict[str, Any]:
    """A map (h, w) for the page: 16-bit integers in base64, least byte first; value = integer / 32767 * peak."""
    peak = float(np.abs(values).max(initial=0))
    whole = np.rint(values / peak * 32767) if peak > 0 else np.zeros_like(values)
    data = base64.b64encode(whole.astype("<i2").tobytes()).decode()
    return {"height": values.shape[0], "width": values.shape[1], "peak": peak, "data": data}


def unpack_map(content: dict[str, Any]) -> np.ndarray:
    """The inverse of `packed`, to its precision."""
    whole = np.frombuffer(base64.b64decode(content["data"]), "<i2").astype(np.float32)
    return whole.reshape(content["height"], content["width"]) / 32767 * np.float32(content["peak"])


def faithfulness(
    model: Model,
    x: Tensor,
    target: int,
    *,
    layer: str | None = None,
    method: str = "grad-cam",
    against: int | None = None,
    report_progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Whether the map tells the truth: deletion and insertion with their curves, and what is to be said in words."""
    found = heatmaps(model, x, [[target]], layer=layer, method=method, against=against, progress=report_progress)
    scores = evaluate(model, x, found, steps=14, progress=report_progress)
    rows = [{**row, "curve": [round(float(v), 4) for v in scores.curves[row["metric"]][0, 0]]} for row in scores.rows()]
    keep = ("metric", "mean", "better", "says", "curve")
    return {"rows": [{k: row[k] for k in keep} for row in rows], "notes": list(scores.notes)}


def feature_maps(model: Model, x: Tensor, layer: str) -> np.ndarray:
    """What one layer makes of the picture, float32 (C, H, W); (C, L, 1) of tokens, (C, 1, 1) without extent."""
    return _three_axes(activations(model, x, [layer])[layer][0], model.layers.find(layer))


def _three_axes(values: np.ndarray, row: Layer) -> np.ndarray:
    """One picture's output of a layer as (C, H, W), whatever axes it has."""
    if values.ndim > 3:
        return values.reshape(len(values), -1, values.shape[-1])
    if values.ndim == 2 and not row.layout.spatial_dims and row.layout.channel_dim == 2:
        values = values.T  # tokens (L, C)
    return values.reshape(*values.shape, *[1] * (3 - values.ndim))


def relevance(model: Model, x: Tensor, layer: str, target: int) -> np.ndarray:
    """How much each channel adds to the target's logit, (C,): the sum over places of activation times gradient.

    At the last layers of a network that ends in an average and a matrix these add up to the logit, less its bias.
    """
    with capture.capture_layers(model, [layer], detach_at_layer=True) as run:
        seen = run(x.to(model.device))
        (slope,) = torch.autograd.grad(seen.logits[0, target], seen.maps[layer], allow_unused=True)
    own = seen.maps[layer].detach()
    if slope is None:
        return np.zeros(model.layers.find(layer).units, np.float32)
    found = (own * slope).float()[0]
    require_finite(model, found, f"layer {layer!r}")
    summed: np.ndarray = _three_axes(found.cpu().numpy(), model.layers.find(layer)).sum((1, 2))
    return summed


def concept_heatmap(maps: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """How much of each concept of a bank (R, C) is at each place of maps (C, h, w), float32 (R, h, w)."""
    found: np.ndarray = encode(bank, torch.from_numpy(maps)[None])[0].numpy()
    return found


def channel_statistics(maps: np.ndarray) -> dict[str, list[Any]]:
    """Of each channel of maps (C, H, W): mean, max, share of places above 0, whether it says the same everywhere."""
    flat = maps.reshape(len(maps), -1)
    dead = is_constant_channel(flat[None])[0] if flat.shape[1] > 1 else flat[:, 0] == 0
    return {
        "mean": _rounded(flat.mean(1)),
        "max": _rounded(flat.max(1)),
        "active": _rounded((flat > 0).mean(1)),
        "dead": dead.tolist(),
    }


def layer_summary(maps: np.ndarray) -> dict[str, float]:
    """A layer in three numbers, each a share: of dead channels, of values that are not above 0, of the busiest tenth of
    the channels in all that is above 0."""
    table = channel_statistics(maps)
    weights = np.sort(maps.reshape(len(maps), -1).clip(min=0).sum(1))[::-1]
    total = float(weights.sum())
    tenth = float(weights[: max(1, len(weights) // 10)].sum()) / total if total > 0 else 0.0
    return {
        "dead": float(np.mean(table["dead"])),
        "sparsity": float(1 - np.mean(table["active"])),
        "busiest tenth": tenth,
    }


def layer_summaries(
    model: Model, x: Tensor, layers: Sequence[str], report_progress: ProgressCallback, batch_size: int = 24
) -> dict[str, dict[str, float]]:
    """`layer_summary` of many layers, from a few passes."""
    found: dict[str, dict[str, float]] = {}
    for start in range(0, len(layers), batch_size):
        seen = activations(model, x, layers[start : start + batch_size])
        found |= {name: layer_summary(seen[name][0].reshape(seen[name].shape[1], -1)) for name in seen}
        report_progress(min(start + batch_size, len(layers)), len(layers))
    return found


def channel_sheet(maps: np.ndarray) -> tuple[Image.Image, dict[str, int]]:
    """All channels on one sheet, row by row, in colour, each scaled for itself; and the sheet's measures in pixels."""
    height, width = maps.shape[1:]
    shrink = max(1, -(-max(height, width) // MAX_TILE_SIZE))
    if shrink > 1:
        maps = _shrunk(maps, shrink)
        height, width = maps.shape[1:]
    columns = int(np.ceil(np.sqrt(len(maps) * height / width)))
    page = tile(standard(maps)[..., None], columns)[..., 0]
    image = Image.fromarray(page)
    image.putpalette(lookup_table("viridis").tobytes())
    columns = min(columns, len(maps))
    return image, {"columns": columns, "rows": -(-len(maps) // columns), "height": height, "width": width}


def _shrunk(maps: np.ndarray, by: int) -> np.ndarray:
    averaged = torch.nn.functional.avg_pool2d(torch.from_numpy(np.ascontiguousarray(maps))[None], by, ceil_mode=True)
    return np.asarray(averaged[0])


def units_at_position(
    model: Model, maps: np.ndarray, layer: str, row: int, column: int, top: int = 12
) -> dict[str, Any]:
    """Who speaks at a place of a layer: its strongest units there, and which part of the picture they see."""
    here = maps[:, row, column]
    best = np.argsort(-here, kind="stable")[:top]
    units = [{"unit": int(u), "value": float(here[u])} for u in best if here[u] > 0]
    return {
        "layer": layer,
        "row": row,
        "column": column,
        "units": units,
        "sees": receptive_field_box(model, layer, row, column),
    }


def receptive_field_grid(model: Model, layer: str) -> dict[str, list[float]] | None:
    """Where a layer's places look, as shares of the picture, (down, across): `origin` of the first place, `stride` from
    one to the next, `size` of what each sees. None where it is not known."""
    where: Layer = model.layers.find(layer)
    if where.receptive_field is None or where.stride is None or where.origin is None:
        return None
    sides = model.preprocessing.size
    told = {"origin": where.origin, "stride": where.stride, "size": where.receptive_field}
    return {name: [v / side for v, side in zip(values, sides, strict=True)] for name, values in told.items()}


def receptive_field_box(model: Model, layer: str, row: int, column: int) -> list[float] | None:
    """Top, left, bottom and right of what a place sees, as shares of the picture; None where it is not known."""
    known = receptive_field_grid(model, layer)
    if known is None:
        return None
    start = [o + i * s for o, i, s in zip(known["origin"], (row, column), known["stride"], strict=True)]
    stop = [a + size for a, size in zip(start, known["size"], strict=True)]
    return [*(max(0.0, a) for a in start), *(min(1.0, b) for b in stop)]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{v:.4g}") for v in values]
