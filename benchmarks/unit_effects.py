"""Effects of removing each unit of a layer: convscope, full passes with a hook, and captum's layer ablation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import process_time

import numpy as np
import torch
from captum.attr import LayerFeatureAblation
from grad_cam import as_users_have_it, photographs
from tables import header
from timing import Timed, interleaved
from torch import Tensor, nn

import convscope

LAYERS = (
    ("Lite0", "lite0", "blocks.4"),
    ("Lite0", "lite0", "blocks.6"),
    ("Lite0", "lite0", "bn2"),
    ("ResNet-50", "torchvision:resnet50", "layer3"),
    ("ResNet-50", "torchvision:resnet50", "layer4"),
)
MAX_UNITS = 48  # of a layer
FEW_UNITS = (3, 17, 31)
MANY_IMAGES = 8
BATCH = 16  # units per pass of the peers


@dataclass(frozen=True)
class Row:
    """One layer: its units, times, and the largest difference of each peer's effects from convscope's."""

    network: str
    layer: str
    units: int
    images: int
    times: dict[str, Timed]
    differences: dict[str, float]


def load(source: str) -> convscope.Model:
    """Load a network; random weights get the batch statistics of the photographs, so that values keep their scale."""
    if source == "lite0":
        return convscope.load(source)
    model = convscope.load(source, weights="random")
    norms = [part for part in model.module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.module.train()(photographs(model, BATCH))
    model.module.eval()
    return model


def compare(network: str, source: str, layer: str, rounds: int) -> Row:
    """Time all contenders on one photograph, for the first units of a layer and the top class."""
    model = load(source)
    x = photographs(model, 1)
    target = int(convscope.predict(model, x, top=1).indices[0, 0])
    units = min(MAX_UNITS, model.layers[layer].units)
    peer = as_users_have_it(model.module)
    captum = LayerFeatureAblation(copy.deepcopy(peer), nn.Module())
    captum.layer = captum.forward_func.get_submodule(layer)
    mask = torch.arange(model.layers[layer].units).clamp(max=units).view(1, -1, 1, 1)  # the rest as one more

    def by_captum() -> np.ndarray:
        with torch.no_grad():
            maps = captum.attribute(x, target=target, layer_mask=mask, perturbations_per_eval=BATCH)
        return -maps[0, :units, 0, 0].numpy()

    contenders: dict[str, Callable[[], np.ndarray]] = {
        "convscope": lambda: convscope.effects(model, x, layer, range(units), targets=target, progress=False).logits[
            :, 0, 0
        ],
        "full passes with a hook": lambda: by_hook(peer, layer, x, target, range(units))[:, 0],
        "captum": by_captum,
    }
    return measure(network, layer, units, 1, contenders, rounds)


def compare_few_units(network: str, source: str, layer: str, rounds: int) -> Row:
    """Time convscope and full passes on many photographs, for few units."""
    model = load(source)
    x = photographs(model, MANY_IMAGES)
    target = int(convscope.predict(model, x[:1], top=1).indices[0, 0])
    peer = as_users_have_it(model.module)
    contenders: dict[str, Callable[[], np.ndarray]] = {
        "convscope": lambda: convscope.effects(model, x, layer, FEW_UNITS, targets=target, progress=False).logits[
            :, :, 0
        ],
        "full passes with a hook": lambda: by_hook(peer, layer, x, target, FEW_UNITS),
    }
    return measure(network, layer, len(FEW_UNITS), len(x), contenders, rounds)


def measure(
    network: str,
    layer: str,
    units: int,
    images: int,
    contenders: dict[str, Callable[[], np.ndarray]],
    rounds: int,
) -> Row:
    """Time contenders, of which convscope is the first, and compare their effects."""
    times = interleaved(contenders, "convscope", rounds, threads=1, clock=process_time)
    effects = {name: run() for name, run in contenders.items()}
    ours = effects.pop("convscope")
    differences = {name: float(np.abs(ours - other).max() / np.abs(ours).max()) for name, other in effects.items()}
    return Row(network, layer, units, images, times, differences)


def by_hook(network: nn.Module, layer: str, x: Tensor, target: int, units: Sequence[int]) -> np.ndarray:
    """Remove units with a forward hook, a batch of inputs at a time, in passes through the whole network; (U, N)."""
    removed = torch.empty(0, dtype=torch.long)

    def remove(_: nn.Module, __: object, maps: Tensor) -> Tensor:
        maps = maps.clone()
        maps[torch.arange(len(removed)), removed] = 0
        return maps

    pairs = torch.cartesian_prod(torch.tensor(units), torch.arange(len(x)))
    with torch.no_grad():
        before = torch.cat([network(part)[:, target] for part in x.split(BATCH)])
        handle = network.get_submodule(layer).register_forward_hook(remove)
        try:
            parts = []
            for part in pairs.split(BATCH):
                removed, rows = part.unbind(1)
                parts.append(network(x[rows])[:, target] - before[rows])
        finally:
            handle.remove()
    return torch.cat(parts).view(len(units), len(x)).numpy()


def run(rounds: int) -> list[Row]:
    rows = [compare(*layer, rounds) for layer in LAYERS]
    return [*rows, *[compare_few_units(*LAYERS[i], rounds) for i in (0, 3)]]


def table(rows: list[Row]) -> list[str]:
    names = list(rows[0].times)
    lines = [
        "The effect of setting units of a layer to 0 on the logit of one class, for photographs. Seconds of one CPU,",
        "and in brackets the ratio to convscope. The second line of a cell is the largest difference from convscope's",
        f"effects, relative to the largest effect. Other packages run {BATCH} inputs per pass. Random weights for",
        "ResNet-50. After `bn2` and `layer4` the network is affine, and effects follow from one backward pass.",
        "",
        *header("layer", "units", "images", *names),
    ]
    for row in rows:
        cells = []
        for name in names:
            if name not in row.times:
                cells.append("")
                continue
            timed = row.times[name]
            cell = f"{timed.seconds:.2f} ({timed.text(1)})"
            cells.append(cell + (f"<br>{row.differences[name]:.0e}" if name in row.differences else ""))
        few = ", few units" if row.units == len(FEW_UNITS) else ""
        lines.append(f"| {row.network}, `{row.layer}`{few} | {row.units} | {row.images} | " + " | ".join(cells) + " |")
    return lines
