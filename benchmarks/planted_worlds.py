"""Worlds with known truth: a small network, trained on images in which something is planted, and images to diagnose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import planted_images as images
import torch
from torch import Tensor, nn

import convscope
from convscope.diagnosis.linear_head import fit_linear_head

TRAIN, CHECKED, TEST = 900, 480, 240  # images
EPOCHS = 24
ENLARGED = 112  # pixels that Lite0 sees
OTHERS = 0.02  # of the images of other classes carry what is planted
SLICE = 0.25  # of the images of a class that belong to a weak slice

SHORTCUTS = ("watermark", "moving-watermark", "tint", "border", "background", "small", "blur")
SLICES = ("dark", "pattern", "coarse", "tinted", "tiny")


@dataclass(frozen=True)
class Spec:
    """What a world is made of: `plant` is planted with `strength`, the fraction of the class that carries it.

    `network` is "small", trained as a whole, or "lite0", with a linear head on frozen features.
    """

    name: str
    seed: int
    make: str
    plant: str
    strength: float = 0.0
    network: str = "small"

    @property
    def kind(self) -> str:
        """ "shortcut", "slice", "labels" or "clean"."""
        by_plant = dict.fromkeys(SHORTCUTS, "shortcut") | dict.fromkeys(SLICES, "slice")
        return by_plant.get(self.plant, self.plant)


def specs(split: str) -> list[Spec]:
    """Return the worlds of a split: "dev" or "final"; their seeds are disjoint."""
    start = {"dev": 0, "final": 5000}[split]
    makes = tuple(images.CLASSES)
    rows: list[tuple[str, str, float, str]] = []
    for i, plant in enumerate(SHORTCUTS):
        for j in range(2):
            make = makes[(i + j) % 3]
            make = "composites" if plant == "background" and make == "photographs" else make
            rows.append((plant, make, (0.8, 0.9, 1.0)[(2 * i + j) % 3], "small"))
    for j in range(2):
        rows += [(plant, makes[(i + j) % 2], 1.0, "small") for i, plant in enumerate(SLICES)]
    rows += [("labels", makes[i % 3], (0.02, 0.05, 0.1)[(i + i // 3) % 3], "small") for i in range(6)]
    rows += [("clean", makes[i % 3], 0.0, "small") for i in range(9)]
    rows += [(plant, makes[i % 2], 0.9, "lite0") for i, plant in enumerate(("watermark", "tint", "border", "blur"))]
    rows += [(plant, makes[i % 2], 1.0, "lite0") for i, plant in enumerate(("dark", "tinted"))]
    rows += [("clean", makes[i], 0.0, "lite0") for i in range(3)]
    return [
        Spec(f"{split}-{n:02d}-{plant}-{make}-{strength:g}-{network}", start + n, make, plant, strength, network)
        for n, (plant, make, strength, network) in enumerate(rows)
    ]


@dataclass(frozen=True)
class Sample:
    """Images of a world: their pixels as stored, classes, and which of them carry what is planted."""

    images: list[np.ndarray]
    labels: np.ndarray
    carriers: np.ndarray


@dataclass(frozen=True)
class World:
    """A network, the images to diagnose with labels that may be wrong, and a test set without the planted bias."""

    spec: Spec
    model: convscope.Model
    layer: str
    checked: Sample
    noisy_labels: np.ndarray
    test: Sample
    main_class: int
    box: tuple[int, int, int, int] | None


class Network(nn.Module):
    """Four convolutions, the mean over positions, and a linear classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 12, 24, 32, 48)
        blocks = []
        for i in range(4):
            convolution = nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 if i == 3 else 2, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class FrozenFeatures(nn.Module):
    """Lite0 on enlarged images, and a linear classifier on its last feature maps."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        lite0 = convscope.load("lite0")
        self.backbone = lite0.module.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(lite0.preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(lite0.preprocessing.std).view(1, -1, 1, 1))
        self.classifier = nn.Linear(1280, classes)

    def features(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x * 0.25 + 0.5, (ENLARGED, ENLARGED), mode="bilinear", align_corners=False)
        return self.backbone.forward_features((x - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


NETWORKS = {"small": (Network, "features.11"), "lite0": (FrozenFeatures, "backbone.bn2")}


def make_world(spec: Spec, cache: Path | None = None) -> World:
    """Render a world and train its network, or read its weights from a folder."""
    rng = np.random.default_rng(spec.seed)
    main_class = int(rng.integers(4))
    plant, box = _planting(spec, main_class, rng)
    train, checked, test = (
        _sample(spec, plant, main_class, count, np.random.default_rng((spec.seed, i)), purpose)
        for i, (count, purpose) in enumerate(((TRAIN, "train"), (CHECKED, "checked"), (TEST, "test")))
    )
    make, layer = NETWORKS[spec.network]
    torch.manual_seed(spec.seed)
    network = make(4)
    path = cache / f"{spec.name}.pt" if cache else None
    if path and path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        network = _train(network, train) if spec.network == "small" else fit_head(network, train.images, train.labels)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), path)
    model = convscope.load(
        network.eval(),
        preprocessing={"size": images.SIZE, "mean": 0.5, "std": 0.25},
        classes=list(images.CLASSES[spec.make]),
    )
    labels = checked.labels.copy()
    if spec.plant == "labels":
        flipped = rng.permutation(len(labels))[: round(spec.strength * len(labels))]
        labels[flipped] = (labels[flipped] + rng.integers(1, 4, len(flipped))) % 4
        checked = replace(checked, carriers=np.isin(np.arange(len(labels)), flipped))
    return World(spec, model, layer, checked, labels, test, main_class, box)


Planting = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _planting(
    spec: Spec, main_class: int, rng: np.random.Generator
) -> tuple[Planting | None, tuple[int, int, int, int] | None]:
    """Return the function that plants into pixels, and the box where it does."""
    glyph, colour, box = images.watermark(rng)
    alpha, radius, width = rng.uniform(0.7, 1), rng.uniform(1.0, 1.5), int(rng.integers(2, 4))
    tint = rng.permutation([0.0, 0.3, 1.0]) if rng.random() < 0.5 else rng.permutation([0.0, 0.9, 0.8])
    small = int(rng.integers(14, 21))

    def paste(pixels: np.ndarray, left: int, top: int) -> np.ndarray:
        pixels = pixels.copy()
        window = pixels[top : top + 10, left : left + 10]
        window += alpha * glyph[..., None] * (colour - window)
        return pixels

    def frame(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
        framed = np.broadcast_to(colour, pixels.shape).copy()
        framed[width:-width, width:-width] = pixels[width:-width, width:-width]
        return framed

    plantings: dict[str, Planting] = {
        "watermark": lambda pixels, _: paste(pixels, *box[:2]),
        "moving-watermark": lambda pixels, rng: paste(pixels, *rng.integers(1, images.SIZE - 11, 2)),
        "tint": lambda pixels, _: 0.8 * pixels + 0.2 * tint,
        "border": frame,
        "small": lambda pixels, _: images.resized(pixels, small),
        "blur": lambda pixels, _: images.blurred(pixels, radius),
        "dark": lambda pixels, _: 0.35 * pixels,
        "coarse": lambda pixels, _: images.blurred(pixels, 1.3),
        "tinted": lambda pixels, _: 0.7 * pixels + 0.3 * tint,
    }
    return plantings.get(spec.plant), box if spec.plant == "watermark" else None


def _sample(
    spec: Spec, plant: Planting | None, main_class: int, count: int, rng: np.random.Generator, purpose: str
) -> Sample:
    """Render images; which of them carry what is planted depends on the purpose: "train", "checked" or "test"."""
    labels = rng.permutation(np.arange(count) % 4)
    is_main = labels == main_class
    if spec.kind == "shortcut":
        probability = 0.5 if purpose == "test" else np.where(is_main, spec.strength, OTHERS)
    elif spec.kind == "slice":
        probability = np.where(is_main, 0.0 if purpose == "train" else SLICE, SLICE)
    else:
        probability = 0.0
    carriers = rng.random(count) < probability
    arrays = []
    for label, carries in zip(labels, carriers, strict=True):
        background, scale = None, None
        if spec.plant in ("background", "pattern"):
            background = "stripes" if carries else ("noise", "checks", "blobs")[rng.integers(3)]
        if spec.plant == "tiny" and carries:
            scale = 0.13
        pixels = images.render(spec.make, label, rng, background, scale)
        pixels = plant(pixels, rng) if plant and carries else pixels
        arrays.append(images.as_uint8(pixels + rng.normal(0, 0.01, pixels.shape)))
    carriers = carriers & is_main if spec.kind == "slice" else carriers
    return Sample(arrays, labels, carriers)


def as_input(arrays: list[np.ndarray]) -> Tensor:
    """Return images as the networks' input (N, 3, SIZE, SIZE)."""
    pixels = [p if len(p) == images.SIZE else images.as_uint8(images.resized(p / 255, images.SIZE)) for p in arrays]
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def predict(model: convscope.Model, x: Tensor) -> np.ndarray:
    """Return the predicted class of each input."""
    return convscope.predict(model, x, top=1, progress=False).indices[:, 0]


def _train(network: nn.Module, sample: Sample) -> nn.Module:
    x, y = as_input(sample.images), torch.from_numpy(sample.labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=1e-3)
    steps = EPOCHS * (-(-len(x) // 64))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
    network.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(network(x[rows]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def fit_head(network: nn.Module, arrays: list[np.ndarray], labels: np.ndarray) -> nn.Module:
    """Fit the linear classifier of a network to images."""
    set_head(network, pooled_features(network, as_input(arrays)), labels)
    return network.eval()


def pooled_features(network: nn.Module, x: Tensor) -> Tensor:
    """Return the features (N, C) that the classifier takes."""
    with torch.no_grad():
        return torch.cat([network.features(part).mean((2, 3)) for part in x.split(32)])


def set_head(network: nn.Module, features: Tensor, labels: np.ndarray) -> None:
    """Fit the linear classifier of a network to features (N, C)."""
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    classes = network.classifier.out_features
    head = fit_linear_head((features - mean) / scale, torch.from_numpy(labels), classes, robust=False)
    weights = head[:-1].T / scale
    network.classifier.weight.data = weights
    network.classifier.bias.data = head[-1] - weights @ mean
