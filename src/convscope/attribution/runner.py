"""From one batch of pictures to maps: which passes are needed, and what the methods make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.context import MethodContext
from convscope.attribution.registry import CamMethod, ModelMethod, get_method
from convscope.attribution.targets import BatchTargets, TargetSpec
from convscope.engine import capture
from convscope.engine.batching import balanced_chunks, batch_size, forward_bytes, gradient_bytes
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.validation import require_finite


@dataclass(frozen=True)
class MethodSpec:
    """One method, with its options, at one layer or at several whose maps are fused; without layers: at the input."""

    method: str
    layers: tuple[Layer, ...] = ()
    fuse: str = "mean"
    options: Mapping[str, Any] = field(default_factory=dict)
    layer_reason: str = ""

    @property
    def layer_name(self) -> str:
        """The layers' names."""
        return " + ".join(layer.name for layer in self.layers) or "input"


@dataclass(frozen=True)
class MethodMaps:
    """What one cell found for a batch: `values` (B, T, ...), and what else there is under its name, (B, ...) each."""

    values: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchResult:
    """One batch done: the targets and their logits (B, T), and what each cell found."""

    targets: BatchTargets
    logits: Tensor
    maps: tuple[MethodMaps, ...]


@dataclass(frozen=True)
class HeatmapJob:
    """What is to be done with every batch. `smooth` is a key of `VIEWS`."""

    model: Model
    targets: TargetSpec
    specs: tuple[MethodSpec, ...]
    smooth: str | None = None
    seed: int = 0
    memory: int = 0

    def cam_layers(self) -> list[str]:
        """The layers whose activations and gradients several cells may share, in the network's order."""
        wanted = {
            row.name for cell in self.specs if isinstance(get_method(cell.method), CamMethod) for row in cell.layers
        }
        return [name for name in self.model.layers.names if name in wanted]

    def bytes_per_image(self) -> float:
        """Of memory, for one picture of a batch."""
        layers = self.cam_layers()
        asking = any(isinstance(get_method(cell.method), ModelMethod) for cell in self.specs)
        whole = gradient_bytes(self.model, None, math.prod(self.model.preprocessing.size)) if asking else 0.0
        return max(whole, forward_bytes(self.model, layers[0] if layers else None))


def run_batch(
    job: HeatmapJob,
    x: Tensor,
    indices: Sequence[int],
    report_progress: Callable[[float], None],
    targets: BatchTargets | None = None,
) -> BatchResult:
    """The maps of all cells for one batch (B, C, H, W) of the pictures `indices`; their targets, if not chosen yet.

    `tell` is told the share of the work, 0 to 1, that is done.
    """
    views = AUGMENTATIONS[job.smooth](x, job.seed)
    logits: Tensor | None = None
    found: list[list[MethodMaps]] = []
    for view, undo in views:
        shared = _shared_pass(job, view, indices, targets)
        targets = shared.chosen
        logits = shared.logits if logits is None else logits
        found.append([])
        for cell in job.specs:
            done = (len(found) - 1) / len(views) + len(found[-1]) / len(job.specs) / len(views)
            part = partial(tell_part, report_progress, done, 1 / len(job.specs) / len(views))
            maps = _run_method(job, cell, view, shared, part)
            require_finite(job.model, maps.values, f"the evidence by {cell.method} at layer {cell.layer_name!r}")
            grid = maps.values.shape[2:]
            more = {key: undo(value) if value.shape[2:] == grid else value for key, value in maps.extras.items()}
            found[-1].append(MethodMaps(undo(maps.values), more))
    assert targets is not None
    assert logits is not None
    cells = (_averaged(views_of_one) for views_of_one in zip(*found, strict=True))
    return BatchResult(targets, logits.cpu(), tuple(cells))


class _Shared(NamedTuple):
    """What is kept of one forward pass, and for each way to score it the gradients (T, B, C, ...) at every layer."""

    maps: dict[str, Tensor]
    chosen: BatchTargets
    logits: Tensor
    gradients: dict[Callable[..., Tensor], dict[str, Tensor]]


def _shared_pass(plan: HeatmapJob, x: Tensor, indices: Sequence[int], chosen: BatchTargets | None) -> _Shared:
    layers = plan.cam_layers()
    ways = dict.fromkeys(
        m.scores for c in plan.specs if isinstance(m := get_method(c.method), CamMethod) and m.scores is not None
    )
    with torch.no_grad(), capture.capture_layers(plan.model, layers, detach_at_layer=bool(ways)) as run:
        seen = run(x)
        require_finite(plan.model, seen.logits, "the network's output")
        chosen = plan.targets.for_batch(indices, seen.logits) if chosen is None else chosen
        gradients = {}
        for way in ways:
            with torch.enable_grad():
                scores = way(chosen, seen)
            gradients[way] = _gradients(plan, scores, {name: seen.maps[name] for name in layers})
    maps = {name: tensor.detach().float() for name, tensor in seen.maps.items()}
    return _Shared(maps, chosen, chosen.logits(seen), gradients)


def _gradients(plan: HeatmapJob, scores: Tensor, maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of T scores (B, T) at each layer, (T, B, C, ...) float32.

    A picture's score depends on no other picture, so the gradient of the sum holds each picture's own. Several targets
    go back together, as many as fit into memory.
    """
    if not scores.requires_grad:  # nothing leads from the layers to the scores
        return {n: m.new_zeros((scores.shape[1], *m.shape), dtype=torch.float32) for n, m in maps.items()}
    count = scores.shape[1]
    fits = max(1, int(plan.memory // (2 * len(scores) * plan.bytes_per_image())))
    ends = list(maps.values())
    found = [part for targets in balanced_chunks(range(count), fits) for part in _backward(scores, targets, ends)]
    zeros = [m.new_zeros(1).expand(count, *m.shape) for m in ends]
    columns = [
        zero if parts[0] is None else torch.cat([part for part in parts if part is not None]).float()
        for zero, parts in zip(zeros, zip(*found, strict=True), strict=True)
    ]
    return dict(zip(maps, columns, strict=True))


def _backward(scores: Tensor, targets: Sequence[int], ends: Sequence[Tensor]) -> Iterator[Sequence[Tensor | None]]:
    """The gradients (t, B, C, ...) of some of the targets at each of `ends`; None where there is none.

    The graph is kept: other targets and other ways to score go back through it too.
    """
    ones = torch.zeros(len(targets), *scores.shape, device=scores.device)
    ones[range(len(targets)), :, list(targets)] = 1
    go_back = partial(torch.autograd.grad, scores, ends, retain_graph=True, allow_unused=True)
    if len(targets) > 1:
        try:
            yield go_back(ones, is_grads_batched=True)
            return
        except RuntimeError:  # a backward pass that looks at its own numbers takes one target at a time
            pass
    for one in ones:
        yield [None if gradient is None else gradient[None] for gradient in go_back(one)]


def _run_method(
    plan: HeatmapJob, cell: MethodSpec, x: Tensor, shared: _Shared, tell: Callable[[float], None]
) -> MethodMaps:
    method = get_method(cell.method)
    if isinstance(method, CamMethod):
        maps = [_cam_maps(method, shared, row.name, plan.targets.num_targets) for row in cell.layers]
        tell(1)
        return MethodMaps(fuse_maps(maps, cell.fuse))
    larger = x[0, 0].numel() / math.prod(plan.model.preprocessing.size)
    size = batch_size(plan.model, plan.bytes_per_image() * larger, plan.memory)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    with capture.capture_layers(plan.model, []) as run:
        for layer in cell.layers or (None,):
            done = len(found) / len(cell.layers or (None,))
            part = partial(tell_part, tell, done, 1 / len(cell.layers or (None,)))
            question = MethodContext(plan.model, x, shared.chosen, run, size, plan.seed, part, layer)
            answer = method.function(question, **cell.options)
            found.append(answer if isinstance(answer, tuple) else (answer, {}))
            part(1)
    return MethodMaps(
        fuse_maps([values.float() for values, _ in found], cell.fuse), found[0][1] if len(found) == 1 else {}
    )


def _cam_maps(method: CamMethod, shared: _Shared, layer: str, count: int) -> Tensor:
    """The maps of T targets (B, T, ...)."""
    if method.scores is None:
        one = method.function(shared.maps[layer])[:, None]
        return one.expand(-1, count, *one.shape[2:])
    gradients = shared.gradients[method.scores][layer]
    return torch.stack([method.function(shared.maps[layer], gradient) for gradient in gradients], dim=1)


def tell_part(tell: Callable[[float], None], done: float, whole: float, share: float) -> None:
    """Tell that a share of a part of the work is done, the part being `whole` of it all, behind what was `done`."""
    tell(done + whole * share)


def _averaged(maps: Sequence[MethodMaps]) -> MethodMaps:
    """The mean over views, on the CPU."""
    more = {key: _mean([m.extras[key] for m in maps]).cpu() for key in maps[0].extras}
    return MethodMaps(_mean([m.values for m in maps]).cpu(), more)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other: torch's own mean rounds differently for different places in memory."""
    return sum(tensors[1:], tensors[0]) / len(tensors)


# --- several layers --------------------------------------------------------------------------------------------------


def fuse_maps(maps: Sequence[Tensor], how: str) -> Tensor:
    """Maps (B, T, ...) of several layers as one at the finest of their resolutions, each divided by its largest value
    beforehand, so that no layer drowns the others."""
    if len(maps) == 1:
        return maps[0]
    finest = max((m.shape[2:] for m in maps), key=math.prod)
    return FUSIONS[how](torch.stack([_stretched(_unit(m), finest) for m in maps]))


def _unit(maps: Tensor) -> Tensor:
    largest = maps.abs().amax(tuple(range(2, maps.ndim)), keepdim=True)
    return maps / torch.where(largest > 0, largest, 1)


def _stretched(maps: Tensor, size: Sequence[int]) -> Tensor:
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    return F.interpolate(maps, tuple(size), mode=modes[len(size)], align_corners=False)


def _product(maps: Tensor) -> Tensor:
    """What all layers agree upon: the geometric mean of the positive evidence."""
    return maps.clamp(min=0).prod(0) ** (1 / len(maps))


FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda maps: _mean([*maps]),
    "max": lambda maps: maps.amax(0),  # Jiang et al. 2021, section III.D, without their tanh for early layers
    "product": _product,
}

# --- smoothing over views --------------------------------------------------------------------------------------------

View = tuple[Tensor, Callable[[Tensor], Tensor]]  # an input, and what brings its maps back
NOISES, NOISE = 8, 0.1  # copies; standard deviation as a share of the picture's own range of values


def _as_it_is(x: Tensor, seed: int) -> list[View]:
    return [(x, lambda maps: maps)]


def _flips(x: Tensor, seed: int) -> list[View]:
    """The picture and its mirror image."""
    return [*_as_it_is(x, seed), (x.flip(-1), lambda maps: maps.flip(-1))]


def _noise(x: Tensor, seed: int) -> list[View]:
    """The picture and noisy copies of it: the same noise for every picture, whatever its neighbours."""
    draw = torch.Generator().manual_seed(seed)
    positions = tuple(range(1, x.ndim))
    spread = NOISE * (x.amax(positions, keepdim=True) - x.amin(positions, keepdim=True))
    copies = [x + spread * torch.randn(x.shape[1:], generator=draw).to(x) for _ in range(NOISES)]
    return [*_as_it_is(x, seed), *((copy, lambda maps: maps) for copy in copies)]


AUGMENTATIONS: dict[str | None, Callable[[Tensor, int], list[View]]] = {
    None: _as_it_is,
    "flips": _flips,
    "noise": _noise,
}
