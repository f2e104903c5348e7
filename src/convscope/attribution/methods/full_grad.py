"""FullGrad: the contributions of the input and of every bias to the score, from one forward and one backward pass.

For a piecewise linear network, the score at an image x is ``S(x) = dS/dx x + sum_b dS/db b``, where b runs over all
biases at all positions where they are added (Srinivas and Fleuret, NeurIPS 2019, proposition 1). Biases are observed as
PyTorch's functions are called, so that the network is not modified. Each is multiplied by its gradient as soon as the
backward pass reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.context import Extras, MethodContext
from convscope.attribution.methods.gradient import INTERPOLATION, grad_batch_size
from convscope.engine.batching import balanced_chunks
from convscope.engine.function_modes import FunctionMode
from convscope.errors import ConvscopeError

Args = Sequence[Any]
Kwargs = Mapping[str, Any]


def full_grad(context: MethodContext) -> tuple[Tensor, Extras]:
    """Sum the gradient's product with the input and with every bias (FullGrad, unsigned).

    ::

        M = psi(dS/dx x) + sum_l sum_c psi(dS/db_l b_l)_c

    ``l`` runs over the layers with spatial extent and ``c`` over channels. ``psi`` takes absolute values, scales them
    to [0, 1] for each image and layer, and upsamples bilinearly with aligned corners. The authors' constant 1e-6 in the
    scaling is omitted: it would make the map depend on the score's scale.

    Biases are those of convolutions and linear layers, other constants that are added,
    ``beta - gamma mu / sigma`` of batch normalisation, and the bound of a clamp (such as ReLU6) where it saturates.

    Parameters
    ----------
    context : MethodContext

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
    extras : dict
        "completeness_error" (B, T): S minus the sum of all contributions. It is 0 up to rounding for piecewise linear
        networks, and of any size for others (SiLU, sigmoid gates, layer normalisation, attention).

    References
    ----------
    Srinivas and Fleuret, Full-Gradient Representation for Neural Network Visualization, NeurIPS 2019, equation 9.
    """
    if context.model.adapter.name == "torchscript":
        raise ConvscopeError("full-grad observes every bias, which TorchScript hides; use integrated-gradients")
    x = context.x
    maps, errors = [], []
    channel_dim = 1 if getattr(context.model.adapter, "channels_first", True) else -1
    for positions in balanced_chunks(range(len(x)), grad_batch_size(context)):
        images = slice(positions[0], positions[-1] + 1)
        collector = _BiasCollector(len(positions), x.shape[2:], channel_dim)
        with collector:
            leaf, scores = context.forward(x[images], torch.arange(images.start, images.stop, device=x.device))
        target_maps, totals = [], []
        for gradient in context.backward(leaf, scores):
            collector.accumulate(x[images], 1, gradient)
            target_maps.append(collector.map)
            totals.append(collector.total)
            collector.reset()
        maps.append(torch.stack(target_maps, 1))
        errors.append(scores.detach() - torch.stack(totals, 1).to(scores))
        context.report_progress(images.stop / len(x))
    return torch.cat(maps), {"completeness_error": torch.cat(errors)}


class _BiasCollector(FunctionMode):
    """Observe every bias while a batch runs, and accumulate the contributions in the backward pass.

    Parameters
    ----------
    num_images : int
    input_size : sequence of int
        The spatial size of the map.
    channel_dim : int
        The dimension of the channels where a function does not determine it.

    Attributes
    ----------
    map : Tensor of shape (num_images, ...)
    total : Tensor of shape (num_images,)
        The sum of all contributions.
    """

    def __init__(self, num_images: int, input_size: Sequence[int], channel_dim: int) -> None:
        super().__init__()
        self.num_images, self.input_size, self.channel_dim = num_images, tuple(input_size), channel_dim
        self.pending: tuple[Tensor, Tensor] | None = None  # a difference, and its bias so far
        self.reset()

    def reset(self) -> None:
        """Start the next target."""
        self.map = self.total = torch.zeros(())

    def intercept(self, function: Callable[..., Any], name: str, args: Args, kwargs: Kwargs) -> Any:
        """Call the function; find the bias in it."""
        arithmetic = _Arithmetic.parse(name, args, kwargs)
        if self.pending is not None and name != "get" and _is_argument(self.pending[0], args, kwargs):
            continues = arithmetic is not None and arithmetic.x is self.pending[0]
            if arithmetic is None or not continues or arithmetic.subtracts or arithmetic.inverts:
                self._add_pending()
        output = function(*args, **kwargs)
        if isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled():
            self._observe(name, function, args, kwargs, arithmetic, output)
        return output

    def _observe(
        self,
        name: str,
        func: Callable[..., Any],
        args: Args,
        kwargs: Kwargs,
        arithmetic: _Arithmetic | None,
        output: Tensor,
    ) -> None:
        """Find the bias in one call."""
        if name in _LAYERS:
            position, channel_dim = _LAYERS[name]
            bias = args[position] if len(args) > position else kwargs.get("bias")
            self.add_bias(output, _align_bias(bias, output.ndim, channel_dim), channel_dim)
        elif name == "batch_norm":
            self.add_bias(output, _batch_norm_bias(func, args, kwargs), 1)
        elif name in _BOUNDS:
            self.add_bias(output, _saturated_values(name, output, args[1:], kwargs), self.channel_dim)
        elif arithmetic is not None:
            self._observe_arithmetic(arithmetic, output)

    def _observe_arithmetic(self, arithmetic: _Arithmetic, output: Tensor) -> None:
        """Join the steps of a batch normalisation written as arithmetic (minus, times, plus) to a single bias."""
        continues = self.pending is not None and arithmetic.x is self.pending[0]
        bias = self.pending[1] if self.pending is not None and continues else None
        constant = arithmetic.constant
        if arithmetic.name in ("mul", "div"):
            if bias is not None:
                self.pending = output, bias * constant if arithmetic.name == "mul" else bias / constant
        elif arithmetic.subtracts:
            self._add_pending()
            self.pending = output, -constant
        else:
            if bias is not None:
                self.pending = None
            self.add_bias(output, constant if bias is None else bias + constant, self.channel_dim)

    def _add_pending(self) -> None:
        """Treat a subtracted constant as a bias of its own, because no addition follows."""
        if self.pending is not None:
            self.add_bias(*self.pending, self.channel_dim)
            self.pending = None

    def add_bias(self, output: Tensor, bias: Tensor | None, channel_dim: int) -> None:
        """Accumulate the contribution of a bias, which was added to give `output`, in the backward pass."""
        if bias is not None:
            # The hook belongs to this value of the tensor; later in-place changes do not trigger it.
            output.register_hook(partial(self.accumulate, bias.detach(), channel_dim))  # type: ignore[no-untyped-call]

    def accumulate(self, bias: Tensor, channel_dim: int, gradient: Tensor | None) -> None:
        """Add the contribution `gradient` times `bias` to the total and, if it has spatial extent, to the map."""
        if gradient is None:  # none arrives
            return
        contribution = gradient.float() * bias
        self.total = self.total + contribution.reshape(self.num_images, -1).sum(1)
        if contribution.ndim == 2 + len(self.input_size):
            scaled = _scale_to_unit(contribution.abs()).sum(channel_dim, keepdim=True).movedim(channel_dim, 1)
            mode = INTERPOLATION[len(self.input_size)]
            self.map = self.map + F.interpolate(scaled, self.input_size, mode=mode, align_corners=True)[:, 0]


class _Arithmetic(NamedTuple):
    """A sum or product of a tensor that depends on the image and a constant.

    `subtracts` marks ``x - constant``, `inverts` marks ``constant / x``.
    """

    name: str
    x: Tensor
    constant: Tensor
    subtracts: bool
    inverts: bool

    @classmethod
    def parse(cls, name: str, args: Args, kwargs: Kwargs) -> _Arithmetic | None:
        """Interpret a function call; None if it is no sum or product with a constant."""
        if name not in ("add", "sub", "rsub", "mul", "div") or len(args) + ("other" in kwargs) != 2:
            return None
        x, constant = (*args, *(kwargs[key] for key in ("other",) if key in kwargs))
        swapped = not _depends_on_image(x)
        x, constant = (constant, x) if swapped else (x, constant)
        if not _depends_on_image(x) or _depends_on_image(constant):
            return None
        constant = torch.as_tensor(constant, device=x.device) * (1 if swapped else kwargs.get("alpha", 1))
        return cls(name, x, constant, name == "sub" and not swapped, name == "div" and swapped)


def _depends_on_image(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_argument(tensor: Tensor, args: Args, kwargs: Kwargs) -> bool:
    """Check whether a tensor is an argument of a call, or in a list of them."""
    values = [*args, *kwargs.values()]
    return any(tensor is part for value in values for part in (value if isinstance(value, list | tuple) else [value]))


def _scale_to_unit(maps: Tensor) -> Tensor:
    """Scale each image's values to [0, 1]; constant ones become 0."""
    axes = tuple(range(1, maps.ndim))
    low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


_LAYERS = {
    **{f"conv{kind}{n}d": (2, 1) for n in (1, 2, 3) for kind in ("", "_transpose")},
    "convolution": (2, 1),
    "linear": (2, -1),
}
"""Functions with a bias: its position among the arguments, and the channels' dimension in the output."""

_BOUNDS: dict[str, tuple[float | None, float | None]] = {"relu6": (0, 6), "hardtanh": (-1, 1), "clamp": (None, None)}
"""Functions with bounds, and their default bounds."""


def _align_bias(bias: Tensor | None, ndim: int, channel_dim: int) -> Tensor | None:
    """Reshape a bias (C,) so that it broadcasts to an output of `ndim` dimensions."""
    if bias is None or channel_dim != 1:
        return bias
    return bias.reshape(-1, *[1] * (ndim - 2))


def _batch_norm_bias(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Tensor | None:
    """Return what batch normalisation makes of 0, ``beta - gamma mu / sigma``; None if it uses batch statistics."""
    if args[5] if len(args) > 5 else kwargs.get("training", False):
        return None
    x: Tensor = args[0]
    bias: Tensor = func(x.new_zeros(1, x.shape[1], *[1] * (x.ndim - 2)), *args[1:], **kwargs)
    return bias


def _saturated_values(name: str, output: Tensor, args: Args, kwargs: Kwargs) -> Tensor | None:
    """Return the output where it is at a bound and 0 elsewhere; None if no value is at a bound."""
    keys = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    bounds = () if name == "relu6" else args
    low, high = (bounds[i] if len(bounds) > i else kwargs.get(key, _BOUNDS[name][i]) for i, key in enumerate(keys))
    saturated = torch.zeros_like(output, dtype=torch.bool)
    if low is not None:
        saturated |= output <= low
    if high is not None:
        saturated |= output >= high
    return output.detach() * saturated if bool(saturated.any()) else None
