"""What layers return, however it is packed: a tensor, tuples, mappings and dataclasses of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def primary_tensor(output: Any) -> Tensor | None:
    """The tensor that a layer's output stands for: itself, or the first of floats in a tuple, dict or dataclass.

    In a mapping or object, `logits` and `out` come before the rest.
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    return next((t for part in _parts(output).values() if (t := primary_tensor(part)) is not None), None)


def replace_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """A copy of a layer's output in which `new` stands where `old` stood."""
    return map_tensors(output, lambda tensor: new if tensor is old else tensor)


def map_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a layer's output in which every tensor is what `change` makes of it."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        changed = {key: map_tensors(part, change) for key, part in output.items()}
        kind: Any = type(output)
        return kind(**changed) if dataclasses.is_dataclass(output) else kind(changed)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(map_tensors(part, change) for part in output))
    if isinstance(output, tuple | list):
        return type(output)(map_tensors(part, change) for part in output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {key: map_tensors(part, change) for key, part in _parts(output).items()}
        return dataclasses.replace(output, **fields)
    return output


def tensor_leaves(output: Any) -> list[Tensor]:
    """Every tensor in a layer's output."""
    tensors: list[Tensor] = []

    def found(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(output, found)
    return tensors


def iter_tensors(parts: Any) -> Iterator[Tensor]:
    """Every tensor among what a function is given or returns: lists, tuples and dicts are looked into."""
    if isinstance(parts, Tensor):
        yield parts
    elif isinstance(parts, dict):
        yield from iter_tensors(list(parts.values()))
    elif isinstance(parts, list | tuple):
        for part in parts:
            yield from iter_tensors(part)


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
