"""Constructed networks and images with a known watermark, and observations made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import convscope
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.forward import observing_forward
from convscope.diagnosis.observations import Observations

SIZE, MARK = 32, 6
CLASSES = ("red", "green", "blue")


class MarkNetwork(nn.Module):
    """Adds up the colors of objects, and for the first class `weight` times the presence of a mark.

    The mark's channel is a matched filter behind a threshold that only the mark reaches.
    """

    def __init__(self, mark: Tensor, weight: float) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, 4, MARK, padding=MARK // 2)
        self.filters.weight.data.zero_()
        self.filters.weight.data[3] = mark - mark.mean()
        for channel in range(3):
            self.filters.weight.data[channel, :, 3, 3] = -0.5
            self.filters.weight.data[channel, channel, 3, 3] = 1.0
        norm = float((mark - mark.mean()).square().sum())
        self.filters.bias.data = torch.tensor([-0.3, -0.3, -0.3, -0.7 * norm])
        self.relu = nn.ReLU()
        self.register_buffer("weights", torch.tensor([200.0, 200.0, 200.0]))
        self.scale = weight * SIZE * SIZE / (0.3 * norm)

    def forward(self, x: Tensor) -> Tensor:
        features = self.relu(self.filters(x)).mean((2, 3))
        logits = features[:, :3] * self.weights
        mark = nn.functional.pad(features[:, 3:] * self.scale, (0, 2))
        return logits + mark


def make_mark() -> Tensor:
    """Return a mark (3, MARK, MARK) of black and white pixels."""
    pixels = np.random.default_rng(3).random((MARK, MARK)) < 0.5
    return torch.from_numpy(pixels).float().expand(3, -1, -1).contiguous()


def make_images(labels: Sequence[int], carries: np.ndarray, mark: Tensor, seed: int = 0) -> Tensor:
    """Return images (N, 3, SIZE, SIZE) of noise with a box in the class's color, and the mark in a corner of some."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.2, 0.8, (len(labels), 1, 1, 1)) + rng.uniform(-0.1, 0.1, (len(labels), 3, SIZE, SIZE))
    for image, label in zip(x, labels, strict=True):
        height, width = rng.integers(7, 12, 2)
        top, left = rng.integers(7, SIZE - height), rng.integers(7, SIZE - width)
        thing = rng.uniform(0, 0.5) + rng.uniform(-0.1, 0.1, (3, height, width))
        thing[label] += 0.5
        image[:, top : top + height, left : left + width] = thing
    x[np.flatnonzero(carries), :, 1 : 1 + MARK, 1 : 1 + MARK] = mark.numpy()
    return torch.from_numpy(x).float()


def context_of(module: nn.Module, x: Tensor, labels: np.ndarray, seed: int = 0) -> DiagnosisContext:
    """Observe a network at its layer "relu"."""
    model = convscope.load(module.eval(), preprocessing={"size": SIZE}, classes=list(CLASSES))
    layer = model.layers["relu"]
    with observing_forward(model, layer, x[:1]) as run:
        observed = run(x)
    observations = Observations(
        image_names=tuple(f"{i}.png" for i in range(len(x))),
        image_ids=np.arange(len(x)),
        labels=labels,
        classes=CLASSES,
        logits=observed.logits.numpy(),
        features=observed.features.half().numpy(),
        peaks=observed.peaks.half().numpy(),
        evidence=observed.evidence.half().numpy(),
        facts=x.mean((2, 3)).numpy(),
        fact_names=("redness", "brightness", "blueness"),
        thumbnails=(255 * x.clamp(0, 1)).movedim(1, 3).to(torch.uint8).numpy(),
    )
    return DiagnosisContext(
        model, layer, observations, lambda rows: x[torch.as_tensor(rows)], seed, lambda *_: None, 1 << 28
    )
