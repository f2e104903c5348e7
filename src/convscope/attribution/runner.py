"""Compute the maps of several methods for one batch of images, with as few passes as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from convscope.attribution import influence
from convscope.attribution.augmentation import AUGMENTATIONS, Undo
from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.context import Extras, LayerContext, MethodContext
from convscope.attribution.fusion import fuse_maps, mean_in_order
from convscope.attribution.registry import CamMethod, Method, ModelMethod
from convscope.attribution.targets import TargetSpec
from convscope.engine import capture
from convscope.engine.batching import balanced_chunks, batch_size, forward_bytes, gradient_bytes
from convscope.engine.capture import ForwardResult
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.images.geometry import Geometry

ReportProgress = Callable[[float], None]
"""Takes the fraction of the work that is done, 0 to 1."""

ScoreRule = Callable[[BatchTargets, ForwardResult], Tensor]


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options, and the layers it works at.

    Attributes
    ----------
    name : str
        Key of the method in `METHODS`.
    method : Method
    layers : tuple of Layer
        The maps of several layers are fused. Empty for methods that work at the input, and before the default layer is
        chosen.
    fuse : str
        Key of `FUSIONS`.
    options : mapping
        Keyword arguments of the method's function.
    layer_reason : str
        Why these layers were chosen.
    """

    name: str
    method: Method
    layers: tuple[Layer, ...] = ()
    fuse: str = "mean"
    options: Mapping[str, object] = field(default_factory=dict)
    layer_reason: str = ""

    @property
    def layer_name(self) -> str:
        """The layers' names, joined by " + "; "input" if there are none."""
        return " + ".join(layer.name for layer in self.layers) or "input"


@dataclass(frozen=True)
class HeatmapJob:
    """What to compute for every batch.

    Attributes
    ----------
    model : Model
    targets : TargetSpec
    specs : tuple of MethodSpec
    smooth : str or None
        Key of `AUGMENTATIONS`.
    seed : int
    memory : int
        Bytes that intermediate results may take.
    refine : bool
        Make the maps follow the edges of the images.
    """

    model: Model
    targets: TargetSpec
    specs: tuple[MethodSpec, ...]
    smooth: str | None = None
    seed: int = 0
    memory: int = 0
    refine: bool = False

    @cached_property
    def cam_layers(self) -> list[Layer]:
        """The layers whose activations and gradients CAM methods share, without repetition."""
        layers = (layer for spec in self.specs if isinstance(spec.method, CamMethod) for layer in spec.layers)
        return list(dict.fromkeys(layers))

    @cached_property
    def cam_scores(self) -> list[ScoreRule]:
        """The scores whose gradients CAM methods share, without repetition."""
        scores = (spec.method.score for spec in self.specs if isinstance(spec.method, CamMethod))
        return list(dict.fromkeys(score for score in scores if score is not None))

    @cached_property
    def bytes_per_image(self) -> float:
        """The memory that intermediate results take for one image."""
        forward = forward_bytes(self.model, self.cam_layers)
        if not any(isinstance(spec.method, ModelMethod) for spec in self.specs):
            return forward
        return max(gradient_bytes(self.model, None, math.prod(self.model.preprocessing.size)), forward)


@dataclass(frozen=True)
class MethodMaps:
    """The maps of one method for a batch.

    Attributes
    ----------
    values : Tensor of shape (B, T, ...)
    extras : dict of Tensor
        Further arrays (B, ...) by name.
    """

    values: Tensor
    extras: Extras = field(default_factory=dict)


@dataclass(frozen=True)
class BatchResult:
    """The results for a batch.

    Attributes
    ----------
    targets : BatchTargets
    logits, probabilities : Tensor of shape (B, T)
        The targets' logits and probabilities.
    maps : tuple of MethodMaps
        One per spec of the job.
    """

    targets: BatchTargets
    logits: Tensor
    probabilities: Tensor
    maps: tuple[MethodMaps, ...]


def run_batch(
    job: HeatmapJob,
    x: Tensor,
    indices: Sequence[int],
    report_progress: ReportProgress,
    targets: BatchTargets | None = None,
    geometry: Sequence[Geometry] = (),
) -> BatchResult:
    """Compute the maps of all methods for one batch.

    Parameters
    ----------
    job : HeatmapJob
    x : Tensor of shape (B, C, H, W)
        Preprocessed images.
    indices : sequence of int
        The images' positions among all images.
    report_progress : callable
    targets : BatchTargets, optional
        The images' targets, if they were determined before.
    geometry : sequence of Geometry
        Where the inputs lie in the images, which targets that are boxes need.

    Returns
    -------
    BatchResult
        On the CPU.
    """
    views = AUGMENTATIONS[job.smooth](x, job.seed)
    num_steps = len(views) * len(job.specs)
    passes: list[_SharedPass] = []
    maps_by_view: list[list[MethodMaps]] = []
    for v, view in enumerate(views):  # the first one is the images themselves, which determine the targets
        view_targets = None if targets is None else view.move_targets(targets)
        shared = _shared_pass(job, view.x, indices, view_targets, geometry)
        targets = shared.targets if targets is None else targets
        passes.append(shared)
        maps_by_view.append([])
        for s, spec in enumerate(job.specs):
            report_part = partial(report_step, report_progress, v * len(job.specs) + s, 1, num_steps)
            maps = _run_method(job, spec, view.x, shared, report_part)
            maps_by_view[v].append(_undo_view(maps, view.undo))
    averages = tuple(_average_views(maps) for maps in zip(*maps_by_view, strict=True))
    return BatchResult(passes[0].targets, passes[0].logits.cpu(), passes[0].probabilities.cpu(), averages)


def _undo_view(maps: MethodMaps, undo: Undo) -> MethodMaps:
    """Map values, and extras on the same grid, back to the original images."""
    grid = maps.values.shape[2:]
    extras = {key: undo(value) if value.shape[2:] == grid else value for key, value in maps.extras.items()}
    return MethodMaps(undo(maps.values), extras)


def _average_views(maps: Sequence[MethodMaps]) -> MethodMaps:
    """Average the maps of several views; move them to the CPU."""
    extras = {key: mean_in_order([m.extras[key] for m in maps]).cpu() for key in maps[0].extras}
    return MethodMaps(mean_in_order([m.values for m in maps]).cpu(), extras)


def report_step(report_progress: ReportProgress, done: float, step: float, total: float, fraction: float) -> None:
    """Report that `fraction` of a step of size `step` is done, after `done` of `total`."""
    report_progress((done + step * fraction) / total)


# --- the pass that CAM methods share ---------------------------------------------------------------------------------


class _SharedPass(NamedTuple):
    """The outcome of a forward pass and its backward passes.

    `activations` are (B, C, ...) by layer. `gradients` are (T, B, C, ...) by score rule and layer.
    """

    activations: dict[str, Tensor]
    targets: BatchTargets
    logits: Tensor
    probabilities: Tensor
    gradients: dict[ScoreRule, dict[str, Tensor]]


def _shared_pass(
    job: HeatmapJob, x: Tensor, indices: Sequence[int], targets: BatchTargets | None, geometry: Sequence[Geometry]
) -> _SharedPass:
    gradients = {}
    layer_names = [layer.name for layer in job.cam_layers]
    with (
        torch.no_grad(),
        capture.capture_layers(job.model, layer_names, detach_at_layer=bool(job.cam_scores)) as run,
    ):
        outputs = run(x)
        require_finite(job.model, outputs.logits, "the network's output")
        targets = job.targets.for_batch(indices, outputs.logits, geometry) if targets is None else targets
        for score in job.cam_scores:
            with torch.enable_grad():
                scores = score(targets, outputs)
            gradients[score] = _gradients(job, scores, outputs.maps)
            for name in outputs.maps.keys() - gradients[score].keys():
                scores_of_image = influence.scores_of_image(targets, rule=score)
                influence.require_gradient(job.model, job.model.layers.find(name), x, scores_of_image)
    activations = {name: activation.detach().float() for name, activation in outputs.maps.items()}
    probabilities = targets.probabilities(job.model.probabilities(outputs.logits.detach()))
    return _SharedPass(activations, targets, targets.logits(outputs), probabilities, gradients)


def _gradients(job: HeatmapJob, scores: Tensor, activations: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the gradients (T, B, C, ...) float32 of scores (B, T) at each layer that they depend on.

    An image's score depends on no other image, so the gradient of the scores' sum holds each image's own. As many
    targets as fit into memory share a backward pass.
    """
    if not scores.requires_grad:
        return {}
    max_targets = max(1, int(job.memory // (2 * len(scores) * job.bytes_per_image)))
    layers = list(activations.values())
    chunks = [
        gradients
        for targets in balanced_chunks(range(scores.shape[1]), max_targets)
        for gradients in _backward(scores, targets, layers)
    ]
    by_layer = dict(zip(activations, zip(*chunks, strict=True), strict=True))
    gradients = {name: [part for part in parts if part is not None] for name, parts in by_layer.items()}
    return {name: torch.cat(parts).float() for name, parts in gradients.items() if parts}


def _backward(scores: Tensor, targets: Sequence[int], layers: Sequence[Tensor]) -> Iterator[Sequence[Tensor | None]]:
    """Yield the gradients (t, B, C, ...) of some targets' scores at each layer; None where there is no dependence.

    The graph is retained for other targets and scores.
    """
    one_hot = torch.zeros(len(targets), *scores.shape, device=scores.device)
    one_hot[range(len(targets)), :, list(targets)] = 1
    grad = partial(torch.autograd.grad, scores, layers, retain_graph=True, allow_unused=True)
    if len(targets) > 1:
        try:
            yield grad(one_hot, is_grads_batched=True)
            return
        except RuntimeError:  # some backward functions cannot be batched: one target at a time
            pass
    for grad_output in one_hot:
        yield [None if gradient is None else gradient[None] for gradient in grad(grad_output)]


# --- single methods --------------------------------------------------------------------------------------------------


def _run_method(
    job: HeatmapJob, spec: MethodSpec, x: Tensor, shared: _SharedPass, report_progress: ReportProgress
) -> MethodMaps:
    if isinstance(spec.method, CamMethod):
        maps = _run_cam(spec, spec.method, shared)
        report_progress(1)
    else:
        maps = _run_model_method(job, spec, x, shared.targets, report_progress)
    require_finite(job.model, maps.values, f"the evidence by {spec.name} at layer {spec.layer_name!r}")
    return maps


def _run_cam(spec: MethodSpec, method: CamMethod, shared: _SharedPass) -> MethodMaps:
    num_targets = shared.targets.classes.shape[1]
    maps = []
    for layer in spec.layers:
        activation = shared.activations[layer.name]
        if method.score is None:
            values = method.function(activation)[:, None]
            maps.append(values.expand(-1, num_targets, *values.shape[2:]))
        else:
            zeros = torch.zeros_like(activation).expand(
                num_targets, *activation.shape
            )  # no target depends on the layer
            gradients = shared.gradients[method.score].get(layer.name, zeros)
            by_target = [
                method.function(activation, gradient, *_boxes(method, shared.targets, t))
                for t, gradient in enumerate(gradients)
            ]
            maps.append(torch.stack(by_target, dim=1))
    return MethodMaps(fuse_maps(maps, spec.fuse))


def _boxes(method: CamMethod, targets: BatchTargets, t: int) -> tuple[Tensor | None, ...]:
    """Return the boxes (B, 4) that are target number `t` of the images, for a method that takes them."""
    if not method.needs_boxes:
        return ()
    return (None if targets.boxes is None else targets.boxes[:, t],)


def _run_model_method(
    job: HeatmapJob, spec: MethodSpec, x: Tensor, targets: BatchTargets, report_progress: ReportProgress
) -> MethodMaps:
    scale = x[0, 0].numel() / math.prod(job.model.preprocessing.size)
    size = batch_size(job.model, job.bytes_per_image * scale, job.memory)
    layers = spec.layers or (None,)
    values: list[Tensor] = []
    extras: Extras = {}
    with capture.capture_layers(job.model, []) as run:
        for i, layer in enumerate(layers):
            report_layer = partial(report_step, report_progress, i, 1, len(layers))
            arguments = (job.model, x, targets, run, size, job.seed, report_layer)
            context = MethodContext(*arguments) if layer is None else LayerContext(*arguments, layer)
            output = spec.method.function(context, **spec.options)
            maps, extras = output if isinstance(output, tuple) else (output, {})
            values.append(maps.float())
            report_layer(1)
    return MethodMaps(fuse_maps(values, spec.fuse), extras if len(layers) == 1 else {})
