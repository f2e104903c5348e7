"""Full-gradient: what the input and every bias of the network contribute to the score, by one pass each way.

A network of pieces that are linear is, at a picture x,  S(x) = dS/dx x + sum_b dS/db b  over all biases b, each counted
at every place at which it is added (Srinivas & Fleuret, NeurIPS 2019, proposition 1). The network's own functions are
watched while it runs, so that nothing of it is touched, and each bias is weighed as soon as its gradient passes by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convscope.attribution.context import MethodContext
from convscope.attribution.methods.gradient import INTERPOLATION, grad_batch_size
from convscope.engine.batching import balanced_chunks


def full_grad(question: MethodContext) -> tuple[Tensor, dict[str, Tensor]]:
    """M = psi(dS/dx x) + sum_l sum_c psi(dS/db_l b_l)_c  over the layers l with places. Unsigned.

    Srinivas & Fleuret, Full-Gradient Representation for Neural Network Visualization, NeurIPS 2019, equation 9; psi
    takes the absolute value, scales a layer's to [0, 1] for each picture and upsamples bilinearly from corner to
    corner, as in the authors' program; channels are summed up. Their 1e-6 under the fraction is left out: it would make
    the map depend on the scale of the score.

    Biases are those of convolutions and linear layers, whatever else is added that does not depend on the picture,
    beta - gamma mu / sigma of batch normalisation, and what a clamp (ReLU6) gives where it is saturated. S minus
    the sum of all of these is "completeness_error": nought but for rounding if the network has linear pieces only, and
    of any size if it has not (SiLU, sigmoid gates, layer norm, attention).
    """
    x = question.x
    maps, errors = [], []
    channels = 1 if getattr(question.model.adapter, "channels_first", True) else -1
    for part in balanced_chunks(range(len(x)), grad_batch_size(question)):
        at = slice(part[0], part[-1] + 1)
        heard = _BiasCollector(len(part), x.shape[2:], channels)
        with heard:
            leaf, scores = question.forward(x[at], torch.arange(at.start, at.stop, device=x.device))
        found, total = [], []
        for gradient in question.backward(leaf, scores):
            heard.accumulate(x[at], 1, gradient)
            found.append(heard.map)
            total.append(heard.total)
            heard.begin()
        maps.append(torch.stack(found, 1))
        errors.append(scores.detach() - torch.stack(total, 1).to(scores))
        question.report_progress(at.stop / len(x))
    return torch.cat(maps), {"completeness_error": torch.cat(errors)}


class _BiasCollector(TorchFunctionMode):
    """Hears of every bias while a batch of `count` pictures runs, and adds up what it contributes on the way back.

    `channels` is the dimension of the channels where a function does not tell.
    """

    def __init__(self, count: int, size: Sequence[int], channels: int) -> None:
        super().__init__()
        self.count, self.size, self.channels = count, tuple(size), channels
        self.centred: tuple[Tensor, Tensor] | None = None  # what something was taken off from, and what that comes to
        self.begin()

    def begin(self) -> None:
        self.map: Any = 0
        self.total: Any = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0].strip("_")
        name = FUNCTION_ALIASES.get(name, name)
        pair = _Pair.of(name, args, kwargs)
        if self.centred is not None and name != "get" and _among(self.centred[0], args, kwargs):
            goes_on = pair is not None and pair.x is self.centred[0] and not pair.begins and not pair.inverts
            if not goes_on:
                self.flush()
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled():
            if name in _LAYERS:
                position, channels = _LAYERS[name]
                bias = args[position] if len(args) > position else kwargs.get("bias")
                self.add_bias(output, _column(bias, output.ndim, channels), channels)
            elif name == "batch_norm":
                self.add_bias(output, _of_batch_norm(func, args, kwargs), 1)
            elif name in _BOUNDS:
                self.add_bias(output, _saturated(name, output, args[1:], kwargs), self.channels)
            elif pair is not None:
                self.follow(pair, output)
        return output

    def follow(self, pair: _Pair, output: Tensor) -> None:
        """A batch normalisation that is written out, mean off, scaled, offset on, has one bias and not two."""
        goes_on = self.centred is not None and pair.x is self.centred[0]
        before = self.centred[1] if self.centred is not None and goes_on else None
        if pair.name in ("mul", "div"):
            if before is not None:
                self.centred = output, before * pair.other if pair.name == "mul" else before / pair.other
        elif pair.begins:
            self.flush()
            self.centred = output, -pair.other
        else:
            if before is not None:
                self.centred = None
            self.add_bias(output, pair.other if before is None else before + pair.other, self.channels)

    def flush(self) -> None:
        """What was taken off is a bias by itself, where nothing was put on behind it."""
        if self.centred is not None:
            self.add_bias(*self.centred, self.channels)
            self.centred = None

    def add_bias(self, output: Tensor, bias: Tensor | None, channels: int) -> None:
        if bias is not None:
            # Belongs to this value of the tensor; what is written into it later does not see the hook.
            output.register_hook(partial(self.accumulate, bias.detach(), channels))  # type: ignore[no-untyped-call]

    def accumulate(self, bias: Tensor, channels: int, gradient: Tensor) -> None:
        term = gradient.float() * bias
        self.total = self.total + term.reshape(self.count, -1).sum(1)
        if term.ndim == 2 + len(self.size):
            evenly = _unit(term.abs()).sum(channels, keepdim=True).movedim(channels, 1)
            mode = INTERPOLATION[len(self.size)]
            self.map = self.map + F.interpolate(evenly, self.size, mode=mode, align_corners=True)[:, 0]


class _Pair(NamedTuple):
    """A sum or product of x, which depends on the picture, and `other`, which does not."""

    name: str
    x: Tensor
    other: Tensor
    begins: bool  # x - other
    inverts: bool  # other / x

    @classmethod
    def of(cls, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Pair | None:
        if name not in ("add", "sub", "rsub", "mul", "div") or len(args) + ("other" in kwargs) != 2:
            return None
        x, other = (*args, *(kwargs[key] for key in ("other",) if key in kwargs))
        swapped = not (isinstance(x, Tensor) and x.requires_grad)
        x, other = (other, x) if swapped else (x, other)
        if not (isinstance(x, Tensor) and x.requires_grad) or (isinstance(other, Tensor) and other.requires_grad):
            return None
        other = torch.as_tensor(other, device=x.device) * (1 if swapped else kwargs.get("alpha", 1))
        return cls(name, x, other, name == "sub" and not swapped, name == "div" and swapped)


def _among(tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    given = [*args, *kwargs.values()]
    return any(tensor is part for each in given for part in (each if isinstance(each, list | tuple) else [each]))


def _unit(maps: Tensor) -> Tensor:
    """Each picture's own lowest value at 0, its highest at 1."""
    rest = tuple(range(1, maps.ndim))
    low, high = maps.amin(rest, keepdim=True), maps.amax(rest, keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


_LAYERS = {
    **{f"conv{kind}{n}d": (2, 1) for n in (1, 2, 3) for kind in ("", "_transpose")},
    "convolution": (2, 1),
    "linear": (2, -1),
}
"""Functions with a bias: which of the arguments it is, and the dimension of the output along which it lies."""

_BOUNDS: dict[str, tuple[Any, Any]] = {"relu6": (0, 6), "hardtanh": (-1, 1), "clamp": (None, None)}
"""Functions that cut off, and where unless they are told."""

FUNCTION_ALIASES = {
    **{"clip": "clamp", "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div"},
    **{"iadd": "add", "radd": "add", "isub": "sub", "imul": "mul", "rmul": "mul", "truediv": "div", "itruediv": "div"},
}
"""Other names of the same function, underscores taken off."""


def _column(bias: Tensor | None, ndim: int, channels: int) -> Tensor | None:
    return None if bias is None else bias.reshape(-1, *[1] * (ndim - 2)) if channels == 1 else bias


def _of_batch_norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """beta - gamma mu / sigma: what the function makes of 0. None where mean and variance are the batch's own."""
    if args[5] if len(args) > 5 else kwargs.get("training", False):
        return None
    x: Tensor = args[0]
    bias: Tensor = func(x.new_zeros(1, x.shape[1], *[1] * (x.ndim - 2)), *args[1:], **kwargs)
    return bias


def _saturated(name: str, output: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What is given whatever goes in: a bound, where it is reached."""
    keys = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    given = () if name == "relu6" else args
    low, high = (given[i] if len(given) > i else kwargs.get(key, _BOUNDS[name][i]) for i, key in enumerate(keys))
    reached = torch.zeros_like(output, dtype=torch.bool)
    if low is not None:
        reached |= output <= low
    if high is not None:
        reached |= output >= high
    return output.detach() * reached if bool(reached.any()) else None
