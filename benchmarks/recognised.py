"""Does a network that took no part recognise what patterns show? Classes drawn with Lite0, named by Lite2 and Lite1."""

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
from convscope.featurevis.image_statistics import colourfulness
from convscope.samples import photographs

COUNT = 100  # classes in a set
SETS = (8, 4, 9)  # the recipe was chosen with classes of others
PEER_STEPS = 256


@dataclass(frozen=True)
class Row:
    """Shares of classes that a judge names first, and among its first five."""

    what: str
    classes: int
    seconds: float
    top1: dict[str, float]
    top5: dict[str, float]


def classes(number: int) -> list[int]:
    """A set of 100 ImageNet classes, drawn by a hash; sets do not overlap."""
    order = sorted(range(1000), key=lambda c: hashlib.sha256(f"convscope {c}".encode()).digest())
    return order[COUNT * number : COUNT * (number + 1)]


def judged(images: Sequence[np.ndarray], wanted: Sequence[int], judge: str) -> tuple[float, float]:
    """How often the judge's first guess, and one of its first five, is the wanted class; 8-bit pictures."""
    said = convscope.predict(convscope.load(judge), [Image.fromarray(image) for image in images], top=5).indices
    hits = said == np.array(wanted)[:, None]
    return float(hits[:, 0].mean()), float(hits.any(1).mean())


def row(
    what: str, wanted: Sequence[int], draw: Callable[[Sequence[int]], Sequence[np.ndarray]], judges: Sequence[str]
) -> tuple[Row, Sequence[np.ndarray]]:
    begin = time.perf_counter()
    images = draw(wanted)
    seconds = (time.perf_counter() - begin) / len(wanted)
    found = {judge: judged(images, wanted, judge) for judge in judges}
    tops = [{judge: tops[i] for judge, tops in found.items()} for i in (0, 1)]
    return Row(what, len(wanted), seconds, *tops), images


def ours(wanted: Sequence[int]) -> list[np.ndarray]:
    """By the default recipe."""
    return list(convscope.patterns(convscope.load("lite0"), "logits", wanted).images)


class Prepared(torch.nn.Module):
    """Lite0 on pictures in [0, 1], as the peers show them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = convscope.load("lite0").module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network((x * 255 - 127) / 128)
        return result


def lucent(wanted: Sequence[int]) -> list[np.ndarray]:
    """By its defaults but for the number of steps."""
    from lucent.optvis import param, render

    network = Prepared().eval()
    images = []
    for c in wanted:
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


def dreamlens(wanted: Sequence[int]) -> list[np.ndarray]:
    """By its defaults but for the number of steps."""
    from dreamlens import FeatureTarget, FeatureVisualizer
    from dreamlens.optimization import RenderConfig

    network = Prepared().eval()
    visualizer = FeatureVisualizer(network, quiet=True, normalize=False)
    images = []
    for c in wanted:
        target = FeatureTarget.for_class(c, layer=network.network.classifier)
        picture = visualizer.visualize(target, config=RenderConfig(steps=PEER_STEPS)).as_hwc()
        images.append((np.asarray(picture).clip(0, 1) * 255).round().astype(np.uint8))
    return images


@dataclass(frozen=True)
class Look:
    """How pictures look beside photographs: means over them."""

    what: str
    saturated: float
    contrast: float
    colourfulness: float
    slope: float


def look(what: str, images: np.ndarray) -> Look:
    """Share of values at 0 or 255, deviation of the brightness in 0..255, Hasler and Suesstrunk's colourfulness, and
    the exponent by which the spectrum's amplitude falls with frequency."""
    grey = images.astype(np.float64) @ (0.299, 0.587, 0.114)
    side = grey.shape[1]
    window = np.outer(np.hanning(side), np.hanning(side))
    amplitude = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    edges = np.logspace(np.log10(2 / side), np.log10(0.5), 16)
    rings = [(frequency >= a) & (frequency < b) for a, b in pairwise(edges)]
    profile = np.array([np.sqrt((amplitude[:, ring] ** 2).mean(1)) for ring in rings])
    slopes = np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(profile), 1)[0]
    saturated = np.isin(images, (0, 255)).mean()
    return Look(
        what, float(saturated), float(grey.std((1, 2)).mean()), float(colourfulness(images).mean()), -slopes.mean()
    )


def natural() -> np.ndarray:
    """The sample photographs' centres."""
    found = []
    for path in photographs():
        picture = Image.open(path).convert("RGB")
        found.append(np.asarray(ImageOps.fit(picture, (224, 224), Image.Resampling.LANCZOS)))
    return np.stack(found)


def run(peer_classes: int = 5) -> tuple[list[Row], list[Look]]:
    """Three sets by convscope, the first classes of the first of them by the peers."""
    judges = ("lite2", "lite1")
    rows, looks = [], [look("photographs", natural())]
    for n in SETS:
        own, images = row(f"convscope, set {n}", classes(n), ours, judges)
        rows.append(own)
        looks.append(look(own.what, np.stack(images)))
    few = classes(SETS[0])[:peer_classes]
    contenders = {"convscope": ours, f"lucent, {PEER_STEPS} steps": lucent, f"dreamlens, {PEER_STEPS} steps": dreamlens}
    for what, draw in contenders.items():
        own, images = row(what, few, draw, judges)
        rows.append(own)
        looks.append(look(what, np.stack(images)))
    return rows, looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=5, help="classes that lucent draws")
    torch.set_num_threads(THREADS)
    rows, looks = run(parser.parse_args().peers)
    for found in [*rows, *looks]:
        sys.stdout.write(f"{found}\n")


if __name__ == "__main__":
    main()
