"""Rows of a layer that are not one per image: frames and windows folded into the batch, sequences before the batch.

A second pass, of two images, proves which rows belong to which image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.capture import run_with_callback
from convscope.engine.layer_table import Layer, Layout
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
    return [
        _fold(layer, singles[layer.name], pairs.get(layer.name)) if layer.name in singles else layer for layer in layers
    ]


def _outputs(module: nn.Module, adapter: FrameworkAdapter, x: Tensor, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    return single.ndim > 2 and single.shape[1] == 1 and pair.shape == expected and _equal(pair[:, :1], single)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= RTOL * expected.abs().max())
