"""Tensors in nested containers: what layers and functions of PyTorch take and return.

Containers are tuples (named ones included), lists, mappings and dataclasses, and so are the outputs of Hugging Face
models. ``torch.utils._pytree`` is not used: it is private, it knows no unregistered dataclasses, and it takes three
times as long, which counts where every call of a function is inspected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

PREFERRED_KEYS = ("logits", "out")  # of containers that hold several tensors
_SCALARS = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size})

T = TypeVar("T")


def primary_tensor(output: object) -> Tensor | None:
    """Return the tensor that an output stands for: itself, or the first floating-point or quantised tensor in it.

    In mappings and dataclasses, `PREFERRED_KEYS` come before the other keys.
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() or output.is_quantized else None
    parts = sorted(_parts(output).items(), key=lambda part: part[0] not in PREFERRED_KEYS)
    return next((tensor for _, part in parts if (tensor := primary_tensor(part)) is not None), None)


def tensor_at(output: object, index: int | None) -> Tensor | None:
    """Return the tensor at a position among all tensors of an output, depth first; None stands for the primary one."""
    return primary_tensor(output) if index is None else next(islice(iter_tensors(output), index, None), None)


def replace_tensor(output: T, old: Tensor, new: Tensor) -> T:
    """Return a copy of `output` with `new` in place of `old`."""
    return map_tensors(output, lambda tensor: new if tensor is old else tensor)


def map_tensors(output: T, function: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of `output` with `function` applied to every tensor."""
    container: Any = output
    if isinstance(container, Tensor):
        changed: Any = function(container)
        return changed  # type: ignore[no-any-return]
    parts = {key: map_tensors(part, function) for key, part in _parts(container).items()}
    return _rebuild(container, parts) if parts else output


def iter_tensors(value: object) -> Iterator[Tensor]:
    """Yield every tensor in `value`, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from iter_tensors(part)
    elif type(value) not in _SCALARS:
        for part in _parts(value).values():
            yield from iter_tensors(part)


def iter_leaves(value: object) -> Iterator[object]:
    """Yield everything in `value` that is no container, depth first."""
    if isinstance(value, Mapping | tuple | list) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        for part in _parts(value).values():
            yield from iter_leaves(part)
    else:
        yield value


def _parts(container: object) -> Mapping[Any, object]:
    """Return the direct parts of a container by key, field or position; none if it is no container."""
    if isinstance(container, Mapping):
        return container
    if isinstance(container, tuple | list):
        return dict(enumerate(container))
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        return {f.name: getattr(container, f.name) for f in dataclasses.fields(container)}
    return {}


def _rebuild(container: Any, parts: Mapping[Any, object]) -> Any:
    """Return a container of the same type with other parts."""
    kind = type(container)
    if isinstance(container, Mapping):
        return kind(**parts) if dataclasses.is_dataclass(container) else kind(parts)
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return kind(*parts.values())
    if isinstance(container, tuple | list):
        return kind(parts.values())
    return dataclasses.replace(container, **parts)
