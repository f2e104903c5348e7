"""What layers return, however it is packed: a tensor, tuples, mappings and dataclasses of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a layer's output stands for: itself, or the first of floats in a tuple, dict or dataclass.

    In a mapping or object, `logits` and `out` come before the rest.
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    return next((t for part in _parts(output).values() if (t := first_tensor(part)) is not None), None)


def with_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """A copy of a layer's output in which `new` stands where `old` stood."""
    return each_tensor(output, lambda tensor: new if tensor is old else tensor)


def each_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a layer's output in which every tensor is what `change` makes of it."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        changed = {key: each_tensor(part, change) for key, part in output.items()}
        kind: Any = type(output)
        return kind(**changed) if dataclasses.is_dataclass(output) else kind(changed)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(each_tensor(part, change) for part in output))
    if isinstance(output, tuple | list):
        return type(output)(each_tensor(part, change) for part in output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {key: each_tensor(part, change) for key, part in _parts(output).items()}
        return dataclasses.replace(output, **fields)
    return output


def flat(output: Any) -> list[Tensor]:
    """Every tensor in a layer's output."""
    tensors: list[Tensor] = []

    def found(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    each_tensor(output, found)
    return tensors


def tensors_in(parts: Any) -> Iterator[Tensor]:
    """Every tensor among what a function is given or returns: lists, tuples and dicts are looked into."""
    if isinstance(parts, Tensor):
        yield parts
    elif isinstance(parts, dict):
        yield from tensors_in(list(parts.values()))
    elif isinstance(parts, list | tuple):
        for part in parts:
            yield from tensors_in(part)


def _parts(output: Any) -> dict[Any, Any]:
    if isinstance(output, Mapping):
        parts = dict(output)
    elif isinstance(output, tuple | list):
        return dict(enumerate(output))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    else:
        return {}
    return dict(sorted(parts.items(), key=lambda item: item[0] not in ("logits", "out")))
