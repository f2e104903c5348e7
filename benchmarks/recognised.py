"""Does a network that took no part recognise what patterns show? Classes drawn with Lite0, named by Lite2 and Lite1."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timing import THREADS

import convscope

COUNT = 100  # classes in a set
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


def ours(wanted: Sequence[int]) -> Sequence[np.ndarray]:
    """By the default recipe."""
    return list(convscope.patterns(convscope.load("lite0"), "logits", wanted).images)


def lucent(wanted: Sequence[int]) -> Sequence[np.ndarray]:
    """By its defaults but for the number of steps."""
    from lucent.optvis import param, render

    network = convscope.load("lite0").module
    scale = torch.tensor([127.0, 128.0])

    class Prepared(torch.nn.Module):
        """Lite0 on pictures in [0, 1]."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.network((x * 255 - scale[0]) / scale[1])
            return result

    prepared = Prepared().eval()
    images = []
    for c in wanted:
        (image,) = render.render_vis(
            prepared,
            f"network_classifier:{c}",
            lambda: param.image(224),
            thresholds=(PEER_STEPS,),
            preprocess=False,
            progress=False,
            show_image=False,
        )
        images.append((image[0] * 255).round().astype(np.uint8))
    return images


def run(peer_classes: int = 10) -> list[Row]:
    """Three sets by convscope, the first classes of the first set by lucent."""
    judges = ("lite2", "lite1")
    rows = [row(f"convscope, set {n + 1}", classes(n), ours, judges)[0] for n in range(3)]
    few = classes(0)[:peer_classes]
    rows.append(row("convscope", few, ours, judges)[0])
    rows.append(row(f"lucent, {PEER_STEPS} steps", few, lucent, judges)[0])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=10, help="classes that lucent draws")
    torch.set_num_threads(THREADS)
    for found in run(parser.parse_args().peers):
        sys.stdout.write(f"{found}\n")


if __name__ == "__main__":
    main()
