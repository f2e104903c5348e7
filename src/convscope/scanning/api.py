"""A pass over a data set, from the plan to the store; killed, it goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from convscope.datasets.catalogue import Catalogue, catalogue, class_indices
from convscope.distributed.ray_pool import map_unordered
from convscope.engine.batching import MAX_BATCH, MEMORY, Progress, batch_size, forward_bytes
from convscope.engine.layer_selection import last_per_resolution
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError, require_int
from convscope.images.loading import DEFAULT_MAX_PIXELS, Failure
from convscope.results import local_folder, versions, write_json
from convscope.scanning.batch_statistics import Looking, forward_with_statistics
from convscope.scanning.decoding import Decoder
from convscope.scanning.merge import Merge
from convscope.scanning.plan import IDENTITY, ScanPlan, identity, require_same, shard_size
from convscope.scanning.shard import ScanTargets, ShardFile, ShardResult, file_name, scan_shard, write
from convscope.store.store import Store, open_store


def scan(
    model: Model,
    dataset: Any,
    out: str | os.PathLike[str],
    layers: str | Sequence[str] | None = None,
    k: int = 100,
    *,
    sample: int = 1000,
    batch: int | None = None,
    shard: int | None = None,
    fit: str = "squash",
    workers: int | None = None,
    ray: str | None = None,
    compiled: bool = False,
    storage: Mapping[str, Any] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Store:
    """Show a data set to a network once, and keep of every unit what excites it most and least, and its statistics.

    A run that was killed goes on where it was when it is called again in the same way; one that is done is only opened.

    Parameters
    ----------
    model
        From `convscope.load`.
    dataset
        A folder, a glob, a text list, WebDataset tars, Parquet with pictures, a data set of torchvision or Hugging
        Face, or pictures in any form that `convscope` takes. Local, or any address that fsspec knows.
    out
        The folder of the store, on a disk of this machine; finished, it can be copied to any address and read there.
    layers
        Names; "all" for every layer that makes something of its own. None: the last one at each resolution. The logits
        are always looked at.
    k
        So many pictures are kept for each unit at either end.
    sample
        On so many pictures, chosen by a hash, every unit's highest value is kept: for deciles, similarity and
        co-activation.
    batch, shard
        Pictures that go through the network together, and that are written together. They decide what is computed with
        what, and so the last bits.
    fit
        "squash" shows the network the whole picture, "crop" its own evaluation crop.
    workers
        Processes that decode ahead of the network; 0: none. With `ray`, actors; None: as many as there is room for.
        They have no influence on the store.
    ray
        The address of a Ray cluster that does the work, or "local" to start one. This process writes the store.
    compiled
        Compile the network first, which takes a minute or more; on a CPU it is then 1.1 to 1.6 times as fast.
    storage
        Options for fsspec where the data are.
    max_pixels
        Pictures with more are refused before memory is spent on them.
    memory
        Bytes that a batch's intermediate results may take.
    progress
        Called after every batch with the number of pictures done and the number in all.

    Raises
    ------
    ConvscopeError
        For unknown layers and data, when no picture can be used, when the store is another run's, and says what
        differs, or is being written by another process.
    """
    store = local_folder(out)
    data = catalogue(dataset, storage=storage)
    names = _layers(model, layers)
    units = {name: _units(model, name) for name in names}
    if batch is not None and model.fixed_batch_size not in (None, batch):
        raise ConvscopeError(f"batch is {batch}, and {model.name} takes {model.fixed_batch_size} at a time")
    size = (
        batch_size(model, forward_bytes(model), memory, MAX_BATCH // 2) if batch is None else require_int("batch", batch, 1)
    )
    plan = ScanPlan(
        images=len(data),
        batch=size,
        shard=shard_size(len(data), size, None if shard is None else require_int("shard", shard, 1)),
        k=require_int("k", k, 1),
        sample=require_int("sample", sample, 0),
        fit=fit,
        max_pixels=max_pixels,
        threads=torch.get_num_threads(),
        compiled=compiled,
    )
    told = {"name": data.name, "images": len(data), "fingerprint": data.fingerprint}
    own = identity(plan, model.describe(), told, names, versions())
    subject = ScanTargets(units, data.labels, class_indices(data, model))
    with _locked(store):
        if (store / "manifest.json").exists():
            require_same(_kept(store / "manifest.json"), own, str(store))
            _remove_temporary(store)
            return open_store(store)
        if (store / "plan.json").exists():
            require_same(_kept(store / "plan.json"), own, str(store))
        else:
            write_json(store / "plan.json", own)
        work = _ScanJob(model, plan, subject, data)
        still_there = partial(catalogue, dataset, storage=storage)
        with closing(_found(work, missing_shards(store, plan), workers, ray)) as found:
            for step in found:
                if isinstance(step, int):
                    if progress is not None:
                        progress(step, plan.images)
                    continue
                if step.ends_in_failures and still_there().fingerprint != data.fingerprint:
                    raise ConvscopeError(f"{data.name} is not what it was when the scan began; the same call goes on")
                write(store, step)
        failed = _require_some(store, plan, data)
        manifest = {"kind": "scan", **own, "classes": model.classes, "labels": data.label_names, "failed": failed}
        manifest["notes"] = list(data.notes)
        Merge(model, plan, subject, data, store).write(manifest)
        _remove_temporary(store)
    return open_store(store)


def _remove_temporary(store: Path) -> None:
    """Remove what only an unfinished store needs, and files that a killed run had not yet given their names."""
    shutil.rmtree(store / "shards", ignore_errors=True)
    (store / "plan.json").unlink(missing_ok=True)
    for begun in (*store.glob(".*.*"), *(store / "thumbnails").glob(".*.*")):
        begun.unlink()


@dataclass(frozen=True)
class _ScanJob:
    """What is to be done to whichever shards are missing, here or elsewhere."""

    model: Model
    plan: ScanPlan
    subject: ScanTargets
    data: Catalogue

    def here(self, shards: Sequence[int], workers: int) -> Iterator[int | ShardResult]:
        """The shards, in their order; before each the number of pictures done after every batch."""
        batches = chain.from_iterable(self.plan.batches(shard) for shard in shards)
        with self.decoder(workers) as decoder, self.looking() as look:
            decoded = decoder.batches(batches, self.plan.batch)
            for shard in shards:
                yield from scan_shard(self.model, self.plan, shard, self.subject, look, decoded)

    def elsewhere(self) -> Callable[[int], ShardResult]:
        """What an actor of a cluster does with a shard. It lives as long as the actor."""
        torch.set_num_threads(self.plan.threads)
        stack = ExitStack()
        decoder, look = stack.enter_context(self.decoder(1)), stack.enter_context(self.looking())

        def do(shard: int, _alive: ExitStack = stack) -> ShardResult:
            batches = decoder.batches(self.plan.batches(shard), self.plan.batch)
            steps = list(scan_shard(self.model, self.plan, shard, self.subject, look, batches))
            assert isinstance(steps[-1], ShardResult)
            return steps[-1]

        return do

    def decoder(self, workers: int) -> Decoder:
        plan = self.plan
        preprocessing = self.model.preprocessing
        return Decoder(self.data, preprocessing, fit=plan.fit, max_pixels=plan.max_pixels, workers=workers)

    def looking(self) -> AbstractContextManager[Looking]:
        return forward_with_statistics(
            self.model, list(self.subject.layers), self.plan.batch, compiled=self.plan.compiled
        )


def _found(
    work: _ScanJob, shards: Sequence[int], workers: int | None, ray: str | None
) -> Generator[int | ShardResult, None, None]:
    """The shards as they are done, and between them the number of pictures done in all."""
    plan = work.plan
    done = plan.images - sum(len(plan.within(shard)) for shard in shards)
    if not shards:
        return
    if ray is None:
        count = _default_workers(plan.images) if workers is None else workers
        for step in work.here(shards, count):
            done += step if isinstance(step, int) else 0
            yield done if isinstance(step, int) else step
        return
    gpus = int(work.model.device.type == "cuda")
    elsewhere = map_unordered(
        work.elsewhere, shards, address=ray, cpus=plan.threads, gpus=gpus, workers=workers or None
    )
    for shard, found in elsewhere:
        yield found
        done += len(plan.within(shard))
        yield done


def missing_shards(store: Path, plan: ScanPlan) -> list[int]:
    return [shard for shard in range(plan.shards) if not (store / "shards" / file_name(shard)).exists()]


def _require_some(store: Path, plan: ScanPlan, data: Catalogue) -> int:
    """How many pictures failed. Raises ConvscopeError if all did."""
    reasons: dict[int, str] = {}
    for shard in range(plan.shards):
        reasons |= ShardFile(store, shard).images()[1]
    if len(reasons) == plan.images:
        few = "; ".join(str(Failure(data.names[i].as_py(), reason)) for i, reason in list(reasons.items())[:3])
        raise ConvscopeError(f"none of the {plan.images:,} pictures of {data.name} can be used: {few}")
    return len(reasons)


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Nobody else writes into the store; what the disk refuses is said in words, and can be gone on from."""
    lock = FileLock(store / ".lock", blocking=False)
    try:
        store.mkdir(parents=True, exist_ok=True)
        with lock:
            yield
    except Timeout as error:
        raise ConvscopeError(f"{store} is being written by another process; wait, or give another folder") from error
    except OSError as error:
        raise ConvscopeError(
            f"cannot write into {store}: {error.strerror or error}; the same call goes on from what is done"
        ) from error


def _kept(file: Path) -> dict[str, Any]:
    """The identity in a plan or a manifest."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvscopeError(f"{file} is damaged: {error}; give another folder, or remove this one") from error
    return {key: told.get(key) for key in IDENTITY}


def _layers(model: Model, layers: str | Sequence[str] | None) -> list[str]:
    """Names of layers, without those named twice; behind them the logits, if the network has any."""
    if layers is None:
        rows = [row for row in last_per_resolution(model) if len(row.shape) != 2]
    elif layers == "all":
        rows = [row for row in model.layers.unique_spatial() if len(row.shape) != 2]
    else:
        given = [layers] if isinstance(layers, str) else list(layers)
        rows = [model.layers.find(name) for name in given if name != LOGITS]
    signals = [row.name for row in rows if len(row.shape) not in (1, 3)]
    if model.preprocessing.axes != 2 or signals:
        raise ConvscopeError(f"a data set is scanned with networks on pictures, and {signals or model.name} is none")
    return [*dict.fromkeys(row.name for row in rows), *[LOGITS] * bool(model.num_outputs)]


def _units(model: Model, name: str) -> int:
    return int(model.num_outputs or 0) if name == LOGITS else model.layers.find(name).units


def _default_workers(images: int) -> int:
    """One process for each core but one; none where starting them takes longer than the work."""
    return max(0, (os.cpu_count() or 1) - 1) if images > FEW else 0


FEW = 128

