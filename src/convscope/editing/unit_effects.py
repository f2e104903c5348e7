"""`convscope.effects`: what removing each unit of a layer does to the network's answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.attribution.targets import Targets, TargetSpec, parse_labels, parse_targets
from convscope.datasets.image_inputs import open_images
from convscope.editing.api import check_units
from convscope.editing.removal import Removal, Replacement
from convscope.editing.removal_curve import removal_curves
from convscope.editing.replacements import HOW, means, resampled, zeros
from convscope.editing.result import Effects
from convscope.engine import capture
from convscope.engine.batching import MEMORY, forward_batch_size
from convscope.engine.layer_selection import LayerLike, find_layer
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.resume import resume_from_layer
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError, warns_of_failures
from convscope.evaluation.statistics import bootstrap
from convscope.images.batches import Batch
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import Progress, ProgressOption, progress_bar, report_part
from convscope.sources.coercion import ModelLike, as_model
from convscope.store.store import Store
from convscope.store.unit_views import store_of_layer, unit_names, unit_patches, unit_patterns

NOISE_SCALE = 10  # standard deviations: far enough for every rectifier to switch
AFFINE_RTOL = 1e-4  # of scores: rounding
MAX_WITH_PATCHES = 24  # units with patches


@warns_of_failures
@check_arguments
def effects(
    model: ModelLike,
    images: object,
    layer: LayerLike,
    units: int | Sequence[int] | None = None,
    *,
    how: str = "zero",
    targets: Targets | None = None,
    labels: object = None,
    reference: object = None,
    curve: bool = False,
    store: Store | str | os.PathLike[str] | None = None,
    fit: str = "squash",
    seed: int = 0,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Effects:
    """Measure what the removal of each unit of a layer does to the targets' logits, and to the accuracy.

    ::

        effect of unit u on target t of image n = y_t(x_n; A_u replaced) - y_t(x_n)

    Only the part of the network after the layer runs again for each unit. Where that part is affine, as between the
    last feature maps and the logits of many networks, the effects follow from one backward pass:

    ::

        sum over positions of  dy_t / dA_u * (replacement - A_u)

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        One image or N, in any form that `convscope.predict` takes.
    layer : str, Layer or nn.Module
        The layer whose units are removed.
    units : int or sequence of int, optional
        U units, numbered from 0; all of the layer if omitted.
    how : {"zero", "mean", "resample"}
        What a removed unit is replaced by at all positions: 0; the mean of its activations over the reference images
        and all positions; or its map of another image, drawn at random for each image. Class tokens of transformers
        are no positions and stay as they are.
    targets : optional
        As for `convscope.heatmaps`: T targets per image; by default each image's top class.
    labels : int, str or sequence of these, optional
        The right class of each image, for effects on the accuracy.
    reference : path, sequence of paths, PIL images, arrays or tensor, optional
        The images of "mean" and "resample"; by default `images` themselves.
    curve : bool
        Also remove 1, 2, 4, ... units together, those with the lowest mean effects first, and as many in random order.
    store : Store or path, optional
        A scan of the model with this layer: gives units their names (see `convscope.name_units`), and those with the
        largest effects their top patches, and their patterns where the store has them.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    seed : int
        Seed of the draws of "resample", and of the random order of curves.
    memory : int
        Bytes that intermediate results may take.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` with numbers of images; exceptions raised in it cancel cleanly.

    Returns
    -------
    Effects
        Effects (U, N, T) on logits, and with labels the change of the accuracy for each unit with its interval.

    Raises
    ------
    ConvscopeError
        For unknown layers, units, targets and labels, a store of another model or without the layer, for values that
        are not finite, and when no image can be read.

    See Also
    --------
    convscope.edit : A model in which units are removed for good.

    References
    ----------
    Morcos et al., On the importance of single directions for generalization, ICLR 2018 (removal of single units).
    Chan et al., Causal Scrubbing, 2022 ("resample").

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> effects = convscope.effects(model, convscope.samples.photographs(), "blocks.6", units=[0, 1, 2])
    >>> effects.logits.shape  # units, images, targets
    (3, 4, 1)
    """
    if how not in HOW:
        raise ConvscopeError(f"how is {how!r}; expected one of {', '.join(HOW)}")
    if reference is not None and how == "zero":
        raise ConvscopeError("reference= needs how='mean' or how='resample'; got how='zero'")
    model = as_model(model, images)
    selected = find_layer(model, layer)
    numbers = list(range(selected.units)) if units is None else check_units(selected, as_list(units))
    if not numbers:
        raise ConvscopeError("units is empty; give at least one unit, or None for all of the layer")
    opened = store_of_layer(store, model, selected)
    loader = ImageBatchLoader(open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels)
    spec = parse_targets(model, targets, len(loader))
    right = None if labels is None else parse_labels(model, labels, len(loader))
    with progress_bar(progress, "effects") as report:
        replacement = _replacement(model, selected, how, images, reference, fit, seed, memory)
        affine = right is None and is_affine_after(model, selected, next(loader.batches(1)), spec)
        job = _Job(Removal(model, selected, spec, replacement, memory), torch.tensor(numbers), right, affine)
        parts, indices = job.run_all(loader, report)
        logits = np.concatenate([part.effects for part in parts], axis=1)
        order = np.array(numbers)[np.argsort(logits.mean((1, 2)), kind="stable")]
        extras: dict[str, Any] = removal_curves(job.removal, loader, order, right, seed) if curve else {}
    names = tuple(loader.names[i] for i in indices)
    classes = torch.cat([part.targets for part in parts]).cpu().numpy()
    if right is not None:
        extras |= _accuracies(np.concatenate([part.correct for part in parts], axis=1), right[indices].numpy())
    if opened is not None:
        extras |= _views(opened, selected, np.array(numbers), logits)
    return Effects(
        model,
        logits=logits,
        units=np.array(numbers),
        targets=classes,
        baseline=np.concatenate([part.baseline for part in parts]),
        layer=selected.name,
        how=how,
        target_names=tuple(map(tuple, spec.names(classes, indices))),
        image_names=names,
        fit=fit,
        seed=seed,
        notes=tuple(loader.notes),
        failed=tuple(loader.failed),
        **extras,
    )


def as_list(units: int | Sequence[int]) -> Sequence[int]:
    """Return one unit or several as a sequence."""
    return [units] if isinstance(units, int | np.integer) else units


def _views(store: Store, layer: Layer, units: np.ndarray, effects: np.ndarray) -> dict[str, Any]:
    """Return the names of units (U,), and patches and patterns of those with the largest effects (U, N, T)."""
    strongest = units[np.argsort(-np.abs(effects).mean((1, 2)), kind="stable")[:MAX_WITH_PATCHES]]
    pattern_units, patterns = unit_patterns(store, layer, strongest)
    views = {
        "unit_names": unit_names(store, layer, units),
        "patch_units": strongest,
        "patches": unit_patches(store, layer, strongest),
    }
    return views | ({"pattern_units": pattern_units, "patterns": patterns} if len(pattern_units) else {})


def _accuracies(correct: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the accuracy, its changes, overall and per class, and their bootstrap intervals.

    `correct` (1 + U, N) says which images are classified correctly, first without any edit.
    """
    changes = (correct[1:].astype(np.float32) - correct[:1]).T  # (N, U)
    classes = np.unique(labels)
    by_class = [changes[labels == c] for c in classes]
    return {
        "accuracy": changes.mean(0, dtype=np.float64),
        "interval": np.stack(bootstrap(changes), axis=1),
        "baseline_accuracy": np.array(correct[0].mean()),
        "classes": classes,
        "class_accuracy": np.stack([part.mean(0, dtype=np.float64) for part in by_class], axis=1),
        "class_interval": np.stack([np.stack(bootstrap(part), axis=1) for part in by_class], axis=1),
    }


def _replacement(
    model: Model, layer: Layer, how: str, images: object, reference: object, fit: str, seed: int, memory: int
) -> Replacement:
    """Return the function that computes what a unit's map is replaced by."""
    if how == "zero":
        return zeros
    source = ImageBatchLoader(open_images(images if reference is None else reference), model.preprocessing, fit=fit)
    if how == "mean":
        return means(model, layer, source, memory)
    if reference is None and len(source) < 2:
        raise ConvscopeError("how='resample' takes a unit's maps from other images; give several images, or reference=")
    return resampled(model, layer, source, seed, same_images=reference is None)


# --- passes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BatchEffects:
    """Effects (U, B, T), targets (B, T), scores (B, T) without an edit, and which images are right (1 + U, B)."""

    effects: np.ndarray
    targets: Tensor
    baseline: np.ndarray
    correct: np.ndarray


def is_affine_after(model: Model, layer: Layer, batch: Batch, spec: TargetSpec) -> bool:
    """Return whether scores are affine functions of a layer's output, on random maps and the middle between them."""
    if not model.differentiable or model.fixed_batch_size is not None:
        return False
    with torch.no_grad(), capture.capture_layers(model, [layer.name]) as run:
        outputs = run(batch.x)
    targets = spec.for_batch(batch.indices, outputs.logits, batch.geometry)
    maps = outputs.maps[layer.name]
    if not maps.is_floating_point():
        return False
    noise = torch.randn((4, *maps.shape[1:]), generator=torch.Generator().manual_seed(0)).to(maps)
    noise = NOISE_SCALE * (float(maps.std()) or 1.0) * noise
    with resume_from_layer(model, layer.name, batch.x) as resume:

        def scores_of(values: Tensor) -> Tensor:
            return targets.of_image(0, len(values)).scores(resume(values))

        ends = scores_of(noise)
        middles = scores_of((noise[:2] + noise[2:]) / 2)
    difference = (ends[:2] + ends[2:]) / 2 - middles
    return bool((difference.abs() <= AFFINE_RTOL * ends.abs().amax().clamp(min=1e-30)).all())


@dataclass(frozen=True)
class _Job:
    """What is the same for all batches.

    Attributes
    ----------
    removal : Removal
    units : Tensor of shape (U,)
    labels : Tensor of shape (N,), optional
    is_affine : bool
        Whether the targets' scores are affine functions of the layer's output, and no labels are given.
    """

    removal: Removal
    units: Tensor
    labels: Tensor | None
    is_affine: bool

    def run_all(self, loader: ImageBatchLoader, report: Progress) -> tuple[list[_BatchEffects], list[int]]:
        """Compute the effects for all images; return them by batch, and the positions of the images."""
        parts: list[_BatchEffects] = []
        indices: list[int] = []
        for batch in loader.batches(forward_batch_size(self.removal.model, self.removal.memory)):
            done = len(indices) + len(loader.failed)
            parts.append(self.run(batch, partial(report_part, report, done, len(batch.indices), len(loader))))
            indices += batch.indices
            report(len(indices) + len(loader.failed), len(loader))
        return parts, indices

    def run(self, batch: Batch, report: Callable[[float], None]) -> _BatchEffects:
        """Compute the effects for a batch of images; report the fraction that is done."""
        if self.is_affine:
            return self._run_affine(batch)
        with self.removal.open(batch) as run:
            sets = torch.nn.functional.one_hot(self.units, self.removal.layer.units).bool()
            scores, predicted = run.scores(sets, report)
            return _BatchEffects(
                (scores - run.baseline).cpu().numpy(),
                run.targets.classes,
                run.baseline.cpu().numpy(),
                self._correct(batch.indices, torch.cat([run.predicted[None], predicted])),
            )

    def _run_affine(self, batch: Batch) -> _BatchEffects:
        """Compute the effects from the gradients of the scores, where these are constant."""
        model, layer = self.removal.model, self.removal.layer
        with torch.enable_grad(), capture.capture_layers(model, [layer.name], detach_at_layer=True) as run:
            outputs = run(batch.x)
            require_finite(model, outputs.logits, "the network's output")
            targets = self.removal.targets.for_batch(batch.indices, outputs.logits.detach(), batch.geometry)
            scores = targets.scores(outputs)
            gradients = [
                torch.autograd.grad(one.sum(), outputs.maps[layer.name], retain_graph=True)[0]
                for one in scores.unbind(1)
            ]
        maps = outputs.maps[layer.name].detach().movedim(layer.unit_axis, 1)
        changes = self.removal.replacement(maps, batch.indices) - maps
        products = [(g.movedim(layer.unit_axis, 1) * changes)[:, self.units] for g in gradients]
        effects = torch.stack([p.flatten(2).sum(2) if p.ndim > 2 else p for p in products], dim=2)  # (B, U, T)
        return _BatchEffects(
            effects.transpose(0, 1).float().cpu().numpy(),
            targets.classes,
            scores.detach().cpu().numpy(),
            np.empty((0, len(batch.indices))),
        )

    def _correct(self, indices: tuple[int, ...], predicted: Tensor) -> np.ndarray:
        """Return which images (1 + U, B) are classified as their labels say."""
        if self.labels is None:
            return np.zeros((1 + len(self.units), len(indices)), bool)
        return (predicted.cpu() == self.labels[list(indices)]).numpy()
