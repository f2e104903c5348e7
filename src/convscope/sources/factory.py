"""Networks made by a function of the user: "package.module:factory"."""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import nn

from convscope.errors import ConvscopeError
from convscope.sources import files, instance
from convscope.sources.spec import ModelSpec
from convscope.suggestions import suggest


def from_path(path: str, weights: str | None) -> ModelSpec:
    """Import `package.module` and call `factory()`; `weights` may name a file to load into the result."""
    name, _, attribute = path.partition(":")
    try:
        package = importlib.import_module(name)
    except Exception as error:  # the user's module may raise anything
        expected = "expected package.module:factory, importable from here"
        raise ConvscopeError(f"{path!r} cannot be imported: {files.first_line(error)}; {expected}") from error
    factory = getattr(package, attribute, None)
    if not callable(factory):
        raise ConvscopeError(f"{name} has no function {attribute!r}; {suggest(attribute, dir(package))}")
    try:
        module = factory()
    except Exception as error:  # the user's function may raise anything
        raise ConvscopeError(f"{path!r} raised {type(error).__name__}: {files.first_line(error)}") from error
    spec = instance.wrap(module)
    spec.loaded_by_convscope, spec.name = True, path
    if weights == "random":
        raise ConvscopeError("a factory makes its own weights; weights= may name a file to load into the network")
    if weights not in (None, "default"):
        if not isinstance(module, nn.Module) or spec.adapter.name != "torch":
            raise ConvscopeError("weights= for a Keras factory: load them inside the factory")
        spec.notes += files.load_weights_file(module, Path(str(weights)))
    return spec
