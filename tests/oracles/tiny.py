"""A small network, a small data set with two damaged images, and what scans of these share in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import convscope

LAYERS = ["first", "last"]
NUM_IMAGES = 150


class Tiny(nn.Module):
    """Two layers with negative values, an in-place ReLU after each, and three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.last = nn.Conv2d(4, 6, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.last(self.relu(self.first(x)))).mean((2, 3)))


def tiny() -> convscope.Model:
    return convscope.load(
        Tiny(), preprocessing={"size": 24, "mean": 0.5, "std": 0.25}, classes=["apple", "bread", "cheese"]
    )


def write_images(folder: Path) -> None:
    """Write 150 images in three folders; two cannot be read."""
    generator = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        subfolder = folder / ("apple", "bread", "quince")[i % 3]
        subfolder.mkdir(exist_ok=True)
        small = generator.integers(0, 256, (4 + i % 3, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 30)).save(subfolder / f"{i:03d}.png")
    (folder / "apple" / "060.png").write_bytes(b"not an image")
    (folder / "bread" / "100.png").write_bytes(b"\x89PNG\r\n\x1a\n")


SETTINGS: dict[str, Any] = {"k": 7, "sample": 20, "batch": 8, "shard": 64, "workers": 0}


def read_files(folder: Path) -> dict[str, bytes]:
    """Read all files in a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
