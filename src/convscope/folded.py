"""Quicker passes without gradients: what follows a convolution, batch normalisation and activation, is done within it.

The same numbers but for rounding. Nothing of the network is changed: while a pass runs, its calls of torch's functions
are answered by others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

R = TypeVar("R")

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
NORMALISATION = inspect.signature(F.batch_norm)
# Under the names and with the numbers by which oneDNN knows them.
ACTIVATIONS: dict[Any, tuple[str, list[float]]] = {
    F.relu: ("relu", []),
    torch.relu: ("relu", []),
    torch.relu_: ("relu", []),
    Tensor.relu: ("relu", []),
    Tensor.relu_: ("relu", []),
    F.relu6: ("hardtanh", [0.0, 6.0]),
    F.silu: ("swish", []),
    F.hardswish: ("hardswish", []),
}
# What is asked of a tensor without looking at its values.
METADATA = frozenset({"dim", "size", "numel", "stride", "is_contiguous", "is_floating_point", "__len__"})


@dataclass
class Chain:
    """A convolution and what follows it, of which nobody else sees what is handed on within."""

    arguments: tuple[Any, ...]  # of the convolution: weight, bias, stride, padding, dilation, groups
    function: Any
    shape: torch.Size  # of what came in
    normalised: dict[str, Any] | None = None
    activation: tuple[str, list[float]] | None = None
    extends: bool = True

    def folded(self) -> Callable[[Tensor], Tensor]:
        """The whole chain as one function."""
        weight, bias, stride, padding, dilation, groups = self.arguments
        if (bn := self.normalised) is not None:
            scale = (bn["running_var"] + bn["eps"]).rsqrt()
            scale = scale if bn["weight"] is None else scale * bn["weight"]
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
            bias = -bn["running_mean"] * scale if bias is None else (bias - bn["running_mean"]) * scale
            bias = bias if bn["bias"] is None else bias + bn["bias"]
        if self.activation is None:
            return lambda x: self.function(x, weight, bias, stride, padding, dilation, groups)
        name, numbers = self.activation
        sizes = padding, stride, dilation
        pointwise = torch.ops.mkldnn._convolution_pointwise  # as torch.compile has it
        packed = weight
        if weight.ndim == 4:
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *sizes, groups, self.shape)
        return lambda x: pointwise(x, packed, bias, *sizes, groups, name, numbers, "")


class _Watching(TorchFunctionMode):
    """Finds the chains of one pass. Keeps every tensor that passes, so that none is taken for another."""

    def __init__(self, activations: bool) -> None:
        super().__init__()
        self.activations = activations
        self.ends: dict[int, tuple[Tensor, Chain]] = {}  # the last tensor of every chain so far
        self.within: dict[int, tuple[Tensor, Chain]] = {}  # those handed on inside
        self.chains: list[Chain] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in METADATA or (name == "__get__" and not isinstance(output, Tensor)):
            return output
        for tensor in _tensors((args, kwargs)):
            if (inside := self.within.get(id(tensor))) is not None:
                self.chains = [chain for chain in self.chains if chain is not inside[1]]
            if (end := self.ends.get(id(tensor))) is not None:
                self._goes_on(end[1], func, args, kwargs, tensor, output)
        if func in CONVOLUTIONS and _plain(args, kwargs):
            chain = Chain(args[1:], func, args[0].shape)
            self.chains.append(chain)
            self.ends[id(output)] = output, chain
        return output

    def _goes_on(self, chain: Chain, func: Any, args: Any, kwargs: Any, tensor: Tensor, output: Any) -> None:
        first = chain.extends and bool(args) and args[0] is tensor
        if first and func is F.batch_norm and chain.normalised is None and chain.activation is None:
            bound = NORMALISATION.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            first = not given["training"] and given["running_mean"] is not None
            chain.normalised = given if first else None
        elif first and self.activations and func in ACTIVATIONS and chain.activation is None:
            chain.activation = ACTIVATIONS[func]
        else:
            first = False
        chain.extends = first
        if first and output is not tensor:
            self.within[id(tensor)] = tensor, chain
            self.ends[id(output)] = output, chain


class _Folding(TorchFunctionMode):
    """Answers the convolutions of known chains with the whole chain, and what follows them with what it is given."""

    def __init__(self, chains: dict[int, tuple[Chain, Callable[[Tensor], Tensor]]]) -> None:
        super().__init__()
        self.chains = chains
        self.done: dict[int, tuple[Tensor, list[bool]]] = {}  # whether what may follow is done already

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS and _plain(args, kwargs):
            known = self.chains.get(id(args[1]))
            if known is None or known[0].shape[1:] != args[0].shape[1:]:
                return func(*args, **kwargs)
            output = known[1](args[0])
            self.done[id(output)] = output, [known[0].normalised is not None, known[0].activation is not None]
            return output
        if func is F.batch_norm or func in ACTIVATIONS:
            _, done = self.done.get(id(args[0]), (None, [False, False])) if args else (None, [False, False])
            which = 0 if func is F.batch_norm else 1
            if done[which]:
                done[which] = False
                return args[0]
        return func(*args, **kwargs)


def plan(run: Callable[[Tensor], Any], x: Tensor) -> dict[int, tuple[Chain, Callable[[Tensor], Tensor]]]:
    """What can be folded of the pass `run(x)`, by the identity of the convolutions' weights."""
    with torch.no_grad(), _Watching(_fuses(x)) as watching:
        run(x)
    chains = [chain for chain in watching.chains if chain.normalised is not None or chain.activation is not None]
    weights = [id(chain.arguments[0]) for chain in watching.chains]
    with torch.no_grad():  # weights that serve twice may be followed by different things
        return {
            key: (c, c.folded()) for c in chains if weights.count(key := id(c.arguments[0])) == 1
        }


def quickened(
    run: Callable[[Tensor], R], chains: dict[int, tuple[Chain, Callable[[Tensor], Tensor]]]
) -> Callable[[Tensor], R]:
    """`run`, folded."""

    def quick(x: Tensor) -> R:
        with _Folding(chains):
            return run(x)

    return quick


def _fuses(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _plain(args: Any, kwargs: Any) -> bool:
    """Whether a convolution is called as torch's own layers call it."""
    return not kwargs and len(args) == 7 and not isinstance(args[4], str)


def _tensors(parts: Any) -> Iterator[Tensor]:
    if isinstance(parts, Tensor):
        yield parts
    elif isinstance(parts, dict):
        yield from _tensors(list(parts.values()))
    elif isinstance(parts, list | tuple):
        for part in parts:
            yield from _tensors(part)
