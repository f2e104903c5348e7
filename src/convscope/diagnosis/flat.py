"""Take dataclasses of arrays and numbers apart for files, and put them together again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast, get_type_hints

import numpy as np

from convscope.results import map_json

T = TypeVar("T")


def flatten(value: object, prefix: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Take a dataclass apart into arrays and JSON values, both by name; parts of parts are ``part.name``.

    Names of arrays begin with `prefix`.
    """
    arrays: dict[str, np.ndarray] = {}
    values: dict[str, Any] = {}
    for one in fields(cast(Any, value)):
        part = getattr(value, one.name)
        if isinstance(part, np.ndarray):
            arrays[prefix + one.name] = part
        elif is_dataclass(part):
            inner_arrays, inner_values = flatten(part, f"{prefix}{one.name}.")
            arrays |= inner_arrays
            values |= {f"{one.name}.{name}": v for name, v in inner_values.items()}
        else:
            values[one.name] = to_json(part)
    return arrays, values


def restore(kind: type[T], arrays: Mapping[str, np.ndarray], values: Mapping[str, Any], prefix: str) -> T:
    """Put a dataclass together from what `flatten` returned."""
    hints, content = get_type_hints(kind), {}
    for one in fields(cast(Any, kind)):
        hint = hints[one.name]
        if prefix + one.name in arrays:
            content[one.name] = arrays[prefix + one.name]
        elif is_dataclass(hint):
            inner = {name.partition(".")[2]: v for name, v in values.items() if name.startswith(f"{one.name}.")}
            content[one.name] = restore(cast(type[Any], hint), arrays, inner, f"{prefix}{one.name}.")
        else:
            content[one.name] = from_json(values[one.name])
    return kind(**content)


def to_json(value: Any) -> Any:
    """Return a value with None for NaN and infinity, lists for tuples, and numbers for those of numpy."""
    return map_json(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def from_json(value: Any) -> Any:
    """Return a value of a dataclass: NaN for None, tuples for lists."""
    if value is None:
        return float("nan")
    return tuple(from_json(item) for item in value) if isinstance(value, list) else value
