"""Docstrings of the public functions and classes follow numpydoc, with every parameter, return value and an example."""

from __future__ import annotations

import inspect

import pytest
from numpydoc.validate import validate

import convscope
from convscope import objectives

# Sections that are optional here: extended summary, See Also, and the layout of the first line.
OPTIONAL = {"ES01", "GL01", "GL02", "GL03", "GL09", "SA01", "SA04", "PR04", "YD01"}
# Classes that functions return document their attributes; nobody constructs them.
CLASSES_OPTIONAL = {"PR01", "PR02", "EX01"}
CONSTRUCTED = {"Preprocessing"}

PUBLIC = [getattr(convscope, name) for name in convscope.__all__ if not inspect.ismodule(getattr(convscope, name))]
OBJECTIVES = [
    function
    for name, function in vars(objectives).items()
    if inspect.isfunction(function) and function.__module__ == objectives.__name__ and not name.startswith("_")
]


@pytest.mark.parametrize("documented", [*PUBLIC, *OBJECTIVES], ids=lambda item: item.__qualname__)
def test_public_docstrings_are_complete(documented: type) -> None:
    optional = set(OPTIONAL)
    if inspect.isclass(documented) and documented.__name__ not in CONSTRUCTED:
        optional |= CLASSES_OPTIONAL
    report = validate(f"{documented.__module__}.{documented.__qualname__}")
    assert [error for error in report["errors"] if error[0] not in optional] == []
