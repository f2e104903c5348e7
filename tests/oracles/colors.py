"""A network whose units are colors and whose classes are sums of them, and images of colored tiles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import convscope

SIZE = 32  # of the network's input
TILE = 16  # of the images, which are 4 x 4 tiles
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
WEIGHTS = torch.tensor([[3.0, 2.0, 1.0, 0.0], [-1.0, 0.0, 2.5, 0.5]])  # of the classes warm and cold, by color


class ColorNet(nn.Module):
    """relu(1 x 1 convolution) with the units red, green, blue and one that is always 0; their means; two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU()
        self.shrink = nn.AvgPool2d(2)
        self.fc = nn.Linear(4, 2)
        with torch.no_grad():
            self.mix.weight[:] = torch.cat([torch.eye(3), -torch.ones(1, 3)])[:, :, None, None]
            self.mix.bias.zero_()
            self.fc.weight[:] = WEIGHTS
            self.fc.bias[:] = torch.tensor([0.5, -0.5])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.shrink(self.relu(self.mix(x))).mean((2, 3)))


def make_network() -> nn.Module:
    """Make the network that `MODEL` names."""
    return ColorNet().eval()


MODEL = "tests.oracles.colors:make_network"
SETTINGS = '{"size": 32, "interpolation": "nearest"}'


def load_model(net: nn.Module | None = None) -> convscope.Model:
    """Load the network, or another one with the same input and classes."""
    preprocessing = {"size": SIZE, "interpolation": "nearest"}
    return convscope.load(net or make_network(), preprocessing=preprocessing, classes=["warm", "cold"])


def tile_image(names: list[list[str]]) -> np.ndarray:
    """Make an image of colored tiles, uint8 (H, W, 3)."""
    return np.array([[COLOURS[name] for name in row] for row in names], np.uint8).repeat(TILE, 0).repeat(TILE, 1)


def random_images(count: int, seed: int = 0) -> list[np.ndarray]:
    """Make images of 4 x 4 tiles of random colors. Blue is the rarest, so that all images are warm."""
    rng = np.random.default_rng(seed)
    return [tile_image(rng.choice(list(COLOURS), (4, 4), p=[0.3, 0.3, 0.15, 0.25]).tolist()) for _ in range(count)]
