"""`as_model`: let functions take a module or a model's name where they expect a `Model`."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convscope.arguments import IMAGE_SUFFIXES
from convscope.datasets.image_inputs import open_images
from convscope.datasets.readers_memory import IndexableDataset
from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, warn
from convscope.images.lazy import LazyImages
from convscope.sources import api
from convscope.sources.instance import unwrap
from convscope.sources.spec import PREPROCESSING_ASSUMED

ModelLike: TypeAlias = Model | nn.Module | str | os.PathLike[str] | Callable[[Any], Any]
"""A Model, or what `convscope.load` takes: an nn.Module, a Keras model, a name, a file or a function."""

MAX_NAMED = 2  # models by name that stay in memory


@dataclass(frozen=True)
class _CacheEntry:
    """A loaded module without the module itself, so that the cache does not keep it alive."""

    model: Model
    structure: tuple[object, ...]
    sizes: frozenset[tuple[int, ...] | None]  # of tensors for which the model is as it is; None: for other images

    def fits(self, module: nn.Module, size: tuple[int, ...] | None) -> bool:
        """Return whether the model still describes the module, for tensors of a size."""
        has_size = size in self.sizes or PREPROCESSING_ASSUMED not in self.model.assumptions
        return has_size and self.structure == _structure(self.model.adapter, module)


_by_module: WeakKeyDictionary[nn.Module, _CacheEntry] = WeakKeyDictionary()
_by_name: OrderedDict[tuple[str, float], Model] = OrderedDict()
_warned: WeakSet[nn.Module] = WeakSet()
_lock = threading.RLock()


def as_model(model: ModelLike, images: object = None) -> Model:
    """Return `model` if it is a Model; load it otherwise, once. Warn of assumptions at the first use of a network.

    A module is loaded again after its layers or the shapes of its parameters have changed. It is not kept alive. Of the
    models given by name or file the last two stay in memory.

    Parameters
    ----------
    model : Model, nn.Module, Keras model, str or path
    images : object
        What the model is called with. Preprocessed tensors say what size a module takes, where it would be assumed.

    Returns
    -------
    Model

    Raises
    ------
    ConvscopeError
        If `model` is something else, such as an image, or cannot be loaded.

    Warns
    -----
    ConvscopeWarning
        At the first use of a network that was loaded on assumptions, for instance about its preprocessing.
    """
    if isinstance(model, Model):
        _warn_once(model)
        return model
    _refuse_images(model)
    with _lock:
        if isinstance(model, str | os.PathLike):
            return _load_named(os.fspath(model))
        return _load_module(model, _tensor_size(images)) if isinstance(model, nn.Module) else _load_other(model)


def _tensor_size(images: object) -> tuple[int, ...] | None:
    """Return height and width of preprocessed tensors; None for other images."""
    if isinstance(images, Dataset) or (isinstance(images, DataLoader) and isinstance(images.dataset, IndexableDataset)):
        try:
            images = open_images(images)
            image = images[0] if isinstance(images, LazyImages) else images
        except ConvscopeError:  # reported where the images are read
            return None
    else:
        image = images[0] if isinstance(images, list | tuple) and images else images
    is_preprocessed = isinstance(image, Tensor) and image.is_floating_point() and image.ndim in (3, 4)
    return tuple(image.shape[-2:]) if isinstance(image, Tensor) and is_preprocessed else None


def _refuse_images(model: object) -> None:
    """Raise ConvscopeError for an image in place of a model."""
    if isinstance(model, str | os.PathLike):
        if str(model).lower().endswith(IMAGE_SUFFIXES):
            raise ConvscopeError(f"model is the image file {str(model)!r}; the model comes first, the images second")
    elif model is None or isinstance(model, Image.Image | np.ndarray | Tensor | list | tuple | bytes):
        raise ConvscopeError(f"model is a {type(model).__name__}; the model comes first, the images second")


def _load_named(source: str) -> Model:
    path = Path(source)
    key = (source, path.stat().st_mtime if path.is_file() else 0.0)
    model = _by_name.pop(key, None)
    if model is None:
        model = api.load(source)
        _warn_of_assumptions(model, f"convscope.load({source!r}, ...)")
    _by_name[key] = model
    while len(_by_name) > MAX_NAMED:
        _by_name.popitem(last=False)
    return model


def _load_other(source: object) -> Model:
    """Load what is no module: a Keras model of another backend is refused, a function becomes a model."""
    model = api.load(source)
    _warn_of_assumptions(model, "convscope.load(function, preprocessing=..., classes=...)")
    return model


def _load_module(source: nn.Module, size: tuple[int, ...] | None) -> Model:
    module = unwrap(source)
    entry = _by_module.get(module)
    if entry is not None and entry.fits(module, size):
        return replace(entry.model, module=module)
    default = api.load(module)
    model = _at_size(default, size)
    sizes = frozenset({size, model.preprocessing.size} | ({None} if model is default else set()))
    _warn_of_assumptions(model, "convscope.load(module, preprocessing=..., classes=...)")
    _by_module[module] = _CacheEntry(replace(model, module=nn.Identity()), _structure(model.adapter, module), sizes)
    return model


def _at_size(model: Model, size: tuple[int, ...] | None) -> Model:
    """Return a model whose preprocessing is assumed as one for images of a size, if it runs on them."""
    if size is None or PREPROCESSING_ASSUMED not in model.assumptions or model.preprocessing.size == size:
        return model
    try:
        resized = api.load(model.module, preprocessing=replace(model.preprocessing, size=size, resize=None))
    except ConvscopeError:
        return model
    note = f"preprocessing was not given; assumed: {resized.preprocessing}, the size of the tensors"
    return replace(resized, notes=(note, *resized.notes), assumptions=model.assumptions)


def _warn_once(model: Model) -> None:
    """Warn of what `load` assumed, at the first use of the network."""
    if model.assumptions and model.module not in _warned:
        _warned.add(model.module)
        warn(f"{model.name}: {'; '.join(model.assumptions)}. See model.notes, and pass what you know to convscope.load")


def _warn_of_assumptions(model: Model, remedy: str) -> None:
    _warned.add(model.module)
    if model.notes:
        warn(f"{model.name}: {'; '.join(model.notes)}. To be sure, pass {remedy}")


def _structure(adapter: FrameworkAdapter, module: nn.Module) -> tuple[object, ...]:
    """Describe what a layer table depends on: the layers, their settings, and the shapes of the parameters."""
    return (*_layers(adapter, module), *((tuple(p.shape), p.dtype) for p in adapter.parameters(module)))


def _layers(adapter: FrameworkAdapter, module: nn.Module) -> Iterator[tuple[object, ...]]:
    for name, layer in [("", module), *adapter.modules(module).items()]:
        yield name, type(layer), layer.extra_repr()
