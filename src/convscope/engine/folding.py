"""Rows of a layer that are not one per image: frames and windows folded into the batch, sequences before the batch.

A second pass, of two images, proves which rows belong to which image; a third, of images with changed corners, that
the positions of every row are those of the image, as of frames, and not those of crops or mirrored copies.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.capture import run_with_callback
from convscope.engine.layer_table import Layer
from convscope.engine.layouts import Layout
from convscope.engine.nested import primary_tensor

RTOL = 1e-3  # of the same values in a larger batch, relative to the largest


def fold_rows(
    module: nn.Module, adapter: FrameworkAdapter, x: Tensor, layers: list[Layer], singles: Mapping[str, Tensor]
) -> list[Layer]:
    """Describe layers whose rows are not one per image.

    Parameters
    ----------
    module : nn.Module
    adapter : FrameworkAdapter
    x : Tensor
        The image (1, C, H, W) of the traced pass.
    layers : list of Layer
        The network's layers.
    singles : mapping of str to Tensor
        Copies of those layers' own outputs for `x` that have other than one row.

    Returns
    -------
    list of Layer
        All layers; the layouts of those in `singles` say how their rows belong to images, or that it is unknown.
    """
    if not singles:
        return layers
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(x)
    pairs = _outputs(module, adapter, torch.cat([x, noise]), singles)
    folded = [
        _fold(layer, singles[layer.name], pairs.get(layer.name)) if layer.name in singles else layer for layer in layers
    ]
    maps = [layer for layer in folded if layer.name in pairs and layer.is_spatial]
    changed = _outputs(module, adapter, _with_changed_corners(noise), {layer.name for layer in maps}) if maps else {}
    without_image = {
        layer.name for layer in maps if not _shows_image(layer, pairs[layer.name], changed.get(layer.name))
    }
    return [_without_positions(layer) if layer.name in without_image else layer for layer in folded]


def _with_changed_corners(noise: Tensor) -> Tensor:
    """Return an image with other values in the first, and one with other values in the last quarter of all axes."""
    first, last = noise.clone(), noise.clone()
    sizes = [max(size // 4, 1) for size in noise.shape[2:]]
    everything = [slice(None)] * 2
    first[tuple(everything + [slice(size) for size in sizes])] += 1
    last[tuple(everything + [slice(-size, None) for size in sizes])] += 1
    return torch.cat([first, last])


def _shows_image(layer: Layer, pair: Tensor, changed: Tensor | None) -> bool:
    """Check that every row of a layer changes with both corners of the image, in their order along each axis.

    Parameters
    ----------
    layer : Layer
    pair : Tensor
        The layer's own output for two images, of which the second is the noise.
    changed : Tensor or None
        Its output for the noise with either corner changed.
    """
    if changed is None or changed.shape != pair.shape:
        return False
    per_row = replace(layer.layout, rows_per_image=1)
    noise = per_row.to_nchw(pair)[len(pair) // 2 :]
    corners = per_row.to_nchw(changed).reshape(2, *noise.shape)
    energy = (corners - noise).double().square().sum(2)  # (2, rows, ...)
    if not bool(energy.flatten(2).any(2).all()):
        return False
    centers = []
    for dim in range(2, energy.ndim):
        others = [d for d in range(2, energy.ndim) if d != dim]
        profile = energy.sum(others) if others else energy
        positions = torch.arange(profile.shape[-1], device=profile.device, dtype=profile.dtype)
        centers.append((profile * positions).sum(-1) / profile.sum(-1))
    return all(size == 1 or bool((c[0] < c[1]).all()) for size, c in zip(energy.shape[2:], centers, strict=True))


def _without_positions(layer: Layer) -> Layer:
    """Return a layer whose rows are known to belong to images, but not where in them they lie."""
    rows = layer.layout.rows_per_image
    shape = (rows, layer.shape[0] // rows, *layer.shape[1:])
    layout = replace(layer.layout, spatial_dims=(), grid=(), prefix_tokens=0)
    return replace(layer, shape=shape, is_spatial=False, layout=layout)


def _outputs(module: nn.Module, adapter: FrameworkAdapter, x: Tensor, names: Container[str]) -> dict[str, Tensor]:
    """Return copies of layers' own outputs; of none if the network takes single images only."""
    outputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def record(name: str, _: nn.Module, output: object) -> None:
        call = calls[name] = calls.get(name, 0) + 1
        name = name if call == 1 else f"{name}#{call}"
        if name in names and (tensor := primary_tensor(output)) is not None:
            outputs[name] = tensor.clone()

    try:
        run_with_callback(module, adapter, x, record)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError):  # the rows then stay unknown
        return {}
    return outputs


def _fold(layer: Layer, single: Tensor, pair: Tensor | None) -> Layer:
    rows, shape = len(single), layer.shape
    if (
        pair is not None
        and single.numel() > 0  # a detector may find nothing
        and pair.shape[1:] == single.shape[1:]
        and len(pair) == 2 * rows
        and _equal(pair[:rows], single)
    ):
        folded = (rows * shape[0], *shape[1:]) if layer.layout.spatial_dims else (rows, *shape)
        return replace(layer, shape=folded, layout=replace(layer.layout, rows_per_image=rows))
    if pair is not None and not layer.layout.spatial_dims and _is_after_sequence(pair, single):
        return replace(layer, shape=(rows, *shape[1:]), layout=replace(layer.layout, batch_dim=1))
    layout = Layout(layer.layout.channel_dim, rows_per_image=0)
    return replace(layer, is_spatial=False, layout=layout)


def _is_after_sequence(pair: Tensor, single: Tensor) -> bool:
    """Check whether the batch is dimension 1, after that of a sequence."""
    expected = (len(single), 2, *single.shape[2:])
    is_sequence = single.numel() > 0 and single.ndim > 2 and single.shape[1] == 1
    return is_sequence and pair.shape == expected and _equal(pair[:, :1], single)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    actual, expected = (t.dequantize() if t.is_quantized else t for t in (actual, expected))
    return bool((actual - expected).abs().max() <= RTOL * expected.abs().max())
