"""Tell a cut gradient from missing influence: change a layer's output, and find where gradients end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convscope.attribution.batch_targets import BatchTargets
from convscope.engine import capture
from convscope.engine.batching import pad_to_fixed_batch
from convscope.engine.capture import ForwardResult
from convscope.engine.isolation import exclusive_access
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.nested import iter_tensors
from convscope.engine.resume import resume_from_layer
from convscope.errors import ConvscopeError

WITHOUT_GRADIENTS = ("ablation-cam", "score-cam", "eigen-cam", "occlusion", "rise")
"""Methods that need no gradients."""

WITHOUT_LAYERS = ("occlusion", "rise")
"""Methods that need neither gradients nor a layer's output."""

RTOL = 1e-6  # rounding of scores
CHANGES = (1, 10)  # standard deviations by which values are changed

Scores = Callable[[ForwardResult], Tensor]
"""Returns the scores (M, T) of a pass over M inputs."""

ScoreRule = Callable[[BatchTargets, ForwardResult], Tensor]
"""Returns the scores (M, T) of M inputs for their targets."""


def scores_of_image(targets: BatchTargets, image: int = 0, rule: ScoreRule = BatchTargets.scores) -> Scores:
    """Return the function that computes the scores of one image's targets for any number of inputs."""
    return lambda outputs: rule(targets.of_image(image, len(outputs.logits)), outputs)


def explain_zero_maps(
    model: Model, layers: Sequence[Layer], x: Tensor, targets: BatchTargets, maps: Tensor
) -> list[list[str]]:
    """Say why maps are zero everywhere: for each image and target the reason, or nothing if the map is not zero.

    Parameters
    ----------
    model : Model
    layers : sequence of Layer
        Empty for the input.
    x : Tensor
        The images (B, C, H, W).
    targets : BatchTargets
    maps : Tensor
        (B, T, ...).

    Returns
    -------
    list of list of str
    """
    is_zero = ~maps.flatten(2).any(2)
    reasons = [[""] * maps.shape[1] for _ in maps]
    for n in is_zero.any(1).nonzero()[:, 0].tolist():
        for t, reason in enumerate(_reasons_of_zero(model, layers, x[n : n + 1], scores_of_image(targets, n))):
            reasons[n][t] = reason if is_zero[n, t] else ""
    return reasons


def _reasons_of_zero(model: Model, layers: Sequence[Layer], x: Tensor, scores: Scores) -> list[str]:
    """Return for each score of one image why its map is zero everywhere."""
    source = "this layer" if layers else "the image"
    depends = torch.stack([depends_on(model, layer, x, scores) for layer in layers or (None,)]).any(0).tolist()
    if layers and not any(bool(_output(model, layer, x).any()) for layer in layers):
        others = f"choose another layer or a method without: {', '.join(WITHOUT_LAYERS)}"
        return [f"; the output of {source} is zero for this image; {others}"] * len(depends)
    listed = f"methods without gradients: {', '.join(WITHOUT_GRADIENTS)}"
    hidden = f", although larger changes of {source} change the target; {listed}"
    return [hidden if is_hidden else f"; {source} has no influence on the target" for is_hidden in depends]


def depends_on(model: Model, layer: Layer | None, x: Tensor, scores: Scores) -> Tensor:
    """Check which scores change if a layer's output changes, by forward passes alone.

    Parameters
    ----------
    model : Model
    layer : Layer or None
        None for the input.
    x : Tensor
        One image (1, C, H, W).
    scores : callable
        Returns the scores (M, T) of a pass over M inputs.

    Returns
    -------
    Tensor of shape (T,), bool
    """
    x = x.detach()[:1]
    if layer is None:
        with torch.no_grad(), capture.capture_layers(model, []) as run:
            values = [scores(run(pad_to_fixed_batch(model, values)))[0] for values in (x, *_changed(x))]
    else:
        maps = _output(model, layer, x)
        with resume_from_layer(model, layer.name, x) as resume:
            values = [scores(resume(pad_to_fixed_batch(model, values)))[0] for values in (maps, *_changed(maps))]
    before, *after = values
    return torch.stack([(changed - before).abs() > RTOL * before.abs() for changed in after]).any(0)


def _output(model: Model, layer: Layer, x: Tensor) -> Tensor:
    """Return a layer's output (1, C, ...) for one image."""
    with torch.no_grad(), capture.capture_layers(model, [layer.name], stop_early=True) as run:
        return run(pad_to_fixed_batch(model, x)).maps[layer.name][:1]


def _changed(values: Tensor) -> list[Tensor]:
    """Return other values (1, ...): of the same scale, and of a larger one, which integers do not round away."""
    scale = float(values.float().std()) or 1.0
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values)
    return [values + factor * scale * noise for factor in CHANGES]


def require_gradient(model: Model, layer: Layer | None, x: Tensor, scores: Scores) -> None:
    """Raise ConvscopeError if scores depend on a layer although no gradient reaches it.

    Call it where a gradient is missing. The parameters are those of `depends_on`.
    """
    if not bool(depends_on(model, layer, x, scores).any()):
        return
    source = "the image" if layer is None else f"layer {layer.name!r}"
    raise ConvscopeError(
        f"no gradient reaches {source}, although the target depends on it: the graph is cut "
        f"{_find_cut(model, layer, x)}. Methods without gradients: {', '.join(WITHOUT_GRADIENTS)}"
    )


class _Call(NamedTuple):
    """One call of a layer: whether gradients go into its input and its output, and whether it computes with int8."""

    name: str
    kind: str
    takes_gradient: bool
    gives_gradient: bool
    is_int8: bool

    @property
    def reason(self) -> str:
        """Why no gradient passes."""
        return "int8 arithmetic has no gradients" if self.is_int8 else "detach, or a function without a gradient"


def _find_cut(model: Model, layer: Layer | None, x: Tensor) -> str:
    """Say between which layers gradients end on their way back from the output."""
    calls: list[_Call] = []
    modules, _ = model.modules_and_parameters()

    def watch(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            gradients = _has_gradient((args, kwargs)), _has_gradient(output)
            calls.append(_Call(name, type(module).__name__, *gradients, _is_int8(module, output)))

        return record

    with exclusive_access(model.module), ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        names = [] if layer is None else [layer.name]
        run = stack.enter_context(capture.capture_layers(model, names, detach_at_layer=layer is not None))
        with torch.enable_grad():
            run(pad_to_fixed_batch(model, x.detach()[:1]).clone().requires_grad_(layer is None))
    cut = next((call for call in calls if call.takes_gradient and (not call.gives_gradient or call.is_int8)), None)
    if cut is not None:
        return f"inside {cut.name!r} ({cut.kind}: {cut.reason})"
    point = "" if layer is None else capture.capture_point(model, layer).call.partition("#")[0]
    last = max((i for i, call in enumerate(calls) if call.gives_gradient or call.name == point), default=-1)
    start = f"after {calls[last].name!r}" if last >= 0 else "after the input"
    following = calls[last + 1 : last + 2]
    end = f" and before {following[0].name!r}" if following else ""
    nearest = [*calls[max(last, 0) : last + 1], *following]
    return f"{start}{end} ({max(nearest, key=lambda call: call.is_int8).reason})"


def _has_gradient(value: object) -> bool:
    return any(tensor.requires_grad for tensor in iter_tensors(value))


def _is_int8(module: nn.Module, output: object) -> bool:
    """Check for a layer that is quantised or returns integers; its output may claim to have a gradient."""
    return "quantized" in type(module).__module__ or any(tensor.is_quantized for tensor in iter_tensors(output))
