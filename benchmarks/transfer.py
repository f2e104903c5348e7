"""Transfer of class patterns to other models: computed with Lite0, classified by Lite2 and Lite1."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageOps
from timing import THREADS

import convscope
from convscope.featurevis.image_statistics import colorfulness
from convscope.samples import photographs

COUNT = 100  # classes per set
SETS = (8, 4, 9)  # the recipe was chosen on other sets
PEER_STEPS = 256


@dataclass(frozen=True)
class Row:
    """Top-1 and top-5 accuracy by judge."""

    name: str
    classes: int
    seconds: float
    top1: dict[str, float]
    top5: dict[str, float]


def classes(number: int) -> list[int]:
    """Return a set of 100 ImageNet classes, selected by a hash; sets do not overlap."""
    order = sorted(range(1000), key=lambda c: hashlib.sha256(f"convscope {c}".encode()).digest())
    return order[COUNT * number : COUNT * (number + 1)]


def accuracy(images: Sequence[np.ndarray], targets: Sequence[int], judge: str) -> tuple[float, float]:
    """Return the judge's top-1 and top-5 accuracy on 8-bit images."""
    predictions = convscope.predict(convscope.load(judge), [Image.fromarray(image) for image in images], top=5).indices
    hits = predictions == np.array(targets)[:, None]
    return float(hits[:, 0].mean()), float(hits.any(1).mean())


def row(
    name: str, targets: Sequence[int], compute: Callable[[Sequence[int]], Sequence[np.ndarray]], judges: Sequence[str]
) -> tuple[Row, Sequence[np.ndarray]]:
    start = time.perf_counter()
    images = compute(targets)
    seconds = (time.perf_counter() - start) / len(targets)
    accuracies = {judge: accuracy(images, targets, judge) for judge in judges}
    tops = [{judge: tops[i] for judge, tops in accuracies.items()} for i in (0, 1)]
    return Row(name, len(targets), seconds, *tops), images


def ours(targets: Sequence[int]) -> list[np.ndarray]:
    """Compute patterns with the default recipe."""
    return list(convscope.patterns(convscope.load("lite0"), "logits", targets).images)


class Prepared(torch.nn.Module):
    """Lite0 on images in [0, 1], as the peers pass them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = convscope.load("lite0").module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network((x * 255 - 127) / 128)
        return result


def lucent(targets: Sequence[int]) -> list[np.ndarray]:
    """Compute patterns with its defaults, except for the number of steps."""
    from lucent.optvis import param, render

    network = Prepared().eval()
    images = []
    for c in targets:
        (image,) = render.render_vis(
            network,
            f"network_classifier:{c}",
            lambda: param.image(224),
            thresholds=(PEER_STEPS,),
            preprocess=False,
            progress=False,
            show_image=False,
        )
        images.append((image[0] * 255).round().astype(np.uint8))
    return images


def dreamlens(targets: Sequence[int]) -> list[np.ndarray]:
    """Compute patterns with its defaults, except for the number of steps."""
    from dreamlens import FeatureTarget, FeatureVisualizer
    from dreamlens.optimization import RenderConfig

    network = Prepared().eval()
    visualizer = FeatureVisualizer(network, quiet=True, normalize=False)
    images = []
    for c in targets:
        target = FeatureTarget.for_class(c, layer=network.network.classifier)
        image = visualizer.visualize(target, config=RenderConfig(steps=PEER_STEPS)).as_hwc()
        images.append((np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8))
    return images


@dataclass(frozen=True)
class ImageStatistics:
    """Means over images."""

    name: str
    saturated: float
    contrast: float
    colorfulness: float
    slope: float


def measure(name: str, images: np.ndarray) -> ImageStatistics:
    """Measure saturation, contrast, colorfulness (Hasler and Suesstrunk) and the exponent of the spectrum."""
    gray = images.astype(np.float64) @ (0.299, 0.587, 0.114)
    side = gray.shape[1]
    window = np.outer(np.hanning(side), np.hanning(side))
    amplitude = np.abs(np.fft.fft2((gray - gray.mean((1, 2), keepdims=True)) * window))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    edges = np.logspace(np.log10(2 / side), np.log10(0.5), 16)
    rings = [(frequency >= a) & (frequency < b) for a, b in pairwise(edges)]
    profile = np.array([np.sqrt((amplitude[:, ring] ** 2).mean(1)) for ring in rings])
    slopes = np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(profile), 1)[0]
    saturated = np.isin(images, (0, 255)).mean()
    return ImageStatistics(
        name, float(saturated), float(gray.std((1, 2)).mean()), float(colorfulness(images).mean()), -slopes.mean()
    )


def natural() -> np.ndarray:
    """Return the centres of the sample photographs."""
    crops = []
    for path in photographs():
        image = Image.open(path).convert("RGB")
        crops.append(np.asarray(ImageOps.fit(image, (224, 224), Image.Resampling.LANCZOS)))
    return np.stack(crops)


def run(peer_classes: int = 5) -> tuple[list[Row], list[ImageStatistics]]:
    """Run three sets with convscope, and the first classes of the first set with the peers."""
    judges = ("lite2", "lite1")
    rows, statistics = [], [measure("photographs", natural())]
    for n in SETS:
        result, images = row(f"convscope, set {n}", classes(n), ours, judges)
        rows.append(result)
        statistics.append(measure(result.name, np.stack(images)))
    few = classes(SETS[0])[:peer_classes]
    contenders = {"convscope": ours, f"lucent, {PEER_STEPS} steps": lucent, f"dreamlens, {PEER_STEPS} steps": dreamlens}
    for name, compute in contenders.items():
        result, images = row(name, few, compute, judges)
        rows.append(result)
        statistics.append(measure(name, np.stack(images)))
    return rows, statistics


def table(rows: list[Row], statistics: list[ImageStatistics]) -> list[str]:
    """Return the section of the README: text and tables."""
    ours = sum(row.seconds for row in rows[: len(SETS)]) / len(SETS)
    peers = [f"{row.name.partition(',')[0]} {row.seconds / ours:.1f}" for row in rows[-2:]]
    return [
        "Patterns of ImageNet classes are computed with Lite0 by the default recipe and shown as 8-bit images to two",
        f"other networks; the table gives their top-1 and top-5 accuracy. Sets of {COUNT} classes, which do not",
        "overlap, are selected by a hash. The recipe was chosen on classes of three other sets by Lite1, at its own",
        "size and at 280 pixels. Lite2 had been used to judge earlier recipes on these sets.",
        "",
        "| | classes | s per class | Lite2 top-1 | Lite2 top-5 | Lite1 top-1 | Lite1 top-5 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *[
            f"| {r.name} | {r.classes} | {r.seconds:.1f} | {r.top1['lite2']:.2f} | {r.top5['lite2']:.2f} "
            f"| {r.top1['lite1']:.2f} | {r.top5['lite1']:.2f} |"
            for r in rows
        ],
        "",
        f"Time per class relative to convscope over the three sets: {', '.join(peers)}.",
        "",
        "Image statistics, compared with those of photographs: the fraction of values that are 0 or 255, the",
        "standard deviation of the brightness (0..255), colorfulness (Hasler and Suesstrunk), and the exponent",
        "of the spectrum's amplitude.",
        "",
        "| | saturated | contrast | colorfulness | spectrum |",
        "| --- | --- | --- | --- | --- |",
        *[
            f"| {s.name} | {s.saturated:.3f} | {s.contrast:.0f} | {s.colorfulness:.0f} | {s.slope:.2f} |"
            for s in statistics
        ],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=5, help="classes that lucent draws")
    torch.set_num_threads(THREADS)
    rows, statistics = run(parser.parse_args().peers)
    for row_or_statistics in [*rows, *statistics]:
        sys.stdout.write(f"{row_or_statistics}\n")


if __name__ == "__main__":
    main()
