"""Models, inputs and comparisons that the tests of heatmaps share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import convscope
from convscope.attribution.api import compute_heatmaps, resolve_method

SIZE = 24


def load_module(
    net: nn.Module, size: Any = SIZE, classes: list[str] | None = None, **preprocessing: Any
) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": size, **preprocessing}, classes=classes)


def random_images(count: int = 3, size: int | tuple[int, ...] = SIZE, seed: int = 1) -> Tensor:
    """Return normally distributed inputs; `size` is the side of images with 3 channels, or a shape (C, ...)."""
    shape = (3, size, size) if isinstance(size, int) else size
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def preprocess(model: convscope.Model, photos: list[str], size: int | None = None) -> Tensor:
    """Squash photographs to a square of `size` pixels (default: the model's input size) and normalise them."""
    height, width = model.preprocessing.size if size is None else (size, size)
    resized = [Image.open(path).convert("RGB").resize((width, height)) for path in photos]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2) / 255
    return model.preprocessing.normalize(pixels).contiguous(memory_format=torch.channels_last)


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def random_resnet(blocks: int = 2) -> nn.Module:
    """Return a ResNet with random weights and batch statistics; two blocks per stage make a ResNet-18."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.ResNet(BasicBlock, [blocks] * 4)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.normal_(0, 0.3)
    return net.eval()


def heatmap_values(model: convscope.Model, x: Tensor, targets: Any = None, **kwargs: Any) -> np.ndarray:
    return convscope.heatmaps(model, x, targets, **kwargs).values


def heatmaps_by_specs(
    model: convscope.Model, images: Any, targets: Any, *specs: tuple[str, Any], fuse: str = "mean", **kwargs: Any
) -> list[convscope.Heatmaps]:
    """Compute heatmaps by several pairs of a method and its layers in one call."""
    resolved = [resolve_method(model, method, layer, fuse, {}) for method, layer in specs]
    return compute_heatmaps(model, images, targets, resolved, **kwargs)
