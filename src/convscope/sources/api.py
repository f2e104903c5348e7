"""Where models come from. One `load` for all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from convscope.engine.model import Model
from convscope.engine.probe import ProbeResult, probe
from convscope.errors import ConvscopeError, nearest
from convscope.images.preprocessing import Preprocessing
from convscope.sources import bundled, exported, factory, files, instance, keras, timm, torchvision
from convscope.sources.spec import ModelSpec, first_convolution

BY_PREFIX: dict[str, Callable[[str, str], ModelSpec]] = {
    "torchvision": torchvision.from_name,
    "timm": timm.from_name,
    "keras": keras.from_name,
}
BY_SUFFIX: dict[str, Callable[[Path, str | None], ModelSpec]] = {
    ".keras": keras.from_file,
    ".h5": keras.from_file,
    ".hdf5": keras.from_file,
    ".pt2": exported.from_file,
    ".pt": files.refuse_pickle,
    ".pth": files.refuse_pickle,
    ".ckpt": files.refuse_pickle,
    ".bin": files.refuse_pickle,
    ".safetensors": files.refuse_weights,
}

TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*m")  # Keras colours its errors

# Tried in turn, with a picture of noughts, where nobody says how large a network's pictures are.
USUAL_SIZES = (224, 32, 28, 64, 96, 128, 160, 192, 227, 240, 256, 299, 384, 512)


def load(
    source: Any,
    *,
    weights: str | os.PathLike[str] | None = None,
    preprocessing: Any = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> Model:
    """Make a network ready to be looked into.

    Parameters
    ----------
    source
        "lite0" (bundled, works offline; "lite1" and "lite2" where their packages are installed), "torchvision:NAME",
        "timm:NAME", "keras:NAME", a file (.keras, .h5, .pt2), "package.module:factory" (called without arguments), or
        an `nn.Module` or Keras model in hand, which is used as it is: weights changed later are seen.
    weights
        "default" (the source's own, downloaded if need be), "random", or a file of weights (.safetensors, .pth, .keras,
        .weights.h5), for models made by name.
    preprocessing
        A `Preprocessing`, a mapping of its fields, timm's data config or torchvision's preset. Default: what the source
        says; where it says nothing, an assumption that `Model.notes` states.
    classes
        Names of the classes, in order. Default: what the source says, or none.
    device
        Where to run: "cpu", "cuda", "mps". A model in hand stays where it is.

    Raises
    ------
    ConvscopeError
        For a source, weights, preprocessing or classes that do not exist, do not fit or are not safe to open.
    """
    given = None if preprocessing is None else Preprocessing.of(preprocessing)
    found = _find(source, weights)
    if found.loaded_by_convscope:
        _optimise(found)
    if device is not None and isinstance(source, str | os.PathLike):
        _move(found, device)
    elif device is not None:
        raise ConvscopeError("device= is for models that load makes; move a model in hand yourself: model.to(device)")
    settings, probed = _resolve_preprocessing(found, given)
    if any(isinstance(m, _BatchNorm) and not m.track_running_stats for m in found.module.modules()):
        found.fixed_batch_size = 1
        found.notes.append("a batch normalisation keeps no statistics of its own: pictures go through one at a time")
    names = tuple(map(str, classes)) if classes is not None else found.classes
    if names is not None and probed.num_outputs is not None and len(names) != probed.num_outputs:
        if classes is not None:
            raise ConvscopeError(f"{len(names)} class names for a model with {probed.num_outputs} outputs")
        names = None
    return Model(
        module=found.module,
        name=found.name,
        preprocessing=settings,
        classes=names,
        layers=probed.layers,
        adapter=found.adapter,
        final_activation=probed.final_activation,
        notes=tuple(found.notes),
        fixed_batch_size=found.fixed_batch_size,
        num_outputs=probed.num_outputs,
        loaded_by_convscope=found.loaded_by_convscope,
        channels_last_output=probed.channels_last_output,
    )


def _find(source: Any, weights: str | os.PathLike[str] | None) -> ModelSpec:
    if isinstance(source, Model):
        raise ConvscopeError("this model is loaded already")
    if not isinstance(source, str | os.PathLike):
        if weights is not None:
            raise ConvscopeError("weights= is for models made by name; put weights into a model in hand yourself")
        return instance.wrap(source)
    text = os.fspath(source)
    chosen = None if weights is None else os.fspath(weights)
    if text in bundled.NAMES:
        return bundled.from_name(text, chosen or "default")
    prefix, colon, name = text.partition(":")
    if colon and prefix in BY_PREFIX:
        return BY_PREFIX[prefix](name, chosen or "default")
    path = Path(text)
    if path.suffix.lower() in BY_SUFFIX:
        if path.suffix.lower() != ".keras" and ".weights" in path.suffixes:
            return files.refuse_weights(path, chosen)
        files.require_file(path)
        return BY_SUFFIX[path.suffix.lower()](path, chosen)
    if colon:
        return factory.from_path(text, chosen)
    known = [*bundled.NAMES, *torchvision.names(), *timm.names()]
    raise ConvscopeError(
        f"no model is called {text!r}; nearest: {nearest(text, known)}; other sources: keras:NAME, "
        "a .keras, .h5 or .pt2 file, package.module:factory"
    )


def _optimise(found: ModelSpec) -> None:
    found.module.eval()
    for parameter in found.adapter.parameters(found.module):
        parameter.requires_grad_(False)
    if found.adapter.name == "torch":
        for parameter in found.module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _move(found: ModelSpec, device: str | torch.device) -> None:
    try:
        found.module.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConvscopeError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def _resolve_preprocessing(found: ModelSpec, given: Preprocessing | None) -> tuple[Preprocessing, ProbeResult]:
    """The preprocessing, with what had to be assumed noted, and the layer table found with a picture of that size."""
    if given is not None:
        return given, _probe(found, given.channels, given.size)
    channels = found.channels or first_convolution(found.module)
    sizes = [found.size] if found.size is not None else [(side, side) for side in USUAL_SIZES]
    known = [] if found.preprocessing is None else [found.preprocessing]
    errors: list[ConvscopeError] = []
    for settings in [*known, *(found.assume(size, channels) for size in sizes)]:
        try:
            probed = _probe(found, settings.channels, settings.size)
        except ConvscopeError as error:
            errors.append(error)
            continue
        if settings not in known:
            found.notes.append(f"preprocessing was not given; assumed: {settings}")
        elif found.recognised is not None:
            found.notes.append(f"preprocessing taken from {found.recognised}")
        return settings, probed
    raise errors[0]


def _probe(found: ModelSpec, channels: int, size: tuple[int, ...]) -> ProbeResult:
    parameter: Tensor | None = next((p for p in found.adapter.parameters(found.module) if p.is_floating_point()), None)
    x = (
        torch.zeros((1, channels, *size))
        if parameter is None
        else torch.zeros((1, channels, *size), dtype=parameter.dtype, device=parameter.device)
    )
    try:
        return probe(found.module, found.adapter, x)
    except ConvscopeError:
        raise
    except Exception as error:  # a network may raise anything
        reason = " ".join(TERMINAL_CODE.sub("", str(error)).split())[:300]
        raise ConvscopeError(
            f"{found.name} does not run on a batch of shape {tuple(x.shape)} ({type(error).__name__}: {reason}); "
            "say what it takes: preprocessing=dict(size=(H, W), channels=C), for signals size=(L,), for volumes "
            "size=(D, H, W)"
        ) from error
