"""Effects of removing each unit of a layer: convscope, full passes with a hook, and captum's layer ablation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from captum.attr import LayerFeatureAblation
from grad_cam import as_users_have_it, photographs
from timing import Timed, interleaved
from torch import Tensor, nn

import convscope

LAYERS = (
    ("Lite0", "lite0", "blocks.4"),
    ("Lite0", "lite0", "blocks.6"),
    ("ResNet-50", "torchvision:resnet50", "layer3"),
)
BATCH = 16  # units per pass of the peers


@dataclass(frozen=True)
class Row:
    """One layer: its units, times, and the largest difference of each peer's effects from convscope's."""

    network: str
    layer: str
    units: int
    times: dict[str, Timed]
    differences: dict[str, float]


def compare(network: str, source: str, layer: str, rounds: int) -> Row:
    """Time all contenders on one photograph, for all units of a layer and the top class."""
    model = convscope.load(source, weights="default" if source == "lite0" else "random")
    x = photographs(model, 1)
    target = int(convscope.predict(model, x, top=1).indices[0, 0])
    units = model.layers[layer].units
    peer = as_users_have_it(model.module)
    captum = LayerFeatureAblation(copy.deepcopy(peer), nn.Module())
    captum.layer = captum.forward_func.get_submodule(layer)
    mask = torch.arange(units).view(1, units, 1, 1)

    def by_captum() -> np.ndarray:
        with torch.no_grad():
            maps = captum.attribute(x, target=target, layer_mask=mask, perturbations_per_eval=BATCH)
        return -maps[0, :, 0, 0].numpy()

    contenders: dict[str, Callable[[], np.ndarray]] = {
        "convscope": lambda: convscope.effects(model, x, layer, targets=target, progress=False).logits[:, 0, 0],
        "full passes with a hook": lambda: by_hook(peer, peer.get_submodule(layer), x, target, units),
        "captum": by_captum,
    }
    times = interleaved(contenders, "convscope", rounds)
    ours, *others = (run() for run in contenders.values())
    differences = [float(np.abs(ours - other).max() / np.abs(ours).max()) for other in others]
    return Row(network, layer, units, times, dict(zip(list(contenders)[1:], differences, strict=True)))


def by_hook(network: nn.Module, layer: nn.Module, x: Tensor, target: int, units: int) -> np.ndarray:
    """Remove units with a forward hook, a batch of them at a time, in passes through the whole network."""
    removed = torch.empty(0, dtype=torch.long)

    def remove(_: nn.Module, __: object, maps: Tensor) -> Tensor:
        maps = maps.clone()
        maps[torch.arange(len(removed)), removed] = 0
        return maps

    with torch.no_grad():
        before = network(x)[0, target]
        handle = layer.register_forward_hook(remove)
        try:
            parts = []
            for removed in torch.arange(units).split(BATCH):
                parts.append(network(x.expand(len(removed), -1, -1, -1))[:, target] - before)
        finally:
            handle.remove()
    return torch.cat(parts).numpy()


def run(rounds: int) -> list[Row]:
    return [compare(*layer, rounds) for layer in LAYERS]


def table(rows: list[Row]) -> list[str]:
    lines = [
        "The effect of setting each unit of a layer to 0 on the top class of one photograph, for all units. Seconds,",
        "and in brackets the ratio to convscope. Below, the largest difference from convscope's effects, relative to",
        "the largest of them.",
        "",
        "| layer | units | " + " | ".join(rows[0].times) + " |",
        "| --- | --- |" + " --- |" * len(rows[0].times),
    ]
    for row in rows:
        cells = [
            f"{timed.seconds:.2f} ({timed.ratio:.1f})"
            + (f"<br>{row.differences[name]:.0e}" if name in row.differences else "")
            for name, timed in row.times.items()
        ]
        lines.append(f"| {row.network}, `{row.layer}` | {row.units} | " + " | ".join(cells) + " |")
    return lines
