"""One pass over a labelled data set: record what the analyses need about every image, in shards that survive a crash.

Each shard is computed and written as a whole, so that an interrupted run resumes at the first missing one. When all are
there, they are joined into memory-mapped arrays: memory does not grow with the number of images.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
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
from convscope.distributed.ray_pool import map_unordered
from convscope.engine.batching import batch_size, forward_bytes
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.images.failures import Failure
from convscope.progress import Progress
from convscope.results import atomic_write, versions, write_json
from convscope.scanning.decoding import DecodedBatch, PrefetchingDecoder, default_workers
from convscope.scanning.folders import locked, read_identity
from convscope.scanning.plan import ShardPlan, choose_shard_size, require_same_scan
from convscope.scanning.shard import NOT_FINITE

FORMAT = 1  # of the observations: raised by one with every change of their files or facts
MAX_BATCH = 16
ARRAYS = ("image_ids", "logits", "features", "peaks", "evidence", "facts", "thumbnails")
FACT_NAMES = (*FACTS, *POSITION_FACTS)
FLOAT16_MAX = 65504.0
FINISHED = "observations.json"


@dataclass(frozen=True)
class RecordingPlan(ShardPlan):
    """How the images are divided, and how they are shown to the network.

    Attributes
    ----------
    fit, max_pixels
        As of `ImageBatchLoader`.
    num_threads : int
        Threads that the network computes with.
    """

    fit: str
    max_pixels: int
    num_threads: int


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
    plan : RecordingPlan
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
    plan: RecordingPlan
    workers: int | None = None
    ray: str | None = None

    def identity(self) -> dict[str, object]:
        """Return what two runs must have in common to share a folder, as JSON values."""
        catalogue = self.catalogue
        values = {
            "format": FORMAT,
            "model": self.model.describe(),
            "data": {"name": catalogue.name, "images": len(catalogue), "fingerprint": catalogue.fingerprint},
            "scanned_layers": [self.layer.name],
            "plan": asdict(self.plan),
            "versions": versions(),
        }
        identity: dict[str, object] = json.loads(json.dumps(values, default=str))
        return identity

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


def plan_recording(
    model: Model, layer: Layer, num_images: int, *, fit: str, max_pixels: int, memory: int
) -> RecordingPlan:
    """Divide the images into batches that fit into `memory` bytes, and into shards."""
    size = batch_size(model, forward_bytes(model, [layer]), memory, MAX_BATCH)
    return RecordingPlan(
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
    identity, plan = job.identity(), job.plan
    for name in (FINISHED, "plan.json"):
        if (folder / name).exists():
            require_same_scan(read_identity(folder / name), identity, str(folder), "diagnosis")
            if name == FINISHED:
                return
    write_json(folder / "plan.json", identity)
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    missing = [shard for shard in range(plan.num_shards) if not _shard_file(shards, shard).exists()]
    done = plan.num_images - sum(len(plan.shard_images(shard)) for shard in missing)
    for shard, step in _steps(job, missing):
        if isinstance(step, int):
            done += step
            progress(done, plan.num_images)
            continue
        content, ends_in_failures = step
        if ends_in_failures and reload_catalogue().fingerprint != job.catalogue.fingerprint:
            raise ConvscopeError(f"{job.catalogue.name} has changed since the run began; rerun to resume")
        with atomic_write(_shard_file(shards, shard)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    failed = _join(job, folder)
    write_json(folder / FINISHED, {**identity, "failed": failed})
    shutil.rmtree(shards)
    (folder / "plan.json").unlink()


def _shard_file(shards: Path, shard: int) -> Path:
    return shards / f"{shard:05d}.safetensors"


ShardContent = tuple[bytes, bool]
"""The content of a shard's file, and whether no image of its last batch could be read, as when the data are gone."""


Step = tuple[int, int | ShardContent]
"""A shard with the number of images that were done, or in the end with the content of its file."""


def _steps(job: RecordingJob, shards: Sequence[int]) -> Iterator[Step]:
    """Compute shards, in this process or on a cluster."""
    if not shards:
        return
    plan = job.plan
    if job.ray is None:
        num_workers = default_workers(plan.num_images) if job.workers is None else job.workers
        with job.decoder(num_workers) as decoder, job.forward() as forward:
            batches = decoder.batches(plan.batches(shards), plan.batch_size)
            for shard in shards:
                yield from _compute(job, shard, batches, forward)
        return
    gpus = int(job.model.device.type == "cuda")
    results = map_unordered(
        partial(_RemoteRecorder, job),
        shards,
        address=job.ray,
        cpus=plan.num_threads,
        gpus=gpus,
        workers=job.workers or None,
    )
    for shard, content in results:
        yield shard, content
        yield shard, len(plan.shard_images(shard))


def _compute(
    job: RecordingJob, shard: int, batches: Iterator[DecodedBatch], forward: Callable[[torch.Tensor], BatchObservations]
) -> Iterator[Step]:
    """Yield the number of images after each batch of a shard, and then its content."""
    columns = _Columns()
    for batch in islice(batches, len(list(job.plan.batches([shard])))):
        columns.add(batch, forward(batch.x))
        yield shard, len(batch.indices)
    yield shard, (columns.content(), columns.ends_in_failures)


class _RemoteRecorder:
    """Computes shards in an actor of a cluster; its decoder and its hooks live as long as the actor."""

    def __init__(self, job: RecordingJob) -> None:
        torch.set_num_threads(job.plan.num_threads)
        self._job, self._stack = job, ExitStack()
        self._decoder = self._stack.enter_context(job.decoder(num_workers=1))
        self._forward = self._stack.enter_context(job.forward())

    def __call__(self, shard: int) -> ShardContent:
        plan = self._job.plan
        batches = self._decoder.batches(plan.batches([shard]), plan.batch_size)
        *_, (_, content) = _compute(self._job, shard, batches, self._forward)
        if isinstance(content, int):
            raise TypeError(f"shard {shard} ended without a result")
        return content


class _Columns:
    """Collects what is recorded about the usable images of a shard."""

    def __init__(self) -> None:
        self.parts: dict[str, list[torch.Tensor]] = {name: [] for name in ARRAYS}
        self.failed: dict[int, str] = {}
        self.ends_in_failures = False

    def add(self, batch: DecodedBatch, values: BatchObservations) -> None:
        """Add the images of a batch that can be used; note the reasons of the others."""
        finite = values.finite_rows().tolist()
        readable = [row for row, image in enumerate(batch.indices) if image not in batch.failed]
        usable = [row for row in readable if finite[row]]
        self.failed |= batch.failed
        self.failed |= {batch.indices[row]: NOT_FINITE for row in readable if not finite[row]}
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
    files = [_shard_file(folder / "shards", shard) for shard in range(job.plan.num_shards)]
    reasons: dict[str, str] = {}
    counts = []
    for path in files:
        with safe_open(path, framework="np") as file:
            reasons |= json.loads(file.metadata()["failed"])
            counts.append(len(file.get_tensor("image_ids")) if "image_ids" in file.keys() else 0)  # noqa: SIM118
    if not sum(counts):
        names = job.catalogue.names
        examples = "; ".join(str(Failure(names[int(i)].as_py(), why)) for i, why in list(reasons.items())[:3])
        raise ConvscopeError(f"none of the {len(names):,} images of {job.catalogue.name} can be used: {examples}")
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
