"""Quicker passes: what follows a convolution, batch normalisation and activation, is done within it.

The same numbers but for rounding. Nothing of the network is changed: while a pass runs, its calls of torch's functions
are answered by others.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convscope.packing import tensors_in

R = TypeVar("R")
Folds = dict[int, tuple["Chain", Callable[[Tensor], Tensor]]]  # under the identity of the convolution's weight

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
NORMALISATION = inspect.signature(F.batch_norm)
# The names by which oneDNN knows them.
ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    F.relu6: "hardtanh",
    F.hardtanh: "hardtanh",
    F.silu: "swish",
    F.hardswish: "hardswish",
}
# What is asked of a tensor without looking at its values.
METADATA = frozenset({"dim", "size", "numel", "stride", "is_contiguous", "is_floating_point", "__len__"})


@dataclass
class Chain:
    """A convolution and what follows it, of which nobody else sees what is handed on within."""

    arguments: tuple[Any, ...]  # of the convolution: weight, bias, stride, padding, dilation, groups
    function: Any
    shape: torch.Size  # of what came in
    fuses: bool  # oneDNN takes activations in, and weights laid out beforehand
    normalised: dict[str, Any] | None = None
    activation: tuple[str, list[float]] | None = None
    extends: bool = True

    def steps(self) -> list[str]:
        """What follows the convolution, in its order."""
        given = {"normalisation": self.normalised, "activation": self.activation}
        return [step for step, what in given.items() if what is not None]

    def folded(self) -> Callable[[Tensor], Tensor]:
        """The whole chain as one function."""
        weight, bias, stride, padding, dilation, groups = self.arguments
        if (bn := self.normalised) is not None:
            scale = (bn["running_var"] + bn["eps"]).rsqrt()
            scale = scale if bn["weight"] is None else scale * bn["weight"]
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
            bias = -bn["running_mean"] * scale if bias is None else (bias - bn["running_mean"]) * scale
            bias = bias if bn["bias"] is None else bias + bn["bias"]
        if not self.fuses:
            return lambda x: self.function(x, weight, bias, stride, padding, dilation, groups)
        name, numbers = self.activation or ("none", [])
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
        self.weights: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in METADATA or (name == "__get__" and not isinstance(output, Tensor)):
            return output
        for tensor in tensors_in((args, kwargs)):
            if (inside := self.within.get(id(tensor))) is not None:
                self.chains = [chain for chain in self.chains if chain is not inside[1]]
            if (end := self.ends.get(id(tensor))) is not None:
                self._goes_on(end[1], func, args, kwargs, tensor, output)
        if func in CONVOLUTIONS and _plain(args, kwargs):
            chain = Chain(args[1:], func, args[0].shape, self.activations)
            self.chains.append(chain)
            self.weights.append(id(args[1]))
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
            chain.activation = ACTIVATIONS[func], _limits(func, args, kwargs)
        else:
            first = False
        chain.extends = first
        if first and output is not tensor:
            self.within[id(tensor)] = tensor, chain
            self.ends[id(output)] = output, chain


class _Folding(TorchFunctionMode):
    """Answers the convolutions of known chains with the whole chain, and what follows them with what it is given."""

    def __init__(self, folds: Folds) -> None:
        super().__init__()
        self.folds = folds
        self.done: dict[int, tuple[Tensor, list[str]]] = {}  # what is done already and will be asked for

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS and _plain(args, kwargs):
            known = self.folds.get(id(args[1]))
            if known is None:
                return func(*args, **kwargs)
            output = known[1](args[0])
            self.done[id(output)] = output, known[0].steps()
            return output
        if func is F.batch_norm or func in ACTIVATIONS:
            tensor, steps = self.done.get(id(args[0]) if args else 0, (None, []))
            if tensor is not None and steps[0] == _step(func):
                steps.pop(0)
                if not steps:  # let it go
                    del self.done[id(tensor)]
                return tensor
        return func(*args, **kwargs)


def _step(func: Any) -> str:
    return "normalisation" if func is F.batch_norm else "activation"


def plan(run: Callable[[Tensor], Any], x: Tensor, *, gradients: bool = False) -> Folds:
    """What can be folded of the pass `run(x)`; with `gradients` only what lets them through, the normalisation."""
    with torch.no_grad(), _Watching(not gradients and _fuses(x)) as watching:
        run(x)
    calls = Counter(watching.weights)
    # Weights that serve twice may be followed by different things.
    chains = {id(c.arguments[0]): c for c in watching.chains if c.steps() and calls[id(c.arguments[0])] == 1}
    with torch.no_grad():
        return {key: (chain, chain.folded()) for key, chain in chains.items()}


def quickened(run: Callable[[Tensor], R], folds: Folds) -> Callable[[Tensor], R]:
    """`run`, folded. For as long as the network's weights stay what they were when `folds` were made."""

    def quick(x: Tensor) -> R:
        with _Folding(folds):
            return run(x)

    return quick


def _fuses(x: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return plain and built and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _limits(func: Any, args: Any, kwargs: Any) -> list[float]:
    """Between which numbers a clipping activation lets through."""
    if func is F.relu6:
        return [0.0, 6.0]
    if func is not F.hardtanh:
        return []
    bound = inspect.signature(F.hardtanh).bind(*args, **kwargs)
    bound.apply_defaults()
    return [float(bound.arguments["min_val"]), float(bound.arguments["max_val"])]


def _plain(args: Any, kwargs: Any) -> bool:
    """Whether a convolution is called as torch's own layers call it."""
    return not kwargs and len(args) == 7 and not isinstance(args[4], str)
