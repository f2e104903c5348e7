"""Choose layers for matrix factorisation, read their activations, and run the network from changed activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from convscope.engine import capture, resume
from convscope.engine.batching import MEMORY, forward_batch_size, pad_to_fixed_batch
from convscope.engine.layer_selection import LayerLike, find_layer
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError
from convscope.images.batches import Batch
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing

ActivationIterator: TypeAlias = Callable[[ImageBatchLoader], Iterator[tuple[Batch, Tensor]]]


def check_image_model(preprocessing: Preprocessing, purpose: str) -> None:
    """Raise ConvscopeError for a network whose input is not a gray or RGB image."""
    if preprocessing.axes != 2 or preprocessing.channel_order == "channels":
        raise ConvscopeError(f"{purpose} need a network on gray or RGB images; this one takes {preprocessing.shape}")


def resolve_class(model: Model, target: int | str) -> int:
    """Return the index of a class. Raises ConvscopeError for an unknown class, or if the model has none."""
    if model.num_outputs is None:
        raise ConvscopeError(f"target is {target!r}, but this model has no classes")
    return model.class_index(target)


def spatial_layer(model: Model, requested: LayerLike) -> Layer:
    """Return a layer. Raises ConvscopeError if there is none, or if it has no spatial positions."""
    layer = find_layer(model, requested)
    if not layer.is_spatial:
        shape = " x ".join(map(str, layer.shape))
        raise ConvscopeError(
            f"layer {layer.name!r} has output {shape}, without spatial positions; choose an earlier one"
        )
    return layer


def last_nonnegative_layer(model: Model, x: Tensor, requested: LayerLike | None = None) -> Layer:
    """Find a layer without negative activations.

    Parameters
    ----------
    model : Model
    x : Tensor
        (B, C, H, W) preprocessed images that are used to check.
    requested : str, Layer or nn.Module, optional
        The layer to check; the last suitable one, other than pooling, if omitted.

    Raises
    ------
    ConvscopeError
        If the requested layer has negative activations or only zeros, or if no layer is suitable.
    """
    layers = [layer for layer in model.layers.unique_spatial() if not layer.is_pooling]
    layers += [] if requested is None else [spatial_layer(model, requested)]
    minima: dict[str, float] = {}

    def record_minimum(layer: str, maps: Tensor) -> None:
        minima[layer] = float(maps.min()) if bool(maps.any()) else -math.inf  # all zeros cannot be factorised

    names = [layer.name for layer in layers]
    with torch.no_grad(), capture.capture_layers(model, names, stop_early=True, on_output=record_minimum) as run:
        run(pad_to_fixed_batch(model, x))
    suitable = [layer for layer in layers if minima[layer.name] >= 0]
    if not suitable:
        raise ConvscopeError(
            "all layers of this network have negative activations; concepts need one without, such as after a ReLU"
        )
    if requested is None:
        return suitable[-1]
    layer = layers[-1]
    minimum = minima[layer.name]
    if minimum < 0:
        values = f"activations down to {minimum:.3g}" if math.isfinite(minimum) else "only zeros"
        raise ConvscopeError(
            f"layer {layer.name!r} has {values}, and concepts need non-negative activations; "
            f"choose a layer after a ReLU, such as {suitable[-1].name!r}"
        )
    return layer


@contextmanager
def iter_activations(model: Model, layer: str, memory: int) -> Iterator[ActivationIterator]:
    """Capture a layer for passes over several image loaders.

    The block gets a function that yields the batches of a loader with the layer's activations (B, C, h, w), float32, on
    the CPU. Passes end at the layer.
    """
    with torch.no_grad(), capture.capture_layers(model, [layer], stop_early=True) as run:

        def iterate(loader: ImageBatchLoader) -> Iterator[tuple[Batch, Tensor]]:
            for batch in loader.batches(forward_batch_size(model, memory)):
                maps = run(pad_to_fixed_batch(model, batch.x)).maps[layer][: len(batch.indices)].float().cpu()
                require_finite(model, maps, f"layer {layer!r}")
                yield batch, maps

        yield iterate


def layer_activations(model: Model, layer: str, x: Tensor) -> Tensor:
    """Compute a layer's activations (1, C, h, w) for one image `x` (1, C, H, W): float32, on the CPU."""
    with torch.no_grad(), capture.capture_layers(model, [layer], stop_early=True) as run:
        maps = run(pad_to_fixed_batch(model, x)).maps[layer][:1].float().cpu()
    require_finite(model, maps, f"layer {layer!r}")
    return maps


def logits_from_layer(
    model: Model,
    layer: str,
    x: Tensor,
    points: Tensor,
    make_maps: Callable[[Tensor], Tensor],
    memory: int = MEMORY,
) -> Tensor:
    """Compute the logits when other activations replace those of a layer for one image.

    Parameters
    ----------
    model : Model
    layer : str
        The layer whose activations are replaced.
    x : Tensor
        (1, C, H, W) the image, preprocessed.
    points : Tensor
        (M, ...) what the activations are made from.
    make_maps : callable
        Makes activations (m, C, h, w) from m of the points.
    memory : int
        Bytes for intermediate results.

    Returns
    -------
    Tensor
        (M, K) logits, on the CPU.
    """
    parts = []
    with resume.resume_from_layer(model, layer, x) as run:
        for part in torch.split(points, forward_batch_size(model, memory)):
            logits = run(pad_to_fixed_batch(model, make_maps(part))).logits
            require_finite(model, logits, "the network's output")
            parts.append(logits[: len(part)].cpu())
    return torch.cat(parts)
