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

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, warn
from convscope.sources import api
from convscope.sources.instance import unwrap

ModelLike: TypeAlias = Model | nn.Module | str | os.PathLike[str] | Callable[[Any], Any]
"""A Model, or what `convscope.load` takes: an nn.Module, a Keras model, a name, a file or a function."""

MAX_NAMED = 2  # models by name that stay in memory

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class _CacheEntry:
    """A loaded module without the module itself, so that the cache does not keep it alive."""

    model: Model
    structure: tuple[object, ...]


_by_module: WeakKeyDictionary[nn.Module, _CacheEntry] = WeakKeyDictionary()
_by_name: OrderedDict[tuple[str, float], Model] = OrderedDict()
_warned: WeakSet[nn.Module] = WeakSet()
_lock = threading.RLock()


def as_model(model: ModelLike) -> Model:
    """Return `model` if it is a Model; load it otherwise, once. Warn of assumptions at the first use of a network.

    A module is loaded again after its layers or the shapes of its parameters have changed. It is not kept alive. Of the
    models given by name or file the last two stay in memory.

    Parameters
    ----------
    model : Model, nn.Module, Keras model, str or path

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
        return _load_module(model) if isinstance(model, nn.Module) else _load_other(model)


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


def _load_module(source: nn.Module) -> Model:
    module = unwrap(source) if isinstance(source, nn.Module) else source
    entry = _by_module.get(module) if isinstance(module, nn.Module) else None
    if entry is not None and entry.structure == _structure(entry.model.adapter, module):
        return replace(entry.model, module=module)
    model = api.load(module)
    _warn_of_assumptions(model, "convscope.load(module, preprocessing=..., classes=...)")
    _by_module[module] = _CacheEntry(replace(model, module=nn.Identity()), _structure(model.adapter, module))
    return model


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
