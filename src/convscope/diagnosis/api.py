"""`convscope.diagnose`: named, tested reasons for the errors of a classifier on a labelled data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.attribution.api import resolve_method
from convscope.attribution.default_layer import choose_layer
from convscope.datasets.catalogue import Catalogue, build_catalogue, match_classes
from convscope.diagnosis.analyses import run_analyses, saved_searches
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.overview import summarize
from convscope.diagnosis.recording import RecordingJob, known_classes, plan_recording, record_observations
from convscope.diagnosis.result import Diagnosis
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_int, warns_of_failures
from convscope.images.failures import Failure
from convscope.images.loading import DEFAULT_MAX_PIXELS
from convscope.progress import ProgressOption, progress_bar
from convscope.results import local_folder
from convscope.sources.coercion import ModelLike, as_model
from convscope.store.store import Store, open_store

TASKS = ("classification", "binary", "probabilities")
MAX_NAMES = 5  # that a message lists
LABELS_ADVICE = (
    "put the images into one folder per class, named as the network's classes are, or give a .csv file with the "
    "columns image and label"
)


@warns_of_failures
@check_arguments
def diagnose(
    model: ModelLike,
    dataset: object,
    *,
    layer: LayerLike | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    folds: int = 0,
    fit: str = "squash",
    workers: int | None = None,
    ray: str | None = None,
    storage: Mapping[str, object] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    memory: int = MEMORY,
    progress: ProgressOption = None,
) -> Diagnosis:
    """Find named, tested reasons for the errors of a classifier on a labelled data set.

    One pass over the images records logits, activations and evidence (Grad-CAM of the predicted class) at one layer,
    and simple facts about each image as it is stored. The analyses work on these. If a run with `out` is interrupted,
    the same call resumes it.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        A network that chooses one class per image; from `convscope.load`, or anything that it takes.
    dataset : str, path, sequence or data set object
        Labelled images, as `convscope.scan` takes them: a folder with one subfolder per class, a .csv file with the
        columns image and label, a .txt list, WebDataset tars, Parquet files, or a data set of torchvision or Hugging
        Face. Labels are matched to the network's classes by name. Some images may have no label.
    layer : str, Layer or nn.Module, optional
        The layer whose activations and evidence are recorded. By default that of `convscope.heatmaps`.
    store : Store or path, optional
        A scan of the same images with the same weights: units in findings have the names that it holds.
    out : path, optional
        Save the report in this folder, as ``Diagnosis.save`` does. What is recorded stays there too, in memory-mapped
        files, so that memory does not grow with the number of images, and so do finished searches until the report
        is complete; without it the arrays are in memory.
    seed : int
        Seed of all random draws.
    folds : int
        If above 0, label quality is that of a linear head on the layer's features, cross-validated in so many parts:
        for networks that were trained on the images.
    fit : {"squash", "crop", "pad"}
        As for `convscope.scan`.
    workers : int, optional
        Number of processes that decode ahead of the network; 0 for none. With `ray`, the number of actors; by default
        as many as fit into the cluster.
    ray : str, optional
        Address of a Ray cluster that makes the pass over the images, or "local" to start one. The analyses run in this
        process.
    storage : mapping, optional
        Options of fsspec for the address of the data.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    memory : int
        Bytes that intermediate results may take.
    progress : bool or callable, optional
        By default a progress bar appears for each step after 1.5 seconds; True shows it at once, False never. A
        function is called as ``progress(done, total)`` within each step; exceptions raised in it cancel cleanly.

    Returns
    -------
    Diagnosis
        Findings, the most important first, and the overview.

    Raises
    ------
    ConvscopeError
        For data without labels or with labels that are not the network's classes, for networks of another task, for a
        store of other images or weights, and if no image can be used.

    Examples
    --------
    >>> import convscope
    >>> photos = convscope.samples.photographs()
    >>> rows = zip(photos, ["Egyptian cat", "Dungeness crab", "jacamar", "lesser panda"])
    >>> with open("photos.csv", "w") as file:
    ...     print("image,label", *(f"{photo},{label}" for photo, label in rows), sep=chr(10), file=file)
    >>> convscope.diagnose("lite0", "photos.csv").overview.accuracy
    0.75
    """
    model = as_model(model)
    _require_classifier(model)
    seed, folds = require_int("seed", seed, 0), require_int("folds", folds, 0)
    if folds == 1:
        raise ConvscopeError("folds is 1; expected 2 or more, or 0 for none")
    folder = None if out is None else local_folder(out)
    selected, layer_reason = _select_layer(model, layer)
    catalogue = build_catalogue(dataset, storage=storage)
    opened = _open_store(store, model, catalogue)
    labels, notes = _class_labels(model, catalogue)
    job = RecordingJob(
        model,
        selected,
        catalogue,
        labels,
        known_classes(model, None if opened is None else opened.classes),
        plan_recording(model, selected, len(catalogue), fit=fit, max_pixels=max_pixels, memory=memory),
        workers,
        ray,
    )
    with progress_bar(progress, "images") as report:
        observations, failed = record_observations(
            job,
            None if folder is None else folder / "observations",
            partial(build_catalogue, dataset, storage=storage),
            report,
        )
    if not observations.is_labelled.any():
        raise ConvscopeError(f"no labelled image of {catalogue.name} can be used: {failed[0]}")
    overview = summarize(observations, seed)
    context = DiagnosisContext(
        model, selected, observations, partial(_load_inputs, job, observations.image_ids), seed, _ignore, memory, opened
    )
    saved = saved_searches(job, context, folds, folder)
    outcome = run_analyses(context, overview, folds, saved, progress)
    diagnosis = Diagnosis.of(
        model,
        observations,
        outcome.findings,
        searches=outcome.searches,
        overview=overview,
        label_quality=outcome.label_quality,
        changed_images=outcome.changed_images,
        layer=selected.name,
        layer_reason=layer_reason,
        data_name=catalogue.name,
        store_address="" if opened is None else opened.address,
        seed=seed,
        folds=folds,
        notes=(*catalogue.notes, *notes, *(note for search in outcome.searches for note in search.notes)),
        failed=failed,
    )
    if folder is not None:
        diagnosis.save(folder)
        saved.clear()
    return diagnosis


# --- the request -----------------------------------------------------------------------------------------------------


def _require_classifier(model: Model) -> None:
    """Raise ConvscopeError for a network that does not choose one class per image."""
    if model.preprocessing.axes != 2:
        raise ConvscopeError(f"{model.name} takes {model.preprocessing.shape}; diagnose takes networks on images")
    if model.task not in TASKS or model.has_independent_classes:
        task = "multilabel" if model.task in TASKS else model.task
        raise ConvscopeError(
            f"{model.name} is a network for {task}; diagnose takes networks that choose one class per image: "
            "classification, also with two classes and a single output. If it is one: load(..., task='classification')"
        )
    model.require_scores()
    if (model.num_outputs or 0) < 2:
        raise ConvscopeError(
            f"{model.name} has a single output; if it stands for two classes, say so: load(..., task='binary')"
        )
    model.require_gradients("diagnose")


def _select_layer(model: Model, layer: LayerLike | None) -> tuple[Layer, str]:
    spec = resolve_method(model, "grad-cam", layer, "mean", {})
    if len(spec.layers) > 1:
        raise ConvscopeError(f"layer has {len(spec.layers)} layers; diagnose takes one")
    selected, reason = (spec.layers[0], spec.layer_reason) if spec.layers else choose_layer(model)
    if len(selected.shape) != 3:
        raise ConvscopeError(f"layer {selected.name!r} does not return maps (C, h, w) of images; choose another layer")
    return selected, reason


def _open_store(store: Store | str | os.PathLike[str] | None, model: Model, catalogue: Catalogue) -> Store | None:
    """Open a store; raise ConvscopeError if it is of other images or weights."""
    if store is None:
        return None
    opened = store if isinstance(store, Store) else open_store(store)
    data = opened.manifest["data"]
    if data["fingerprint"] != catalogue.fingerprint:
        raise ConvscopeError(
            f"{opened.address} is a store of other images ({data['images']:,} of {data['name']}); the data set is "
            f"{catalogue.name} with {len(catalogue):,}: scan it, or leave out store="
        )
    opened.check_weights(model)
    return opened


def _class_labels(model: Model, catalogue: Catalogue) -> tuple[np.ndarray, list[str]]:
    """Return the network's class of each image (N,), -1 if unknown, and notes on labels that match no class."""
    if catalogue.labels is None or catalogue.label_names is None:
        raise ConvscopeError(f"{catalogue.name} has no labels; {LABELS_ADVICE}")
    names = catalogue.label_names
    matches = match_classes(names, model.classes, model.num_outputs)
    if matches is None:
        known = "" if model.classes is None else f" ({_list_names(model.classes)})"
        raise ConvscopeError(
            f"the labels of {catalogue.name} ({_list_names(names)}) are not among the {model.num_outputs} classes of "
            f"{model.name}{known}; {LABELS_ADVICE}"
        )
    labels = np.where(catalogue.labels >= 0, matches[catalogue.labels], -1).astype(np.int64)
    notes = []
    unknown = [name for name, match in zip(names, matches, strict=True) if match < 0]
    if unknown:
        count = int(((catalogue.labels >= 0) & (labels < 0)).sum())
        notes.append(
            f"{count:,} images have labels that are no class of the network ({_list_names(unknown)}); they count as "
            "unlabelled"
        )
    return labels, notes


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + ", ..." * (len(names) > MAX_NAMES)


# --- the images again -------------------------------------------------------------------------------------------------


def _load_inputs(job: RecordingJob, image_ids: np.ndarray, positions: Sequence[int]) -> Tensor:
    """Return images, given by their positions in the observations, as network input (n, C, H, W)."""
    ids = [int(image_ids[position]) for position in positions]
    with job.decoder(num_workers=0, measure=False) as decoder:
        parts = list(decoder.batches([[index] for index in ids], 1))
    for batch in parts:
        for index, reason in batch.failed.items():
            raise ConvscopeError(str(Failure(job.catalogue.names[index].as_py(), reason)))
    return torch.cat([batch.x for batch in parts])


def _ignore(done: float, total: int) -> None:
    """Report to nobody."""
