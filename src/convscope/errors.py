"""The exception for input that a user can correct, the warning for results to look at twice, and checks of arguments.

This module needs nothing but the standard library, so that ``convscope.ConvscopeError`` is available without loading
PyTorch.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from numbers import Integral, Real
from types import ModuleType
from typing import ParamSpec, TypeVar

from convscope.suggestions import suggest

P = ParamSpec("P")
R = TypeVar("R")

PACKAGE_FOLDER = os.path.join(os.path.dirname(__file__), "")
MAX_FAILURES = 3  # that a warning names


class ConvscopeError(ValueError):
    """Raised for input that convscope refuses.

    The message is one line: what was given, what was expected, what to do. It names an argument as ``name=``, or at its
    start, or after a colon, as ``name is`` or ``name has``; `rename_arguments` relies on that.
    """


class ConvscopeWarning(UserWarning):
    """Issued if a call succeeds only in part, or with an assumption.

    Images that could not be used, assumed preprocessing, random weights. The text also stands in the result: in its
    ``notes`` or ``failed``.
    """


def warn(message: str) -> None:
    """Issue a ConvscopeWarning that points to the nearest calling line outside this package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE_FOLDER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ConvscopeWarning, stacklevel=level)


_in_public_call: ContextVar[bool] = ContextVar("in_public_call", default=False)


def warns_of_failures(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function whose result has ``failed``: warn once per call of the inputs that failed.

    Public functions that it calls itself do not warn.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        is_nested = _in_public_call.get()
        token = _in_public_call.set(True)
        try:
            result = function(*args, **kwargs)
        finally:
            _in_public_call.reset(token)
        lines = [str(failure) for failure in getattr(result, "failed", ())]
        if lines and not is_nested:
            more = f"; and {len(lines) - MAX_FAILURES} more, see .failed" if len(lines) > MAX_FAILURES else ""
            warn(f"could not be used: {'; '.join(lines[:MAX_FAILURES])}{more}")
        return result

    return call


def rename_arguments(message: str, names: Mapping[str, str]) -> str:
    """Return a message about arguments of a function with what they are called elsewhere, such as on the command line.

    Parameters
    ----------
    message : str
        In the form that `ConvscopeError` describes.
    names : mapping
        For each argument its other name, also for an argument with a value, such as ``"resume=True"``; arguments that
        are not in it stay as they are.

    Examples
    --------
    >>> rename_arguments("start is 3; leave out start=, or recipe='dream'", {"start": "--start", "recipe": "--recipe"})
    '--start is 3; leave out --start, or --recipe dream'
    >>> rename_arguments("say it: load(..., classes=[...])", {"classes": "--classes"})
    'say it: --classes'
    """

    def rename(match: re.Match[str]) -> str:
        name, value = match["name"] or match["keyword"], match["value"]
        if name not in names:
            return match[0]
        return names.get(f"{name}={value}") or f"{names[name]} {_typed_value(value or '')}".rstrip()

    return _LOAD_CALL.sub(
        lambda match: f"{match['source'] or ''} {match['options']}".lstrip(), _ARGUMENT.sub(rename, message)
    )


def _typed_value(value: str) -> str:
    """Return the value of an argument as it is typed on the command line; nothing for lists and functions."""
    if value.startswith("dict("):
        content = re.sub(r"(\w+)=", r'"\1": ', value[len("dict(") : -1]).replace("(", "[").replace(")", "]")
        return f"'{{{content}}}'"
    return "" if value.startswith(("[", "lambda ")) else value.strip(QUOTES)


QUOTES = "'\""
_ARGUMENT = re.compile(
    r"(?:^|(?<=: ))(?P<name>[a-z_]+)(?= (?:is|has) )"
    r"|(?<![\w.-])(?P<keyword>[a-z_]+)=(?!=)"
    r"(?P<value>'[^']*'|\"[^\"]*\"|dict\((?:[^()]|\([^()]*\))*\)|\[[^\]]*\]|lambda [^,;)]*|[\w.-]*[\w-])?"
)
_LOAD_CALL = re.compile(r"(?:convscope\.)?load\((?:\.\.\.|'(?P<source>[^']*)'), (?P<options>--[^()]*)\)")


def find_name(kind: str, name: object, known: Sequence[str]) -> str:
    """Return the entry of `known` that `name` means, in any case, with or without hyphens.

    Parameters
    ----------
    kind : str
        What the names stand for, such as "method", for the message.
    name : object
        What was given.
    known : sequence of str
        All names there are.

    Raises
    ------
    ConvscopeError
        If there is no such name; the message lists the nearest ones.
    """
    if not isinstance(name, str):
        raise ConvscopeError(f"{kind} is {name!r}; expected a name such as {known[0]!r}")
    names = {_plain_name(entry): entry for entry in known}
    if _plain_name(name) in names:
        return names[_plain_name(name)]
    raise ConvscopeError(f"{kind} {name!r} is not known; {suggest(name, known)}")


def _plain_name(name: str) -> str:
    plain = name.casefold().replace("-", "").replace("_", "").replace(" ", "")
    return re.sub(r"(plusplus|pp)$", "++", plain)


def require_extra(package: str, extra: str = "scan") -> ModuleType:
    """Import and return an optional package.

    Parameters
    ----------
    package : str
        Name of the module to import, such as ``"pyarrow.compute"``.
    extra : str
        The extra of convscope that installs it.

    Raises
    ------
    ConvscopeError
        If the package is not installed; the message names the extra.
    """
    try:
        return import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ConvscopeError(f"{name} is not installed; pip install 'convscope[{extra}]'") from error


def is_int(value: object) -> bool:
    """Return whether `value` is an integer (numpy's included) and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether `value` is a finite real number (numpy's included) and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require_int(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` as an int; raise ConvscopeError, naming the argument, unless it is one of at least `minimum`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ConvscopeError(f"{name} is {value!r}; expected a whole number, {minimum} or more")
    return int(value)


def require_number(
    name: str,
    value: object,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
) -> float:
    """Return `value` as a float; raise ConvscopeError, naming the argument, unless it is a number in the range.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    value : object
        A finite real number.
    minimum, above, below, maximum : float, optional
        Inclusive lower bound, exclusive lower bound, exclusive upper bound, inclusive upper bound.
    """
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (("of at least", minimum), ("above", above), ("below", below), ("of at most", maximum))
        if bound is not None
    ]
    number = float(value) if isinstance(value, Real) and is_number(value) else math.nan
    too_low = (minimum is not None and number < minimum) or (above is not None and number <= above)
    too_high = (below is not None and number >= below) or (maximum is not None and number > maximum)
    if math.isnan(number) or too_low or too_high:
        raise ConvscopeError(f"{name} is {value!r}; expected a number {' and '.join(bounds)}".rstrip())
    return number
