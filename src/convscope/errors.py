"""The exception for what a user can put right."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class ConvscopeError(ValueError):
    """Input that convscope refuses. The message is one line: what was given, what was expected, what to do."""


def nearest(word: str, known: list[str], count: int = 4) -> str:
    """Up to `count` known names that resemble `word`, best first, joined for an error message."""
    import difflib

    found = difflib.get_close_matches(word, known, n=count, cutoff=0.4)
    return ", ".join(found or known[:count])


def require_extra(package: str, extra: str = "scan") -> Any:
    """The package, imported. Raises ConvscopeError, naming the extra that brings it, where it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        raise ConvscopeError(f"{top} is not installed; pip install 'convscope[{extra}]'") from error
