"""`convscope.explain`: the few units that carry a prediction, and the proof."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from convscope.arguments import check_arguments
from convscope.attribution.default_layer import choose_layer
from convscope.attribution.targets import ClassLabels, Targets, parse_targets
from convscope.datasets.image_inputs import open_images
from convscope.editing.removal import Removal, Replacement
from convscope.editing.replacements import means, zeros
from convscope.editing.unit_effects import is_affine_after
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike, find_layer
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_int, warns_of_failures
from convscope.explanations.job import ExplanationJob, ImageExplanation
from convscope.explanations.result import Explanation
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model
from convscope.store.store import Store
from convscope.store.unit_views import store_of_layer, unit_names, unit_patches

HOW = ("zero", "mean")
MAX_FEATURES = 64


@warns_of_failures
@check_arguments
def explain(
    model: ModelLike,
    images: object,
    targets: Targets | None = None,
    *,
    layer: LayerLike | None = None,
    features: int = 8,
    share: float = 0.5,
    how: str = "zero",
    reference: object = None,
    against: ClassLabels | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    draws: int = 20,
    fit: str = "squash",
    seed: int = 0,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Explanation:
    """Find the few units of a layer that carry a prediction, where they are active, and check it by removing them.

    Units are ordered by their effects alone, and removed one after the other. What each adds to the fall of the logit y
    is its effect; the effects sum to the fall when all are removed together, in any network::

        effect of the k-th unit = y(units 1 to k-1 removed) - y(units 1 to k removed)
        share of a unit         = its effect / (y - y(all units of the layer removed))

    Where the network is affine after the layer, as after the last feature maps of many networks, effects do not depend
    on the order, and the shares of all units of the layer sum to 1; with ``how="zero"`` the denominator is then the
    logit minus its bias. The selection ends when the units carry `share` together, or with `features` units.

    The proof is one more pass: the logit without these units, next to the logits without as many other units whose
    removal changes the layer's output about as much.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        One image or N, in any form that `convscope.predict` takes.
    targets : optional
        One target per image, as for `convscope.heatmaps`; by default each image's top class.
    layer : str, Layer or nn.Module, optional
        The layer whose units explain. By default that of Grad-CAM. The layer of an attached dictionary,
        "LAYER/dictionary", explains by its features.
    features : int
        The largest number of units, 1 to 64.
    share : float
        The share of the logit that the units are to carry, above 0, at most 1.
    how : {"zero", "mean"}
        What a removed unit is replaced by at all positions: 0, or the mean of its activations over the reference images
        and all positions.
    reference : path, sequence of paths, PIL images, arrays or tensor, optional
        The images of "mean".
    against : optional
        A class, or several, whose mean logit is subtracted from the target's, as for `convscope.heatmaps`.
    store : Store or path, optional
        A scan of the model with this layer: gives units their names (see `convscope.name_units`) and top patches.
    draws : int
        How many times other units are drawn for comparison; 0 for none.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    seed : int
        Seed of these draws.
    memory : int
        Bytes that intermediate results may take.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` with numbers of images; exceptions raised in it cancel cleanly.

    Returns
    -------
    Explanation
        Units, effects, positions and names for each image; ``print`` gives the sentences.

    Raises
    ------
    ConvscopeError
        For unknown layers and targets, several targets per image, a store of another model or without the layer, for
        values that are not finite, and when no image can be read.

    See Also
    --------
    convscope.effects : The effect of every unit.
    convscope.edit : A model without some units.

    Notes
    -----
    In a layer of more than 256 units that are active on an image, after which the network is not affine, effects are
    measured for the 256 units with the largest first-order estimates (Syed et al.).

    References
    ----------
    Morcos et al., On the importance of single directions for generalization, ICLR 2018 (removal of units).
    Syed et al., Attribution Patching Outperforms Automated Circuit Discovery, 2023 (first-order estimates).

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> explanation = convscope.explain(model, convscope.samples.photographs()[0], layer="blocks.6")
    >>> explanation.units.shape  # images, units
    (1, ...)
    >>> bool(explanation.removed_logits[0] < explanation.random_logits.min())
    True
    """
    _check(features, share, how, reference, draws)
    model = as_model(model, images)
    spec_layer = None if layer is None else find_layer(model, layer)
    loader = ImageBatchLoader(
        open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels, keep_copies=True
    )
    spec = parse_targets(model, targets, len(loader), against)
    if spec.num_targets != 1:
        raise ConvscopeError(f"targets names {spec.num_targets} targets per image; explain takes one")
    selected, reason = (spec_layer, "as given") if spec_layer else choose_layer(model, spec.functions)
    opened = store_of_layer(store, model, selected)
    with progress_bar(progress, "explain") as report:
        first = next(loader.batches(1))
        job = ExplanationJob(
            Removal(model, selected, spec, _replacement(model, selected, reference, fit, memory), memory),
            is_affine_after(model, selected, first, spec),
            features,
            share,
            draws,
            seed,
        )
        parts, indices = job.run_all(loader, report)
    return _collect(model, job, parts, indices, loader, opened, how, reason)


def _check(features: int, share: float, how: str, reference: object, draws: int) -> None:
    """Raise ConvscopeError for values out of range."""
    require_int("features", features)
    if features > MAX_FEATURES:
        raise ConvscopeError(f"features is {features}; expected 1 to {MAX_FEATURES}: an explanation is short")
    if not 0 < share <= 1:
        raise ConvscopeError(f"share is {share}; expected a fraction above 0, at most 1")
    if how not in HOW:
        raise ConvscopeError(f"how is {how!r}; expected one of {', '.join(HOW)}")
    if (reference is None) != (how == "zero"):
        raise ConvscopeError("how='mean' takes the mean over reference= images; give both or neither")
    require_int("draws", draws, minimum=0)


def _replacement(model: Model, layer: Layer, reference: object, fit: str, memory: int) -> Replacement:
    """Return what removed units are replaced by: zeros, or their means over reference images."""
    if reference is None:
        return zeros
    return means(model, layer, ImageBatchLoader(open_images(reference), model.preprocessing, fit=fit), memory)


def _collect(
    model: Model,
    job: ExplanationJob,
    parts: Sequence[ImageExplanation],
    indices: Sequence[int],
    loader: ImageBatchLoader,
    store: Store | None,
    how: str,
    reason: str,
) -> Explanation:
    """Join the explanations of all images."""
    removal = job.removal
    width = max((len(part.units) for part in parts), default=0)

    def stack(name: str, fill: float) -> np.ndarray:
        return np.stack([_pad(getattr(part, name), width, fill) for part in parts])

    targets = np.array([part.target for part in parts])
    logits = np.array([part.scores for part in parts], np.float32)
    units = stack("units", -1).astype(np.int64)
    return Explanation(
        model,
        units=units,
        effects=stack("effects", np.nan).astype(np.float32),
        single_effects=stack("single_effects", np.nan).astype(np.float32),
        maps=stack("maps", 0).astype(np.float32),
        boxes=stack("boxes", np.nan).astype(np.float32),
        targets=targets,
        logits=logits[:, 0],
        base_logits=logits[:, 1],
        removed_logits=logits[:, 2],
        removed_classes=np.array([part.removed_class for part in parts]),
        random_logits=np.stack([part.random for part in parts]).astype(np.float32),
        layer=removal.layer.name,
        layer_reason=reason,
        num_units=removal.layer.units,
        how=how,
        share=job.share,
        target_names=tuple(row[0] for row in removal.targets.names(targets[:, None], indices)),
        unit_names=tuple(unit_names(store, removal.layer, row) for row in units),
        image_names=tuple(loader.names[i] for i in indices),
        geometry=tuple(part.geometry for part in parts),
        image_source=loader,
        image_indices=tuple(indices),
        fit=loader.fit,
        seed=job.seed,
        patches=None if store is None else unit_patches(store, removal.layer, units),
        notes=tuple(loader.notes),
        failed=tuple(loader.failed),
    )


def _pad(values: np.ndarray, count: int, fill: float) -> np.ndarray:
    """Pad the first axis to `count`."""
    missing = np.full((count - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, missing])
