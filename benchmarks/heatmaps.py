"""Grad-CAM: convscope beside pytorch-grad-cam, captum, torchcam and a bare forward pass."""

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
from timing import Timed, interleaved
from torch import Tensor, nn
from torchcam.methods import GradCAM as TorchCam

import convscope
from convscope.images.loading import ImageBatchLoader

NETWORKS = {"ResNet-50": "torchvision:resnet50", "VGG16": "torchvision:vgg16", "Lite0": "lite0"}


@dataclass(frozen=True)
class Row:
    """One network at one batch size: times, and how far each peer's map is from convscope's (largest difference)."""

    network: str
    batch: int
    layer: str
    times: dict[str, Timed]
    apart: dict[str, float]


def compare(name: str, source: str, batch: int, rounds: int) -> Row:
    """Time everybody on the same weights and the same input, channels last for all, and compare the maps."""
    model = convscope.load(source, weights="default" if source == "lite0" else "random")
    layer = model.layers.last_spatial().name
    # In-place activations behind the layer break the peers' hooks; they get a copy without.
    plain = copy.deepcopy(model.module)
    for module in plain.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for parameter in plain.parameters():
        parameter.requires_grad_(True)  # as users have it
    as_users_have_it = copy.deepcopy(plain).to(memory_format=torch.contiguous_format)
    hand = convscope.load(as_users_have_it, preprocessing=model.preprocessing)
    x = photographs(model, batch)
    asked = _telling(model, x)
    # Each peer has a network of its own, so that nobody's hooks fire in another's time.
    first, second, third = (copy.deepcopy(plain) for _ in range(3))
    captum = LayerGradCam(first, first.get_submodule(layer))
    gradcam = GradCAM(second, [second.get_submodule(layer)])
    torchcam = TorchCam(third, third.get_submodule(layer))

    def by_torchcam() -> Tensor:
        return torchcam(asked, third(x))[0]

    def bare() -> Tensor:
        with torch.no_grad():
            return model.module(x)

    contenders: dict[str, Callable[[], object]] = {
        "bare forward": bare,
        "convscope": lambda: convscope.heatmaps(model, x, asked).values,
        "convscope, model in hand": lambda: convscope.heatmaps(hand, x, asked, layer=layer).values,
        "captum": lambda: captum.attribute(x, target=asked),
        "torchcam": by_torchcam,
        "pytorch-grad-cam": lambda: gradcam(input_tensor=x, targets=[ClassifierOutputTarget(asked)] * batch),
    }
    times = interleaved(contenders, "bare forward", rounds)
    own = convscope.heatmaps(model, x, asked).values[:, 0]
    apart = {
        "convscope, model in hand": _apart(own, convscope.heatmaps(hand, x, asked, layer=layer).values[:, 0]),
        "captum": _apart(own, captum.attribute(x, target=asked)[:, 0].detach().numpy()),
        "torchcam": _apart(_scaled(own), by_torchcam().detach().numpy().reshape(own.shape)),
        "pytorch-grad-cam": _apart(
            _scaled(np.stack([cv2.resize(m, (224, 224)) for m in _scaled(own)])),
            gradcam(input_tensor=x, targets=[ClassifierOutputTarget(asked)] * batch),
        ),
    }
    torchcam.remove_hooks()
    gradcam.activations_and_grads.release()
    return Row(name, batch, layer, times, apart)


def as_users_have_it(module: nn.Module) -> nn.Module:
    """A copy, contiguous, with gradients, and without the in-place activations that the peers' hooks cannot bear."""
    own = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    for part in own.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    return own.requires_grad_(True)


def photographs(model: convscope.Model, batch: int) -> Tensor:
    """The sample photographs as the network takes them, as many as asked for."""
    folder = Path(convscope.__file__).parent / "samples"
    paths = sorted(str(p) for p in folder.iterdir() if p.suffix in (".jpg", ".png"))
    pictures = ImageBatchLoader(paths, model.preprocessing)
    four = next(pictures.batches(4)).x
    return four.repeat(-(-batch // 4), 1, 1, 1)[:batch].contiguous(memory_format=torch.channels_last)


def _telling(model: convscope.Model, x: Tensor) -> int:
    """A class with positive evidence in every picture: with random weights not every one has it."""
    classes = list(range(0, 1000, 50))
    maps = convscope.heatmaps(model, x, [classes] * len(x)).values
    return classes[int(maps.max((2, 3)).min(0).argmax())]


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(one - other).max() / np.abs(one).max())


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Rectified and brought to 0..1, map by map, as pytorch-grad-cam and torchcam return them."""
    positive = np.maximum(maps, 0)
    low = positive.min((1, 2), keepdims=True)
    return (positive - low) / (positive.max((1, 2), keepdims=True) - low + 1e-7)


def run(rounds: int) -> list[Row]:
    """All networks at batch 8 and batch 1."""
    torch.manual_seed(0)
    return [compare(name, source, batch, rounds) for name, source in NETWORKS.items() for batch in (8, 1)]
