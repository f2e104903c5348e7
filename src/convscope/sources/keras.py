"""Keras 3 models on the torch backend: applications by name, files, models in hand.

Keras is imported only here, and only when asked for: it takes seconds.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convscope.errors import ConvscopeError, nearest
from convscope.images import Preprocessing
from convscope.sources import files
from convscope.sources.found import Found, imagenet_classes


class KerasDialect:
    """A Keras model: an `nn.Module` that speaks NHWC and keeps its layers in lists of its own."""

    name = "keras"

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        return dict(_walk(module, ""))

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        return (variable.value for variable in module.weights)  # type: ignore[union-attr]

    def run(self, module: nn.Module, x: Tensor) -> Any:
        return module(x.permute(0, 2, 3, 1), training=False)


def _walk(module: Any, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    for layer in module.layers if hasattr(module, "layers") else module._layers:
        yield prefix + layer.name, layer
        if hasattr(layer, "layers") or layer._layers:
            yield from _walk(layer, f"{prefix}{layer.name}/")


def import_keras() -> Any:
    """Keras on the torch backend, or a clear refusal."""
    if "keras" not in sys.modules and os.environ.setdefault("KERAS_BACKEND", "torch") != "torch":
        raise ConvscopeError(
            f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']!r}; convscope runs Keras on torch: set KERAS_BACKEND=torch"
        )
    try:
        import keras
    except ImportError as error:
        raise ConvscopeError("Keras is not installed; pip install 'convscope[keras]'") from error
    if not hasattr(keras, "config") or keras.config.backend() != "torch":
        _refuse_backend(getattr(getattr(keras, "config", None), "backend", lambda: "tensorflow")())
    return keras


def _refuse_backend(backend: str) -> None:
    raise ConvscopeError(
        f"Keras runs on the {backend} backend here; save the model as model.save('FILE.keras') and load that file in a "
        "process of its own, or set KERAS_BACKEND=torch before the first import of keras"
    )


def from_name(name: str, weights: str) -> Found:
    """A model of keras.applications, with its own preprocessing and ImageNet's class names."""
    keras = import_keras()
    applications = {
        attribute: module
        for module in vars(keras.applications).values()
        if hasattr(module, "preprocess_input")
        for attribute in vars(module)
        if attribute[0].isupper() and callable(getattr(module, attribute))
    }
    if name not in applications:
        raise ConvscopeError(f"keras.applications has no model {name!r}; nearest: {nearest(name, list(applications))}")
    build = getattr(applications[name], name)
    if weights == "default":
        try:
            module = build(weights="imagenet")
        except Exception as error:  # Keras raises a bare Exception when it cannot download
            if "URL fetch failure" not in str(error):
                raise
            with files.downloading(f"keras:{name}"):
                raise OSError(str(error).partition(":")[0]) from error
    else:
        module = build(weights=None)
        if weights != "random":
            _put_weights(module, Path(weights))
    height, width = module.input_shape[1:3]
    return Found(
        module,
        f"keras:{name}",
        KerasDialect(),
        preprocessing=_measure(applications[name].preprocess_input, (height or 224, width or 224)),
        classes=imagenet_classes() if module.output_shape[-1] == 1000 else None,
    )


def _measure(preprocess: Any, size: tuple[int, int]) -> Preprocessing:
    """What a `preprocess_input` does to pixels 0..255: its offset, scale and channel order, read off four pictures."""
    pixels = torch.zeros((4, 1, 1, 3))
    for channel in range(3):
        pixels[channel + 1, 0, 0, channel] = 255.0
    black, *pure = torch.tensor(preprocess(pixels.numpy()).copy()).float()[:, 0, 0]
    response = torch.stack([p - black for p in pure])  # row: channel of the picture, column: channel of the network
    order = response.abs().argmax(0)  # which channel of the picture each of the network's channels shows
    scale = response.abs().max(0).values / 255
    return Preprocessing(
        size=size,
        range=(0.0, 255.0),
        mean=tuple((-black / scale).tolist()),
        std=tuple((1 / scale).tolist()),
        channel_order="RGB" if order.tolist() == [0, 1, 2] else "BGR",
    )


def _put_weights(module: Any, path: Path) -> None:
    if path.suffix not in (".keras", ".h5"):
        raise ConvscopeError(f"weights {str(path)!r}: expected 'default', 'random', a .keras or a .weights.h5 file")
    files.require_file(path)
    _require_magic(path)
    try:
        if path.suffix == ".keras":
            module.set_weights(_read(path).get_weights())
        else:
            module.load_weights(path)
    except ValueError as error:
        raise ConvscopeError(
            f"the weights in {path} do not fit {module.name}: {' '.join(str(error).split())[:300]}"
        ) from error


def from_file(path: Path, weights: str | None) -> Found:
    """A model saved by Keras, by any backend, opened in safe mode."""
    _require_magic(path)
    module = _read(path)
    if weights not in (None, "default"):
        _put_weights(module, Path(str(weights)))
    found = from_model(module)
    found.owned, found.name = True, path.name
    return found


def _require_magic(path: Path) -> None:
    magic = path.open("rb").read(8)
    if path.suffix == ".keras" and not zipfile.is_zipfile(path):
        kind = "an HDF5 file: rename it to .h5" if magic == b"\x89HDF\r\n\x1a\n" else "not a zip archive"
        raise ConvscopeError(f"{path} is not a .keras file: it is {kind}")
    if path.suffix in (".h5", ".hdf5") and magic != b"\x89HDF\r\n\x1a\n":
        kind = "a zip archive: rename it to .keras" if magic[:2] == b"PK" else "without the HDF5 signature"
        raise ConvscopeError(f"{path} is not an HDF5 file: it is {kind}")


def _read(path: Path) -> Any:
    keras = import_keras()
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True, custom_objects=_old_layers(keras))
    except Exception as error:  # Keras wraps what goes wrong in many types
        text = " ".join(str(error).split())
        if "Lambda" in text or "safe_mode" in text or "unsafe" in text:
            raise ConvscopeError(
                f"{path} holds a Lambda layer or another piece of Python code, which is not run; if you trust it, load "
                "it yourself with keras.models.load_model(FILE, safe_mode=False) and pass the model"
            ) from error
        raise ConvscopeError(f"{path} cannot be loaded by Keras: {text[:300]}") from error


def _old_layers(keras: Any) -> dict[str, Any]:
    """Keras 2 saved arguments that Keras 3 refuses."""

    def forgiving(base: Any, dropped: tuple[str, ...]) -> Any:
        def start(self: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, *args, **{k: v for k, v in kwargs.items() if k not in dropped})

        return type(base.__name__, (base,), {"__init__": start})

    kernel = ("kernel_initializer", "kernel_regularizer", "kernel_constraint", "groups")
    return {
        "DepthwiseConv2D": forgiving(keras.layers.DepthwiseConv2D, ("groups",)),
        "SeparableConv2D": forgiving(keras.layers.SeparableConv2D, kernel),
    }


def from_model(module: Any) -> Found:
    """A Keras model in hand."""
    if not isinstance(module, nn.Module):
        keras = sys.modules.get("keras")
        _refuse_backend(keras.config.backend() if keras is not None and hasattr(keras, "config") else "tensorflow")
    shape = getattr(module, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise ConvscopeError(f"a Keras model with one picture as input is expected; this one takes {shape}")
    _, height, width, channels = shape
    size = (height, width) if height is not None and width is not None else None
    scaled = any(type(layer).__name__ in ("Rescaling", "Normalization") for layer in _layers(module))
    found = Found(
        module,
        module.name,
        KerasDialect(),
        owned=False,
        size=size,
        channels=channels,
        range=(0.0, 255.0) if scaled else (0.0, 1.0),
    )
    if size is not None and channels == 3:
        found.preprocessing = _by_name(module.name, size)
    if found.preprocessing is not None:
        found.notes.append(f"preprocessing taken from keras.applications, by the name {module.name!r}")
    return found


def _layers(module: nn.Module) -> list[nn.Module]:
    return list(KerasDialect().modules(module).values())


def _by_name(name: str, size: tuple[int, int]) -> Preprocessing | None:
    """The preprocessing of a keras.applications model, recognised by the name that Keras gives it."""
    keras = import_keras()
    for module in vars(keras.applications).values():
        if hasattr(module, "preprocess_input") and name in {attribute.lower() for attribute in vars(module)}:
            return _measure(module.preprocess_input, size)
    return None
