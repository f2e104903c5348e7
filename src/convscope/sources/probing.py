"""Run a network once at `load`: find the size of its input where it is not given, and describe its layers."""

from __future__ import annotations

import inspect
import re
from functools import partial

import torch
from torch import Tensor, nn

from convscope.engine.capture import VIEW_ERROR
from convscope.engine.output_inference import OutputRequest
from convscope.engine.probe import ProbeResult, probe
from convscope.errors import ConvscopeError
from convscope.images.preprocessing import Preprocessing
from convscope.sources.spec import PREPROCESSING_ASSUMED, ModelSpec, input_channels

ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # Keras colors its errors

# Input sizes tried in turn, with an image of zeros, when neither the source nor the user names one.
COMMON_SIZES = (224, 32, 28, 64, 96, 128, 160, 192, 227, 240, 256, 299, 384, 512)


def resolve_preprocessing(
    spec: ModelSpec, explicit: Preprocessing | None, request: OutputRequest, grid: tuple[int, int] | None
) -> tuple[Preprocessing, ProbeResult]:
    """Return the preprocessing, with assumptions noted, and the layer table for an input of its size."""
    _require_weights(spec)
    run_probe = partial(_probe, spec, request=request, grid=grid)
    if explicit is not None:
        return explicit, run_probe(explicit.channels, explicit.size)
    channels = spec.channels or input_channels(spec.module)
    common: list[tuple[int, ...]] = [(side, side) for side in COMMON_SIZES]
    sizes = common if spec.size is None else [spec.size]
    known = [] if spec.preprocessing is None else [spec.preprocessing]
    errors: list[ConvscopeError] = []
    for settings in [*known, *(spec.assumed_preprocessing(size, channels) for size in sizes)]:
        try:
            probed = run_probe(settings.channels, settings.size)
        except ConvscopeError as error:
            errors.append(error)
            continue
        if settings not in known:
            spec.notes.append(f"preprocessing was not given; assumed: {settings}")
            spec.assumptions.append(PREPROCESSING_ASSUMED)
        elif spec.preprocessing_origin is not None:
            spec.notes.append(f"preprocessing taken from {spec.preprocessing_origin}")
        return settings, probed
    raise errors[0]


def store_weights(spec: ModelSpec, memory_format: torch.memory_format) -> None:
    """Store the convolution weights of a PyTorch network in a memory format."""
    if spec.adapter.name == "torch":
        for parameter in spec.module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _probe(
    spec: ModelSpec, channels: int, size: tuple[int, ...], request: OutputRequest, grid: tuple[int, int] | None
) -> ProbeResult:
    parameter: Tensor | None = next((p for p in spec.adapter.parameters(spec.module) if p.is_floating_point()), None)
    dtype, device = (torch.float32, None) if parameter is None else (parameter.dtype, parameter.device)
    x = torch.zeros((1, channels, *size), dtype=dtype, device=device)
    try:
        try:
            return probe(spec.module, spec.adapter, x, request, grid)
        except RuntimeError as error:
            if VIEW_ERROR not in str(error) or not spec.loaded_by_convscope:
                raise
            store_weights(spec, torch.contiguous_format)
            return probe(spec.module, spec.adapter, x, request, grid)
    except ConvscopeError:
        raise
    except Exception as error:  # a network may raise anything
        reason = " ".join(ANSI_ESCAPE.sub("", str(error)).split())[:300]
        raise ConvscopeError(
            f"{spec.name} does not run on a batch of shape {tuple(x.shape)} ({type(error).__name__}: {reason}); "
            f"{_input_advice(spec, size)}"
        ) from error


def _require_weights(spec: ModelSpec) -> None:
    """Refuse a network whose weights are on the meta device, where they have no values."""
    missing = next((n for n, p in spec.module.named_parameters() if isinstance(p, Tensor) and p.is_meta), None)
    if missing is not None:
        raise ConvscopeError(
            f"weight {missing!r} of {spec.name} is on the meta device and has no values, as offloading and "
            "torch.device('meta') leave it; load the weights to a device first"
        )


def _input_advice(spec: ModelSpec, size: tuple[int, ...]) -> str:
    """Say how to describe a network's input, after it did not run."""
    names, keywords = _required_arguments(spec.module)
    if not names and len(keywords) == 1:
        return f"it takes the image by name: forward=lambda module, x: module({keywords[0]}=x)"
    names += keywords
    if len(names) > 1:
        return (
            f"it takes {len(names)} inputs ({', '.join(names)}), and one image goes in: say how it is called with "
            "forward=lambda module, x: module(x, ...)"
        )
    if len(size) == 1:
        return (
            f"signals are (N, channels, L), here L is {size[0]}: preprocessing=dict(size=(L,), channels=C); if it "
            "takes them without channels, (N, L): forward=lambda module, x: module(x[:, 0])"
        )
    return (
        "describe its input: preprocessing=dict(size=(H, W), channels=C), for signals size=(L,), for volumes "
        "size=(D, H, W); if it takes a dictionary or another shape: forward=lambda module, x: module({'image': x})"
    )


def _required_arguments(module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the arguments that ``forward`` requires, and of those that it takes by name alone."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return [], []
    required = [p for p in parameters if p.default is inspect.Parameter.empty]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_position = [p.name for p in required if p.kind in kinds]
    return by_position, [p.name for p in required if p.kind == inspect.Parameter.KEYWORD_ONLY]
