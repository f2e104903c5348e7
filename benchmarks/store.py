"""Time and bytes read for queries on a large store with random values.

python benchmarks/store.py FOLDER [--units 10000] [--images 1000000]
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

LAYERS, PART = 10, 1 << 16  # layers; images written at once
K, SAMPLE, CLASSES = 100, 1000, 1000


def layer(number: int, units: int, images: int, generator: np.random.Generator) -> LayerSummary:
    """Return a layer of 14 x 14 positions. No image occurs twice among the top images of a unit."""
    sample = generator.random((units, SAMPLE), np.float32)
    step = images // K  # one image from each interval of this length
    which = (np.arange(K) * step + generator.integers(0, step, (units, K)))[:, generator.permutation(K)]
    positions = generator.integers(0, 196, (units, K)).astype(np.int32)
    values = -np.sort(-generator.random((units, K), np.float32), 1)
    one = np.ones(units)
    return LayerSummary(
        name=f"layer {number}", kind="Conv2d", shape=(units, 14, 14), receptive_field=(64.0, 64.0),
        stride=(16.0, 16.0), origin=(0.0, 0.0), has_global_context=False, mean=one, variance=one, maximum=one,
        minimum=-one, active=one, fires=one, histogram=np.full((units, HISTOGRAM_BINS), images // HISTOGRAM_BINS),
        top=RankedExamples(values, which, positions),
        bottom=RankedExamples(-values, (which + 1) % images, positions), sample=sample,
        sample_positions=np.zeros(sample.shape, np.int32), class_means=generator.random((units, CLASSES), np.float32),
    )  # fmt: skip


def rows(images: int, generator: np.random.Generator) -> Iterator[ImageRows]:
    for start in range(0, images, PART):
        ids = np.arange(start, min(start + PART, images))
        yield ImageRows(
            names=[f"photographs/{i % CLASSES:04d}/{i:08d}.jpg" for i in ids], labels=ids % CLASSES,
            failed=[None] * len(ids), sizes=generator.integers(200, 800, (len(ids), 2)),
            boxes=np.tile([0.0, 0, 500, 500], (len(ids), 1)), classes=generator.integers(0, CLASSES, (len(ids), 5)),
            probabilities=generator.random((len(ids), 5)), losses=generator.random(len(ids)),
        )  # fmt: skip


def write(folder: Path, units: int, images: int) -> None:
    generator = np.random.default_rng(0)
    names = [f"class {i}" for i in range(CLASSES)]
    write_store(
        folder,
        (layer(i, units // LAYERS, images, generator) for i in range(LAYERS)),
        rows(images, generator),
        sample_images=np.sort(generator.choice(images, SAMPLE, replace=False)),
        class_counts=np.full(CLASSES, images // CLASSES),
        input_size=(224, 224),
        shards=[],
        manifest={
            "kind": "scan", "format": FORMAT, "model": {"name": "none", "weights_sha256": "", "preprocessing": None},
            "data": {"name": "none", "images": images, "fingerprint": ""}, "plan": {"k": K}, "classes": names,
            "labels": names, "failed": 0, "versions": {},
        },
    )  # fmt: skip


def read() -> int:
    """Return the bytes that this process has read so far, memory-mapped files included."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure(name: str, query: Callable[[], Any]) -> None:
    start, worked, before = time.perf_counter(), time.process_time(), read()
    query()
    took = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - worked)
    sys.stdout.write(f"| {name} | {took[0]:.0f} | {took[1]:.0f} | {(read() - before) / 1e6:.2f} |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if not (arguments.folder / "manifest.json").exists():
        write(arguments.folder, arguments.units, arguments.images)
    sizes = {file.name: file.stat().st_size / 1e6 for file in arguments.folder.iterdir()}
    sys.stdout.write("; ".join(f"{name} {size:.1f} MB" for name, size in sorted(sizes.items())))
    before = convscope.open_store(arguments.folder).unit("layer 0", 3)  # imports happen on the first query
    before.similar()
    before.examples()
    sys.stdout.write("\n| query | ms | CPU ms | MB read |\n| --- | --- | --- | --- |\n")
    store = convscope.open_store(arguments.folder)
    measure("`open_store`", lambda: convscope.open_store(arguments.folder))
    middle = arguments.units // LAYERS // 2
    for which, unit in (("first", store.unit("layer 4", middle)), ("another", store.unit("layer 7", middle // 4))):
        measure(f"{which} unit: its statistics", lambda: unit.statistics)  # noqa: B023
        measure(f"{which} unit: nine examples", lambda: unit.examples(9))  # noqa: B023
        measure(f"{which} unit: its classes", unit.classes)
        measure(f"{which} unit: similar ones, of all layers", unit.similar)
    image = store.image(arguments.images // 3)
    measure("an image's predictions", lambda: image.predictions)
    measure("an image's units: all of topk.parquet, in parts", image.units)


if __name__ == "__main__":
    main()
