"""Keras 3 models on the torch backend: applications by name, files, models in hand.

Keras is imported only here, and only when asked for: it takes seconds.
"""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convscope.errors import ConvscopeError, nearest
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.spec import ModelSpec, imagenet_classes


@dataclass(frozen=True)
class KerasAdapter:
    """A Keras model: an `nn.Module` that mostly speaks NHWC and keeps its layers in lists of its own."""

    channels_first: bool = False
    name = "keras"

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        return dict(_walk(module, ""))

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        return (variable.value for variable in module.weights)  # type: ignore[union-attr]

    def run(self, module: nn.Module, x: Tensor) -> Any:
        import keras

        # Keras would bring the picture to its own default device, wherever the model is.
        with keras.device(str(x.device)):
            return module(x if self.channels_first else x.permute(0, 2, 3, 1), training=False)


def _walk(module: Any, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    import keras

    for layer in module.layers if isinstance(module, keras.Model) else module._layers:
        yield prefix + layer.name, layer
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


def from_name(name: str, weights: str) -> ModelSpec:
    """A model of keras.applications, with its own preprocessing and ImageNet's class names."""
    known = _applications(import_keras())
    if name not in known:
        raise ConvscopeError(f"keras.applications has no model {name!r}; nearest: {nearest(name, list(known))}")
    build, preprocess = known[name]
    if weights == "default":
        try:
            module = build(weights="imagenet")
        except Exception as error:  # Keras raises a bare Exception when it cannot download
            if "URL fetch failure" not in str(error):
                raise
            with files.downloading(f"keras:{name}"):
                raise OSError(str(error).partition(": None")[0]) from error
    else:
        with _seeded():
            module = build(weights=None)
        if weights != "random":
            _put_weights(module, Path(weights))
    found = from_model(module)
    found.loaded_by_convscope, found.name, found.recognised = True, f"keras:{name}", None
    found.preprocessing = _measure(preprocess, found.size or USUAL_SIZE)
    found.classes = imagenet_classes() if module.output_shape[-1] == 1000 else None
    return found


def _applications(keras: Any) -> dict[str, tuple[Any, Any]]:
    """What keras.applications holds: each model's builder, and the `preprocess_input` of the module it comes from."""
    builders = {name: build for name, build in vars(keras.applications).items() if name[0].isupper()}

    def home(build: Any) -> Any:
        return getattr(keras.applications, build.__module__.rpartition(".")[2])

    return {name: (build, home(build).preprocess_input) for name, build in builders.items()}


@contextmanager
def _seeded() -> Iterator[None]:
    """Random weights made in the block are always the same ones: Keras draws its seeds from Python's own generator."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _measure(preprocess: Any, size: tuple[int, int]) -> Preprocessing:
    """What a `preprocess_input` does to pixels 0..255: its offset, scale and channel order, read off four pictures."""
    pixels = torch.zeros((4, 1, 1, 3))
    for channel in range(3):
        pixels[channel + 1, 0, 0, channel] = 255.0
    black, *pure = torch.tensor(preprocess(pixels.numpy(), data_format="channels_last").copy()).float()[:, 0, 0]
    response = torch.stack([p - black for p in pure])  # row: channel of the picture, column: channel of the network
    order = response.abs().argmax(0)  # which channel of the picture each of the network's channels shows
    scale = response.abs().max(0).values / 255
    return Preprocessing(
        size=size,
        range=(0.0, 255.0),
        mean=tuple((0 - black / scale).tolist()),
        std=tuple((1 / scale).tolist()),
        channel_order="RGB" if order.tolist() == [0, 1, 2] else "BGR",
    )


def _put_weights(module: Any, path: Path) -> None:
    if path.suffix.lower() not in (".keras", ".h5"):
        raise ConvscopeError(f"weights {str(path)!r}: expected 'default', 'random', a .keras or a .weights.h5 file")
    files.require_file(path)
    _require_magic(path)
    saved = _read(path).get_weights() if path.suffix.lower() == ".keras" else None
    try:
        if saved is not None:
            module.set_weights(saved)
        else:
            module.load_weights(path)
    except Exception as error:  # Keras and h5py raise many types
        raise ConvscopeError(f"the weights in {path} do not fit {module.name}: {_text(error)[:300]}") from error


def from_file(path: Path, weights: str | None) -> ModelSpec:
    """A model saved by Keras, by any backend, opened in safe mode."""
    _require_magic(path)
    module = _read(path)
    if weights == "random":
        raise ConvscopeError(f"{path} holds weights of its own; weights= may only name a file to put in their place")
    if weights not in (None, "default"):
        _put_weights(module, Path(str(weights)))
    found = from_model(module)
    found.loaded_by_convscope, found.name = True, path.name
    return found


def _require_magic(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(8)
    suffix = path.suffix.lower()
    if suffix == ".keras" and not zipfile.is_zipfile(path):
        kind = "an HDF5 file: rename it to .h5" if magic == b"\x89HDF\r\n\x1a\n" else "not a zip archive"
        raise ConvscopeError(f"{path} is not a .keras file: it is {kind}")
    if suffix in (".h5", ".hdf5") and magic != b"\x89HDF\r\n\x1a\n":
        kind = "a zip archive: rename it to .keras" if magic[:2] == b"PK" else "without the HDF5 signature"
        raise ConvscopeError(f"{path} is not an HDF5 file: it is {kind}")


def _read(path: Path) -> Any:
    keras = import_keras()
    try:
        with _keras2_compat(keras):
            return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras wraps what goes wrong in many types
        if "safe_mode" in _text(error):
            raise ConvscopeError(
                f"{path} holds a Lambda layer or another piece of Python code, which is not run; if you trust it, load "
                "it yourself with keras.models.load_model(FILE, safe_mode=False) and pass the model"
            ) from error
        raise ConvscopeError(f"{path} cannot be loaded by Keras: {_text(error)[:300]}") from error


def _text(error: Exception) -> str:
    """What an error says, in one line; of Keras' errors around errors, the innermost."""
    return " ".join(str(error).rpartition("Exception encountered: ")[2].split())


# What Keras 2 saved with a layer, as if it meant something, and Keras 3 refuses.
KERAS_2_ONLY = {
    "Conv2DTranspose": {"groups"},
    "DepthwiseConv2D": {"groups"},
    "SeparableConv2D": {"groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"},
}
_lock = threading.Lock()


@contextmanager
def _keras2_compat(keras: Any) -> Iterator[None]:
    """For as long as the block lasts, Keras passes over `KERAS_2_ONLY` in a file."""

    def reader(usual: Any, dropped: set[str]) -> Any:
        def from_config(cls: Any, config: Mapping[str, Any]) -> Any:
            return usual.__func__(cls, {key: value for key, value in config.items() if key not in dropped})

        return classmethod(from_config)

    with _lock:
        layers = {getattr(keras.layers, name): dropped for name, dropped in KERAS_2_ONLY.items()}
        own = {layer: vars(layer)["from_config"] for layer in layers if "from_config" in vars(layer)}
        try:
            for layer, dropped in layers.items():
                layer.from_config = reader(layer.from_config, dropped)
            yield
        finally:
            for layer in layers:
                if layer in own:
                    layer.from_config = own[layer]
                else:
                    del layer.from_config


USUAL_SIZE = (224, 224)  # of keras.applications, where a model leaves it open


def from_model(module: Any) -> ModelSpec:
    """A Keras model in hand."""
    keras: Any = sys.modules.get("keras")
    backend = keras.config.backend() if hasattr(keras, "config") else "tensorflow"
    if backend != "torch" or any(base.__module__.startswith("tf_keras") for base in type(module).__mro__):
        _refuse_backend("tensorflow" if backend == "torch" else backend)
    if not isinstance(module, keras.Model):
        raise ConvscopeError(f"cannot look into a Keras {type(module).__name__}; expected a Keras model")
    height, width, channels, first = _input(module)
    size = (height, width) if height is not None and width is not None else None
    scaled = any(type(layer).__name__ in ("Rescaling", "Normalization") for _, layer in _walk(module, ""))
    found = ModelSpec(
        module,
        module.name,
        KerasAdapter(first),
        loaded_by_convscope=False,
        size=size,
        channels=channels,
        range=(0.0, 255.0) if scaled else (0.0, 1.0),
    )
    if channels == 3:
        found.preprocessing = _by_name(keras, module.name, size or USUAL_SIZE)
    found.recognised = f"keras.applications, by the name {module.name!r}"
    return found


def _input(module: Any) -> tuple[int | None, int | None, int, bool]:
    """Height, width and channels of the picture that a model takes, and whether it takes its channels first."""
    shape = getattr(module, "input_shape", None)
    if shape is None:  # a subclassed model; what it was built for
        shape = (module.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise ConvscopeError(
            f"the Keras model {module.name!r} is not built yet, so its input is not known; call it once on a picture: "
            "model(numpy.zeros((1, H, W, C)))"
        )
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise ConvscopeError(f"a Keras model with one picture as input is expected; this one takes {shape}")
    formats = (getattr(layer, "data_format", None) for _, layer in _walk(module, ""))
    if next(filter(None, formats), "channels_last") == "channels_first":
        return shape[2], shape[3], shape[1], True
    return shape[1], shape[2], shape[3], False


def _by_name(keras: Any, name: str, size: tuple[int, int]) -> Preprocessing | None:
    """The preprocessing of a keras.applications model, recognised by the name that Keras gives it."""

    def plain(text: str) -> str:  # "efficientnetv2-b0", "inception_v3"; "mobilenet_1.00_224" with its width and size
        return re.sub(r"[-_]", "", re.sub(r"_\d\.\d\d_\d+$", "", text.lower()))

    for application, (_, preprocess) in _applications(keras).items():
        if plain(application) == plain(name):
            return _measure(preprocess, size)
    return None
