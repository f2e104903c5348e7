"""Which layers can be taken apart, and what the rest of the network makes of maps that were put together again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from convscope.engine import capture, resume
from convscope.engine.batching import MEMORY, forward_batch_size, pad_to_fixed_batch
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError
from convscope.images.loading import Batch, ImageBatchLoader
from convscope.images.preprocessing import Preprocessing


def check_image_model(preprocessing: Preprocessing, what: str) -> None:
    """Raise ConvscopeError for networks on anything but ordinary pictures."""
    if preprocessing.axes != 2 or preprocessing.channel_order == "channels":
        raise ConvscopeError(f"{what} are made of ordinary pictures; this network takes {preprocessing.shape}")


def resolve_class(model: Model, target: int | str) -> int:
    """The index of a class. Raises ConvscopeError where there is no such class, or none at all."""
    if model.num_outputs is None:
        raise ConvscopeError(f"class {target!r} was asked for, but this model has no classes")
    return model.class_index(target)


def spatial_layer(model: Model, name: str) -> Layer:
    """The layer called `name`. Raises ConvscopeError if there is none, or if it has no places."""
    row = model.layers.find(name)
    if not row.is_spatial:
        raise ConvscopeError(f"layer {row.name!r} gives {' x '.join(map(str, row.shape))}: it has no places to look at")
    return row


def last_nonnegative_layer(model: Model, x: Tensor, asked: str | None = None) -> Layer:
    """The layer asked for, or the last with places, poolings apart, that has no negative value for `x` (B, C, H, W).

    Raises ConvscopeError if the layer asked for has negative values, and if there is no other.
    """
    rows = [row for row in model.layers.unique_spatial() if not row.is_pooling]
    rows += [] if asked is None else [spatial_layer(model, asked)]
    lowest: dict[str, float] = {}

    def look(name: str, maps: Tensor) -> None:
        lowest[name] = float(maps.min()) if bool(maps.any()) else -math.inf  # what is 0 everywhere has no parts

    with (
        torch.no_grad(),
        capture.capture_layers(model, [row.name for row in rows], stop_early=True, on_output=look) as run,
    ):
        run(pad_to_fixed_batch(model, x))
    found = [row for row in rows if lowest[row.name] >= 0]
    if not found:
        raise ConvscopeError(
            "no layer of this network is rectified (ReLU and the like): all give negative values, which are no sums of "
            "non-negative parts"
        )
    if asked is None:
        return found[-1]
    row, low = rows[-1], lowest[rows[-1].name]
    if low < 0:
        gives = f"values down to {low:.3g}" if math.isfinite(low) else "0 everywhere"
        raise ConvscopeError(
            f"layer {row.name!r} gives {gives}, and concepts are sums of non-negative parts; choose a layer behind a "
            f"ReLU, {found[-1].name!r}, say"
        )
    return row


@contextmanager
def iter_activations(
    model: Model, layer: str, memory: int
) -> Iterator[Callable[[ImageBatchLoader], Iterator[tuple[Batch, Tensor]]]]:
    """The block gets a function that goes through pictures, batch by batch, and gives with each the maps of the layer
    (B, C, h, w), float32, on the CPU. The passes end behind the layer."""
    with torch.no_grad(), capture.capture_layers(model, [layer], stop_early=True) as run:

        def maps(images: ImageBatchLoader) -> Iterator[tuple[Batch, Tensor]]:
            for batch in images.batches(forward_batch_size(model, memory)):
                found = run(pad_to_fixed_batch(model, batch.x)).maps[layer][: len(batch.indices)].float().cpu()
                require_finite(model, found, f"layer {layer!r}")
                yield batch, found

        yield maps


def layer_activations(model: Model, layer: str, x: Tensor) -> Tensor:
    """What the layer gives for one picture `x` (1, C, H, W): (1, C, h, w), float32, on the CPU."""
    with torch.no_grad(), capture.capture_layers(model, [layer], stop_early=True) as run:
        maps = run(pad_to_fixed_batch(model, x)).maps[layer][:1].float().cpu()
    require_finite(model, maps, f"layer {layer!r}")
    return maps


def logits_from_layer(
    model: Model, layer: str, x: Tensor, points: Tensor, maps: Callable[[Tensor], Tensor], memory: int = MEMORY
) -> Tensor:
    """The logits (M, K), on the CPU, when `maps(points)` (M, C, h, w) takes the place of what `layer` gives for the one
    picture `x` (1, C, H, W). The maps are made a part at a time, from a part of the `points` (M, ...)."""
    size = forward_batch_size(model, memory)
    found = []
    with resume.resume_from_layer(model, layer, x) as run:
        for part in torch.split(points, size):
            logits = run(pad_to_fixed_batch(model, maps(part))).logits
            require_finite(model, logits, "the network's output")
            found.append(logits[: len(part)].cpu())
    return torch.cat(found)
