"""Heatmaps: where in an image the evidence for a target is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product

import torch
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.attribution.augmentation import AUGMENTATIONS
from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.box_targets import has_boxes
from convscope.attribution.default_layer import choose_layer, choose_layer_for_boxes, explain_shape
from convscope.attribution.fusion import FUSIONS
from convscope.attribution.influence import explain_zero_maps
from convscope.attribution.methods.rise import noise_notes
from convscope.attribution.multiscale import run_multiscale, scaled_inputs, validate_scales
from convscope.attribution.registry import METHODS, ModelMethod, default_method_for_boxes, method_options
from convscope.attribution.result import Heatmaps, is_displayed_blank
from convscope.attribution.runner import BatchResult, HeatmapJob, MethodSpec
from convscope.attribution.targets import ClassLabels, Targets, TargetSpec, parse_targets
from convscope.datasets.image_inputs import open_images
from convscope.engine.batching import MEMORY, batch_size
from convscope.engine.capture import ForwardResult
from convscope.engine.layer_selection import LayerLike, as_layers, find_layer
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.probe import STOCHASTIC_NOTE
from convscope.errors import ConvscopeError, find_name, warns_of_failures
from convscope.images.geometry import Geometry
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model


@warns_of_failures
@check_arguments
def heatmaps(
    model: ModelLike,
    images: object,
    targets: Targets | None = None,
    *,
    layer: LayerLike | Sequence[LayerLike] | None = None,
    method: str | None = None,
    fit: str = "squash",
    against: ClassLabels | None = None,
    smooth: str | None = None,
    scale: float | Sequence[float] = 1,
    fuse: str = "mean",
    refine: bool = False,
    seed: int = 0,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
    **options: object,
) -> Heatmaps:
    """Compute heatmaps: the evidence for each target at each position of the images.

    The part of the network before the layer runs once per image, without gradients; all targets share it.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        Any form that `convscope.predict` takes; N images.
    targets : class, sequence or callable, optional
        One class (index or name) for all images, one per image, or a list of T for each image, of which one alone,
        ``[["cat", "dog"]]``, is for all images; with a single image also ``["cat", "dog"]``. By default each image's
        top class. Or a function of the network's output for M inputs that returns scores (M,), or a list of T such
        functions; see `convscope.segmentation_target` and `convscope.output_target`.
    layer : str, Layer, nn.Module or sequence of these, optional
        A name in ``model.layers``, one of its rows, or a module of the network; or several, whose maps are fused. By
        default ("auto") the last layer with spatial extent that every path from the image to the target passes through
        and that the target depends on; the result's `layer_reason` explains the choice. Methods that work at the input
        take no layer.
    method : str, optional
        Name of a method; `convscope.methods` lists them. By default "grad-cam"; for boxes "odam", or "d-rise" where the
        network is a function without layers.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    against : class or sequence of classes, optional
        One class for all images, one per image, or several for all: their mean logit is subtracted from the target's,
        so that the map shows evidence for the target rather than for these.
    smooth : {None, "flips", "noise"}
        Average the maps of the image and its mirror image, or of the image and 8 noisy copies.
    scale : float or sequence of float
        Size of the network's input as a multiple of its own size, above 0 and at most 16. The maps have as many more
        positions; the maps of several scales are fused. Networks with a fixed input size take only 1. To find objects,
        see `convscope.locate`.
    fuse : {"mean", "max", "product"}
        How the maps of several layers or scales are combined, each divided by its largest absolute value first.
        "product" is the geometric mean of the positive evidence.
    refine : bool
        Make the maps follow the edges of the images, by averages over neighbours of similar colors: they then show
        where objects are rather than single positions' evidence. Not for signals and volumes.
    seed : int
        Random seed for stochastic methods.
    memory : int
        Bytes that a batch's intermediate results may take.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` with the number of images done, with a fraction during long methods, and the number
        of images; exceptions raised in it cancel cleanly.
    **options
        Keyword arguments of the method's function.

    Returns
    -------
    Heatmaps
        ``values`` (N, T, h, w) float32, signed and not normalised. Images that cannot be read are left out and listed
        in ``failed``.

    Raises
    ------
    ConvscopeError
        For an unknown method, option, layer or target, for a layer without spatial extent, for values that are not
        finite, and when no image can be read.

    References
    ----------
    The functions in `convscope.attribution.methods` name their papers and equations.

    Examples
    --------
    >>> import convscope, convscope.samples
    >>> model = convscope.load("lite0")
    >>> heatmaps = convscope.heatmaps(model, convscope.samples.photographs()[0])
    >>> heatmaps.values.shape
    (1, 1, 7, 7)
    >>> heatmaps.layer
    'bn2'
    """
    model = as_model(model, images)
    if method is None:
        method = default_method_for_boxes(model) if has_boxes(targets) else "grad-cam"
    spec = resolve_method(model, method, layer, fuse, options)
    with progress_bar(progress, "heatmaps") as report:
        return compute_heatmaps(
            model,
            images,
            targets,
            [spec],
            fit=fit,
            against=against,
            smooth=smooth,
            scale=scale,
            refine=refine,
            seed=seed,
            memory=memory,
            max_pixels=max_pixels,
            progress=report,
        )[0]


def resolve_method(
    model: Model,
    name: str,
    layer: LayerLike | Sequence[LayerLike] | None,
    fuse: str,
    options: Mapping[str, object],
) -> MethodSpec:
    """Validate a method, its options and layers; a layer that is not given is chosen later.

    Parameters
    ----------
    model : Model
    name : str
        Key of the method.
    layer : str, Layer, nn.Module, sequence of these or None
    fuse : str
    options : mapping

    Raises
    ------
    ConvscopeError
        For anything unknown or invalid.
    """
    name = find_name("method", name, list(METHODS))
    method = METHODS[name]
    settings = method_options(name, method, options)
    if fuse not in FUSIONS:
        raise ConvscopeError(f"fuse is {fuse!r}; expected one of {', '.join(FUSIONS)}")
    if not isinstance(method, ModelMethod) or method.needs_gradient:
        model.require_gradients(f"method {name!r}")
    if method.at_input:
        if layer not in (None, "auto", "input"):
            raise ConvscopeError(f"{name} works at the input and takes no layer; got layer {layer!r}")
        return MethodSpec(name, method, (), fuse, settings, "the method works at the input")
    if not len(model.layers):
        raise ConvscopeError(
            f"method {name!r} needs a layer, and {model.name} shows none; methods at the input work: saliency, "
            "integrated-gradients, occlusion, rise"
        )
    if layer is None or layer == "auto":
        return MethodSpec(name, method, (), fuse, settings)
    requested = as_layers(layer)
    if not requested:
        raise ConvscopeError("layer is an empty list; give at least one layer, or None to choose automatically")
    layers = tuple(dict.fromkeys(_find_spatial(model, one) for one in requested))
    return MethodSpec(name, method, layers, fuse, settings, "as requested")


def _find_spatial(model: Model, requested: LayerLike) -> Layer:
    """Find a layer; raise ConvscopeError if it has no spatial extent."""
    layer = find_layer(model, requested)
    if not layer.is_spatial and (reason := explain_shape(model, layer)):
        raise ConvscopeError(reason)
    if not layer.is_spatial:
        known = [spatial.name for spatial in model.layers.unique_spatial()]
        others = f"the last layers that have some: {', '.join(known[-4:])}" if known else "no layer has any"
        raise ConvscopeError(
            f"layer {layer.name!r} has output {' x '.join(map(str, layer.shape))} without spatial extent; {others}"
        )
    return layer


def compute_heatmaps(
    model: Model,
    images: object,
    targets: Targets | None,
    specs: Sequence[MethodSpec],
    *,
    fit: str = "squash",
    against: ClassLabels | None = None,
    smooth: str | None = None,
    scale: float | Sequence[float] = 1,
    refine: bool = False,
    seed: int = 0,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> list[Heatmaps]:
    """Compute heatmaps by several methods that share passes; the parameters are those of `heatmaps`."""
    if smooth not in AUGMENTATIONS:
        raise ConvscopeError(f"smooth is {smooth!r}; expected one of {', '.join(map(str, AUGMENTATIONS))}")
    scales = validate_scales(model, scale)
    if refine and model.preprocessing.axes != 2:
        raise ConvscopeError(f"refine takes images only; this network takes {model.preprocessing.shape}")
    images = open_images(images)
    loader = ImageBatchLoader(images, model.preprocessing, fit=fit, max_pixels=max_pixels, keep_copies=True)
    num_images = len(loader.names)
    target_spec = parse_targets(model, targets, num_images, against)
    specs = [_with_layer(model, spec, target_spec, loader) for spec in specs]
    job = HeatmapJob(model, target_spec, tuple(specs), smooth, seed, memory, refine)
    size = batch_size(model, job.bytes_per_image * max(scales) ** 2, memory)
    results: list[BatchResult] = []
    reasons: list[list[list[list[str]]]] = []  # why maps are zero, of each batch, spec, image and target
    geometry: list[Geometry] = []
    indices: list[int] = []
    for batch, *inputs in zip(loader.batches(size), *scaled_inputs(loader, images, scales, size), strict=True):
        num_done = len(indices) + len(loader.failed)
        report_progress = partial(_report_images, progress, num_done, len(batch.indices), num_images)
        result = run_multiscale(job, batch, scales, inputs, report_progress)
        results.append(result)
        reasons.append(
            [
                _explain_zero_maps(job, spec, len(scales), batch.x, result.targets, maps.values)
                for spec, maps in zip(job.specs, result.maps, strict=True)
            ]
        )
        geometry += batch.geometry
        indices += batch.indices
    return [
        _collect(s, job, results, list(chain(*parts)), scales, loader, tuple(geometry), tuple(indices))
        for s, parts in enumerate(zip(*reasons, strict=True))
    ]


def _with_layer(model: Model, spec: MethodSpec, targets: TargetSpec, loader: ImageBatchLoader) -> MethodSpec:
    """Choose the layer of a method that needs one and got none; for boxes by those of the first image."""
    if spec.layers or spec.method.at_input:
        return spec
    if targets.boxes:
        batch = next(loader.batches(1))

        def scores(outputs: ForwardResult) -> Tensor:
            image_targets = targets.for_batch(batch.indices, outputs.logits[:1], batch.geometry)
            return image_targets.of_image(0, len(outputs.logits)).scores(outputs)

        layer, reason = choose_layer_for_boxes(model, batch.x, scores)
    else:
        layer, reason = choose_layer(model, targets.functions)
    return replace(spec, layers=(layer,), layer_reason=reason)


def _explain_zero_maps(
    job: HeatmapJob, spec: MethodSpec, num_scales: int, x: Tensor, targets: BatchTargets, maps: Tensor
) -> list[list[str]]:
    """Say why maps (B, T, ...) are zero: as `explain_zero_maps`, and that of products by what is multiplied."""
    if spec.fuse == "product" and max(1, len(spec.layers)) * num_scales > 1:
        reason = "; no position has positive evidence in all of the maps that are multiplied"
        return [[reason if is_zero else "" for is_zero in row] for row in (~maps.flatten(2).any(2)).tolist()]
    return explain_zero_maps(job.model, spec.layers, x, targets, maps)


def _report_images(progress: Progress | None, done: int, count: int, total: int, fraction: float) -> None:
    """Report that a fraction of a batch of `count` images is done, after `done` of `total` images."""
    if progress is not None:
        progress(done + fraction * count, total)


def _collect(
    s: int,
    job: HeatmapJob,
    results: Sequence[BatchResult],
    zero_reasons: Sequence[Sequence[str]],
    scales: Sequence[float],
    loader: ImageBatchLoader,
    geometry: tuple[Geometry, ...],
    indices: tuple[int, ...],
) -> Heatmaps:
    """Join the maps of the job's spec number `s` over all batches."""
    spec = job.specs[s]
    layer = spec.layer_name
    maps = [result.maps[s] for result in results]
    values = torch.cat([m.values for m in maps])
    extras = {key: torch.cat([m.extras[key] for m in maps]).numpy() for key in maps[0].extras}
    classes = torch.cat([result.targets.classes for result in results]).cpu().numpy()
    image_names = tuple(loader.names[i] for i in indices)
    target_names = job.targets.names(classes, indices)
    names = [[f"{image}, {target}" for target in row] for image, row in zip(image_names, target_names, strict=True)]
    fused = {"fuse": spec.fuse} if len(spec.layers) > 1 or len(scales) > 1 else {}
    refined = {"refine": True} if job.refine else {}
    return Heatmaps(
        job.model,
        values=values.numpy(),
        targets=classes,
        logits=torch.cat([result.logits for result in results]).numpy(),
        probabilities=torch.cat([result.probabilities for result in results]).numpy(),
        layer=layer,
        method=spec.name,
        fit=loader.fit,
        image_names=image_names,
        geometry=geometry,
        image_source=loader,
        image_indices=indices,
        target_spec=job.targets,
        settings={"smooth": job.smooth, "scale": list(scales), "seed": job.seed, **fused, **refined, **spec.options},
        layer_reason=spec.layer_reason,
        extras=extras,
        notes=(
            *loader.notes,
            *[note for note in job.model.notes if note == STOCHASTIC_NOTE],
            *quality_notes(values, zero_reasons, target_names, image_names, layer, geometry),
            *noise_notes(values, extras, spec.options, names),
        ),
        failed=tuple(loader.failed),
    )


def quality_notes(
    maps: Tensor,
    zero_reasons: Sequence[Sequence[str]],
    target_names: Sequence[Sequence[str]],
    image_names: Sequence[str],
    layer: str,
    geometry: Sequence[Geometry],
) -> list[str]:
    """Describe maps (N, T, ...) of which an overlay shows nothing, or the same everywhere.

    `zero_reasons` says for each image and target why the map is zero, if it is.
    """
    source = "the image" if layer == "input" else "this layer"
    flat = maps.flatten(2)
    low, high = flat.amin(2), flat.amax(2)
    at_input = layer == "input" and maps.ndim == 4
    notes = []
    for n, t in product(range(maps.shape[0]), range(maps.shape[1])):
        name = f"{image_names[n]}, {target_names[n][t]}"
        if zero_reasons[n][t]:
            notes.append(f"{name}: the map is zero everywhere{zero_reasons[n][t]}")
        elif low[n, t] == high[n, t]:
            notes.append(f"{name}: the map is {high[n, t]:.3g} everywhere; no position has more evidence than another")
        elif high[n, t] <= 0:
            notes.append(f"{name}: the map is negative everywhere; {source} is evidence against the target")
        elif is_displayed_blank(maps[n, t], geometry[n], at_input):
            notes.append(
                f"{name}: no positive evidence is left in the overlay: few positions are positive, at most "
                f"{high[n, t]:.3g}, and they vanish at the size of the image"
            )
    return notes
