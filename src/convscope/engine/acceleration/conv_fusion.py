"""Quicker passes: the padding before a convolution and what follows it, normalisation and activation, is done within.

The same numbers but for rounding. Nothing of the network is changed: while a pass runs, its calls of torch's functions
are answered by others.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convscope.engine.acceleration.inplace_clamp import inplace_clamp
from convscope.engine.nested import iter_tensors, replace_tensor

R = TypeVar("R")
OnBatch = Callable[[Tensor], Tensor]
Pads = tuple[tuple[int, int], ...]  # zeros in front of and behind each axis of a map
# A chain, and what does all of it, under the identity of the convolution's weight.
Folds = dict[int, tuple["ConvChain", Callable[[Tensor, Pads | None], Tensor]]]

RTOL = 1e-3  # of the largest value; far more than rounding makes of a pass, far less than a mistake
MAX_CHANNELS_PER_GROUP = (
    4  # maps that each of a convolution's outputs looks at: its time is that of reading and writing, not of adding
)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
NORMALISATION = inspect.signature(F.batch_norm)
PADDING = inspect.signature(F.pad)
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
# Those whose gradient can be told from what comes out.
RECTIFIERS = {function: name for function, name in ACTIVATIONS.items() if name in ("relu", "hardtanh")}
# What is asked of a tensor without looking at its values.
METADATA = frozenset(
    {"dim", "ndimension", "size", "numel", "nelement", "__len__", "stride", "is_contiguous"}
    | {"is_floating_point", "is_complex", "is_inference"}
)


@dataclass
class ConvChain:
    """A convolution and what follows it, of which nobody else sees what is handed on within."""

    arguments: tuple[Any, ...]  # of the convolution: weight, bias, stride, padding, dilation, groups
    function: Any
    shape: torch.Size  # of what came in
    fuses: bool  # oneDNN takes activations in, and weights laid out beforehand
    padded: bool = False  # what comes in is laid in zeros first
    normalised: dict[str, Any] | None = None
    activation: tuple[str, list[float]] | None = None
    activated: tuple[Tensor, int] | None = None  # what comes out, and how often it had been written into then
    extends: bool = True

    def steps(self) -> list[str]:
        """What follows the convolution, in its order."""
        given = {"normalisation": self.normalised, "activation": self.activation}
        return [step for step, what in given.items() if what is not None]

    def folded(self) -> Callable[[Tensor, Pads | None], Tensor]:
        """The whole chain as one function of a batch and of the zeros to be laid around it."""
        weight, bias, stride, padding, dilation, groups = self.arguments
        if (bn := self.normalised) is not None:
            scale = (bn["running_var"] + bn["eps"]).rsqrt()
            scale = scale if bn["weight"] is None else scale * bn["weight"]
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
            bias = -bn["running_mean"] * scale if bias is None else (bias - bn["running_mean"]) * scale
            bias = bias if bn["bias"] is None else bias + bn["bias"]

        axes = weight.ndim - 2
        plain = self._as_one(weight, bias, stride, padding, dilation, groups)
        window = ConvGeometry(weight, _each(axes, padding), _each(axes, dilation))

        @cache
        def padded(pads: Pads) -> OnBatch:
            with torch.no_grad():
                own = absorb_padding(window, pads) if len(pads) == axes else None
            if own is None:
                return lambda x: plain(_laid_around(x, pads))
            return self._as_one(own.weight, bias, stride, own.padding, dilation, groups)

        return lambda x, pads: plain(x) if pads is None else padded(pads)(x)

    def _as_one(self, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> OnBatch:
        name, numbers = self.activation or ("none", [])
        if not self.fuses:
            if self.activation is None:
                return lambda x: self.function(x, weight, bias, stride, padding, dilation, groups)
            low, high = numbers or (0.0, math.inf)
            return lambda x: inplace_clamp(self.function(x, weight, bias, stride, padding, dilation, groups), low, high)
        sizes = padding, stride, dilation
        pointwise = torch.ops.mkldnn._convolution_pointwise  # as torch.compile has it
        packed = weight
        if weight.ndim == 4:
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *sizes, groups, self.shape)
        return lambda x: pointwise(x, packed, bias, *sizes, groups, name, numbers, "")


class ConvGeometry(NamedTuple):
    """What a convolution looks through: its weight, and its padding and dilation along each axis."""

    weight: Tensor
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def absorb_padding(window: ConvGeometry, pads: Pads) -> ConvGeometry | None:
    """A window that pads by itself what would be padded by `pads` first; None if that is not possible, or not quicker.

    A convolution pads both ends of an axis alike. Where more zeros are wanted at one end, it gets as many at both, and
    zeros at the other end of its kernel, which look past them.
    """
    around = [(p + before, p + behind) for p, (before, behind) in zip(window.padding, pads, strict=True)]
    padding = tuple(max(ends) for ends in around)
    more = [(p - before, p - behind) for p, (before, behind) in zip(padding, around, strict=True)]
    if any(end % d for ends, d in zip(more, window.dilation, strict=True) for end in ends):
        return None
    if any(map(any, more)) and window.weight.shape[1] > MAX_CHANNELS_PER_GROUP:
        return None
    taps = tuple((a // d, b // d) for (a, b), d in zip(more, window.dilation, strict=True))
    return window._replace(weight=_laid_around(window.weight, taps), padding=padding)


def _laid_around(x: Tensor, pads: Pads) -> Tensor:
    """With so many zeros around each of the last axes."""
    return F.pad(x, [end for ends in reversed(pads) for end in ends])


def _zeros_around(func: Any, args: Any, kwargs: Any) -> Pads | None:
    """What a call lays around maps (N, C, ...); None if it is not `torch.nn.functional.pad`, or does anything else."""
    if func is not F.pad:
        return None
    bound = PADDING.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    axes = given["input"].ndim - 2
    ends = [(int(a), int(b)) for a, b in zip(given["pad"][::2], given["pad"][1::2], strict=True)]
    if given["mode"] != "constant" or given["value"] or len(ends) > axes or min(map(min, ends), default=0) < 0:
        return None
    return (*[(0, 0)] * (axes - len(ends)), *reversed(ends))


def _each(axes: int, given: int | tuple[int, ...]) -> tuple[int, ...]:
    """A number for each axis, of one for all of them or one for each."""
    numbers = (given,) if isinstance(given, int) else tuple(given)
    return numbers * axes if len(numbers) == 1 else numbers


class _FusionFinder(TorchFunctionMode):
    """Finds the chains of one pass. Keeps every tensor that passes, so that none is taken for another."""

    def __init__(self, activations: Mapping[Any, str], fuses: bool) -> None:
        super().__init__()
        self.activations, self.fuses = activations, fuses
        self.ends: dict[int, tuple[Tensor, ConvChain]] = {}  # the last tensor of every chain so far
        self.within: dict[int, tuple[Tensor, ConvChain]] = {}  # those handed on inside
        self.chains: list[ConvChain] = []
        self.weights: list[int] = []
        self.padded: dict[int, Tensor] = {}
        self.latest: Tensor | None = None  # of what is padded, as long as nothing has happened since
        self.only_before = True  # nothing is padded but what a convolution, and nobody else, takes at once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in METADATA or (name == "__get__" and not isinstance(output, Tensor)):
            return output
        convolves = func in CONVOLUTIONS and _plain(args, kwargs)
        padded = convolves and args[0] is self.latest
        self.only_before &= padded or self.latest is None
        for tensor in iter_tensors((args, kwargs)):
            self.only_before &= id(tensor) not in self.padded or (padded and tensor is args[0])
            if (inside := self.within.get(id(tensor))) is not None:
                self.chains = [chain for chain in self.chains if chain is not inside[1]]
            if (end := self.ends.get(id(tensor))) is not None:
                self._goes_on(end[1], func, args, kwargs, tensor, output)
        if convolves:
            chain = ConvChain(args[1:], func, args[0].shape, self.fuses, padded)
            self.chains.append(chain)
            self.weights.append(id(args[1]))
            self.ends[id(output)] = output, chain
        self.latest = None
        if _zeros_around(func, args, kwargs) is not None:
            self.latest = self.padded[id(output)] = output
        return output

    def _goes_on(self, chain: ConvChain, func: Any, args: Any, kwargs: Any, tensor: Tensor, output: Any) -> None:
        first = chain.extends and bool(args) and args[0] is tensor
        if first and func is F.batch_norm and chain.normalised is None and chain.activation is None:
            bound = NORMALISATION.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            first = not given["training"] and given["running_mean"] is not None
            chain.normalised = given if first else None
        elif first and func in self.activations and chain.activation is None:
            chain.activation = self.activations[func], _limits(func, args, kwargs)
            chain.activated = output, _written(output)
        else:
            first = False
        chain.extends = first
        if first and output is not tensor:
            self.within[id(tensor)] = tensor, chain
            self.ends[id(output)] = output, chain


class _FusionMode(TorchFunctionMode):
    """Answers the convolutions of known chains with the whole chain, and what follows them with what it is given."""

    def __init__(self, folds: Folds) -> None:
        super().__init__()
        self.folds = folds
        self.pads = any(chain.padded for chain, _ in folds.values())
        self.short: tuple[Tensor, Pads] | None = None  # what is still to be padded, and how
        self.done: dict[int, tuple[Tensor, list[str]]] = {}  # what is done already and will be asked for

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.pads and (pads := _zeros_around(func, args, kwargs)) is not None:
            (x,) = iter_tensors((args[:1], kwargs))
            output = x.view_as(x)
            self.short = output, pads
            return output
        if func in CONVOLUTIONS and _plain(args, kwargs) and (known := self.folds.get(id(args[1]))) is not None:
            x, pads = args[0], None
            if self.short is not None and x is self.short[0]:
                pads, self.short = self.short[1], None
            output = known[1](x, pads)
            if steps := known[0].steps():
                self.done[id(output)] = output, steps
            return output
        if func is F.batch_norm or func in ACTIVATIONS:
            tensor, steps = self.done.get(id(args[0]) if args else 0, (None, []))
            if tensor is not None and steps[0] == _step(func):
                steps.pop(0)
                if not steps:  # let it go
                    del self.done[id(tensor)]
                return tensor
        if self.short is not None and any(tensor is self.short[0] for tensor in iter_tensors((args, kwargs))):
            args, kwargs = replace_tensor((args, kwargs), self.short[0], _laid_around(*self.short))
        return func(*args, **kwargs)


def _written(tensor: Tensor) -> int:
    """How often a tensor has been written into; of those made in inference mode torch does not keep count."""
    return 0 if tensor.is_inference() else tensor._version


def _step(func: Any) -> str:
    return "normalisation" if func is F.batch_norm else "activation"


def find_fusions(run: Callable[[Tensor], Any], x: Tensor, *, gradients: bool = False) -> Folds:
    """What can be folded of the pass `run(x)`; with `gradients` normalisation and rectifiers only."""
    fuses = not gradients and _fuses(x)
    activations = RECTIFIERS if gradients else ACTIVATIONS if fuses else {}
    with torch.no_grad(), _FusionFinder(activations, fuses) as watching:
        run(x)
    calls = Counter(watching.weights)
    for chain in watching.chains:
        chain.padded &= watching.only_before
        # What is written into later tells nothing of a rectifier's gradient.
        if gradients and chain.activated is not None and _written(chain.activated[0]) != chain.activated[1]:
            chain.activation = None
        chain.activated = None
    # Weights that serve twice may be followed by different things.
    once = [c for c in watching.chains if calls[id(c.arguments[0])] == 1]
    chains = {id(c.arguments[0]): c for c in once if c.steps() or c.padded}
    with torch.no_grad():
        return {key: (chain, chain.folded()) for key, chain in chains.items()}


def with_fusion(run: Callable[[Tensor], R], folds: Folds) -> Callable[[Tensor], R]:
    """`run`, folded. For as long as the network's weights stay what they were when `folds` were made."""

    def quick(x: Tensor) -> R:
        with _FusionMode(folds):
            return run(x)

    return quick


def outputs_match(run: Callable[[Tensor], Any], quick: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether both give the same but for rounding. They do not where something that is no function of torch's, an
    extension say, looks at what is handed on within a chain."""
    with torch.no_grad():
        pairs = zip(iter_tensors(run(x)), iter_tensors(quick(x)), strict=True)
        return all(bool((a - b).abs().max() <= RTOL * a.abs().max()) for a, b in pairs if a.is_floating_point())


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
