"""Fuse convolutions with zero padding before them and batch normalisation and an activation after them.

`find_chains` runs a copy of the network's modules and finds chains of which nothing else reads an intermediate tensor.
`with_fusion` makes the convolutions of the copy compute their chains; the other modules of a chain return what they are
given. The network itself is not changed, so that other threads may run it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from convscope.engine.function_modes import Args, Function, FunctionMode, Kwargs, without_function_modes
from convscope.engine.nested import iter_tensors
from convscope.engine.torch_ops import onednn_convolution, supports_onednn

R = TypeVar("R")
Run = Callable[[Tensor, nn.Module], R]  # runs a batch on a network, or on a copy of it
Pads = tuple[tuple[int, int], ...]  # zeros before and after each spatial axis

MAX_CHANNELS_PER_GROUP = 4  # up to here a convolution is bound by memory, and a larger kernel costs little
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Activations and their names in oneDNN.
HARDTANH: dict[type[nn.Module], str] = dict.fromkeys((nn.ReLU6, nn.Hardtanh), "hardtanh")
ACTIVATIONS = HARDTANH | {nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish"}
SAME_PADDING = "timm.layers.conv2d_same.Conv2dSame"  # a convolution that pads its input as TensorFlow does
NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"  # batch normalisation with its activation inside


@dataclass
class ConvChain:
    """A convolution of the copy and the modules after it; called with an input, it computes all of them."""

    conv: Any
    onednn: bool
    modules: list[Any] = field(default_factory=list)  # after the convolution
    end: float = math.inf  # the number of modules before the first tensor that other functions read
    padded: dict[Pads, tuple[Any, ...]] = field(default_factory=dict)  # arguments of the convolution that pads

    def takes(self, module: nn.Module) -> bool:
        """Whether a module can be computed after the last one."""
        is_last = any(type(before) in ACTIVATIONS for before in self.modules)
        is_next = not self.modules if isinstance(module, NORMS) else self.onednn and not is_last
        return is_next and not module._forward_pre_hooks  # noqa: SLF001

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Fold batch normalisation into the weights of the convolution."""
        for norm in self.modules[:1]:
            if isinstance(norm, NORMS):
                tensors = self.conv.weight, self.conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
                weight, bias, mean, var, *affine = (None if t is None else t.cpu().double() for t in tensors)
                fused = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, *affine)  # type: ignore[arg-type]
                parameters = (tensor.detach().to(self.conv.weight) for tensor in fused)  # rounded once
                self.conv.__dict__["_parameters"] = dict(zip(("weight", "bias"), parameters, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the chain."""
        if not self.onednn:
            y: Tensor = type(self.conv).forward(self.conv, x)
            return y
        pads = same_padding(self.conv, x.shape) if class_name(self.conv) == SAME_PADDING else ()
        # A kernel grows by its uneven padding: 16 taps for 9.
        is_cheap = self.conv.weight.shape[1] <= MAX_CHANNELS_PER_GROUP and max(self.conv.dilation) == 1
        if not is_cheap and any(before != after for before, after in pads):
            x, pads = F.pad(x, [end for pair in reversed(pads) for end in pair]), ()
        if pads not in self.padded:
            self.padded[pads] = self._pad(pads)
        last = self.modules[-1]
        bounds = [last.min_val, last.max_val] if isinstance(last, nn.Hardtanh) else []
        return onednn_convolution(x, self.padded[pads], ACTIVATIONS.get(type(last), "none"), bounds)

    @torch.no_grad()
    def _pad(self, pads: Pads) -> tuple[Any, ...]:
        """Return a convolution that pads its input itself, both ends of an axis alike.

        If the last end needs more zeros, both get them, and the kernel gets zeros at its first end.
        """
        conv = self.conv
        weight = F.pad(conv.weight, [taps for before, after in reversed(pads) for taps in (after - before, 0)])
        padding = [after for _, after in pads] or conv.padding
        return weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups


def same_padding(conv: Any, shape: Sequence[int]) -> Pads:
    """Return the zeros that timm's Conv2dSame pads an input with: those that TensorFlow does."""
    pads = []
    for length, kernel, stride, dilation in zip(shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True):
        total = max((-(-length // stride) - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)


def copy_modules(network: nn.Module) -> nn.Module:
    """Copy a network's modules in inference mode; the copies share parameters, buffers and hooks with the originals."""
    copies = {module: object.__new__(type(module)) for module in network.modules()}
    for module, copied in copies.items():
        children = {name: child if child is None else copies[child] for name, child in module._modules.items()}  # noqa: SLF001
        copied.__dict__.update(module.__dict__, _modules=children, training=False)
    return copies[network]


def find_chains(run: Run[R], network: nn.Module, x: Tensor) -> tuple[R, nn.Module, list[ConvChain]]:
    """Run a batch, with gradients if they are enabled; return the result, a copy, and what can be fused in it."""
    copied, finder = copy_modules(network), _ChainFinder()
    recorders = {module: record for module in copied.modules() if (record := finder.recorder(module)) is not None}
    for module, record in recorders.items():
        module.__dict__["forward"] = record
    with finder:
        result = run(x, copied)
    for module in recorders:
        del module.__dict__["forward"]
    return result, copied, finder.fusible()


def with_fusion(run: Run[R], copied: nn.Module, chains: Sequence[ConvChain]) -> Callable[[Tensor], R]:
    """Return `run` on a copy that computes chains at their convolutions, while the parameters stay the same."""
    pending = _Pending()
    for chain in chains:
        chain.fold_norm()
        chain.conv.__dict__["forward"] = partial(pending.start, chain)
        for module in chain.modules:
            module.__dict__["forward"] = partial(pending.skip, module)

    def fused(x: Tensor) -> R:
        pending.modules.clear()
        result = run(x, copied)
        if pending.modules:
            raise RuntimeError("a module that was computed at the convolution before it did not run")
        return result

    return fused


class _Pending(threading.local):
    """Outputs of chains, with the modules that will be called with them and have nothing left to do."""

    def __init__(self) -> None:
        self.modules: dict[int, tuple[Tensor, list[nn.Module]]] = {}  # by the identity of the output

    def start(self, chain: ConvChain, x: Tensor) -> Tensor:
        """Compute a chain: the forward pass of its convolution."""
        y = chain(x)
        if chain.modules:
            self.modules[id(y)] = y, list(chain.modules)
        return y

    def skip(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what was computed at the convolution: the forward pass of a module after it."""
        _, modules = self.modules.get(id(x), (x, []))
        if not modules or modules[0] is not module:  # it is also used elsewhere
            y: Tensor = type(module).forward(module, x)
            return y
        del modules[0]
        if not modules:
            del self.modules[id(x)]
        return _after_norm(module, x)


class _ChainFinder(FunctionMode):
    """Find the chains of a pass: modules record their tensors, the function mode sees who else reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.chains: dict[nn.Module, ConvChain | None] = {}  # by convolution; None cannot be fused
        # Outputs by identity, which stays unique while they are kept, with their chains and the modules before them.
        self.outputs: dict[int, tuple[Tensor, ConvChain, int]] = {}

    def fusible(self) -> list[ConvChain]:
        """Return the chains that can be fused, up to the first tensor that other functions read."""
        chains = [chain for chain in self.chains.values() if chain is not None]
        for chain in chains:
            chain.modules = [module for i, module in enumerate(chain.modules) if i < chain.end]
        return [chain for chain in chains if chain.modules]

    def recorder(self, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """Return the forward pass that takes a module's place; None if the module can be no part of a chain."""
        name, parameters = class_name(module), module._parameters  # noqa: SLF001
        if "forward" in module.__dict__:
            return None
        if type(module) in CONVOLUTIONS or name == SAME_PADDING:
            return partial(self._convolve, module) if "weight" in parameters else None
        is_norm = (type(module) in NORMS or name == NORM_ACT) and module.running_mean is not None
        return partial(self._continue, module) if is_norm or type(module) in ACTIVATIONS else None

    def intercept(self, function: Function, _name: str, args: Args, kwargs: Kwargs) -> Any:
        """Call a function outside of the recorded modules, whatever it reads of a tensor."""
        self._read(*iter_tensors((args, kwargs)))
        return function(*args, **kwargs)

    def _read(self, *tensors: Tensor) -> None:
        for _, chain, length in (self.outputs[id(x)] for x in tensors if id(x) in self.outputs):
            chain.end = min(chain.end, length)

    def _convolve(self, conv: Any, x: Tensor) -> Tensor:
        self._read(x)
        with without_function_modes():
            y: Tensor = type(conv).forward(conv, x)
            onednn = not torch.is_grad_enabled() and supports_onednn(x)
        is_plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        chain = ConvChain(conv, is_plain and onednn)
        self.chains[conv] = None if conv in self.chains else chain  # the modules after two calls may differ
        return self._record(chain, conv, y)

    def _continue(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run batch normalisation or an activation; add it to the chain that ends in its input, if it can be fused."""
        _, chain, length = self.outputs.get(id(x), (x, None, 0))
        if chain is None or length < len(chain.modules) or length >= chain.end or not chain.takes(module):
            chain = None
            self._read(x)
        with without_function_modes():
            forward: Any = nn.BatchNorm2d.forward if isinstance(module, NORMS) else type(module).forward
            y: Tensor = forward(module, x)
        if chain is None:
            return _after_norm(module, y)
        chain.modules.append(module)
        return self._record(chain, module, y)

    def _record(self, chain: ConvChain, module: nn.Module, y: Tensor) -> Tensor:
        self.outputs[id(y)] = y, chain, len(chain.modules)
        y = _after_norm(module, y)
        if module._forward_hooks:  # noqa: SLF001
            self._read(y)
        return y


def _after_norm(module: Any, x: Tensor) -> Tensor:
    """Run what timm's batch normalisation contains besides itself."""
    y: Tensor = module.act(module.drop(x)) if class_name(module) == NORM_ACT else x
    return y


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
