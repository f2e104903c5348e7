"""A model whose classes have names of very different lengths."""

from __future__ import annotations

import pytest
from torch import nn

import convscope


@pytest.fixture(scope="session")
def model() -> convscope.Model:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 12))
    names = [
        "West Highland white terrier",
        "American Staffordshire terrier",
        "soft-coated wheaten terrier",
        "black-and-tan coonhound",
        "W" * 60,
        "greater Swiss Mountain dog",
        "cat",
        "a name\nof two lines",
        "café au lait",
        "wire-haired fox terrier",
        "",
        "beer bottle, photographed from very far away on a cloudy afternoon in the early autumn",
    ]
    return convscope.load(net.eval(), preprocessing={"size": 24}, classes=names)
