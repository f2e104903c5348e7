"""While a pass runs, single calls of torch's functions are seen, or answered otherwise; the network is not touched."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from convscope.engine.nested import primary_tensor, replace_tensor
from convscope.errors import ConvscopeError


class ForceGradMode(TorchFunctionMode):
    """While active, what the network itself says about gradients (`no_grad`, `enable_grad`) is passed over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__name__", "") == "_set_grad_enabled" else func(*args, **(kwargs or {}))


class LogitsRecorder(TorchFunctionMode):
    """Remembers what went into each softmax or sigmoid, so that the last one can be taken off again.

    Works for a module, a function and an activation fused into a Keras layer alike, and touches none of them.
    """

    HEADS = frozenset({"softmax", "log_softmax", "sigmoid"})
    CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as"})

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]
        if name.removesuffix("_") not in self.HEADS:
            output = func(*args, **(kwargs or {}))
            if name in self.CASTS:  # the same values, rounded
                self.made += [(output, went_in) for made, went_in in self.made if made is args[0]]
            return output
        went_in = args[0] if args else kwargs["input"]
        went_in = went_in.clone() if name.endswith("_") else went_in
        output = func(*args, **(kwargs or {}))
        self.made.append((output, went_in))
        return output

    def pre_activation(self, output: Any) -> Any:
        last = primary_tensor(output)
        for made, went_in in reversed(self.made):
            # The very values, whatever shape they were given since.
            if last is not None and made.data_ptr() == last.data_ptr() and made.numel() == last.numel():
                return replace_tensor(output, last, went_in.reshape(last.shape))
        raise ConvscopeError("the network ended in a softmax or sigmoid when it was loaded, and does not now")
