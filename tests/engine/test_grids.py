"""Grids of tokens that cannot be followed: said by the user, or inferred from their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError


class Opaque(torch.autograd.Function):
    """Passes tokens on in a way that no trace can follow."""

    @staticmethod
    def forward(ctx: object, tokens: Tensor) -> Tensor:
        return torch.from_numpy(tokens.detach().numpy().copy())

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class OpaqueTokens(nn.Module):
    """Patches become tokens, with `extra` ones in front; a custom operation hides where they came from."""

    def __init__(self, extra: int, patch: tuple[int, int] = (8, 8), conv: bool = True) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, patch, patch)
        self.extra, self.conv = extra, conv
        self.mix, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = (
            self.embed(x)
            if self.conv
            else nn.functional.conv2d(x, self.embed.weight, self.embed.bias, self.embed.stride)
        )
        tokens = Opaque.apply(maps.flatten(2).transpose(1, 2))
        tokens = torch.cat([tokens.new_zeros(len(x), self.extra, 6), tokens], 1)
        return self.fc(self.mix(tokens).mean(1))


@pytest.mark.parametrize("extra", [0, 1])
def test_tokens_are_laid_on_the_grid_of_an_earlier_layer_by_their_number(extra: int) -> None:
    net = OpaqueTokens(extra)
    model = convscope.load(net, preprocessing={"size": (32, 48)}, task="classification")
    assert any("4 x 6" in note and "grid=(h, w)" in note for note in model.notes)
    x = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        expected = net.mix(net.embed(x).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 6))
    np.testing.assert_allclose(convscope.activations(model, x, "mix")["mix"], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert convscope.heatmaps(model, x, 1, layer="mix").values.shape == (2, 1, 4, 6)


def test_a_grid_that_the_user_says() -> None:
    net = OpaqueTokens(3, (8, 4), conv=False)
    assert not convscope.load(net, preprocessing={"size": 32}).layers["mix"].is_spatial
    model = convscope.load(net, preprocessing={"size": 32}, grid=(4, 8))
    assert model.layers["mix"].shape == (6, 4, 8)
    assert model.layers["mix"].layout.prefix_tokens == 3


def test_a_grid_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(ConvscopeError, match=r"no layer returns as many tokens \(the layers return 35\)"):
        convscope.load(OpaqueTokens(3, (8, 4), conv=False), preprocessing={"size": 32}, grid=(7, 7))
    with pytest.raises(ConvscopeError, match="expected \\(h, w\\)"):
        convscope.load("lite0", weights="random", grid=7)
