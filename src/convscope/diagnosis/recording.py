"""One pass over a labelled data set: record what the analyses need about every image, in shards that survive a crash.

Each shard is computed and written as a whole, so that an interrupted run resumes at the first missing one. When all are
there, they are joined into memory-mapped arrays: memory does not grow with the number of images.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from convscope.datasets.catalogue import Catalogue
from convscope.diagnosis.facts import FACTS, measure_image
from convscope.diagnosis.forward import (
    POSITION_FACTS,
    BatchObservations,
    example_input,
    observing_forward,
    position_facts,
)
from convscope.diagnosis.observations import Observations
from convscope.engine.batching import batch_size, forward_bytes
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.images.failures import Failure
from convscope.progress import Progress
from convscope.results import write_json
from convscope.scanning.decoding import DecodedBatch, PrefetchingDecoder
from convscope.scanning.folders import PLAN_FILE, begin_run, locked
from convscope.scanning.plan import ShardPlan, choose_shard_size, run_identity
from convscope.scanning.sharding import ShardResult, no_usable_image, run_shards, shard_path, usable_rows

FORMAT = 1  # of the observations: raised by one with every change of their files or facts
MAX_BATCH = 16
ARRAYS = ("image_ids", "logits", "features", "peaks", "evidence", "facts", "thumbnails")
FACT_NAMES = (*FACTS, *POSITION_FACTS)
FLOAT16_MAX = 65504.0
FINISHED = "observations.json"


@dataclass(frozen=True)
class RecordingJob:
    """What is recorded.

    Attributes
    ----------
    model : Model
    layer : Layer
    catalogue : Catalogue
        The N images.
    labels : ndarray of shape (N,), int64
        The network's class of each image, -1 if unknown.
    classes : tuple of str
    plan : ShardPlan
    workers : int or None
        Number of processes that decode images; with `ray`, of actors.
    ray : str or None
        Address of a Ray cluster that computes the shards.
    """

    model: Model
    layer: Layer
    catalogue: Catalogue
    labels: np.ndarray
    classes: tuple[str, ...]
    plan: ShardPlan
    workers: int | None = None
    ray: str | None = None

    def identity(self) -> dict[str, object]:
        """Return what two runs must have in common to share a folder, as JSON values."""
        return run_identity(self.plan, self.model, self.catalogue, [self.layer.name], FORMAT)

    def decoder(self, num_workers: int, *, measure: bool = True) -> PrefetchingDecoder:
        """Return a decoder of the images, which measures facts about them as well."""
        return PrefetchingDecoder(
            self.catalogue,
            self.model.preprocessing,
            fit=self.plan.fit,
            max_pixels=self.plan.max_pixels,
            workers=num_workers,
            measure=measure_image if measure else None,
        )

    def forward(self) -> AbstractContextManager[Callable[[torch.Tensor], BatchObservations]]:
        """Return the pass that observes batches."""
        return observing_forward(self.model, self.layer, example_input(self.model))

    def compute(
        self, shard: int, batches: Iterator[DecodedBatch], forward: Callable[[torch.Tensor], BatchObservations]
    ) -> Iterator[int | ShardResult]:
        """Yield the number of images after each batch of a shard, and then its result."""
        columns = _Columns()
        for batch in islice(batches, len(list(self.plan.batches([shard])))):
            columns.add(batch, forward(batch.x))
            yield len(batch.indices)
        yield ShardResult(shard, columns.content(), columns.ends_in_failures)


def plan_recording(model: Model, layer: Layer, num_images: int, *, fit: str, max_pixels: int, memory: int) -> ShardPlan:
    """Divide the images into batches that fit into `memory` bytes, and into shards."""
    size = batch_size(model, forward_bytes(model, [layer]), memory, MAX_BATCH)
    return ShardPlan(
        num_images, size, choose_shard_size(num_images, size, None), fit, max_pixels, torch.get_num_threads()
    )


def record_observations(
    job: RecordingJob, folder: Path | None, reload_catalogue: Callable[[], Catalogue], progress: Progress
) -> tuple[Observations, tuple[Failure, ...]]:
    """Record what the analyses need about every image.

    Parameters
    ----------
    job : RecordingJob
    folder : Path or None
        Where the arrays are stored, to be mapped into memory. If they are there, nothing is computed; if a run was
        interrupted, it is resumed. None keeps the arrays in memory.
    reload_catalogue : callable
        Lists the data set anew, to find out whether it has changed when images cannot be read any more.
    progress : callable
        Called with the number of images done and the number of all.

    Returns
    -------
    observations : Observations
        Of the images that could be used.
    failed : tuple of Failure
        The images that could not, with the reasons.

    Raises
    ------
    ConvscopeError
        If no image can be used, or the folder belongs to another run.
    """
    if folder is None:
        with TemporaryDirectory(prefix="convscope-") as temporary:
            _record(job, Path(temporary), reload_catalogue, progress)
            return load_observations(job, Path(temporary), mapped=False)
    with locked(folder):
        _record(job, folder, reload_catalogue, progress)
    return load_observations(job, folder)


def load_observations(
    job: RecordingJob, folder: Path, *, mapped: bool = True
) -> tuple[Observations, tuple[Failure, ...]]:
    """Open the arrays in a folder, mapped into memory (copied where they are written to) or read."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c" if mapped else None) for name in ARRAYS}
    ids = np.array(arrays.pop("image_ids"))
    names = job.catalogue.names
    observations = Observations(
        image_names=tuple(names.take(ids).to_pylist()),
        image_ids=ids,
        labels=job.labels[ids],
        classes=job.classes,
        fact_names=FACT_NAMES,
        **arrays,
    )
    reasons = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["failed"]
    return observations, tuple(Failure(names[int(i)].as_py(), reason) for i, reason in reasons.items())


# --- the run ---------------------------------------------------------------------------------------------------------


def _record(job: RecordingJob, folder: Path, reload_catalogue: Callable[[], Catalogue], progress: Progress) -> None:
    """Compute the missing shards, and join all."""
    identity = job.identity()
    if begin_run(folder, FINISHED, identity, "diagnosis"):
        return
    run_shards(job, folder, workers=job.workers, ray=job.ray, reload_catalogue=reload_catalogue, progress=progress)
    write_json(folder / FINISHED, {**identity, "failed": _join(job, folder)})
    shutil.rmtree(folder / "shards")
    (folder / PLAN_FILE).unlink()


class _Columns:
    """Collects what is recorded about the usable images of a shard."""

    def __init__(self) -> None:
        self.parts: dict[str, list[torch.Tensor]] = {name: [] for name in ARRAYS}
        self.failed: dict[int, str] = {}
        self.ends_in_failures = False

    def add(self, batch: DecodedBatch, values: BatchObservations) -> None:
        """Add the images of a batch that can be used; note the reasons of the others."""
        readable, usable = usable_rows(batch, values.finite_rows().tolist(), self.failed)
        self.ends_in_failures = not readable
        if not usable:
            return
        rows = torch.tensor(usable)
        logits, features, peaks, evidence = (part[rows.to(part.device)].cpu() for part in values)
        assert batch.measurements is not None
        self.parts["image_ids"].append(torch.tensor(batch.indices)[rows])
        self.parts["logits"].append(logits.float())
        for name, array in (("features", features), ("peaks", peaks), ("evidence", evidence)):
            self.parts[name].append(array.clamp(-FLOAT16_MAX, FLOAT16_MAX).half())
        facts = torch.from_numpy(batch.measurements)[rows]
        self.parts["facts"].append(torch.cat([facts, position_facts(evidence)], 1))
        self.parts["thumbnails"].append(torch.from_numpy(batch.thumbnails)[rows])

    def content(self) -> bytes:
        """Return the content of the shard's file."""
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self.parts.items() if parts}
        reasons = {str(image): reason for image, reason in sorted(self.failed.items())}
        content: bytes = save(tensors, {"failed": json.dumps(reasons)})
        return content


# --- the arrays ------------------------------------------------------------------------------------------------------


def _join(job: RecordingJob, folder: Path) -> dict[str, str]:
    """Join the shards into one array per file; return the reason for each image that failed."""
    files = [shard_path(folder, shard) for shard in range(job.plan.num_shards)]
    reasons: dict[str, str] = {}
    counts = []
    for path in files:
        with safe_open(path, framework="np") as file:
            reasons |= json.loads(file.metadata()["failed"])
            counts.append(len(file.get_tensor("image_ids")) if "image_ids" in file.keys() else 0)  # noqa: SIM118
    if not sum(counts):
        raise no_usable_image(job.catalogue, {int(image): reason for image, reason in reasons.items()})
    for name in ARRAYS:
        _join_array(name, [path for path, count in zip(files, counts, strict=True) if count], sum(counts), folder)
    return reasons


def _join_array(name: str, files: Sequence[Path], length: int, folder: Path) -> None:
    """Write one array (length, ...), shard by shard, under a temporary name until it is complete."""
    temporary = folder / f".{name}.npy"
    array: np.memmap | None = None
    start = 0
    for path in files:
        with safe_open(path, framework="np") as file:
            part = file.get_tensor(name)
        if array is None:
            array = np.lib.format.open_memmap(temporary, "w+", part.dtype, (length, *part.shape[1:]))
        array[start : start + len(part)] = part
        start += len(part)
    assert array is not None
    array.flush()
    del array
    os.replace(temporary, folder / f"{name}.npy")


def known_classes(model: Model, store_classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of a network's classes; those in a store, or numbers, where the network has none."""
    if model.classes is None and store_classes is not None:
        return tuple(store_classes)
    return tuple(model.class_name(index) for index in range(int(model.num_outputs or 0)))
