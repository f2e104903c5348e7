"""Grad-CAM: convscope, pytorch-grad-cam, captum, torchcam and a bare forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from tables import header
from timing import Timed, interleaved
from torch import Tensor, nn
from torchcam.methods import GradCAM as TorchCam

import convscope
from convscope.images.loading import ImageBatchLoader

NETWORKS = {"ResNet-50": "torchvision:resnet50", "VGG16": "torchvision:vgg16", "Lite0": "lite0"}


@dataclass(frozen=True)
class Row:
    """One network at one batch size: times, and the largest difference of each peer's map from convscope's."""

    network: str
    batch: int
    layer: str
    times: dict[str, Timed]
    differences: dict[str, float]


def compare(name: str, source: str, batch: int, rounds: int) -> Row:
    """Time all contenders on the same weights and input, channels_last, and compare the maps."""
    model = convscope.load(source, weights="default" if source == "lite0" else "random")
    layer = model.layers.last_spatial().name
    # In-place activations after the layer break the peers' hooks; they get a copy without.
    plain = copy.deepcopy(model.module)
    for module in plain.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for parameter in plain.parameters():
        parameter.requires_grad_(True)  # as users have it
    as_users_have_it = copy.deepcopy(plain).to(memory_format=torch.contiguous_format)
    instance = convscope.load(as_users_have_it, preprocessing=model.preprocessing)
    x = photographs(model, batch)
    target = _class_with_evidence(model, x)
    # Each peer has its plain_copy network, so that its hooks do not slow the others down.
    first, second, third = (copy.deepcopy(plain) for _ in range(3))
    captum = LayerGradCam(first, first.get_submodule(layer))
    gradcam = GradCAM(second, [second.get_submodule(layer)])
    torchcam = TorchCam(third, third.get_submodule(layer))

    def by_torchcam() -> Tensor:
        return torchcam(target, third(x))[0]

    def bare() -> Tensor:
        with torch.no_grad():
            return model.module(x)

    contenders: dict[str, Callable[[], object]] = {
        "bare forward": bare,
        "convscope": lambda: convscope.heatmaps(model, x, target).values,
        "convscope, module instance": lambda: convscope.heatmaps(instance, x, target, layer=layer).values,
        "captum": lambda: captum.attribute(x, target=target),
        "torchcam": by_torchcam,
        "pytorch-grad-cam": lambda: gradcam(input_tensor=x, targets=[ClassifierOutputTarget(target)] * batch),
    }
    times = interleaved(contenders, "bare forward", rounds)
    ours = convscope.heatmaps(model, x, target).values[:, 0]
    differences = {
        "convscope, module instance": _max_difference(
            ours, convscope.heatmaps(instance, x, target, layer=layer).values[:, 0]
        ),
        "captum": _max_difference(ours, captum.attribute(x, target=target)[:, 0].detach().numpy()),
        "torchcam": _max_difference(_scaled(ours), by_torchcam().detach().numpy().reshape(ours.shape)),
        "pytorch-grad-cam": _max_difference(
            _scaled(np.stack([cv2.resize(m, (224, 224)) for m in _scaled(ours)])),
            gradcam(input_tensor=x, targets=[ClassifierOutputTarget(target)] * batch),
        ),
    }
    torchcam.remove_hooks()
    gradcam.activations_and_grads.release()
    return Row(name, batch, layer, times, differences)


def as_users_have_it(module: nn.Module) -> nn.Module:
    """Return a contiguous copy with gradients and without in-place activations, which break the peers' hooks."""
    plain_copy = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    for part in plain_copy.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    return plain_copy.requires_grad_(True)


def photographs(model: convscope.Model, batch: int) -> Tensor:
    """Return `batch` sample photographs as network input."""
    folder = Path(convscope.__file__).parent / "samples"
    paths = sorted(str(p) for p in folder.iterdir() if p.suffix in (".jpg", ".png"))
    loader = ImageBatchLoader(paths, model.preprocessing)
    four = next(loader.batches(4)).x
    return four.repeat(-(-batch // 4), 1, 1, 1)[:batch].contiguous(memory_format=torch.channels_last)


def _class_with_evidence(model: convscope.Model, x: Tensor) -> int:
    """Return a class with positive evidence in every image: with random weights not every class has it."""
    classes = list(range(0, 1000, 50))
    maps = convscope.heatmaps(model, x, [classes] * len(x)).values
    return classes[int(maps.max((2, 3)).min(0).argmax())]


def _max_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference relative to the largest value."""
    return float(np.abs(one - other).max() / np.abs(one).max())


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Rectify and scale each map to 0..1, as pytorch-grad-cam and torchcam return them."""
    positive = np.maximum(maps, 0)
    low = positive.min((1, 2), keepdims=True)
    return (positive - low) / (positive.max((1, 2), keepdims=True) - low + 1e-7)


def run(rounds: int) -> list[Row]:
    """Run all networks at batch 8 and batch 1."""
    torch.manual_seed(0)
    return [compare(name, source, batch, rounds) for name, source in NETWORKS.items() for batch in (8, 1)]


def table(rows: list[Row]) -> list[str]:
    """Return the section of the README: text and tables."""
    names = list(rows[0].times)
    lines = [
        "Milliseconds per image, and in brackets the ratio to the bare forward pass. Weights: Lite0's own, random",
        "for the others. The second line of a cell is the largest difference from convscope's map, relative to its",
        "largest value.",
        "",
        *header("network, batch", *names),
    ]
    for row in rows:
        cells = []
        for name in names:
            cell = f"{1000 * row.times[name].seconds / row.batch:.1f} ({row.times[name].text()})"
            cells.append(cell + (f"<br>{row.differences[name]:.0e}" if name in row.differences else ""))
        lines.append(f"| {row.network}, {row.batch} (`{row.layer}`) | " + " | ".join(cells) + " |")
    return lines
