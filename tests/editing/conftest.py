"""The network that the tests of edits, effects and patching share."""

from __future__ import annotations

import pytest
from torch import nn

import convscope
from tests.oracles.nets import SmallConvNet, randomized

SIZE = 32


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return randomized(SmallConvNet()).eval()


@pytest.fixture(scope="module")
def model(net: nn.Module) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": SIZE})
