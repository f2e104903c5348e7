"""Alternative backward rules for ReLUs, applied without modifying the network.

A ReLU is any function that cuts off at 0: ReLU, ReLU6 and other clamps with minimum 0, as modules, functions or
methods, in place or not. The papers define no rule for functions that let negative values through (leaky ReLU, ELU,
SiLU, GELU) or for max-pooling; there the gradient is the usual one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convscope.attribution.context import MethodContext
from convscope.engine.capture import ForwardResult
from convscope.engine.function_modes import FunctionMode
from convscope.errors import ConvscopeError

Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Function = Callable[..., Tensor]
GradientTransform = Callable[[Tensor], Tensor | None]

ReluRule = Callable[[Function, Tensor, Args, Kwargs], Tensor]
"""``rule(function, x, args, kwargs)`` computes ``function(x, *args, **kwargs)`` with another backward pass."""


def guided_backprop(function: Function, x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
    """Pass back ``R_in = relu(R_out)`` where the function's own gradient is not 0."""
    output = function(x, *args, **kwargs)
    # The hook belongs to this value of the tensor; later in-place changes do not trigger it.
    output.register_hook(_positive_part)  # type: ignore[no-untyped-call]
    return output


def deconvnet(function: Function, x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
    """Pass back ``R_in = relu(R_out)`` for any x."""
    return straight_through(function, x, args, kwargs, _positive_part)


def straight_through(
    function: Function, x: Tensor, args: Args, kwargs: Kwargs, transform_gradient: GradientTransform
) -> Tensor:
    """Apply a function, in place if it is; replace its gradient by a transform of the output's gradient."""
    detached = x.detach().clone()
    output = function(detached, *args, **kwargs)
    result: Tensor = _StraightThrough.apply(x, output, transform_gradient)
    return x.copy_(result) if output.data_ptr() == detached.data_ptr() else result


def with_relu_rule(context: MethodContext, rule: ReluRule) -> MethodContext:
    """Return a context whose passes apply `rule` to every ReLU; they raise ConvscopeError if there is none."""

    def run(x: Tensor, module: nn.Module | None = None, /) -> ForwardResult:
        with _ReluRuleMode(rule) as mode:
            outputs = context.run(x, module)
        if not mode.num_relus and outputs.logits.requires_grad:
            method = rule.__name__.replace("_", "-")
            others = ", ".join(sorted(mode.other_activations))
            activations = f"its activations are {others}" if others else "it has no other activations either"
            raise ConvscopeError(
                f"{method} changes how ReLUs pass gradients back, and this network has no ReLU or ReLU6; "
                f"{activations}. saliency and integrated-gradients work on any network"
            )
        return outputs

    return replace(context, run=run)


class _ReluRuleMode(FunctionMode):
    """Apply a rule to the ReLUs that gradients pass through, and count them."""

    def __init__(self, rule: ReluRule) -> None:
        super().__init__()
        self.rule = rule
        self.num_relus = 0
        self.other_activations: set[str] = set()

    def intercept(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> Any:
        """Apply the rule to a ReLU; record other activations."""
        if name in OTHER_ACTIVATIONS:
            self.other_activations.add(name)
        if name not in RELU_LIKE:
            return function(*args, **kwargs)
        x, *rest = args or (kwargs["input"],)
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        if not (x.requires_grad and torch.is_grad_enabled() and RELU_LIKE[name](rest, kwargs)):
            return function(x, *rest, **kwargs)
        self.num_relus += 1
        return self.rule(function, x, rest, kwargs)


class _StraightThrough(torch.autograd.Function):
    """Return `output`; pass the transformed gradient to x."""

    @staticmethod
    def forward(ctx: Any, _x: Tensor, output: Tensor, transform_gradient: GradientTransform) -> Tensor:
        ctx.transform_gradient = transform_gradient
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.transform_gradient(gradients[0]), None, None


def _positive_part(gradient: Tensor | None) -> Tensor | None:
    """Return the positive part; None if no gradient arrives."""
    return None if gradient is None else gradient.clamp(min=0)


# --- which functions are ReLUs ---------------------------------------------------------------------------------------

ArgumentCheck = Callable[[Args, Kwargs], bool]


def _always(_args: Args, _kwargs: Kwargs) -> bool:
    return True


def _has_minimum_zero(name: str, default: float | None = None) -> ArgumentCheck:
    """Return a check that the lower bound, the first argument or the one called `name`, is 0."""

    def check(args: Args, kwargs: Kwargs) -> bool:
        minimum = args[0] if args else kwargs.get(name, default)
        return minimum is not None and torch.as_tensor(minimum).numel() == 1 and float(minimum) == 0

    return check


def _has_threshold_zero(args: Args, kwargs: Kwargs) -> bool:
    threshold, value = (*args, *(kwargs[key] for key in ("threshold", "value") if key in kwargs))[:2]
    return bool(threshold == 0 and value == 0)


RELU_LIKE: dict[str, ArgumentCheck] = {
    "relu": _always,
    "relu6": _always,
    "hardtanh": _has_minimum_zero("min_val", -1.0),
    "clamp": _has_minimum_zero("min"),
    "clamp_min": _has_minimum_zero("min"),
    "threshold": _has_threshold_zero,
}
"""Functions that may be ReLUs, and the check of their arguments that decides."""

OTHER_ACTIVATIONS = frozenset(
    {
        *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "leaky_relu", "logsigmoid", "mish"),
        *("prelu", "rrelu", "selu", "sigmoid", "silu", "softplus", "tanh"),
    }
)
