"""Scan a data set: parse the request, plan the run, scan the missing shards and merge them into a store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from convscope.arguments import check_arguments
from convscope.datasets.catalogue import Catalogue, build_catalogue, match_classes
from convscope.engine.batching import MAX_BATCH, MEMORY, forward_bytes
from convscope.engine.batching import batch_size as fitting_batch_size
from convscope.engine.layer_selection import LayerLike, as_layers, find_layer, last_per_resolution
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError, require_int, warns_of_failures
from convscope.images.loading import DEFAULT_MAX_PIXELS
from convscope.progress import ProgressOption, progress_bar
from convscope.results import local_folder
from convscope.scanning.batch_statistics import StatisticsForward, forward_with_statistics
from convscope.scanning.decoding import DecodedBatch, PrefetchingDecoder
from convscope.scanning.folders import PLAN_FILE, begin_run, locked
from convscope.scanning.merge import ShardMerger
from convscope.scanning.plan import ScanPlan, choose_shard_size, run_identity
from convscope.scanning.shard import ScanTargets, ShardFile, scan_shard
from convscope.scanning.sharding import ShardResult, no_usable_image, run_shards
from convscope.sources.coercion import ModelLike, as_model
from convscope.store.io import Folder
from convscope.store.schema import FORMAT
from convscope.store.store import Store, open_store
from convscope.store.stored_dictionaries import KEY, write_dictionaries


@warns_of_failures
@check_arguments
def scan(
    model: ModelLike,
    dataset: object,
    out: str | os.PathLike[str],
    layers: LayerLike | Sequence[LayerLike] | None = None,
    k: int = 100,
    *,
    sample: int = 1000,
    batch: int | None = None,
    shard: int | None = None,
    fit: str = "squash",
    workers: int | None = None,
    ray: str | None = None,
    compiled: bool = False,
    storage: Mapping[str, object] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    memory: int = MEMORY,
    progress: ProgressOption = None,
) -> Store:
    """Run a data set through a network once, and store the top and bottom images and statistics of every unit.

    If a scan is interrupted, the same call resumes it at the first missing shard; if it is finished, the same call
    opens the store. The content of the store does not depend on the number of workers, nor on interruptions.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    dataset : str, path, sequence, array or data set object
        A folder, a glob, a .txt or .csv list, WebDataset tars, Parquet files with images, a data set of torchvision or
        Hugging Face, or images in any form that `convscope.predict` takes. Paths are local, or URLs that fsspec
        supports.
    out : path
        The folder of the store, on a local disk. A finished store can be copied to any address and read there.
    layers : str, Layer, nn.Module or sequence of these, optional
        Layers as in `convscope.activations`, or "all" for every distinct layer. By default the last layer at each
        resolution. The logits are always scanned.
    k : int
        Number of top and bottom images of each unit.
    sample : int
        Number of images, chosen by a hash, on which every unit's maximum is stored. It serves deciles, similarity and
        co-activation.
    batch, shard : int, optional
        Number of images that go through the network together, and that are written together. Results for other values
        are equal to rounding.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    workers : int, optional
        Number of processes that decode ahead of the network; 0 for none. With `ray`, the number of actors; by default
        as many as fit into the cluster.
    ray : str, optional
        Address of a Ray cluster that scans the shards, or "local" to start one. This process writes the store.
    compiled : bool
        Compile the network first. This takes a minute or more, and speeds up a CPU by a factor of 1.1 to 1.6.
    storage : mapping, optional
        Options of fsspec for the address of the data.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    memory : int
        Bytes that the intermediate results of a batch may take.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        after every batch with the number of images done and the number of all.

    Returns
    -------
    Store
        Units, images and statistics of the scan.

    Raises
    ------
    ConvscopeError
        For unknown layers and data, if no image can be used, if the store belongs to another scan (the message lists
        the differences), or if another process is writing it.

    Examples
    --------
    >>> import tempfile
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = convscope.scan(model, convscope.samples.photographs(), folder.name, "blocks.0", k=2)
    >>> store.layers
    ['blocks.0', 'logits']
    >>> len(store.unit("blocks.0", 3).examples())
    2
    >>> folder.cleanup()
    """
    model = as_model(model)
    store = local_folder(out)
    catalogue = build_catalogue(dataset, storage=storage)
    names = _select_layers(model, layers)
    plan = _make_plan(
        model,
        len(catalogue),
        batch_size=None if batch is None else require_int("batch", batch, 1),
        shard_size=None if shard is None else require_int("shard", shard, 1),
        memory=memory,
        k=require_int("k", k, 1),
        sample_size=require_int("sample", sample, 0),
        fit=fit,
        max_pixels=max_pixels,
        compiled=compiled,
    )
    identity = run_identity(plan, model, catalogue, names, FORMAT)
    label_classes = match_classes(catalogue.label_names, model.classes, model.num_outputs)
    targets = ScanTargets({name: _num_units(model, name) for name in names}, catalogue.labels, label_classes)
    job = _ScanJob(model, plan, targets, catalogue)
    with progress_bar(progress, "scan") as report, locked(store):
        if not begin_run(store, "manifest.json", identity):
            run_shards(
                job,
                store,
                workers=workers,
                ray=ray,
                reload_catalogue=partial(build_catalogue, dataset, storage=storage),
                progress=report,
            )
            _merge(job, store, identity)
        _remove_temporary(store)
    return open_store(store)


# --- the request -----------------------------------------------------------------------------------------------------


def _select_layers(model: Model, layers: LayerLike | Sequence[LayerLike] | None) -> list[str]:
    """Return distinct names of layers, followed by the logits if the network has any."""
    if layers is None:
        selected = [layer for layer in last_per_resolution(model) if len(layer.shape) != 2]
    elif layers == "all":
        selected = [layer for layer in model.layers.unique_spatial() if len(layer.shape) != 2]
    else:
        selected = [find_layer(model, layer) for layer in as_layers(layers) if layer != LOGITS]
    not_images = [layer.name for layer in selected if len(layer.shape) not in (1, 3)]
    if model.preprocessing.axes != 2 or not_images:
        raise ConvscopeError(
            f"{', '.join(not_images) or model.name} does not work on images; only these can be scanned"
        )
    return [*dict.fromkeys(layer.name for layer in selected), *[LOGITS] * bool(model.num_outputs)]


def _num_units(model: Model, name: str) -> int:
    return int(model.num_outputs or 0) if name == LOGITS else model.layers.find(name).units


def _make_plan(
    model: Model,
    num_images: int,
    *,
    batch_size: int | None,
    shard_size: int | None,
    memory: int,
    k: int,
    sample_size: int,
    fit: str,
    max_pixels: int,
    compiled: bool,
) -> ScanPlan:
    if batch_size is None:
        batch_size = fitting_batch_size(model, forward_bytes(model), memory, MAX_BATCH // 2)
    elif model.fixed_batch_size not in (None, batch_size):
        raise ConvscopeError(f"batch is {batch_size}; {model.name} takes batches of {model.fixed_batch_size} only")
    return ScanPlan(
        num_images=num_images,
        batch_size=batch_size,
        shard_size=choose_shard_size(num_images, batch_size, shard_size),
        fit=fit,
        max_pixels=max_pixels,
        num_threads=torch.get_num_threads(),
        k=k,
        sample_size=sample_size,
        compiled=compiled,
    )


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ScanJob:
    """What is done to each shard."""

    model: Model
    plan: ScanPlan
    targets: ScanTargets
    catalogue: Catalogue

    def compute(
        self, shard: int, batches: Iterator[DecodedBatch], forward: StatisticsForward
    ) -> Iterator[int | ShardResult]:
        return scan_shard(self.model, self.plan, shard, self.targets, forward, batches)

    def decoder(self, num_workers: int) -> PrefetchingDecoder:
        return PrefetchingDecoder(
            self.catalogue,
            self.model.preprocessing,
            fit=self.plan.fit,
            max_pixels=self.plan.max_pixels,
            workers=num_workers,
        )

    def forward(self) -> AbstractContextManager[StatisticsForward]:
        layers = list(self.targets.num_units)
        return forward_with_statistics(self.model, layers, self.plan.batch_size, compiled=self.plan.compiled)


# --- the store -------------------------------------------------------------------------------------------------------


def _merge(job: _ScanJob, store: Path, identity: Mapping[str, object]) -> None:
    """Merge the shards into the tables of the store and write its manifest."""
    catalogue = job.catalogue
    manifest = {
        "kind": "scan",
        **identity,
        "classes": job.model.classes,
        "score": job.model.score_name,
        "labels": catalogue.label_names,
        "failed": _count_failures(job, store),
        "notes": list(catalogue.notes),
    }
    if dictionaries := write_dictionaries(Folder(store), job.model):
        manifest |= {KEY: dictionaries}
    ShardMerger(job.model, job.plan, job.targets, catalogue, store).write(manifest)


def _count_failures(job: _ScanJob, store: Path) -> int:
    """Count the images that failed. Raises ConvscopeError if all did."""
    reasons: dict[int, str] = {}
    for shard in range(job.plan.num_shards):
        reasons |= ShardFile(store, shard).failures()
    if len(reasons) == job.plan.num_images:
        raise no_usable_image(job.catalogue, reasons)
    return len(reasons)


def _remove_temporary(store: Path) -> None:
    """Remove what only an unfinished store needs, and temporary files of interrupted runs."""
    shutil.rmtree(store / "shards", ignore_errors=True)
    (store / PLAN_FILE).unlink(missing_ok=True)
    for temporary in (path for folder in ("", "thumbnails", KEY) for path in (store / folder).glob(".*.*")):
        temporary.unlink()
