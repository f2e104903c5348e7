"""Names of units whose right names are known: classes, planted detectors and noise; time and memory of many units."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import THREADS
from torch import Tensor, nn

import convscope
from convscope.naming.assignment import Activations, check_words, choose_words, split_images
from convscope.naming.judges import class_names
from convscope.naming.word_scores import WordScores
from convscope.samples import photographs
from convscope.store.io import Folder, NpyRows

BUILD = Path(__file__).parents[1] / "build" / "unit_names"
CLASSES = range(5, 1000, 25)
SEEDS, VIEWS = 1, 12
CROPS = 40  # of each photograph
NOISE_UNITS = 1000
SIDE = 64  # of rendered images
COLORS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "magenta": (1, 0, 1),
    "cyan": (0, 1, 1), "white": (1, 1, 1), "orange": (1, 0.5, 0),
}  # fmt: skip
ORIENTATIONS = {f"stripes at {30 * i} degrees": math.pi * i / 6 for i in range(6)}
FREQUENCIES = {f"period of {period} pixels": 1 / period for period in (4, 8, 16, 32)}
LARGE = (20_000, 20_000, 10_000)  # units, words, images


@dataclass(frozen=True)
class Row:
    """One experiment: units whose names are known, and how many of them get the right name."""

    title: str
    units: int
    words: int
    images: int
    right: float | None
    named: float
    score: float


# --- classes ---------------------------------------------------------------------------------------------------------


def class_patterns() -> list[Path]:
    """Return files with the patterns of 40 classes by Lite0, which are computed once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    model = convscope.load("lite0")
    files = [BUILD / f"{c:03d}-{seed}.png" for c in CLASSES for seed in range(SEEDS)]
    for seed in range(SEEDS):
        missing = [c for c in CLASSES if not (BUILD / f"{c:03d}-{seed}.png").exists()]
        for start in range(0, len(missing), 20):
            part = missing[start : start + 20]
            result = convscope.patterns(model, "logits", part, seed=seed, progress=False)
            for c, image in zip(part, result.images, strict=True):
                Image.fromarray(image).save(BUILD / f"{c:03d}-{seed}.png")
    return files


def views(image: Image.Image, count: int, rng: np.random.Generator, smallest: float) -> list[np.ndarray]:
    """Return random crops of an image, flipped or not; their sides are `smallest` to 1 of the image's shorter one."""
    crops = []
    for _ in range(count):
        side = int(min(image.size) * rng.uniform(smallest, 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((224, 224))
        crops.append(np.asarray(crop)[:, :: int(rng.choice([1, -1]))])
    return crops


def class_units(folder: Path) -> list[Row]:
    """Name the logits of Lite0 by the probabilities of Lite2, on patterns of classes and crops of photographs."""
    rng = np.random.default_rng(0)
    images: list[np.ndarray] = []
    for file in class_patterns():
        images += views(Image.open(file).convert("RGB"), VIEWS, rng, 0.7)
    for photo in photographs():
        images += views(Image.open(photo).convert("RGB"), CROPS, rng, 0.3)
    stacked = np.stack(images)
    model, judge = convscope.load("lite0"), convscope.load("lite2")
    words, scores = class_names(judge), convscope.predict(judge, stacked, progress=False).logits
    store = convscope.scan(model, stacked, folder / "classes", ["logits"], sample=len(images), workers=0)
    names = convscope.name_units(store, words, scores, output="softmax", save=False)
    shown = np.array(list(CLASSES))
    right = float(np.mean(names.names[shown] == np.array(words)[shown]))
    rows = [
        Row("Lite0's classes by Lite2", len(shown), names.num_words, len(images), right,
            float(names.named[shown].mean()), float(names.scores[shown].mean()))
    ]  # fmt: skip
    noise = convscope.load(NoiseNet(), preprocessing={"size": 64, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    store = convscope.scan(noise, stacked, folder / "noise", ["logits"], sample=len(images), workers=0)
    names = convscope.name_units(store, words, scores, output="softmax", save=False)
    rows.append(
        Row("noise, by Lite2", NOISE_UNITS, names.num_words, len(images), None, float(names.named.mean()),
            float(np.nanmean(names.scores)))
    )  # fmt: skip
    return rows


class NoiseNet(nn.Module):
    """Units that are a hash of the image: uniform noise that no word tells."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 64, NOISE_UNITS)
        generator = torch.Generator().manual_seed(0)
        self.linear.weight.data = torch.randn(self.linear.weight.shape, generator=generator)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        cells = nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        return (1e4 * torch.sin(1e3 * self.linear(cells))).frac()


# --- planted detectors -----------------------------------------------------------------------------------------------


def gratings(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render colored gratings; return images and scores (N, 18): 1 for the color, orientation and period of each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    scores = np.zeros((count, len(COLORS) + len(ORIENTATIONS) + len(FREQUENCIES)), np.float32)
    for n in range(count):
        c, o, f = (int(rng.integers(len(table))) for table in (COLORS, ORIENTATIONS, FREQUENCIES))
        angle, frequency = list(ORIENTATIONS.values())[o], list(FREQUENCIES.values())[f]
        phase = 2 * math.pi * (frequency * (x * math.cos(angle) + y * math.sin(angle)) + rng.random())
        wave = 0.5 + rng.uniform(0.25, 0.5) * np.cos(phase)
        image = wave[..., None] * np.array(list(COLORS.values())[c]) + rng.normal(0, 0.1, (SIDE, SIDE, 3))
        images[n] = np.clip(255 * image, 0, 255)
        scores[n, [c, len(COLORS) + o, len(COLORS) + len(ORIENTATIONS) + f]] = 1
    return images, scores


class GratingNet(nn.Module):
    """One unit for each color, orientation and period: the match of the mean color, and the energy of Gabor filters."""

    def __init__(self) -> None:
        super().__init__()
        colors = torch.tensor(list(COLORS.values()))
        self.register_buffer("colors", colors / colors.norm(dim=1, keepdim=True))
        y, x = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
        filters = []
        for angle in ORIENTATIONS.values():
            for frequency in FREQUENCIES.values():
                window = torch.exp(-(x**2 + y**2) / (2 * min(10, 0.5 / frequency) ** 2))
                phase = 2 * math.pi * frequency * (x * math.cos(angle) + y * math.sin(angle))
                for wave in (phase.cos(), phase.sin()):
                    gabor = window * wave
                    gabor = gabor - window * (gabor.sum() / window.sum())
                    filters.append(gabor / gabor.norm())
        self.gabor = nn.Conv2d(1, len(filters), 33, bias=False)
        self.gabor.weight.data = torch.stack(filters)[:, None]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3))
        color = (mean / mean.norm(dim=1, keepdim=True)) @ self.colors.T
        energy = self.gabor(x.sum(1, keepdim=True)).square().mean((2, 3))
        energy = energy.view(len(x), len(ORIENTATIONS), len(FREQUENCIES), 2).sum(3)
        energy = energy / energy.sum((1, 2), keepdim=True)
        return torch.cat([color, energy.sum(2), energy.sum(1)], 1)


def planted_units(folder: Path) -> list[Row]:
    """Name detectors of colors, orientations and periods, by the parameters that the images were rendered with."""
    words = [*COLORS, *ORIENTATIONS, *FREQUENCIES]
    images, scores = gratings(600, 0)
    model = convscope.load(GratingNet(), preprocessing={"size": SIDE, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    store = convscope.scan(model, images, folder / "gratings", ["logits"], sample=len(images), workers=0)
    names = convscope.name_units(store, words, scores, save=False)
    right = float((names.names == np.array(words)).mean())
    named, score = float(names.named.mean()), float(names.scores.mean())
    return [Row("planted detectors, by exact scores", len(words), len(words), len(images), right, named, score)]


# --- time and memory -------------------------------------------------------------------------------------------------


class SampleFile:
    """The maxima of units in a file, as a store reads them."""

    def __init__(self, folder: str) -> None:
        self._rows = NpyRows(Folder(folder), "maxima.npy")

    def sample_rows(self, start: int, stop: int) -> np.ndarray:
        return self._rows.read(start, stop)


def measure_large(units: int, words: int, images: int) -> dict[str, float]:
    """Name random units by random words; return seconds, seconds of the processors, and the peak of memory in GB."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        for name, shape in (("maxima", (units, images)), ("scores", (images, words))):
            dtype = np.float32 if name == "maxima" else np.float16
            array = np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", dtype, shape)
            rng = np.random.default_rng(0)
            for start in range(0, shape[0], 500):
                array[start : start + 500] = rng.random((min(500, shape[0] - start), shape[1]), np.float32)
            array.flush()
            del array
        scores = np.load(f"{folder}/scores.npy", mmap_mode="r")
        store = SampleFile(folder)
        start, cpu = time.perf_counter(), time.process_time()
        used = np.arange(images)
        shuffled = np.random.default_rng(1).random((1000, images), np.float32)
        activations = Activations(store, np.arange(units), used, shuffled)  # type: ignore[arg-type]
        table = WordScores(tuple(map(str, range(words))), scores, used, "probability", np.zeros(images, np.float32))
        first, second = split_images(used)
        best, _ = choose_words(activations, table, first, 2, lambda _done, _total: None)
        check_words(activations, table, second, best, lambda _done, _total: None)
        return {
            "seconds": time.perf_counter() - start,
            "processor": time.process_time() - cpu,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def large() -> dict[str, float]:
    """Run `measure_large` in a process of its own."""
    BUILD.mkdir(parents=True, exist_ok=True)
    output = subprocess.run(
        [sys.executable, __file__, *map(str, LARGE)], check=True, capture_output=True, text=True
    ).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def run() -> tuple[list[Row], dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        rows = [*class_units(Path(folder)), *planted_units(Path(folder))]
    return rows, large()


def table(rows: list[Row], measured: dict[str, float]) -> list[str]:
    units, words, images = LARGE
    lines = [
        "Units whose right names are known. `right` is the fraction whose name is right, `named` that of units whose",
        "name is better than chance at a false discovery rate of 1 %, and the score the mean area under the ROC curve",
        f"on the images that took no part in the choice. Classes: patterns of {len(CLASSES)} classes by Lite0 ({SEEDS}",
        f"each, {VIEWS} crops of each) and {4 * CROPS} crops of photographs; views of one pattern are",
        "in both halves. Noise: units that are a hash of the image. Planted: detectors of 8 colors, 6 orientations and",
        "4 periods of gratings.",
        "",
        "| units | number | words | images | right | named | score |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        right = "" if row.right is None else f"{row.right:.3f}"
        numbers = f"{row.units} | {row.words} | {row.images} | {right} | {row.named:.3f} | {row.score:.2f}"
        lines.append(f"| {row.title} | {numbers} |")
    lines += [
        "",
        f"{units:,} units, {words:,} words and {images:,} images: {measured['seconds']:.0f} s "
        f"({measured['processor']:.0f} s of both processors together), at most {measured['memory']:.1f} GB.",
    ]
    return lines


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_large(*map(int, sys.argv[1:4]))))
