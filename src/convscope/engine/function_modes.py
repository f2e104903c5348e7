"""Function modes: intercept the torch functions that a network calls, without touching the network.

`FunctionMode` is the base class of every function mode in the package. `canonical_name` gives the different spellings
of a function (``torch.add``, ``Tensor.add_``, ``Tensor.__iadd__``) one name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from torch._C import DisableTorchFunction  # noqa: PLC2701 - there is no public name
from torch.overrides import TorchFunctionMode

from convscope.engine.nested import replace_tensor
from convscope.errors import ConvscopeError

Function = Callable[..., Any]
Args = Sequence[Any]
Kwargs = dict[str, Any]
T = TypeVar("T")

without_function_modes = DisableTorchFunction
"""Context in which no function mode is active."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        **{"iadd": "add", "radd": "add", "isub": "sub", "subtract": "sub"},
        **{"imul": "mul", "rmul": "mul", "multiply": "mul"},
        **{"truediv": "div", "itruediv": "div", "divide": "div", "true_divide": "div"},
        **{"clip": "clamp"},
    }
)
"""Names of the same function, without underscores, and its canonical name."""


@lru_cache(maxsize=1024)
def canonical_name(function: Function) -> str:
    """Return a torch function's name without underscores and overload; aliases are resolved.

    ``torch.add``, ``Tensor.add_`` and ``Tensor.__iadd__`` are all called "add".
    """
    name = _base_name(function).strip("_")
    return ALIASES.get(name, name)


def is_inplace(function: Function) -> bool:
    """Check whether a torch function writes into its first argument: ``Tensor.relu_``, ``Tensor.__iadd__``."""
    name = _base_name(function)
    if name.startswith("__"):
        return name.startswith("__i") and canonical_name(function) in ("add", "sub", "mul", "div")
    return name.endswith("_")


def _base_name(function: Function) -> str:
    """Return a function's own name without overload; an empty one if it has none."""
    return str(getattr(function, "__name__", "")).partition(".")[0]


class FunctionMode(TorchFunctionMode):
    """Base class: intercept calls of torch functions inside the block.

    Subclasses override `intercept`. It makes the call itself, or returns something else in its place.

    Attributes
    ----------
    names : frozenset of str or None
        Canonical names of the functions to intercept; None intercepts all.
    """

    names: frozenset[str] | None = None

    def __torch_function__(self, func: Function, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        name = canonical_name(func)
        if self.names is not None and name not in self.names:
            return func(*args, **(kwargs or {}))
        return self.intercept(func, name, args, kwargs or {})

    def intercept(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> Any:
        """Return the result of ``function(*args, **kwargs)``, or a replacement for it.

        `name` is the function's canonical name. No mode of this class is active inside.
        """
        raise NotImplementedError


class ForceGradMode(FunctionMode):
    """Ignore the network's own changes of the gradient mode (``no_grad``, ``enable_grad``)."""

    names = frozenset({"set_grad_enabled"})

    def intercept(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> None:
        """Skip the call."""


class LogitsRecorder(FunctionMode):
    """Record the inputs of every softmax and sigmoid, so that a final one can be undone.

    Works for modules, functions and activations fused into a Keras layer.
    """

    ACTIVATIONS: ClassVar = frozenset({"softmax", "log_softmax", "sigmoid"})
    CASTS: ClassVar = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as"})
    names = ACTIVATIONS | CASTS

    def __init__(self) -> None:
        super().__init__()
        self.records: list[
            tuple[Tensor, Tensor, int | None]
        ] = []  # an activation's output, its input and its dimension

    def intercept(self, function: Function, name: str, args: Args, kwargs: Kwargs) -> Any:
        """Call the function; record its output with the activation's input."""
        if name in self.CASTS:
            output = function(*args, **kwargs)
            if isinstance(output, Tensor):
                self.records += [(output, x, dim) for activated, x, dim in self.records if activated is args[0]]
            return output
        logits = args[0] if args else kwargs["input"]
        logits = logits.clone() if is_inplace(function) else logits
        output = function(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        self.records.append((output, logits, dim if isinstance(dim, int) else None))
        return output

    def find(self, tensor: Tensor | None) -> tuple[Tensor, int | None] | None:
        """Return the input of the activation that made `tensor`, and the dimension along which it ran."""
        for activated, logits, dim in reversed(self.records):
            # The same values, even if they were reshaped since.
            if tensor is not None and activated.data_ptr() == tensor.data_ptr() and activated.numel() == tensor.numel():
                return logits.reshape(tensor.shape), dim if activated.shape == tensor.shape else None
        return None

    def pre_activation(self, output: T, tensor: Tensor | None) -> T:
        """Replace the activated `tensor` in a network's output by the activation's input."""
        record = self.find(tensor)
        if record is not None and tensor is not None:
            return replace_tensor(output, tensor, record[0])
        raise ConvscopeError("the network ended in a softmax or sigmoid when it was loaded, and does not now")
