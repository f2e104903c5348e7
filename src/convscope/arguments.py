"""`check_arguments`: answer a wrong call of a public function with what was probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from convscope.errors import ConvscopeError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")

P = ParamSpec("P")
R = TypeVar("R")


class ArgumentError(ConvscopeError, TypeError):
    """Raised for a call with unknown, missing or too many arguments."""


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: wrong arguments raise an `ArgumentError` of one line that names the right ones.

    The signature, for type checkers and `help`, stays that of the function.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        message = _find_problem(function.__name__, signature, args, kwargs)
        if message is not None:
            raise ArgumentError(message)
        return function(*args, **kwargs)

    return checked


def _find_problem(
    name: str, signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object]
) -> str | None:
    """Return what is wrong with a call, in one line; None if nothing is."""
    parameters = signature.parameters
    named = [key for key, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_options = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for key in kwargs:
        suggestion = _variant(key, named) if takes_options else _similar(key, named)
        if key not in named and (suggestion or not takes_options):
            hint = f"did you mean {suggestion}=?" if suggestion else f"its arguments: {', '.join(named)}"
            return f"{name}() has no argument {key}=; {hint}"
    if named[:1] == ["model"] and args and not _is_model(args[0]) and any(map(_is_model, args[1:])):
        return f"{name}() got the model in the wrong place; the model comes first: {name}({', '.join(named[:2])}, ...)"
    positional = [key for key in named if parameters[key].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    values, order = dict(zip(positional, args, strict=False), **kwargs), f"{name}({', '.join(positional[:3])}, ...)"
    if _is_result(values.get("images")):
        return f"{name}() got {type(values['images']).__name__}, a result, for images; expected images: {order}"
    swapped = next((key for key in ("targets", "target", "layers", "layer") if _is_image_file(values.get(key))), None)
    if swapped is not None:
        return f"{name}() got the image file {values[swapped]!r} for {swapped}; the order is {order}"
    if len(args) > len(positional) and not any(p.kind == p.VAR_POSITIONAL for p in parameters.values()):
        others = [f"{key}=" for key in named if key not in positional]
        rest = f"give the others by name: {', '.join(others[:6])}" if others else "leave the others out"
        return f"{name}() takes {len(positional)} arguments without a name ({', '.join(positional)}); {rest}"
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return f"{name}(): {error}; it takes {', '.join(named[:4])}"
    return None


def _is_model(value: Any) -> bool:
    """Return whether a value is a `Model` or a module of PyTorch or Keras."""
    return hasattr(value, "named_modules") or (hasattr(value, "preprocessing") and hasattr(value, "layers"))


def _is_result(value: object) -> bool:
    """Return whether a value is a result of convscope."""
    return hasattr(value, "manifest") and hasattr(value, "failed")


def _is_image_file(value: object) -> bool:
    """Return whether a value is the name of an image file."""
    return isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES)


def _variant(key: str, names: Iterable[str]) -> str | None:
    """Return the name that differs from `key` only in case, underscores or a plural s."""
    return next((name for name in names if _plain(name) == _plain(key)), None)


def _similar(key: str, names: Sequence[str]) -> str | None:
    """Return the name that was probably meant: a variant of `key`, a part of it, or one spelled alike."""
    variant = _variant(key, names)
    if variant is not None:
        return variant
    parts = [name for name in names if name in key.split("_") or key in name.split("_")]
    return next(iter([*parts, *difflib.get_close_matches(key, names, n=1, cutoff=0.6)]), None)


def _plain(name: str) -> str:
    return name.replace("_", "").casefold().removesuffix("s")
