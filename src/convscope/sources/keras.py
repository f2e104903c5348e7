"""Keras 3 models on the torch backend: applications by name, files, instances.

Keras is imported only when it is needed, since that takes seconds.
"""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convscope.engine.adapters import ForwardFunction
from convscope.errors import ConvscopeError
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.keras_input import read_input, scales_pixels
from convscope.sources.spec import ModelSpec, imagenet_classes
from convscope.suggestions import suggest


@dataclass(frozen=True)
class KerasAdapter:
    """Adapter of Keras models: modules that mostly use NHWC and list their layers in `layers`."""

    channels_first: bool = False
    forward: ForwardFunction | None = None
    name = "keras"

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return every layer by its path of Keras names."""
        return dict(_walk(module, ""))

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """Return all weights."""
        return (variable.value for variable in module.weights)  # type: ignore[union-attr]

    def run(self, module: nn.Module, x: Tensor) -> Any:
        """Run the model in inference mode on an NCHW batch."""
        import keras

        # Otherwise Keras moves the input to its own default device.
        with keras.device(str(x.device)):
            batch = x if self.channels_first else x.movedim(1, -1)
            output = module(batch, training=False) if self.forward is None else self.forward(module, batch)
        return _named(module, output)

    def with_forward(self, forward: ForwardFunction) -> KerasAdapter:
        """Return an adapter that calls ``forward(model, x)``, with `x` in the layout that the model takes."""
        return replace(self, forward=forward)


def _named(module: Any, output: object) -> object:
    """Return several outputs as a named tuple, under the names that Keras gives them."""
    names = tuple(getattr(module, "output_names", None) or ())
    if isinstance(output, list | tuple) and len(names) == len(output) > 1:
        return _output_type(names)(*output)
    return output


@lru_cache
def _output_type(names: tuple[str, ...]) -> Any:
    return namedtuple("Outputs", names, rename=True)


def _walk(module: Any, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    import keras

    for layer in module.layers if isinstance(module, keras.Model) else module._layers:  # noqa: SLF001
        yield prefix + layer.name, layer
        yield from _walk(layer, f"{prefix}{layer.name}/")


def import_keras() -> Any:
    """Import Keras on the torch backend; raise `ConvscopeError` if it is missing or uses another backend."""
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
        f"Keras runs on the {backend} backend; save the model as model.save('FILE.keras') and load that file in a "
        "process of its own, or set KERAS_BACKEND=torch before the first import of keras"
    )


def from_name(name: str, weights: str, num_classes: int | None = None) -> ModelSpec:
    """Make a model of keras.applications, with its preprocessing and ImageNet's class names."""
    known = _applications(import_keras())
    if name not in known:
        raise ConvscopeError(f"keras.applications has no model {name!r}; {suggest(name, list(known))}")
    build, preprocess = known[name]
    if weights == "default":
        try:
            module = build(weights="imagenet")
        except Exception as error:  # Keras raises a bare Exception when a download fails
            if "URL fetch failure" not in str(error):
                raise
            with files.download_errors(f"keras:{name}"):
                raise OSError(str(error).partition(": None")[0]) from error
    else:
        with _seeded():
            module = build(weights=None, classes=num_classes or 1000)
        if weights != "random":
            _load_weights(module, Path(weights))
    spec = from_model(module)
    spec.loaded_by_convscope, spec.name, spec.preprocessing_origin = True, f"keras:{name}", None
    spec.preprocessing = _measure_preprocessing(preprocess, spec.size or DEFAULT_SIZE)
    spec.classes = imagenet_classes() if module.output_shape[-1] == 1000 else None
    return spec


def _applications(keras: Any) -> dict[str, tuple[Any, Any]]:
    """Map each model of keras.applications to its builder and its `preprocess_input`."""
    builders = {name: build for name, build in vars(keras.applications).items() if name[0].isupper()}

    def home(build: Any) -> Any:
        return getattr(keras.applications, build.__module__.rpartition(".")[2])

    return {name: (build, home(build).preprocess_input) for name, build in builders.items()}


@contextmanager
def _seeded() -> Iterator[None]:
    """Fix random weights inside the block: Keras draws its seeds from Python's `random`."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _measure_preprocessing(preprocess: Any, size: tuple[int, ...]) -> Preprocessing:
    """Measure the offset, scale and channel order of a `preprocess_input` on four images of one pixel."""
    pixels = torch.zeros((4, 1, 1, 3))
    for channel in range(3):
        pixels[channel + 1, 0, 0, channel] = 255.0
    black, *responses = torch.tensor(preprocess(pixels.numpy(), data_format="channels_last").copy()).float()[:, 0, 0]
    response = torch.stack([p - black for p in responses])  # row: channel of the image, column: channel of the input
    order = response.abs().argmax(0)  # the image channel in each input channel
    scale = response.abs().max(0).values / 255
    return Preprocessing(
        size=size,
        range=(0.0, 255.0),
        mean=tuple((0 - black / scale).tolist()),
        std=tuple((1 / scale).tolist()),
        channel_order="RGB" if order.tolist() == [0, 1, 2] else "BGR",
    )


def _load_weights(module: Any, path: Path) -> None:
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
        raise ConvscopeError(
            f"the weights in {path} do not fit {module.name}: {_innermost_message(error)[:300]}"
        ) from error


def from_file(path: Path, weights: str | None) -> ModelSpec:
    """Open a model saved by Keras with any backend, in safe mode."""
    _require_magic(path)
    module = _read(path)
    if weights == "random":
        raise ConvscopeError(f"{path} holds its own weights; weights= may only name a file that replaces them")
    if weights not in (None, "default"):
        _load_weights(module, Path(str(weights)))
    spec = from_model(module)
    spec.loaded_by_convscope, spec.name = True, path.name
    return spec


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
    except Exception as error:  # Keras wraps errors in many types
        if "safe_mode" in _innermost_message(error):
            raise ConvscopeError(
                f"{path} holds a Lambda layer or other Python code, which is not run; if you trust the file, load "
                "it yourself with keras.models.load_model(FILE, safe_mode=False) and pass the model"
            ) from error
        raise ConvscopeError(f"{path} cannot be loaded by Keras: {_innermost_message(error)[:300]}") from error


def _innermost_message(error: Exception) -> str:
    """Return an error's message in one line; of nested Keras errors, the innermost."""
    return " ".join(str(error).rpartition("Exception encountered: ")[2].split())


# Arguments that Keras 2 saved without using them, and that Keras 3 refuses.
KERAS_2_ONLY = {
    "Conv2DTranspose": {"groups"},
    "DepthwiseConv2D": {"groups"},
    "SeparableConv2D": {"groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"},
}
_lock = threading.Lock()


@contextmanager
def _keras2_compat(keras: Any) -> Iterator[None]:
    """Make Keras ignore the arguments of `KERAS_2_ONLY` inside the block."""

    def reader(usual: Any, dropped: set[str]) -> Any:
        def from_config(cls: Any, config: Mapping[str, Any]) -> Any:
            return usual.__func__(cls, {key: value for key, value in config.items() if key not in dropped})

        return classmethod(from_config)

    with _lock:
        layers = {getattr(keras.layers, name): dropped for name, dropped in KERAS_2_ONLY.items()}
        original = {layer: vars(layer)["from_config"] for layer in layers if "from_config" in vars(layer)}
        try:
            for layer, dropped in layers.items():
                layer.from_config = reader(layer.from_config, dropped)
            yield
        finally:
            for layer in layers:
                if layer in original:
                    layer.from_config = original[layer]
                else:
                    del layer.from_config


DEFAULT_SIZE = (224, 224)  # of keras.applications, for models of any input size


def from_model(module: Any) -> ModelSpec:
    """Describe a Keras model that the user passes in."""
    keras: Any = sys.modules.get("keras")
    backend = keras.config.backend() if hasattr(keras, "config") else "tensorflow"
    if backend != "torch" or any(base.__module__.startswith("tf_keras") for base in type(module).__mro__):
        _refuse_backend("tensorflow" if backend == "torch" else backend)
    if not isinstance(module, keras.Model):
        raise ConvscopeError(f"cannot load a Keras {type(module).__name__}; expected a Keras model")
    layers = [layer for _, layer in _walk(module, "")]
    model_input = read_input(module, layers)
    spec = ModelSpec(
        module,
        module.name,
        KerasAdapter(model_input.channels_first),
        loaded_by_convscope=False,
        size=model_input.size,
        channels=model_input.channels,
        range=(0.0, 255.0) if scales_pixels(module, layers) else (0.0, 1.0),
        other_inputs=model_input.others,
    )
    size = model_input.size if model_input.size is None or len(model_input.size) == 2 else None
    if model_input.channels == 3 and (model_input.size is None or size is not None):
        spec.preprocessing = _preprocessing_by_name(keras, module.name, size or DEFAULT_SIZE)
    if spec.preprocessing is not None and len(getattr(module, "output_shape", ())) == 4:
        spec.task = "embedding"  # include_top=False
    spec.preprocessing_origin = f"keras.applications, by the name {module.name!r}"
    return spec


def _preprocessing_by_name(keras: Any, name: str, size: tuple[int, ...]) -> Preprocessing | None:
    """Recognise a model of keras.applications by its default name; return its preprocessing."""

    def plain(text: str) -> str:  # "efficientnetv2-b0", "inception_v3"; "mobilenet_1.00_224" with its width and size
        return re.sub(r"[-_]", "", re.sub(r"_\d\.\d\d_\d+$", "", text.lower()))

    for application, (_, preprocess) in _applications(keras).items():
        if plain(application) == plain(name):
            return _measure_preprocessing(preprocess, size)
    return None
