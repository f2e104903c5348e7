"""One forward pass, traced: what each tensor sees of the input, and which layers' outputs it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convscope.engine.nested import iter_tensors
from convscope.engine.receptive_field import UNKNOWN, Axis, Field, propagate

NONE: frozenset[str] = frozenset()


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows fields through all operations on tensors that depend on the input."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The tensors are kept, so that the identities and addresses under which they are known stay their own.
        self._fields: dict[int, tuple[Tensor, Field]] = {}
        # Memory into which parts of the input went, piece by piece, and the marks of these.
        self._written: dict[int, frozenset[str]] = {}
        self.bytes = 0
        self._image = x.ndim  # dimensions of a tensor that has the input's axes for itself
        self._put(x, Field(tuple(Axis(dim, x.shape[dim]) for dim in range(2, x.ndim)), is_global=False))

    def field(self, tensor: Tensor) -> Field:
        if id(tensor) in self._fields:
            return self._fields[id(tensor)][1]
        return dataclasses.replace(UNKNOWN, ancestors=self._written.get(_memory(tensor), NONE))

    def mark(self, tensor: Tensor, name: str) -> None:
        """From now on, what is made of the tensor is made of `name`, whatever that is made of."""
        self._put(tensor, dataclasses.replace(self.field(tensor), ancestors=frozenset({name})))

    def _put(self, tensor: Tensor, field: Field) -> None:
        self._fields[id(tensor)] = (tensor, field)

    def _depends(self, tensor: Tensor) -> bool:
        return id(tensor) in self._fields or _memory(tensor) in self._written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in iter_tensors((args, *kwargs.values())) if self._depends(t)]
        output = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2].rstrip("_")
        if not inputs or name.endswith("_like") or name.startswith(("new_", "empty")):
            return output
        fields = [self.field(t) for t in inputs]
        made_of = NONE.union(*(f.ancestors for f in fields))
        known = {_memory(t): f.op for t, f in zip(inputs, fields, strict=True)}
        for written in _written(func, args, kwargs):
            if len(inputs) > 1 or written is not inputs[0]:
                self._invalidate_aliases(written, made_of)
        for tensor in iter_tensors(output):
            field = propagate(func, name, args, inputs, fields, tensor, self._image)
            memory = _memory(tensor)
            if memory not in known:
                self.bytes += tensor.numel() * tensor.element_size()
            # Other shapes and types of the same values are still made by what made the values.
            view = memory in known and not func._schema.is_mutable and tensor.numel() == inputs[0].numel()
            op = known[memory] if view else fields[0].op if name == "_to_copy" else name
            self._put(tensor, dataclasses.replace(field, op=op, ancestors=made_of))
        return output

    def _invalidate_aliases(self, written: Tensor, made_of: frozenset[str]) -> None:
        """`written` takes in something else: what other tensors in the same memory see is not known any more."""
        memory = _memory(written)
        self._written[memory] = self._written.get(memory, NONE) | made_of
        for tensor, field in list(self._fields.values()):
            if tensor is not written and _memory(tensor) == memory:
                self._put(tensor, dataclasses.replace(UNKNOWN, ancestors=field.ancestors | made_of))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation works on in place."""
    given = {**kwargs, **dict(zip((a.name for a in func._schema.arguments), args, strict=False))}
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [given[name] for name in written if isinstance(given.get(name), Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

