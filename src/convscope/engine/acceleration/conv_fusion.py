"""Fuse convolutions with zero padding before them and batch normalisation and an activation after them.

`find_fusions` observes one pass and finds chains of these functions of which no other function reads an intermediate
tensor. `with_fusion` computes a chain at its convolution; the chain's other functions return what they are given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.engine.function_modes import Args, Function, FunctionMode, Kwargs
from convscope.engine.nested import iter_tensors, replace_tensor
from convscope.engine.torch_ops import onednn_convolution, pack_weight, supports_onednn

R = TypeVar("R")
Zeros = tuple[tuple[int, int], ...]  # before and after each spatial axis

PIECES = frozenset({"conv_fusion", "padding"})
MAX_CHANNELS_PER_GROUP = 4  # up to here a convolution is bound by memory, and a larger kernel costs little
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
# Activations and their names in oneDNN.
ACTIVATIONS: dict[Function, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    **{F.relu6: "hardtanh", F.hardtanh: "hardtanh", F.silu: "swish", F.hardswish: "hardswish"},
}
# Functions that do not read a tensor's values.
METADATA = {"dim", "ndimension", "size", "numel", "nelement", "len", "stride", "is_contiguous", "is_floating_point"}


class ConvArguments(NamedTuple):
    """The arguments of a convolution after its input."""

    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


@dataclass
class ConvChain:
    """A convolution and the functions around it; called with an input, it computes all of them."""

    function: Function
    arguments: ConvArguments
    input_shape: torch.Size
    onednn: bool
    padded: bool  # padded with zeros before
    output: Tensor | None  # of the last function of the chain
    is_open: bool = True  # the next function can join
    steps: list[str] = field(default_factory=list)  # the functions after the convolution
    batch_norm: dict[str, Any] = field(default_factory=dict)
    activation: tuple[str, list[float]] = ("none", [])
    variants: dict[Zeros, ConvArguments | None] = field(default_factory=dict)  # the fused convolution, per padding

    def __call__(self, x: Tensor, zeros: Zeros = ()) -> Tensor:
        """Compute the chain for `x` with `zeros` around it."""
        if zeros not in self.variants:
            self.variants[zeros] = self._fuse(zeros)
        arguments = self.variants[zeros]
        if arguments is None:
            return self(pad_zeros(x, zeros))
        y: Tensor = onednn_convolution(x, arguments, *self.activation) if self.onednn else self.function(x, *arguments)
        return y

    @torch.no_grad()
    def _fuse(self, zeros: Zeros) -> ConvArguments | None:
        weight, bias, *geometry, groups = self.arguments
        if norm := self.batch_norm:
            scale = (norm["running_var"] + norm["eps"]).rsqrt() * (1 if norm["weight"] is None else norm["weight"])
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
            bias = ((0 if bias is None else bias) - norm["running_mean"]) * scale
            bias = bias if norm["bias"] is None else bias + norm["bias"]
        axes = weight.ndim - 2
        stride, padding, dilation = ((a,) * axes if isinstance(a, int) else (*a,) * (axes // len(a)) for a in geometry)
        fused = absorb_padding(ConvArguments(weight, bias, stride, padding, dilation, groups), zeros)
        if fused is None or not self.onednn or axes != 2:
            return fused
        return fused._replace(weight=pack_weight(fused, self.input_shape))


Fusions = dict[int, ConvChain]  # by the identity of the convolution's weight


def absorb_padding(arguments: ConvArguments, zeros: Zeros) -> ConvArguments | None:
    """Return a convolution that pads its input itself; None if that is impossible or slower.

    A convolution pads both ends of an axis alike. If one end needs more zeros, both ends get them, and the kernel gets
    zeros at its other end.
    """
    if not zeros:
        return arguments
    ends = [(p + before, p + after) for p, (before, after) in zip(arguments.padding, zeros, strict=True)]
    excess = [(max(pair) - pair[0], max(pair) - pair[1]) for pair in ends]
    if any(end % step for pair, step in zip(excess, arguments.dilation, strict=True) for end in pair):
        return None
    if any(map(any, excess)) and arguments.weight.shape[1] > MAX_CHANNELS_PER_GROUP:
        return None
    taps = tuple((a // step, b // step) for (a, b), step in zip(excess, arguments.dilation, strict=True))
    return arguments._replace(weight=pad_zeros(arguments.weight, taps), padding=tuple(map(max, ends)))


def pad_zeros(x: Tensor, zeros: Zeros) -> Tensor:
    """Pad the last axes with zeros."""
    return F.pad(x, [end for ends in reversed(zeros) for end in ends])


def find_fusions(run: Callable[[Tensor], R], x: Tensor, pieces: Collection[str] = PIECES) -> tuple[R, Fusions]:
    """Run a batch, with gradients if they are enabled; return the result and what can be fused."""
    with _FusionFinder(pieces) as finder:
        result = run(x)
    fusions = {key: chain for key, chain in finder.chains.items() if chain is not None}
    for chain in fusions.values():
        chain.output = None
        chain.padded &= finder.skips_padding
    return result, {key: chain for key, chain in fusions.items() if chain.steps or chain.padded}


def with_fusion(run: Callable[[Tensor], R], fusions: Fusions) -> Callable[[Tensor], R]:
    """Return `run` with fused convolutions, valid while the network's parameters stay the same."""

    def fused(x: Tensor) -> R:
        with _FusionMode(fusions):
            return run(x)

    return fused


class _FusionFinder(FunctionMode):
    """Find the chains of a pass. Their tensors are kept, so that identities stay unique."""

    def __init__(self, pieces: Collection[str]) -> None:
        super().__init__()
        self.gradients = torch.is_grad_enabled()
        self.chains: dict[int, ConvChain | None] = {}  # by the weight's identity; None cannot be fused
        self.tensors: dict[int, tuple[Tensor, int | None]] = {}  # outputs, with the key of their chain; paddings
        self.last_padding: Tensor | None = None  # the output of the last function, if that is a padding
        # With gradients, the larger kernels are slower for a single image.
        self.skips_padding = "padding" in pieces and not self.gradients

    def intercept(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> Any:
        """Call the function; extend, end or discard the chains that its arguments belong to."""
        output = function(*args, **kwargs)
        if name in METADATA or (name == "get" and not isinstance(output, Tensor)):
            return output
        is_conv = _is_layer(function, args, kwargs)
        padded = is_conv and args[0] is self.last_padding
        # Paddings are skipped only if convolutions, and nothing else, take their outputs at once.
        self.skips_padding &= padded or self.last_padding is None
        for tensor in iter_tensors((args, kwargs)):
            _, key = self.tensors.get(id(tensor), (tensor, 0))
            if key is None:
                self.skips_padding &= padded and tensor is args[0]
            elif (chain := self.chains.get(key)) is not None and chain.output is not tensor:
                self.chains[key] = None
            elif chain is not None:
                chain.is_open &= bool(args) and args[0] is tensor and self._extend(chain, function, args, kwargs)
                if chain.is_open:
                    chain.output, self.tensors[id(output)] = output, (output, key)
        if is_conv:
            onednn, key = not self.gradients and supports_onednn(args[0]), id(args[1])
            chain = ConvChain(function, ConvArguments(*args[1:]), args[0].shape, onednn, padded, output)
            self.chains[key] = None if key in self.chains else chain  # the functions after two calls may differ
            self.tensors[id(output)] = output, key
        self.last_padding = None if _zeros(function, args, kwargs) is None else output
        if self.last_padding is not None:
            self.tensors[id(output)] = output, None
        return output

    def _extend(self, chain: ConvChain, function: Function, args: Args, kwargs: Kwargs) -> bool:
        """Add a function to a chain if it can be fused."""
        if not chain.is_open or "activation" in chain.steps:
            return False
        if function is F.batch_norm and not chain.steps:
            norm = _bind(function, args, kwargs)
            if norm["training"] or norm["running_mean"] is None:
                return False
            chain.batch_norm = norm
            chain.steps.append("batch_norm")
            return True
        if function not in ACTIVATIONS or not chain.onednn:
            return False
        call = _bind(function, args, kwargs) if function is F.hardtanh else {"min_val": 0.0, "max_val": 6.0}
        name = ACTIVATIONS[function]
        chain.activation = name, [call["min_val"], call["max_val"]] if name == "hardtanh" else []
        chain.steps.append("activation")
        return True


class _FusionMode(FunctionMode):
    """Compute known chains at their convolutions; the chains' other functions return what they are given."""

    NAMES = frozenset(
        {"pad", "batch_norm"} | {function.__name__.strip("_") for function in (*CONVOLUTIONS, *ACTIVATIONS)}
    )

    def __init__(self, fusions: Fusions) -> None:
        super().__init__()
        self.fusions, self.names = fusions, self.NAMES
        self.skips_padding = any(chain.padded for chain in fusions.values())
        self.unpadded: tuple[Tensor, Zeros] | None = None  # a tensor that is still to be padded
        self.computed: dict[int, tuple[Tensor, list[str]]] = {}  # outputs of chains, and the functions to skip

    def intercept(self, function: Function, _name: str, args: Args, kwargs: Kwargs) -> Any:
        """Call the function, or what takes its place."""
        if self.skips_padding and (zeros := _zeros(function, args, kwargs)) is not None:
            (x,) = iter_tensors((args[:1], kwargs))
            self.unpadded, self.names = (x.view_as(x), zeros), None  # any function may be next
            return self.unpadded[0]
        if _is_layer(function, args, kwargs) and (chain := self.fusions.get(id(args[1]))) is not None:
            zeros = ()
            if self.unpadded is not None and args[0] is self.unpadded[0]:
                zeros, self.unpadded, self.names = self.unpadded[1], None, self.NAMES
            output = chain(args[0], zeros)
            if chain.steps:
                self.computed[id(output)] = output, chain.steps.copy()
            return output
        step = "batch_norm" if function is F.batch_norm else "activation" if function in ACTIVATIONS else None
        computed, steps = self.computed.get(id(args[0]) if args else 0, (None, []))
        if computed is not None and steps[0] == step:
            steps.pop(0)
            if not steps:  # drop the reference
                del self.computed[id(computed)]
            return computed
        if self.unpadded is not None and any(tensor is self.unpadded[0] for tensor in iter_tensors((args, kwargs))):
            args, kwargs = replace_tensor((args, kwargs), self.unpadded[0], pad_zeros(*self.unpadded))
        return function(*args, **kwargs)


def _is_layer(function: Function, args: Args, kwargs: Kwargs) -> bool:
    """Check whether a call is a convolution as PyTorch's own layers call it."""
    return function in CONVOLUTIONS and not kwargs and len(args) == 7 and not isinstance(args[4], str)


def _zeros(function: Function, args: Args, kwargs: Kwargs) -> Zeros | None:
    """Return the zeros that a call pads maps (N, C, ...) with; None if it does anything else."""
    if function is not F.pad:
        return None
    call = _bind(function, args, kwargs)
    axes, ends = call["input"].ndim - 2, [int(end) for end in call["pad"]]
    if call["mode"] != "constant" or call["value"] or len(ends) > 2 * axes or min(ends, default=0) < 0:
        return None
    pairs = list(zip(ends[::2], ends[1::2], strict=True))
    return (*[(0, 0)] * (axes - len(pairs)), *reversed(pairs))


def _bind(function: Function, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
