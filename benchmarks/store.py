"""What questions to a large store cost: time, and bytes read from its files. Values in it are drawn at random.

python benchmarks/store.py FOLDER [--units 10000] [--pictures 1000000]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import convscope
from convscope.scanning.statistics import HISTOGRAM_BINS
from convscope.store.schema import FORMAT, ImageRows, LayerSummary, RankedExamples, write_store

LAYERS, PART = 10, 1 << 16  # layers; pictures that are made at once
K, SAMPLE, CLASSES = 100, 1000, 1000


def layer(number: int, units: int, pictures: int, draw: np.random.Generator) -> LayerSummary:
    """A layer of 14 x 14 places. No picture comes twice among the best of a unit."""
    sample = draw.random((units, SAMPLE), np.float32)
    step = pictures // K  # one picture from each stretch of this length
    which = (np.arange(K) * step + draw.integers(0, step, (units, K)))[:, draw.permutation(K)]
    places = draw.integers(0, 196, (units, K)).astype(np.int32)
    values = -np.sort(-draw.random((units, K), np.float32), 1)
    one = np.ones(units)
    return LayerSummary(
        name=f"layer {number}", kind="Conv2d", shape=(units, 14, 14), receptive_field=(64.0, 64.0),
        stride=(16.0, 16.0), origin=(0.0, 0.0), has_global_context=False, mean=one, variance=one, maximum=one, minimum=-one,
        active=one, fires=one, histogram=np.full((units, HISTOGRAM_BINS), pictures // HISTOGRAM_BINS), top=RankedExamples(values, which, places),
        bottom=RankedExamples(-values, (which + 1) % pictures, places), sample=sample,
        sample_positions=np.zeros(sample.shape, np.int32), class_means=draw.random((units, CLASSES), np.float32),
    )  # fmt: skip


def rows(pictures: int, draw: np.random.Generator) -> Iterator[ImageRows]:
    for begin in range(0, pictures, PART):
        ids = np.arange(begin, min(begin + PART, pictures))
        yield ImageRows(
            names=[f"photographs/{i % CLASSES:04d}/{i:08d}.jpg" for i in ids], labels=ids % CLASSES,
            failed=[None] * len(ids), sizes=draw.integers(200, 800, (len(ids), 2)),
            boxes=np.tile([0.0, 0, 500, 500], (len(ids), 1)), classes=draw.integers(0, CLASSES, (len(ids), 5)),
            probabilities=draw.random((len(ids), 5)), losses=draw.random(len(ids)),
        )  # fmt: skip


def write(folder: Path, units: int, pictures: int) -> None:
    draw = np.random.default_rng(0)
    names = [f"class {i}" for i in range(CLASSES)]
    write_store(
        folder,
        (layer(i, units // LAYERS, pictures, draw) for i in range(LAYERS)),
        rows(pictures, draw),
        sample_images=np.sort(draw.choice(pictures, SAMPLE, replace=False)),
        class_counts=np.full(CLASSES, pictures // CLASSES),
        input_size=(224, 224),
        shards=[],
        manifest={
            "kind": "scan", "format": FORMAT, "model": {"name": "none", "weights_sha256": "", "preprocessing": None},
            "data": {"name": "none", "images": pictures, "fingerprint": ""}, "plan": {"k": K}, "classes": names,
            "labels": names, "failed": 0, "versions": {},
        },
    )  # fmt: skip


def read() -> int:
    """Bytes that this process has read so far, files in memory included."""
    return int(Path("/proc/self/io").read_text().split()[1])


def asked(words: str, question: Callable[[], Any]) -> None:
    begin, worked, before = time.perf_counter(), time.process_time(), read()
    question()
    took = 1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - worked)
    sys.stdout.write(f"| {words} | {took[0]:.0f} | {took[1]:.0f} | {(read() - before) / 1e6:.2f} |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    given = parser.parse_args()
    if not (given.folder / "manifest.json").exists():
        write(given.folder, given.units, given.pictures)
    sizes = {file.name: file.stat().st_size / 1e6 for file in given.folder.iterdir()}
    sys.stdout.write("; ".join(f"{name} {size:.1f} MB" for name, size in sorted(sizes.items())))
    before = convscope.open_store(given.folder).unit("layer 0", 3)  # what is imported at the first question
    before.similar()
    before.examples()
    sys.stdout.write("\n| asked | ms | of a processor | MB read |\n| --- | --- | --- | --- |\n")
    store = convscope.open_store(given.folder)
    asked("`open_store`", lambda: convscope.open_store(given.folder))
    middle = given.units // LAYERS // 2
    for which, unit in (("first", store.unit("layer 4", middle)), ("another", store.unit("layer 7", middle // 4))):
        asked(f"{which} unit: its statistics", lambda: unit.statistics)  # noqa: B023
        asked(f"{which} unit: nine examples", lambda: unit.examples(9))  # noqa: B023
        asked(f"{which} unit: its classes", unit.classes)
        asked(f"{which} unit: similar ones, of all layers", unit.similar)
    picture = store.image(given.pictures // 3)
    asked("a picture's predictions", lambda: picture.predictions)
    asked("a picture's units: all of topk.parquet, in parts", picture.units)


if __name__ == "__main__":
    main()
