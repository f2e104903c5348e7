"""How well a dictionary stands in for its layer, on images that are held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from convscope.dictionaries.encoder import FeatureEncoder
from convscope.dictionaries.positions import PositionStore
from convscope.engine import capture
from convscope.engine.batching import forward_batch_size, pad_to_fixed_batch
from convscope.engine.edits import LayerEdit, MapFunction
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.validation import require_finite

CHUNK_VALUES = 1 << 24  # features of a chunk of positions
MAX_DENSITY_POSITIONS = 200_000


def densities(encoder: FeatureEncoder, store: PositionStore) -> np.ndarray:
    """Return the fraction (F,) of the training positions, at most 200,000 of them, at which each feature is active."""
    count = total = torch.zeros(())
    for chunk in store.chunks(max(1, CHUNK_VALUES // len(encoder.atoms))):
        with torch.no_grad():
            count = count + (encoder(chunk.to(encoder.atoms.device)) > 0).sum(0).cpu()
        total = total + len(chunk)
        if total >= MAX_DENSITY_POSITIONS:
            break
    fractions: np.ndarray = (count / total).numpy().astype(np.float32)
    return fractions


def fidelity(
    model: Model,
    layer: Layer,
    encoder: FeatureEncoder,
    x: Tensor,
    mean: Tensor,
    memory: int,
    labels: Tensor | None = None,
) -> dict[str, float]:
    """Compare a layer, and the network's output, with what the reconstruction in the layer's place gives.

    ::

        r2          = 1 - |a - a'|^2 / |a - mean a|^2                      over all positions
        l0          = mean number of active features of a position
        logits_kept = 1 - sum |y - y'| / sum |y - y0|                      y: logit of each image's top class
        loss_kept   = 1 - KL(p | p') / KL(p | p0)                          p: probabilities of the classes
        top1_kept   = fraction of images whose top class stays the same
        accuracy_kept = 1 - (c - c') / (c - c0)                            c: accuracy, with labels

    a' is the reconstruction, y', p' and c' come from it, y0, p0 and c0 from `mean` at all positions.

    Parameters
    ----------
    model : Model
    layer : Layer
    encoder : FeatureEncoder
    x : Tensor
        (H, C, ...) the network's input for images that the dictionary was not trained on.
    mean : Tensor
        (C,) the layer's mean activation on the training images.
    memory : int
        Bytes for intermediate results.
    labels : Tensor, optional
        (H,) the right classes.

    Returns
    -------
    dict of str to float
        Without `loss_kept` and `top1_kept` for networks whose outputs are no probabilities of classes, and without
        `logits_kept` for those without scores. A score that the layer does not influence is NaN.
    """
    maps = [_maps(model, layer, batch) for batch in _batches(model, layer, encoder, x, memory)]
    vectors = torch.cat([m.movedim(1, -1).reshape(-1, layer.units) for m in maps])
    error = active = torch.zeros(())
    for chunk in maps:
        with torch.no_grad():
            features = encoder(chunk)
            error = error + (chunk - encoder.decode(features)).square().sum().cpu()
            active = active + (features > 0).sum().cpu()
    total = (vectors - vectors.mean(0)).square().sum().cpu().clamp_min(1e-12)
    metrics = {"r2": float(1 - error / total), "l0": float(active / len(vectors))}
    if model.num_outputs is None:
        return metrics
    plain, rebuilt, ablated = logits_compared(model, layer, encoder, x, mean, memory)
    metrics |= retained(model, plain, rebuilt, ablated)
    return (
        metrics if labels is None else metrics | {"accuracy_kept": accuracy_fraction(labels, plain, rebuilt, ablated)}
    )


def logits_compared(
    model: Model, layer: Layer, encoder: FeatureEncoder, x: Tensor, mean: Tensor, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (H, K) of the network, with the reconstruction in the layer's place, and with the mean there.

    The parameters are those of `fidelity`.
    """
    batches = _batches(model, layer, encoder, x, memory)

    def reconstruct(maps: Tensor) -> Tensor:
        return encoder.decode(encoder(maps))

    def ablate(maps: Tensor) -> Tensor:
        return mean.to(maps).view(-1, *[1] * (maps.ndim - 2)).expand_as(maps)

    plain, rebuilt, ablated = (
        torch.cat(list(_logits(model, layer, function, batches))) for function in (None, reconstruct, ablate)
    )
    return plain, rebuilt, ablated


def accuracy_fraction(labels: Tensor, plain: Tensor, rebuilt: Tensor, ablated: Tensor) -> float:
    """Return what is kept of the accuracy of logits (H, K) for labels (H,), relative to those with the layer's mean."""
    right, right_rebuilt, right_ablated = ((z.argmax(1) == labels).double().mean() for z in (plain, rebuilt, ablated))
    return _retained(right - right_rebuilt, right - right_ablated)


def retained(model: Model, plain: Tensor, rebuilt: Tensor, ablated: Tensor) -> dict[str, float]:
    """Return what is kept of the logits (H, K) of the network, relative to those with the layer at its mean."""
    top = plain.argmax(1, keepdim=True)
    y, y_rebuilt, y_ablated = (logits.gather(1, top) for logits in (plain, rebuilt, ablated))
    metrics = {"logits_kept": _retained((y - y_rebuilt).abs().sum(), (y - y_ablated).abs().sum())}
    if model.losses(plain) is None:
        return metrics
    p, q, q0 = (-losses for logits in (plain, rebuilt, ablated) if (losses := model.losses(logits)) is not None)
    divergence, of_ablation = ((p.exp() * (p - other)).sum() for other in (q, q0))
    same = (rebuilt.argmax(1) == top[:, 0]).float().mean()
    return metrics | {"loss_kept": _retained(divergence, of_ablation), "top1_kept": float(same)}


def _retained(lost: Tensor, possible: Tensor) -> float:
    return float(1 - lost / possible) if possible > 0 else float("nan")


def _batches(model: Model, layer: Layer, encoder: FeatureEncoder, x: Tensor, memory: int) -> tuple[Tensor, ...]:
    """Split inputs so that a batch's features fit."""
    size = min(forward_batch_size(model, memory), max(1, CHUNK_VALUES // len(encoder.atoms) // max(1, layer.size)))
    return torch.split(x, size)


def _maps(model: Model, layer: Layer, x: Tensor) -> Tensor:
    with torch.no_grad(), capture.capture_layers(model, [layer.name], stop_early=True) as run:
        maps = run(pad_to_fixed_batch(model, x)).maps[layer.name][: len(x)].float()
    require_finite(model, maps, f"layer {layer.name!r}")
    return maps


def _logits(model: Model, layer: Layer, function: MapFunction | None, batches: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Yield the logits of batches, with a function applied to the layer's output."""
    if function is not None:
        model = replace(model, edits=(*model.edits, LayerEdit(layer, function, "reconstruction", b"")))
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        for batch in batches:
            yield run(pad_to_fixed_batch(model, batch)).logits[: len(batch)].cpu()
