"""Prepare a network for LRP: find its layers, merge batch normalisation, and set the rules of other functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convscope.attribution.methods.relu_rules import OTHER_ACTIVATIONS, RELU_LIKE, straight_through
from convscope.engine.function_modes import FunctionMode, is_inplace
from convscope.errors import ConvscopeError

EPSILON = 1e-6  # stabilises the denominators of sums and averages

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class LayerGraph:
    """Record the layers of a network that get rules, and their batch normalisations, in one forward pass.

    Use it as a context manager around the pass.

    Parameters
    ----------
    module : Module
    x : Tensor
        The input of the pass.

    Attributes
    ----------
    layers : list of Module
        Convolutions and linear layers, in the order in which they run.
    first : Module or None
        The first layer, if it is a convolution of the input itself.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
        self.layers: list[nn.Module] = []
        self.first: nn.Module | None = None
        self._outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}  # by id: layer, output, its version
        self._batch_norms: list[tuple[nn.Module, nn.Module]] = []  # layers and what normalises their output
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for module in self.module.modules():
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
                self._handles.append(module.register_forward_hook(self._record_layer))
            elif isinstance(module, BATCH_NORMS):
                self._handles.append(module.register_forward_pre_hook(self._record_batch_norm))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def merge_batch_norms(self) -> None:
        """Merge each batch normalisation into the layer whose output it normalises."""
        self._outputs.clear()
        if not self.layers:
            raise ConvscopeError("lrp finds no PyTorch module that is a convolution or linear layer in this network")
        for layer, norm in self._batch_norms:
            _merge_batch_norm(layer, norm)

    def _record_layer(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if layer in self.layers:
            raise ConvscopeError(f"lrp cannot handle a layer that runs twice; {type(layer).__name__} does")
        self.layers.append(layer)
        self._outputs[id(output)] = layer, output, _version(output)
        if len(self.layers) == 1 and isinstance(layer, CONVOLUTIONS) and torch.equal(args[0], self.x.to(args[0])):
            self.first = layer

    def _record_batch_norm(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        layer, output, version = self._outputs.get(id(args[0]), (norm, None, 0))
        unchanged = output is args[0] and _version(output) == version
        if unchanged and norm.running_mean is not None:
            self._batch_norms.append((layer, norm))


def _version(tensor: Tensor) -> int:
    """Return PyTorch's count of in-place changes."""
    return tensor._version  # noqa: SLF001 - there is no public accessor


def _merge_batch_norm(layer: Any, norm: Any) -> None:
    """Set ``w = w gamma / sigma`` and ``b = (b - mu) gamma / sigma + beta``; make the normalisation the identity."""
    output_dim = 1 if isinstance(layer, TRANSPOSED) else 0
    if output_dim == 1 and layer.groups > 1:
        return  # the output channels of grouped transposed convolutions do not lie along one dimension
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    bias = (0 if layer.bias is None else layer.bias) - norm.running_mean
    shape = [1] * layer.weight.ndim
    shape[output_dim] = -1
    layer.weight = nn.Parameter((layer.weight * scale.view(shape)).detach(), requires_grad=False)
    layer.bias = nn.Parameter((bias * scale + (0 if norm.bias is None else norm.bias)).detach(), requires_grad=False)
    norm.weight, norm.bias, norm.eps = None, None, 0.0
    norm.running_mean, norm.running_var = torch.zeros_like(scale), torch.ones_like(scale)


class LrpMode(FunctionMode):
    """Propagate relevance through functions that are no layers, while active.

    Sums, averages and products with numbers distribute it to their terms by the epsilon rule; terms that do not depend
    on the image get none. Activations and batch normalisation pass it on unchanged.

    Raises
    ------
    ConvscopeError
        For functions that LRP has no rule for.
    """

    def intercept(self, function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function with the backward pass of its rule."""
        tensors = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        if not tensors or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if name in _REFUSED or (name in _PRODUCTS and len(tensors) > 1):
            raise ConvscopeError(
                f"lrp has no rule for {name} of tensors that depend on the image (normalisation by the image's own "
                "statistics, squeeze-and-excitation, attention); use full-grad or integrated-gradients instead"
            )
        if name in _UNCHANGED:
            return straight_through(function, args[0], args[1:], kwargs, _unchanged)
        if name in _LINEAR or (name in ("add", "sub") and len(tensors) > 1):
            return _apply_epsilon_rule(function, args, kwargs, is_inplace(function))
        return function(*args, **kwargs)


def _apply_epsilon_rule(func: Callable[..., Tensor], args: Sequence[Any], kwargs: Any, inplace: bool) -> Tensor:
    """Call a function that is linear in its tensors; distribute relevance to these in proportion to their terms."""
    positions = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]

    def call(*tensors: Tensor) -> Tensor:
        arguments = list(args)
        for i, tensor in zip(positions, tensors, strict=True):
            arguments[i] = tensor.clone() if inplace else tensor
        return func(*arguments, **kwargs)

    output: Tensor = _EpsilonRule.apply(call, *(args[i] for i in positions))
    return args[0].copy_(output) if inplace else output


class _EpsilonRule(torch.autograd.Function):
    """Compute ``y = call(*x)``, linear in x; pass back ``R_x = x dy/dx R_y / (y + eps sign y)``."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], *x: Tensor) -> Tensor:
        ctx.call, ctx.x = call, [t.detach().clone() for t in x]  # copies: the network may modify its tensors
        return call(*x)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        x = [t.requires_grad_() for t in ctx.x]
        with torch.enable_grad():
            y = ctx.call(*x)
        ratio = relevance[0] / (y + EPSILON * torch.where(y < 0, -1.0, 1.0)).detach()
        return None, *(t.detach() * g for t, g in zip(x, torch.autograd.grad(y, x, ratio), strict=True))


def _unchanged(relevance: Tensor) -> Tensor:
    return relevance


_LINEAR = frozenset(
    {"mean", "sum", "neg", "mul", "div", "rsub"}
    | {f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)}
)
_UNCHANGED = frozenset({"batch_norm", *RELU_LIKE, *OTHER_ACTIVATIONS})
_PRODUCTS = frozenset({"mul", "div", "matmul", "bmm", "einsum"})
_REFUSED = frozenset({"layer_norm", "group_norm", "instance_norm", "scaled_dot_product_attention"})
