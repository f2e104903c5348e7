"""A pass over a data set in shards, in this process or on a Ray cluster, that resumes where it was interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from convscope.datasets.catalogue import Catalogue
from convscope.distributed.ray_pool import map_unordered
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.images.failures import Failure
from convscope.progress import Progress
from convscope.results import atomic_write
from convscope.scanning.decoding import DecodedBatch, PrefetchingDecoder, default_workers
from convscope.scanning.plan import ShardPlan

NOT_FINITE = "drives the network out of the range of finite numbers"

Forward = TypeVar("Forward")


@dataclass(frozen=True)
class ShardResult:
    """The results of a shard.

    Attributes
    ----------
    shard : int
    content : bytes
        The content of its file.
    ends_in_failures : bool
        Whether no image of its last batch could be read, as when the data are gone.
    thumbnail_sheets : dict
        The content of its thumbnail sheets, by file name.
    """

    shard: int
    content: bytes
    ends_in_failures: bool
    thumbnail_sheets: Mapping[str, bytes] = field(default_factory=dict)


class ShardJob(Protocol[Forward]):
    """What is done to each shard; it is pickled for other processes."""

    @property
    def model(self) -> Model:
        """The network."""

    @property
    def catalogue(self) -> Catalogue:
        """The images."""

    @property
    def plan(self) -> ShardPlan:
        """How they are divided."""

    def decoder(self, num_workers: int) -> PrefetchingDecoder:
        """Return a decoder of the images."""

    def forward(self) -> AbstractContextManager[Forward]:
        """Return the pass through the network, a function of batches."""

    def compute(self, shard: int, batches: Iterator[DecodedBatch], forward: Forward) -> Iterator[int | ShardResult]:
        """Yield the number of images after each batch of a shard, which are the next of `batches`, and its result."""


def run_shards(
    job: ShardJob[Forward],
    folder: Path,
    *,
    workers: int | None,
    ray: str | None,
    reload_catalogue: Callable[[], Catalogue],
    progress: Progress,
) -> None:
    """Compute the shards that a folder does not have yet, and write each as it is done.

    Parameters
    ----------
    job : ShardJob
    folder : Path
    workers : int or None
        Number of processes that decode images; with `ray`, of actors.
    ray : str or None
        Address of a Ray cluster that computes the shards.
    reload_catalogue : callable
        Lists the data set anew, to find out whether it has changed when images cannot be read any more.
    progress : callable
        Called with the number of images done and the number of all.

    Raises
    ------
    ConvscopeError
        If the data set has changed meanwhile.
    """
    catalogue = job.catalogue
    with closing(_results(job, missing_shards(folder, job.plan), workers, ray)) as results:
        for step in results:
            if isinstance(step, int):
                progress(step, job.plan.num_images)
                continue
            if step.ends_in_failures and reload_catalogue().fingerprint != catalogue.fingerprint:
                raise ConvscopeError(f"{catalogue.name} has changed since the run began; rerun to resume")
            write_shard(folder, step)


def _results(
    job: ShardJob[Forward], shards: Sequence[int], workers: int | None, ray: str | None
) -> Generator[int | ShardResult, None, None]:
    """Yield results of shards as they are done, and between them the number of images done in all."""
    plan = job.plan
    done = plan.num_images - sum(len(plan.shard_images(shard)) for shard in shards)
    if not shards:
        return
    if ray is None:
        num_workers = default_workers(plan.num_images) if workers is None else workers
        with job.decoder(num_workers) as decoder, job.forward() as forward:
            batches = decoder.batches(plan.batches(shards), plan.batch_size)
            for shard in shards:
                for step in job.compute(shard, batches, forward):
                    done += step if isinstance(step, int) else 0
                    yield done if isinstance(step, int) else step
        return
    gpus = int(job.model.device.type == "cuda")
    make_task = partial(_RemoteComputation, job)
    for shard, result in map_unordered(
        make_task, shards, address=ray, cpus=plan.num_threads, gpus=gpus, workers=workers or None
    ):
        yield result
        done += len(plan.shard_images(shard))
        yield done


class _RemoteComputation(Generic[Forward]):
    """Computes shards in an actor of a cluster; its decoder and its hooks live as long as the actor."""

    def __init__(self, job: ShardJob[Forward]) -> None:
        torch.set_num_threads(job.plan.num_threads)
        self._job, self._stack = job, ExitStack()
        self._decoder = self._stack.enter_context(job.decoder(num_workers=1))
        self._forward = self._stack.enter_context(job.forward())

    def __call__(self, shard: int) -> ShardResult:
        plan = self._job.plan
        batches = self._decoder.batches(plan.batches([shard]), plan.batch_size)
        *_, result = self._job.compute(shard, batches, self._forward)
        if not isinstance(result, ShardResult):
            raise TypeError(f"shard {shard} ended without a result")
        return result


def usable_rows(batch: DecodedBatch, finite: Sequence[bool], failed: dict[int, str]) -> tuple[list[int], list[int]]:
    """Return the rows of images that could be read, and of these the finite ones; note the reasons of all others.

    Parameters
    ----------
    batch : DecodedBatch
    finite : sequence of bool
        Whether what the network made of each row is finite.
    failed : dict
        Gets the reason for each image that is not usable, by its id.
    """
    readable = [row for row, image in enumerate(batch.indices) if image not in batch.failed]
    failed |= batch.failed
    failed |= {batch.indices[row]: NOT_FINITE for row in readable if not finite[row]}
    return readable, [row for row in readable if finite[row]]


def no_usable_image(catalogue: Catalogue, reasons: Mapping[int, str]) -> ConvscopeError:
    """Return the error for a data set of which every image failed, with the first reasons."""
    names = catalogue.names
    examples = "; ".join(str(Failure(names[i].as_py(), reason)) for i, reason in list(reasons.items())[:3])
    return ConvscopeError(f"none of the {len(names):,} images of {catalogue.name} can be used: {examples}")


# --- files -----------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's file."""
    return folder / "shards" / f"{shard:05d}.safetensors"


def missing_shards(folder: Path, plan: ShardPlan) -> list[int]:
    """Return the shards whose files are not there."""
    return [shard for shard in range(plan.num_shards) if not shard_path(folder, shard).exists()]


def write_shard(folder: Path, result: ShardResult) -> None:
    """Write thumbnails and then the shard's file, flushed before it takes its name: if it exists, the shard is done."""
    for name, content in result.thumbnail_sheets.items():
        _write(folder / "thumbnails" / name, content)
    _write(shard_path(folder, result.shard), result.content, flushed=True)


def _write(path: Path, content: bytes, *, flushed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)
        if flushed:
            file.flush()
            os.fsync(file.fileno())
