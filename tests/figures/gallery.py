"""Every kind of figure, for the tests of their structure and for the contact sheet."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import convscope
from convscope.diagnosis.changed_images import ChangedImages
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.overview import summarize
from convscope.featurevis.image_statistics import image_statistics
from convscope.featurevis.layer_story import Chapter
from convscope.figures import render
from convscope.objectives import channel
from convscope.plotting.patterns import paired_pattern_grid
from convscope.plotting.story import chapter_sheet
from convscope.results import HasFigure
from tests.diagnosis.helpers import make_observations
from tests.oracles.detectors import SIDE, CellDetector, image_with_squares


@dataclass(frozen=True)
class Gallery:
    """A network, images of several sizes, and the names that the figures need.

    Attributes
    ----------
    first, last : str
        Names of an early and a late layer with feature maps.
    target, other : int
        Two classes.
    steps : int
        Steps of gradient ascent.
    """

    model: convscope.Model
    images: Sequence[Any]
    first: str
    last: str
    target: int
    other: int
    steps: int
    folder: Path


def digits_model() -> convscope.Model:
    """Make a network for gray images of 28 x 28 pixels; it is not trained."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )
    preprocessing = {"size": 28, "channel_order": "L", "mean": (0.5,), "std": (0.5,)}
    return convscope.load(net.eval(), preprocessing=preprocessing, classes=[f"digit {n}" for n in range(10)])


def digit_images() -> list[np.ndarray]:
    """Draw two images of 28 x 28 pixels, a ring and a bar."""
    y, x = np.mgrid[:28, :28] - 13.5
    ring = (np.abs(np.hypot(x, y) - 8) < 2) * 255
    bar = (np.abs(x - y / 4) < 2) * 255
    return [ring.astype(np.uint8), bar.astype(np.uint8)]


def detect_squares() -> convscope.Detections:
    """Detect a gray and a red square."""
    settings: dict[str, Any] = {"task": "detection", "classes": ["gray", "red"], "preprocessing": {"size": SIDE}}
    image = image_with_squares({(8, 0): (200, 200, 200), (0, 16): (255, 0, 0)})
    return convscope.detect(convscope.load(CellDetector(), **settings), image)


def project(vectors: Any) -> np.ndarray:
    """Lay vectors out in a plane by two of their channels."""
    array = np.asarray(vectors)
    return array[:, np.argsort(-array.std(0))[:2]]


def draw_all(g: Gallery) -> Iterator[tuple[str, HasFigure, dict[str, Any]]]:
    """Yield name, result and options of every figure."""
    model, last_image, two_targets = g.model, g.images[-1], [[g.target, g.other]] * 2
    yield "predictions", convscope.predict(model, g.images), {}
    yield "predictions of one image", convscope.predict(model, last_image), {}
    yield "activations", convscope.activations(model, last_image, [g.first, g.last]), {}
    min_max = convscope.activations(model, last_image, g.first, scaling="minmax")
    yield "activations, min to max", min_max, {"cmap": "inferno"}

    heatmaps = convscope.heatmaps(model, g.images[:2], two_targets)
    yield "heatmaps", heatmaps, {}
    yield "heatmaps on one scale", heatmaps, {"shared_scale": True}
    yield "signed heatmaps on one scale", heatmaps, {"signed": True, "shared_scale": True}
    single = convscope.heatmaps(model, last_image, g.target)
    yield "heatmap of one image", single, {}
    yield "map without positive evidence", dataclasses.replace(single, values=-np.abs(single.values) - 1), {}
    yield "signed heatmap", convscope.heatmaps(model, last_image, g.target, against=g.other), {"signed": True}
    yield "gradient at the input", convscope.heatmaps(model, last_image, g.target, method="input-x-gradient"), {}
    digits = digits_model()
    yield "heatmaps of digits", convscope.heatmaps(digits, digit_images(), [[3, 8]] * 2), {}
    yield "detections", detect_squares(), {}
    yield "locations", convscope.locate(model, g.images[:2], two_targets), {}
    labels = [g.target, g.other, g.target]
    yield "effects of units", convscope.effects(model, g.images[:3], g.last, range(5), labels=labels), {}
    yield "effects on a class", convscope.effects(model, last_image, g.last, range(5), targets=g.target), {}
    yield "effects with a curve", convscope.effects(model, g.images[:3], g.last, targets=g.target, curve=True), {}
    yield "dictionary", convscope.dictionary(model, g.images, g.last, features=32, active=4, steps=30), {}
    yield "diagnosis", diagnose_digits(digits), {}
    pair = (model, g.images[0], last_image, g.last)
    yield "patching by position", convscope.patch(*pair, by="position"), {}
    yield "patching by unit", convscope.patch(*pair, units=range(5)), {}

    explanation = convscope.explain(model, g.images[:2], g.target, features=5, share=1.0)
    yield "explanation", explanation, {}
    patches = np.random.default_rng(0).integers(0, 255, (*explanation.units.shape, 3, 16, 16, 3), np.uint8)
    yield "explanation with patches", dataclasses.replace(explanation, patches=patches), {"image": 1}

    units = convscope.patterns(model, g.first, range(4), steps=g.steps, frames=6)
    yield "patterns of units", units, {}
    noise_scores = np.array([1.0, 1e9, *units.noise_scores[2:]])
    scores = np.array([0.0, *units.scores[1:]])
    yield "marked patterns", dataclasses.replace(units, scores=scores, noise_scores=noise_scores), {}
    yield "patterns of classes", convscope.patterns(model, "logits", [g.target, g.other], steps=g.steps), {}
    yield "pattern of one unit", convscope.patterns(model, g.last, [2], steps=g.steps), {}
    objective = channel(g.first, 1) - channel(g.first, 2)
    yield "pattern of an objective", convscope.patterns(model, objective, steps=g.steps), {}
    yield "story", short_story(model, [g.first, g.last, "logits"], g), {}
    yield "story of a gray network", short_story(digits, [digits.layers[0].name, "logits"], g), {}

    yield "evaluation", convscope.evaluate(model, g.images[:2], heatmaps, steps=6), {}
    metrics = ("deletion", "average-drop", "sparseness")
    yield "evaluation of three metrics", convscope.evaluate(model, g.images[:2], heatmaps, metrics, steps=6), {}
    methods = ["grad-cam", "layer-cam", "random"]
    yield "comparison", convscope.compare(model, g.images[:3], g.target, methods=methods), {}
    settings = {"count": 3, "crops": 6, "sobol_points": 2, "n_evaluated": 3, "only_predicted": False}
    yield "concepts", convscope.concepts(model, g.images, g.target, **settings), {}
    cells = {"grid": 3, "positions_per_image": 20, "min_count": 2, "steps": g.steps}
    yield "atlas", convscope.atlas(model, g.images, layer=g.last, **cells, reducer=project), {}

    store = make_store(g)
    yield "unit", store.unit(g.first, 3), {}
    yield "unit of the logits", store.unit("logits", g.target), {}
    yield "examples", store.unit(g.last, 1).examples(), {}
    yield "image", store.image(0), {}
    yield "dead units", store.dead(), {}
    yield "duplicates", store.duplicates(0.6), {}
    yield "changed units", store.compare(store), {}
    yield "names of units", name_digits(), {}
    yield "units by name", store.search(store.classes[g.target] if store.classes else "red"), {}


def name_digits() -> convscope.UnitNames:
    """Name the logits of a network that measures the brightness of the four quarters of an image."""
    quarters = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        quarters[2].weight.copy_(torch.eye(4).repeat(1, 3))
    images = np.random.default_rng(0).random((80, 8, 8, 3))
    words = ["upper left", "upper right", "lower left", "lower right"]
    for n, image in enumerate(images):
        image[4 * (n % 4 // 2) :][:4, 4 * (n % 2) :][:, :4] += 3
    preprocessing = {"size": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    with tempfile.TemporaryDirectory() as folder:
        model = convscope.load(quarters, preprocessing=preprocessing)
        store = convscope.scan(model, np.clip(images / 4, 0, 1), folder, layers=["logits"], sample=80, workers=0)
        return convscope.name_units(store, words, np.eye(4)[np.arange(80) % 4])


def diagnose_digits(model: convscope.Model) -> convscope.Diagnosis:
    """Diagnose the network for digits on 24 images, with a finding on the first of them."""
    images = np.stack(digit_images() * 12)
    logits = np.random.default_rng(0).normal(size=(24, 10)).astype(np.float32)
    observations = make_observations(np.arange(24) % 10, logits, thumbnails=images[..., None].repeat(3, -1))
    return convscope.Diagnosis.of(
        model,
        observations,
        [Finding("slice", "Dark images are often wrong.", "Collect more.", (0, 3, 4), (), 0.2, (0.1, 0.3), 0.01)],
        searches=(),
        overview=summarize(observations),
        label_quality=np.ones(24, np.float32),
        changed_images=ChangedImages.none(),
        layer=model.layers[0].name,
        layer_reason="",
        data_name="digits",
    )


def short_story(model: convscope.Model, layers: Sequence[str], g: Gallery) -> convscope.Story:
    """Compute a story with few steps."""
    chapters = []
    for layer in layers:
        row = None if layer == "logits" else model.layers.find(layer)
        result = convscope.patterns(model, layer, range(4), steps=g.steps)
        field = None if row is None else row.bounded_receptive_field(model.preprocessing.size)
        statistics = image_statistics(result.images)
        chapters.append(
            Chapter(layer, field and field[:2], result.units, tuple(result.names), result.images, statistics)
        )
    return convscope.Story(model, tuple(chapters), 0)


def make_store(g: Gallery) -> convscope.Store:
    """Scan the images, saved as files in one folder per class."""
    for n, image in enumerate(g.images):
        folder = g.folder / "images" / ("first class" if n % 2 else "second class")
        folder.mkdir(parents=True, exist_ok=True)
        source = Image.open(image) if isinstance(image, str) else Image.fromarray(image)
        source.convert("RGB").save(folder / f"image {n}.png")
    return convscope.scan(g.model, g.folder / "images", g.folder / "store", layers=[g.first, g.last, "logits"], k=9)


def sheets(results: Mapping[str, HasFigure]) -> dict[str, Image.Image]:
    """Return the labelled sheets that are saved besides figures: sprites, pairs and the patterns of a chapter."""
    units: Any = results["patterns of units"]
    story: Any = results["story"]
    return {
        "sprites": dict(render(units))["sprites.png"],
        "sprites of classes": dict(render(results["patterns of classes"]))["sprites.png"],
        "pairs": paired_pattern_grid(units, units),
        "chapter": chapter_sheet(story.chapters[-1]),
    }
