"""Other rules for the way back through rectifiers, without touching the network.

A rectifier is what cuts off at 0: ReLU, ReLU6 and other clamps from 0 up, as modules, functions or methods, in place or
not. Where something else lets negative values through (leaky ReLU, ELU, SiLU, GELU), neither paper has a rule, and the
gradient passes as usual; as it does through max-pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convscope.attribution.context import MethodContext
from convscope.engine.capture import ForwardResult
from convscope.errors import ConvscopeError

Rule = Callable[[Callable[..., Tensor], Tensor, Sequence[Any], Mapping[str, Any]], Tensor]
"""Does what function(x, *args, **kwargs) does, and sees to the way back."""


def guided_backprop(
    function: Callable[..., Tensor], x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """R_in = 1[0 < x, and x < 6 where it cuts off there] relu(R_out): only what both ways agree upon."""
    output = function(x, *args, **kwargs)
    # Belongs to this value of the tensor; what is written into it later does not see the hook.
    output.register_hook(_positive)  # type: ignore[no-untyped-call]
    return output


def deconvnet(function: Callable[..., Tensor], x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """R_in = relu(R_out), whatever x was."""
    return straight_through(function, x, args, kwargs, _positive)


def straight_through(
    function: Callable[..., Tensor],
    x: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    change: Callable[[Tensor], Tensor],
) -> Tensor:
    """function(x, ...), in place if it is so; what comes back goes to x, changed, past the function's own slope."""
    still = x.detach().clone()
    output = function(still, *args, **kwargs)
    passed: Tensor = _Straight.apply(x, output, change)
    return x.copy_(passed) if output.data_ptr() == still.data_ptr() else passed


def with_relu_rule(question: MethodContext, rule: Rule) -> MethodContext:
    """The question put to the same network with another rule at its rectifiers. Refused if no rectifier runs."""

    def run(x: Tensor) -> ForwardResult:
        with _ReluRuleMode(rule) as ruled:
            seen = question.run(x)
        if not ruled.changed:
            method = rule.__name__.replace("_", "-")
            has = f"its activations are {', '.join(sorted(ruled.others))}" if ruled.others else "nor any activation"
            raise ConvscopeError(
                f"{method} changes what rectifiers (ReLU, ReLU6) hand back, and this network has none; {has}; "
                "saliency and integrated-gradients take any network"
            )
        return seen

    return replace(question, run=run)


class _ReluRuleMode(TorchFunctionMode):
    """While active, rectifiers that gradients pass through follow the rule."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.changed = 0
        self.others: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "").partition(".")[0].strip("_")
        if name in OTHER_ACTIVATIONS:
            self.others.add(name)
        if name not in RELU_LIKE:
            return func(*args, **kwargs)
        x, *rest = args or (kwargs.pop("input"),)
        if not (x.requires_grad and torch.is_grad_enabled() and RELU_LIKE[name](rest, kwargs)):
            return func(x, *rest, **kwargs)
        self.changed += 1
        return self.rule(func, x, rest, kwargs)


def _always(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return True


def _from_zero(name: str, default: float | None = None) -> Callable[[Sequence[Any], Mapping[str, Any]], bool]:
    """Whether the lower bound, the first argument or the one called `name`, is 0."""

    def check(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        low = args[0] if args else kwargs.get(name, default)
        return low is not None and torch.as_tensor(low).numel() == 1 and float(low) == 0

    return check


def _threshold(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    at, value = (*args, *(kwargs[key] for key in ("threshold", "value") if key in kwargs))[:2]
    return bool(at == 0 and value == 0)


RELU_LIKE: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], bool]] = {
    "relu": _always,
    "relu6": _always,
    "hardtanh": _from_zero("min_val", -1.0),
    "clamp": _from_zero("min"),
    "clip": _from_zero("min"),
    "clamp_min": _from_zero("min"),
    "threshold": _threshold,
}
"""Functions that may be rectifiers, and what their arguments must be for it."""

OTHER_ACTIVATIONS = frozenset(
    {
        *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "leaky_relu", "logsigmoid", "mish"),
        *("prelu", "rrelu", "selu", "sigmoid", "silu", "softplus", "tanh"),
    }
)
"""Other activations."""


def _positive(gradient: Tensor) -> Tensor:
    return gradient.clamp(min=0)


class _Straight(torch.autograd.Function):
    """`output` on the way there; on the way back x gets what comes, changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return ctx.change(gradients[0]), None, None
