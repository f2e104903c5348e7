"""Trace a forward pass: the receptive field of every tensor, and the layers whose outputs it was computed from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - documented, but has no public name

from convscope.engine.data_flow import IMAGE
from convscope.engine.nested import iter_tensors
from convscope.engine.receptive_field import UNKNOWN, Axis, Field
from convscope.engine.receptive_field_rules import operation_name, propagate

if TYPE_CHECKING:
    from torch._ops import OpOverload

_NO_ANCESTORS: frozenset[str] = frozenset()
CASTS = frozenset({"_to_copy", "quantize_per_tensor", "quantize_per_channel", "dequantize"})


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow receptive fields through all operations on tensors that depend on the input.

    Parameters
    ----------
    x : Tensor
        The network's input: (N, C, H, W), or a batch of signals or volumes.
    weights : callable
        Returns the network's parameters and buffers; called when the first operation runs.

    Attributes
    ----------
    allocated_bytes : int
        Bytes of memory that operations have allocated so far for tensors that depend on the input.
    draws_random_numbers : bool
        Whether an operation drew random numbers.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep PyTorch from importing its compiler, which takes two seconds, at the first operation that is traced."""
        return False

    def __init__(self, x: Tensor, weights: Callable[[], Iterable[Tensor]] = tuple) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated_bytes = 0
        self.draws_random_numbers = False
        self._weights = weights
        # Memory of tensors made of weights and constants alone; the tensors are referenced, as those below.
        self._constants: dict[int, list[Tensor]] | None = None
        # Tensors are referenced, so that their identities and addresses are not reused.
        self._fields: dict[int, tuple[Tensor, Field]] = {}
        # Ancestors of memory into which tensors that depend on the input were written.
        self._ancestors_of_memory: dict[int, frozenset[str]] = {}
        self._input_ndim = x.ndim
        axes = tuple(Axis(dim, x.shape[dim]) for dim in range(2, x.ndim))
        self._set_field(x, Field(axes, is_global=False, ancestors=frozenset({IMAGE})))

    def field(self, tensor: Tensor) -> Field:
        """Return the receptive field of a tensor."""
        if id(tensor) in self._fields:
            return self._fields[id(tensor)][1]
        return replace(UNKNOWN, ancestors=self._ancestors_of_memory.get(_address(tensor), _NO_ANCESTORS))

    def is_constant(self, tensor: Tensor) -> bool:
        """Check whether a tensor was made of weights and constants alone."""
        return not self._depends_on_input(tensor) and _address(tensor) in self._known_constants()

    def _known_constants(self) -> dict[int, list[Tensor]]:
        if self._constants is None:
            self._constants = {}
            self._add_constants(t for t in self._weights() if t.layout == torch.strided)
        return self._constants

    def _add_constants(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._known_constants().setdefault(_address(tensor), []).append(tensor)

    def mark(self, tensor: Tensor, name: str) -> None:
        """Make `name` the only ancestor of the tensor, and so of what is computed from it."""
        self._set_field(tensor, replace(self.field(tensor), ancestors=frozenset({name})))

    def _set_field(self, tensor: Tensor, field: Field) -> None:
        self._fields[id(tensor)] = (tensor, field)

    def _depends_on_input(self, tensor: Tensor) -> bool:
        return id(tensor) in self._fields or _address(tensor) in self._ancestors_of_memory

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        arguments = list(iter_tensors((args, *kwargs.values())))
        inputs = [t for t in arguments if self._depends_on_input(t)]
        output = func(*args, **kwargs)
        name = operation_name(func)
        if torch.Tag.nondeterministic_seeded in func.tags and not name.startswith("_scaled_dot_product"):
            self.draws_random_numbers = True
        makes_constants = name.endswith("_like") or name.startswith(("new_", "empty"))
        if makes_constants or all(map(self.is_constant, arguments)):
            self._add_constants(iter_tensors(output))
        if makes_constants or not inputs:
            return output
        fields = [self.field(t) for t in inputs]
        ancestors = _NO_ANCESTORS.union(*(f.ancestors for f in fields))
        op_of_memory = {_address(t): f.op for t, f in zip(inputs, fields, strict=True)}
        for mutated in _mutated_arguments(func, args, kwargs):
            if len(inputs) > 1 or mutated is not inputs[0]:
                self._invalidate_aliases(mutated, ancestors)
        for tensor in iter_tensors(output):
            field = propagate(func, args, inputs, fields, tensor, self._input_ndim)
            address = _address(tensor)
            if address not in op_of_memory:
                self.allocated_bytes += tensor.numel() * tensor.element_size()
            # Views and casts of the same values count as made by the operation that made the values.
            is_view = (
                address in op_of_memory
                and not func._schema.is_mutable  # noqa: SLF001 - schemas have no public name
                and tensor.numel() == inputs[0].numel()
            )
            op = op_of_memory[address] if is_view else fields[0].op if name in CASTS else name
            self._set_field(tensor, replace(field, op=op, ancestors=ancestors))
        return output

    def _invalidate_aliases(self, mutated: Tensor, ancestors: frozenset[str]) -> None:
        """Mark the fields of other tensors in the same memory as unknown, once another tensor was written into it."""
        address = _address(mutated)
        self._ancestors_of_memory[address] = self._ancestors_of_memory.get(address, _NO_ANCESTORS) | ancestors
        for tensor, field in list(self._fields.values()):
            if tensor is not mutated and _address(tensor) == address:
                self._set_field(tensor, replace(UNKNOWN, ancestors=field.ancestors | ancestors))


class UncompiledTrace(Trace):  # type: ignore[no-untyped-call]
    """A trace whose own code is not compiled when the network is; PyTorch wraps the method that it defines."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Exempt the method below from compilation."""
        return True

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        return super().__torch_dispatch__(func, types, args, kwargs)


def start_trace(x: Tensor, weights: Callable[[], Iterable[Tensor]] = tuple) -> Trace:
    """Return a trace of a forward pass on `x`; networks can only be compiled where the compiler has been imported."""
    kind = UncompiledTrace if "torch._dynamo" in sys.modules else Trace
    return kind(x, weights)


def _mutated_arguments(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """Return the arguments that an operation works on in place."""
    arguments = func._schema.arguments  # noqa: SLF001 - schemas have no public name
    values = {**kwargs, **dict(zip((a.name for a in arguments), args, strict=False))}
    names = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for name in names if isinstance(value := values.get(name), Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
