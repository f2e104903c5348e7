"""`load`: make a `Model` of a name, a file or a module."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from convscope.engine.adapters import ForwardFunction
from convscope.engine.capture import VIEW_ERROR
from convscope.engine.model import Model
from convscope.engine.output_inference import OutputRequest
from convscope.engine.outputs import TASKS, OutputSelector
from convscope.engine.probe import ProbeResult, probe
from convscope.errors import ConvscopeError, is_int, nearest
from convscope.images.preprocessing import Preprocessing
from convscope.sources import bundled, exported, factory, files, huggingface, instance, keras, timm, torchvision
from convscope.sources.spec import ModelSpec, input_channels

BY_PREFIX: dict[str, Callable[[str, str], ModelSpec]] = {
    "torchvision": torchvision.from_name,
    "timm": timm.from_name,
    "keras": keras.from_name,
    "hf": huggingface.from_name,
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

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # Keras colours its errors

# Input sizes tried in turn, with an image of zeros, when neither the source nor the user names one.
COMMON_SIZES = (224, 32, 28, 64, 96, 128, 160, 192, 227, 240, 256, 299, 384, 512)


def load(
    source: object,
    *,
    weights: str | os.PathLike[str] | None = None,
    preprocessing: object = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    task: str | None = None,
    output: OutputSelector = None,
    forward: ForwardFunction | None = None,
    grid: tuple[int, int] | None = None,
    template: str | None = None,
    accelerate: bool = True,
) -> Model:
    """Load a network and describe its layers.

    Parameters
    ----------
    source : str, path, nn.Module, Keras model or callable
        "lite0" (bundled, works offline; "lite1" and "lite2" where their packages are installed), "torchvision:NAME",
        "timm:NAME", "keras:NAME", "hf:ORG/NAME" or "hf:FOLDER" (Hugging Face), a file (.keras, .h5, .pt2),
        "package.module:factory" (called without arguments), or an `nn.Module` or Keras model, which is used as it is:
        later changes of its weights take effect.
    weights : str or path, optional
        "default" (the source's own, downloaded if need be), "random", or a file of weights (.safetensors, .pth, .keras,
        .weights.h5), for models made by name.
    preprocessing : Preprocessing, mapping, pipeline or function, optional
        A `Preprocessing`, a mapping of its fields, timm's data config, torchvision's preset, an image processor of
        transformers, a Compose of torchvision, timm or albumentations, or a function that returns the network's input
        (C, H, W) for a PIL image. Default: what the source specifies; otherwise an assumption that `Model.notes`
        states.
    classes : sequence of str, optional
        Names of the classes, in order. Default: what the source specifies, or none.
    device : str or torch.device, optional
        Where to run: "cpu", "cuda", "mps". A module that is passed in stays on its device.
    task : str, optional
        What the outputs mean: "classification", "binary" (one output stands for two classes), "multilabel" (independent
        classes), "regression" (values), "probabilities" (the network returns probabilities and has no logits),
        "segmentation" (class maps), "detection" or "embedding". Inferred where it is certain; `Model.notes` says so.
    output : str, int or callable, optional
        Which of several outputs holds the scores: its key, attribute or position, or a function of what the network
        returns that returns the scores (N, K). Default: the one called "logits" or "out", or the first.
    forward : callable, optional
        ``forward(module, x) -> output``, for networks that take more than a batch, or take it in another form.
    grid : tuple of int, optional
        (h, w): height and width of the grid on which a transformer's tokens lie, where it cannot be inferred.
    template : str, optional
        "a photo of a {}": the text of a class, for networks that compare images with text.
    accelerate : bool
        Fuse convolutions where that is verified to give the same results to rounding. Set it, or the environment
        variable ``CONVSCOPE_ACCELERATE``, to 0 to run the network's own functions only.

    Returns
    -------
    Model
        The network with its preprocessing, class names and layer table.

    Raises
    ------
    ConvscopeError
        For a source, weights, preprocessing, classes, task or output that do not exist, do not fit or are not safe to
        open.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> print(model.preprocessing)
    224 x 224 RGB, bicubic, 0..255, mean 127, std 128
    >>> model.layers["blocks.4"].shape
    (112, 14, 14)
    """
    explicit = None if preprocessing is None else Preprocessing.of(preprocessing)
    _check_output_options(task, output, forward, grid, template)
    spec = _make_spec(source, weights)
    if explicit is not None and explicit.transform is not None:
        spec.notes += explicit.transform.notes
    if forward is not None:
        spec.adapter = spec.adapter.with_forward(forward)
    if weights == "random":
        spec.notes.append("weights are random: the network has learned nothing")
        spec.assumptions.append("weights are random")
    if spec.loaded_by_convscope:
        _freeze(spec)
    if device is not None and isinstance(source, str | os.PathLike):
        _move_to_device(spec, device)
    elif device is not None:
        raise ConvscopeError(
            "device= is for models that are loaded by name or from a file; move this one yourself: model.to(device)"
        )
    names = tuple(map(str, classes)) if classes is not None else spec.classes
    request = OutputRequest(
        task or spec.task, spec.select if output is None else output, None if names is None else len(names)
    )
    run_probe = partial(_probe, spec, request=request, grid=None if grid is None else (int(grid[0]), int(grid[1])))
    resolved, probed = _resolve_preprocessing(spec, explicit, run_probe)
    meaning = probed.meaning
    spec.notes += meaning.notes
    if any(isinstance(m, BATCH_NORMS) and not m.track_running_stats for m in spec.module.modules()):
        spec.fixed_batch_size = 1
        spec.notes.append("a batch normalisation layer keeps no running statistics: images are processed one at a time")
    if names is not None and meaning.num_outputs is not None and len(names) != meaning.num_outputs:
        if classes is not None:
            raise ConvscopeError(f"{len(names)} class names for a model with {meaning.num_outputs} outputs")
        names = None
    return Model(
        module=spec.module,
        name=spec.name,
        preprocessing=resolved,
        classes=names,
        layers=probed.layers,
        adapter=spec.adapter,
        final_activation=meaning.final_activation,
        notes=tuple(spec.notes),
        assumptions=tuple(spec.assumptions),
        fixed_batch_size=spec.fixed_batch_size,
        num_outputs=meaning.num_outputs,
        loaded_by_convscope=spec.loaded_by_convscope,
        channels_last_output=probed.channels_last_output,
        contiguous_input=probed.contiguous_input,
        accelerate=bool(accelerate),
        reader=meaning.reader,
    )


def _check_output_options(task: object, output: object, forward: object, grid: object, template: object) -> None:
    """Refuse options of `load` that are of the wrong kind."""
    if task is not None and task not in TASKS:
        raise ConvscopeError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    if output is not None and not (isinstance(output, str) or is_int(output) or callable(output)):
        raise ConvscopeError(
            f"output is {output!r}; expected a name, a position, or a function of the network's output"
        )
    if forward is not None and not callable(forward):
        raise ConvscopeError(f"forward is {forward!r}; expected a function (module, x) -> output")
    if grid is not None and not (
        isinstance(grid, tuple | list) and len(grid) == 2 and all(is_int(side) and side > 0 for side in grid)
    ):
        raise ConvscopeError(f"grid is {grid!r}; expected (h, w), the height and width of the grid of tokens")
    if template is not None:
        raise ConvscopeError("template= is for networks that compare images with text, which are not supported yet")


def _make_spec(source: object, weights: str | os.PathLike[str] | None) -> ModelSpec:
    """Find the module that handles this kind of source, and let it make the network."""
    if isinstance(source, Model):
        raise ConvscopeError("this is a convscope Model already; pass it to the functions as it is")
    if not isinstance(source, str | os.PathLike):
        if weights is not None:
            raise ConvscopeError("weights= is for models made by name; load weights into your own module yourself")
        return instance.wrap(source)
    text = os.fspath(source)
    weights_text = None if weights is None else os.fspath(weights)
    if text in bundled.NAMES:
        return bundled.from_name(text, weights_text or "default")
    prefix, colon, name = text.partition(":")
    if colon and prefix in BY_PREFIX:
        return BY_PREFIX[prefix](name, weights_text or "default")
    path = Path(text)
    if path.suffix.lower() in BY_SUFFIX:
        if path.suffix.lower() != ".keras" and ".weights" in path.suffixes:
            return files.refuse_weights(path, weights_text)
        files.require_file(path)
        return BY_SUFFIX[path.suffix.lower()](path, weights_text)
    if colon:
        return factory.from_path(text, weights_text)
    known = [*bundled.NAMES, *torchvision.names(), *timm.names()]
    raise ConvscopeError(
        f"no model is called {text!r}; nearest: {nearest(text, known)}; other sources: keras:NAME, "
        "a .keras, .h5 or .pt2 file, package.module:factory"
    )


def _freeze(spec: ModelSpec) -> None:
    """Set eval mode, freeze the parameters and store convolution weights channels_last."""
    spec.module.eval()
    for parameter in spec.adapter.parameters(spec.module):
        parameter.requires_grad_(False)
    _store_weights(spec, torch.channels_last)


def _store_weights(spec: ModelSpec, memory_format: torch.memory_format) -> None:
    """Store the convolution weights of a PyTorch network in a memory format."""
    if spec.adapter.name == "torch":
        for parameter in spec.module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _move_to_device(spec: ModelSpec, device: str | torch.device) -> None:
    try:
        spec.module.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConvscopeError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def _resolve_preprocessing(
    spec: ModelSpec, explicit: Preprocessing | None, run_probe: Callable[[int, tuple[int, ...]], ProbeResult]
) -> tuple[Preprocessing, ProbeResult]:
    """Return the preprocessing, with assumptions noted, and the layer table for an input of its size."""
    if explicit is not None:
        return explicit, run_probe(explicit.channels, explicit.size)
    channels = spec.channels or input_channels(spec.module)
    sizes = [spec.size] if spec.size is not None else [(side, side) for side in COMMON_SIZES]
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
            spec.assumptions.append("preprocessing is assumed")
        elif spec.preprocessing_origin is not None:
            spec.notes.append(f"preprocessing taken from {spec.preprocessing_origin}")
        return settings, probed
    raise errors[0]


def _probe(
    spec: ModelSpec, channels: int, size: tuple[int, ...], request: OutputRequest, grid: tuple[int, int] | None
) -> ProbeResult:
    parameter: Tensor | None = next((p for p in spec.adapter.parameters(spec.module) if p.is_floating_point()), None)
    x = (
        torch.zeros((1, channels, *size))
        if parameter is None
        else torch.zeros((1, channels, *size), dtype=parameter.dtype, device=parameter.device)
    )
    try:
        try:
            return probe(spec.module, spec.adapter, x, request, grid)
        except RuntimeError as error:
            if VIEW_ERROR not in str(error) or not spec.loaded_by_convscope:
                raise
            _store_weights(spec, torch.contiguous_format)
            return probe(spec.module, spec.adapter, x, request, grid)
    except ConvscopeError:
        raise
    except Exception as error:  # a network may raise anything
        reason = " ".join(ANSI_ESCAPE.sub("", str(error)).split())[:300]
        raise ConvscopeError(
            f"{spec.name} does not run on a batch of shape {tuple(x.shape)} ({type(error).__name__}: {reason}); "
            "describe its input: preprocessing=dict(size=(H, W), channels=C), for signals size=(L,), for volumes "
            "size=(D, H, W)"
        ) from error
