"""The network and the dictionary that the tests share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convscope
from tests.oracles.nets import SmallConvNet, randomized

SIZE = 16
LAYER = "relu3"


@pytest.fixture(scope="package")
def net() -> nn.Module:
    return randomized(SmallConvNet()).eval()


@pytest.fixture(scope="package")
def model(net: nn.Module) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": SIZE})


@pytest.fixture(scope="package")
def x() -> torch.Tensor:
    return torch.randn(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="package")
def learned(model: convscope.Model, x: torch.Tensor) -> convscope.Dictionary:
    return convscope.dictionary(model, x, LAYER, features=24, active=4, steps=60)


@pytest.fixture(scope="package")
def attached(model: convscope.Model, learned: convscope.Dictionary) -> convscope.Model:
    return learned.attach(model)
