"""A scan relative to a bare forward pass, the cost of decoding, and memory for growing data sets."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from crops import cut
from PIL import Image
from tables import header
from timing import THREADS, Timed, interleaved
from torch import Tensor

import convscope
from convscope.datasets.catalogue import build_catalogue
from convscope.engine import capture
from convscope.engine.layer_selection import last_per_resolution
from convscope.engine.model import LOGITS, Model
from convscope.images.loading import DEFAULT_MAX_PIXELS
from convscope.samples import photographs
from convscope.scanning.batch_statistics import StatisticsForward, forward_with_statistics
from convscope.scanning.decoding import PrefetchingDecoder
from convscope.scanning.plan import ScanPlan
from convscope.scanning.shard import ScanTargets, scan_shard

BATCH, BATCHES = 32, 4
COUNTS = (1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Pass:
    """Times per image of a bare forward pass and of a scan."""

    network: str
    layers: int
    units: int
    times: dict[str, Timed]
    errors: dict[str, float]


@dataclass(frozen=True)
class Peak:
    """Peak memory of all processes together, in MiB, and the size of the store."""

    images: int
    megabytes: float
    store: float
    seconds: float


def photograph_crops(count: int) -> list[Image.Image]:
    """Return crops of the sample photographs."""
    opened = [Image.open(path).convert("RGB") for path in photographs()]
    generator = random.Random(0)
    return [cut(opened[i % len(opened)], generator) for i in range(count)]


def passes(rounds: int) -> list[Pass]:
    lite0 = convscope.load("lite0")
    resnet = convscope.load("torchvision:resnet50", weights="random")
    return [
        _pass("Lite0, one layer of each resolution", lite0, [row.name for row in last_per_resolution(lite0)], rounds),
        _pass("Lite0, all layers", lite0, [row.name for row in lite0.layers.unique_spatial()], rounds),
        _pass(
            "ResNet-50, one layer of each resolution", resnet, [row.name for row in last_per_resolution(resnet)], rounds
        ),
    ]


def _pass(network: str, model: Model, layers: list[str], rounds: int) -> Pass:
    """Time the network alone, a shard from decoded images to the content of its file, and the same compiled."""
    count = BATCH * BATCHES
    plan = ScanPlan(count, BATCH, count, "squash", DEFAULT_MAX_PIXELS, THREADS, 100, 1000, False)
    with PrefetchingDecoder(build_catalogue(photograph_crops(count)), model.preprocessing) as decoder:
        decoded = list(decoder.batches(plan.batches([0]), BATCH))
    units = {name: model.layers.find(name).units for name in layers} | {LOGITS: int(model.num_outputs or 0)}
    targets = ScanTargets(units, None, None)

    def bare() -> None:
        with torch.inference_mode():
            for part in decoded:
                model.module(part.x)

    def shard(forward: StatisticsForward) -> None:
        deque(scan_shard(model, plan, 0, targets, forward, iter(decoded)), maxlen=0)

    with ExitStack() as stack:
        passes = {
            name: stack.enter_context(forward_with_statistics(model, list(units), BATCH, compiled=compiled))
            for name, compiled in (("convscope", False), ("convscope, compiled", True))
        }
        contenders: dict[str, Callable[[], None]] = {name: partial(shard, forward) for name, forward in passes.items()}
        raw = interleaved({"bare forward": bare, **contenders}, "bare forward", rounds)
        errors = {name: _max_error(model, layers, decoded[0].x, forward) for name, forward in passes.items()}
    times = {name: t.times(1 / count) for name, t in raw.items()}
    return Pass(network, len(units), sum(units.values()), times, errors)


def _max_error(model: Model, layers: list[str], x: Tensor, forward: StatisticsForward) -> float:
    """Return the largest error of the maxima, relative to each layer's largest value."""
    with torch.no_grad(), capture.capture_layers(model, layers) as run:
        maps = run(x).maps
    reductions = forward(x, {}).layers
    errors = [
        (reductions[name].maxima - maps[name].flatten(2).amax(2)).abs().max() / maps[name].abs().max() for name in maps
    ]
    return float(max(errors))


def decoding(count: int = 32) -> dict[tuple[int, int], float]:
    """Measure milliseconds of one core per JPEG, from its bytes to the network's input and the thumbnail."""
    model = convscope.load("lite0")
    image = Image.open(photographs()[0]).convert("RGB")
    milliseconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in ((256, 256), (640, 480), (1600, 1200)):
            files = [Path(folder) / f"{size[0]}-{number}.jpg" for number in range(count)]
            for file in files:
                image.resize(size, Image.Resampling.LANCZOS).save(file, quality=90)
            with PrefetchingDecoder(build_catalogue(files), model.preprocessing) as decoder:
                start = time.process_time()
                deque(decoder.batches([range(count)], count), maxlen=0)
                milliseconds[size] = 1000 * (time.process_time() - start) / count
    return milliseconds


SMALL = """
import sys, torch, convscope
torch.manual_seed(0)
layers = [torch.nn.Conv2d(3, 32, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, 2), torch.nn.ReLU()]
network = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10))
if __name__ == "__main__":
    model = convscope.load(network.eval(), preprocessing={"size": 64})
    convscope.scan(model, sys.argv[1], sys.argv[2], "all", workers=1)
"""


def peaks() -> Iterator[Peak]:
    """Run one process per number of images, with a small network on crops of 64 x 64 in tar files."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "small.py"
        script.write_text(SMALL)
        for count in COUNTS:
            data, store = Path(folder) / f"{count}.tar", Path(folder) / f"{count}"
            _write_tar(data, count)
            start = time.perf_counter()
            megabytes = _peak_memory([sys.executable, str(script), str(data), str(store)])
            seconds = time.perf_counter() - start
            size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
            yield Peak(count, megabytes, size / 2**20, seconds)
            data.unlink()


def _write_tar(file: Path, count: int) -> None:
    """Write small, distinct crops as JPEG."""
    sources = [image.resize((128, 128)) for image in photograph_crops(64)]
    generator = random.Random(1)
    with tarfile.open(file, "w") as tar:
        for number in range(count):
            left, top = generator.randint(0, 64), generator.randint(0, 64)
            buffer = io.BytesIO()
            sources[number % len(sources)].crop((left, top, left + 64, top + 64)).save(buffer, "JPEG")
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            entry.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(entry, buffer)


def _peak_memory(command: list[str]) -> float:
    """Return the peak memory of a process and its children in MiB, shared pages counted once."""
    peak = 0.0
    with subprocess.Popen(command, start_new_session=True) as process:
        while process.poll() is None:
            peak = max(peak, sum(_memory(status.parent) for status in _session_processes(process.pid)))
            time.sleep(0.2)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def _session_processes(session: int) -> Iterator[Path]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        if int(fields[3]) == session:
            yield stat


def _memory(process: Path) -> float:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def table(rows: list[Pass], decode_times: dict[tuple[int, int], float], peaks: list[Peak]) -> list[str]:
    """Return the section of the README: text and tables."""
    names = list(rows[0].times)
    costs = ", ".join(f"{cost:.1f} for {width} x {height}" for (width, height), cost in decode_times.items())
    lines = [
        f"A shard of {BATCH * BATCHES} decoded images in batches of {BATCH}, up to the",
        "content of its file: top positions, statistics, thumbnails. Milliseconds per image, and in brackets the",
        "throughput relative to the bare forward pass. The second line of a cell is the largest difference of the",
        "units' maxima from those of the network's activations, relative to each layer's largest value.",
        "",
        *header("network", "layers", "units", *names),
    ]
    for row in rows:
        cells = [
            f"{1000 * timed.seconds:.1f} ({timed.inverse().text()})"
            + (f"<br>{row.errors[name]:.0e}" if name in row.errors else "")
            for name, timed in row.times.items()
        ]
        lines.append(f"| {row.network} | {row.layers} | {row.units} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"Decoding a JPEG, from file to input and thumbnail, takes {costs} ms of one core.",
        "",
        "Whole runs with a small network (all layers, k = 100) over crops of 64 x 64 in a tar file, with one decoding",
        "process: peak memory of both processes together.",
        "",
        "| images | MiB | store, MiB | seconds |",
        "| --- | --- | --- | --- |",
        *[f"| {p.images:,} | {p.megabytes:.0f} | {p.store:.0f} | {p.seconds:.0f} |" for p in peaks],
    ]
