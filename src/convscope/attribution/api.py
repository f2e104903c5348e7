"""The third technique: which places of a picture speak for a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convscope.attribution.default_layer import choose_layer
from convscope.attribution.multiscale import iter_batches, run_multiscale, validate_scales
from convscope.attribution.registry import get_method, method_options
from convscope.attribution.result import Heatmaps
from convscope.attribution.runner import AUGMENTATIONS, FUSIONS, BatchResult, HeatmapJob, MethodSpec
from convscope.attribution.targets import output_target, parse_targets, segmentation_target
from convscope.engine.batching import MEMORY, Progress, batch_size
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.images.geometry import Geometry
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader

__all__ = ["Heatmaps", "compute_heatmaps", "heatmaps", "output_target", "resolve_method", "segmentation_target"]


def heatmaps(
    model: Model,
    images: Any,
    targets: Any = None,
    *,
    layer: str | Sequence[str] | None = None,
    method: str = "grad-cam",
    fit: str = "squash",
    against: Any = None,
    smooth: str | None = None,
    scale: float | Sequence[float] = 1,
    fuse: str = "mean",
    seed: int = 0,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
    **options: Any,
) -> Heatmaps:
    """Evidence for each target, per place.

    The part of the network in front of the layer runs once, without gradients; several targets share it.

    Parameters
    ----------
    model
        From `convscope.load`.
    images
        Pictures in any form that `convscope` takes.
    targets
        None (each picture's top class), a class (index or name) for all pictures, one per picture, or a list of several
        for each picture. Or a function of the network's output (M, ...) that gives a score for each picture (M,), or a
        list of such: see `over_region` for segmentation and `of_head` for several outputs.
    layer
        Where to look; several layers are fused into one map. Default, "auto": the last layer with spatial extent that
        is not a pooling and that the classes depend on; the result's `why` explains the choice. Methods that look at
        the input take none.
    method
        A key of `convscope.heatmaps.methods.METHODS`.
    fit
        "squash" shows the network the whole picture, "crop" its own evaluation crop.
    against
        A class, one per picture, or several for all: their mean logit is taken off, so that the map says why the target
        rather than these.
    smooth
        "flips" averages over the picture and its mirror image, "noise" over the picture and eight noisy copies.
    scale
        The picture is shown this many times as large as the network's own input size; several are fused. Maps get as
        many more places. Not for networks of fixed input size. (1, 2, 3) with fuse="product" is what `docs/methods.md`
        recommends for "where is it?".
    fuse
        How maps of several layers, or scales, become one, each divided by its largest value: "mean", "max", or
        "product", the geometric mean of what is positive.
    seed
        Of methods that draw at random.
    memory
        Bytes that a batch's intermediate results may take.
    max_pixels
        Pictures with more are refused before memory is spent on them.
    progress
        Called with the number of pictures done, a fraction within those that take long, and the number in all. What it
        raises ends the work, and leaves nothing behind.
    options
        Of the method: its function's keyword arguments.

    Raises
    ------
    ConvscopeError
        For an unknown method, option, layer or target, for a layer without spatial extent, for numbers that are not
        finite, and when no picture can be used. If only some cannot, they are named in `.failed`.
    """
    cell = resolve_method(model, method, layer, fuse, options)
    return compute_heatmaps(
        model,
        images,
        targets,
        [cell],
        fit=fit,
        against=against,
        smooth=smooth,
        scale=scale,
        seed=seed,
        memory=memory,
        max_pixels=max_pixels,
        progress=progress,
    )[0]


def resolve_method(
    model: Model, method: str, layer: str | Sequence[str] | None, fuse: str, options: Mapping[str, Any]
) -> MethodSpec:
    """What is to be computed, checked; and why there. Raises ConvscopeError."""
    at_input = get_method(method).at_input
    settings = method_options(method, options)
    if fuse not in FUSIONS:
        raise ConvscopeError(f"fuse is {fuse!r}; expected {' or '.join(FUSIONS)}")
    if at_input:
        if layer not in (None, "auto", "input"):
            raise ConvscopeError(f"{method} looks at the input; it takes no layer, and {layer!r} was given")
        return MethodSpec(method, (), fuse, settings, "the method works at the input")
    if layer is None or layer == "auto":
        row, why = choose_layer(model)
        return MethodSpec(method, (row,), fuse, settings, why)
    names = [layer] if isinstance(layer, str) else list(layer)
    if not names:
        raise ConvscopeError("an empty list of layers; give at least one, or None for the automatic choice")
    layers = tuple(dict.fromkeys(_spatial(model, name) for name in names))
    return MethodSpec(method, layers, fuse, settings, "as requested")


def compute_heatmaps(
    model: Model,
    images: Any,
    targets: Any,
    specs: Sequence[MethodSpec],
    *,
    fit: str = "squash",
    against: Any = None,
    smooth: str | None = None,
    scale: float | Sequence[float] = 1,
    seed: int = 0,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> list[Heatmaps]:
    """Several methods and layers at once, sharing what passes they can; parameters as of `heatmaps`."""
    if smooth not in AUGMENTATIONS:
        known = ", ".join(str(key) for key in AUGMENTATIONS)
        raise ConvscopeError(f"smooth is {smooth!r}; expected one of {known}")
    scales = validate_scales(model, scale)
    pictures = ImageBatchLoader(images, model.preprocessing, fit=fit, max_pixels=max_pixels)
    asked = parse_targets(model, targets, len(pictures), against)
    plan = HeatmapJob(model, asked, tuple(specs), smooth, seed, memory)
    answers: list[BatchResult] = []
    geometry: list[Geometry] = []
    done: list[int] = []
    size = batch_size(model, plan.bytes_per_image() * max(scales) ** 2, memory)
    for batch, inputs in iter_batches(pictures, images, scales, size):
        before, count = len(done) + len(pictures.failed), len(batch.indices)
        tell = partial(_tell, progress, before, count, len(pictures))
        answers.append(run_multiscale(plan, batch, scales, inputs, tell))
        geometry += batch.geometry
        done += batch.indices
    names = tuple(pictures.names[i] for i in done)
    classes = torch.cat([answer.targets.classes for answer in answers]).cpu()
    logits = torch.cat([answer.logits for answer in answers])
    results = []
    for c, cell in enumerate(specs):
        maps = torch.cat([answer.maps[c].values for answer in answers])
        more = {key: torch.cat([answer.maps[c].extras[key] for answer in answers]) for key in answers[0].maps[c].extras}
        called = asked.names(classes.numpy(), done)
        results.append(
            Heatmaps(
                model,
                values=maps.numpy(),
                targets=classes.numpy(),
                logits=logits.numpy(),
                layer=cell.layer_name,
                method=cell.method,
                fit=fit,
                image_names=names,
                geometry=tuple(geometry),
                image_source=pictures,
                image_indices=tuple(done),
                target_spec=asked,
                settings={**_said(cell, smooth, scales, seed), **cell.options},
                layer_reason=cell.layer_reason,
                extras={key: value.numpy() for key, value in more.items()},
                notes=(*pictures.notes, *quality_notes(maps, called, names, cell.layer_name)),
                failed=tuple(pictures.failed),
            )
        )
    return results


def _tell(progress: Progress | None, before: int, count: int, total: int, share: float) -> None:
    if progress is not None:
        progress(before + share * count, total)


def _said(cell: MethodSpec, smooth: str | None, scales: Sequence[float], seed: int) -> dict[str, Any]:
    fused = {"fuse": cell.fuse} if len(cell.layers) > 1 or len(scales) > 1 else {}
    return {"smooth": smooth, "scale": list(scales), "seed": seed, **fused}


def quality_notes(maps: Tensor, targets: list[list[str]], names: tuple[str, ...], position: str) -> list[str]:
    """In words: maps that an overlay would show as nothing."""
    here = "the picture" if position == "input" else "this layer"
    flat = maps.flatten(2)
    low, high = flat.amin(2), flat.amax(2)
    said = []
    for n, t in ((high <= 0) | (low == high)).nonzero().tolist():
        what = f"{names[n]}, {targets[n][t]}"
        if low[n, t] == high[n, t] == 0:
            said.append(f"{what}: the map is zero everywhere; {here} has no influence on the target")
        elif low[n, t] == high[n, t]:
            said.append(f"{what}: the map is {high[n, t]:.3g} everywhere; it points to no place")
        else:
            said.append(f"{what}: the map is negative everywhere; {here} speaks against the target")
    return said


def _spatial(model: Model, name: str) -> Layer:
    layer = model.layers.find(name)
    if not layer.is_spatial:
        known = [row.name for row in model.layers.unique_spatial()]
        raise ConvscopeError(
            f"layer {name!r} gives {' x '.join(map(str, layer.shape))} and has no spatial extent; the last that do: "
            f"{', '.join(known[-4:])}"
        )
    return layer
