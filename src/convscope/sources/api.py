"""`load`: make a `Model` of a name, a file or a module."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from convscope.arguments import IMAGE_SUFFIXES, check_arguments
from convscope.engine.adapters import ForwardFunction
from convscope.engine.dual_encoder import Tokenizer
from convscope.engine.model import Model
from convscope.engine.output_inference import OutputRequest
from convscope.engine.outputs import OutputSelector
from convscope.errors import ConvscopeError, is_int
from convscope.images.preprocessing import Preprocessing
from convscope.names import TASKS
from convscope.sources import (
    bundled,
    exported,
    factory,
    files,
    huggingface,
    instance,
    keras,
    onnx,
    open_clip,
    timm,
    torchscript,
    torchvision,
)
from convscope.sources.probing import resolve_preprocessing, store_weights
from convscope.sources.spec import ModelSpec
from convscope.sources.text_image import set_classes, set_tokenizer
from convscope.suggestions import suggest

BY_PREFIX: dict[str, Callable[[str, str, int | None], ModelSpec]] = {
    "torchvision": torchvision.from_name,
    "timm": timm.from_name,
    "keras": keras.from_name,
    "hf": huggingface.from_name,
    "open_clip": open_clip.from_name,
}
BY_SUFFIX: dict[str, Callable[[Path, str | None], ModelSpec]] = {
    ".keras": keras.from_file,
    ".h5": keras.from_file,
    ".hdf5": keras.from_file,
    ".pt2": exported.from_file,
    ".onnx": onnx.from_file,
    ".pt": files.refuse_pickle,
    ".pth": files.refuse_pickle,
    ".ckpt": files.refuse_pickle,
    ".bin": files.refuse_pickle,
    ".safetensors": files.refuse_weights,
}

DEVICES = ("cpu", "cuda", "mps")  # that are named to users; others are left to PyTorch
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@check_arguments
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
    tokenizer: Tokenizer | None = None,
    accelerate: bool = True,
) -> Model:
    """Load a network and describe its layers.

    Parameters
    ----------
    source : str, path, nn.Module, Keras model or callable
        "lite0" (bundled, works offline; "lite1" and "lite2" where their packages are installed), "torchvision:NAME",
        "timm:NAME", "keras:NAME", "hf:ORG/NAME" or "hf:FOLDER" (Hugging Face), "open_clip:NAME", a file (.keras, .h5,
        .pt2, .onnx, .pt of TorchScript), "package.module:factory" (called without arguments), an `nn.Module` or Keras
        model, which is used as it is (later changes of its weights take effect), or any function from images
        (N, C, H, W) to scores (N, K), which then has no layers and no gradients.
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
        "a photo of a {}": the text of a class, for networks that compare images with text, which `classes` makes
        classifiers. Default: the names of the classes as they are. The texts are encoded once, here.
    tokenizer : callable, optional
        ``tokenizer(texts)`` returns token ids (K, L), for such networks; or a tokenizer of transformers. Default: the
        network's own, where it is found.
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
    names = None if classes is None else tuple(map(str, classes))
    spec = _make_spec(source, weights, None if names is None else len(names))
    if explicit is not None and explicit.transform is not None:
        spec.notes += explicit.transform.notes
    if spec.other_inputs and forward is None:
        raise ConvscopeError(
            f"{spec.name} takes several inputs ({spec.other_inputs}), and one image goes in: say how it is called with "
            "forward=lambda model, x: model([x, ...])"
        )
    if forward is not None:
        spec.adapter, spec.dual_encoder = spec.adapter.with_forward(forward), None
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
    names = spec.classes if names is None else names
    set_tokenizer(spec, tokenizer)
    set_classes(spec, names, template)
    request = OutputRequest(
        task or spec.task, spec.select if output is None else output, None if names is None else len(names)
    )
    resolved, probed = resolve_preprocessing(spec, explicit, request, grid)
    meaning = probed.meaning
    spec.notes += meaning.notes
    if any(isinstance(m, BATCH_NORMS) and not m.track_running_stats for m in spec.module.modules()):
        spec.fixed_batch_size = 1
        spec.notes.append("a batch normalisation layer keeps no running statistics: images are processed one at a time")
    if names is not None and meaning.num_outputs is not None and len(names) != meaning.num_outputs:
        if classes is not None:
            raise ConvscopeError(f"{len(names)} class names for a model with {meaning.num_outputs} outputs")
        spec.notes.append(
            f"the model's own {len(names)} class names are left out: it has {meaning.num_outputs} outputs; give "
            "classes=[...]"
        )
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
        differentiable=spec.differentiable,
        is_stochastic=probed.is_stochastic,
        dual_encoder=spec.dual_encoder,
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
    if template is not None and not isinstance(template, str):
        raise ConvscopeError(f"template is {template!r}; expected a text with one {{}}, such as 'a photo of a {{}}'")


def _make_spec(source: object, weights: str | os.PathLike[str] | None, num_classes: int | None) -> ModelSpec:
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
        return bundled.from_name(text, weights_text or "default", num_classes)
    prefix, colon, name = text.partition(":")
    if colon and prefix in BY_PREFIX:
        return BY_PREFIX[prefix](name, weights_text or "default", num_classes)
    path = Path(text)
    if path.suffix.lower() == ".pt" and torchscript.is_archive(path):
        return torchscript.from_file(path, weights_text)
    if path.suffix.lower() in BY_SUFFIX:
        if path.suffix.lower() != ".keras" and ".weights" in path.suffixes:
            return files.refuse_weights(path, weights_text)
        files.require_file(path)
        return BY_SUFFIX[path.suffix.lower()](path, weights_text)
    if colon:
        return factory.from_path(text, weights_text)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ConvscopeError(f"{text} is an image file; expected a model's name or file, such as 'lite0'")
    files.refuse_other_format(path)
    known = [*bundled.NAMES, *torchvision.names(), *timm.names()]
    raise ConvscopeError(
        f"no model is called {text!r}; {suggest(text, known)}; other sources: keras:NAME, hf:NAME, "
        "open_clip:NAME, a .keras, .h5, .pt2, .onnx or TorchScript .pt file, package.module:factory"
    )


def _freeze(spec: ModelSpec) -> None:
    """Set eval mode, freeze the parameters and store convolution weights channels_last."""
    spec.module.eval()
    for parameter in spec.adapter.parameters(spec.module):
        parameter.requires_grad_(False)
    store_weights(spec, torch.channels_last)


def _move_to_device(spec: ModelSpec, device: str | torch.device) -> None:
    try:
        spec.module.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        is_known = str(device).partition(":")[0] in DEVICES
        reason = str(error).splitlines()[0] if is_known else f"expected {', '.join(DEVICES[:-1])} or {DEVICES[-1]}"
        raise ConvscopeError(f"device {str(device)!r} cannot be used: {reason}") from error
