"""Draw docs/images/methods: every heatmap method on the same four images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import convscope
from convscope.attribution.registry import METHODS, CamMethod

FOLDER = Path(__file__).parents[1] / "images" / "methods"
HEIGHT, GAP = 150, 6
EARLIER = "blocks.4"  # where class activation maps differ
OPTIONS: Mapping[str, Mapping[str, Any]] = {"rise": {"samples": 1500, "probability": True, "progress": False}}
ATTENTION = ("attention-rollout", "transformer-attribution", "legrad")
SIDE, PATCH, WIDTH = 16, 2, 48  # of the transformer: input, patch and token


class DigitTransformer(nn.Module):
    """A vision transformer of two blocks for the digits of scikit-learn."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, 0.0, nn.functional.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify digits (N, 3, 16, 16) by the class token."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.positions
        logits: torch.Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits


def train_on_digits(epochs: int = 12) -> tuple[convscope.Model, list[Image.Image]]:
    """Train the transformer; return it with four digits that it has not seen."""
    torch.manual_seed(0)
    digits = load_digits()
    images = [Image.fromarray((image * 15.9).astype(np.uint8)).convert("RGB") for image in digits.images]
    inputs = torch.stack([_to_input(image) for image in images])
    labels = torch.from_numpy(digits.target)
    network, count = DigitTransformer(), 1500
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(count).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    preprocessing = {"size": SIDE, "mean": 0.5, "std": 0.5}
    model = convscope.load(network.eval(), preprocessing=preprocessing, classes=list("0123456789"))
    shown = [next(i for i in range(count, len(images)) if int(labels[i]) == digit) for digit in (0, 3, 4, 7)]
    return model, [images[i].resize((160, 160), Image.Resampling.BICUBIC) for i in shown]


def _to_input(image: Image.Image) -> torch.Tensor:
    resized = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    return torch.from_numpy(resized.transpose(2, 0, 1) / 127.5 - 1)


def strip(images: Sequence[Image.Image]) -> Image.Image:
    """Lay images side by side, all of the same height."""
    tiles = [image.resize((round(image.width * HEIGHT / image.height), HEIGHT)) for image in images]
    out = Image.new("RGB", (sum(tile.width + GAP for tile in tiles) - GAP, HEIGHT), "white")
    left = 0
    for tile in tiles:
        out.paste(tile, (left, 0))
        left += tile.width + GAP
    return out


def save(strips: Sequence[Image.Image], name: str) -> None:
    """Write strips, one below the other."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    out = Image.new("RGB", (strips[0].width, len(strips) * (HEIGHT + GAP) - GAP), "white")
    for row, image in enumerate(strips):
        out.paste(image, (0, row * (HEIGHT + GAP)))
    out.save(FOLDER / f"{name}.webp", quality=78, method=6)


def draw_methods(model: convscope.Model, images: Sequence[Any], names: Sequence[str]) -> None:
    """Write a strip of overlays for each method; class activation maps at an earlier layer, too."""
    for name in names:
        if not (FOLDER / f"{name}.webp").exists():
            heatmaps = convscope.heatmaps(model, images, method=name, **OPTIONS.get(name, {}))
            if name == "rise":  # mean scores: only differences count
                lowest = heatmaps.values.min((2, 3), keepdims=True)
                heatmaps = replace(heatmaps, values=heatmaps.values - lowest)
            strips = [strip(heatmaps.overlay())]
            if isinstance(METHODS[name], CamMethod) and name != "cam":
                strips.append(strip(convscope.heatmaps(model, images, method=name, layer=EARLIER).overlay()))
            save(strips, name)


def main() -> None:
    """Draw what is not there yet."""
    photographs = convscope.samples.photographs()
    save([strip([Image.open(path).convert("RGB") for path in photographs])], "photographs")
    names = [name for name, method in METHODS.items() if not method.needs_boxes]
    draw_methods(convscope.load("lite0"), photographs, [name for name in names if name not in ATTENTION])
    transformer, digits = train_on_digits()
    save([strip(digits)], "digits")
    draw_methods(transformer, digits, ATTENTION)


if __name__ == "__main__":
    main()
