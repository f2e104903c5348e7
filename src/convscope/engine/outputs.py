"""What a network's output means, and how class scores are read from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.engine.nested import iter_tensors, primary_tensor
from convscope.errors import ConvscopeError

VALUE_TASKS = ("regression", "embedding")
"""Tasks whose outputs are values, not scores of classes."""

LOG_TASKS = ("probabilities", "detection")
"""Tasks whose networks return probabilities; their logits are the logarithms."""

OutputSelector = str | int | Callable[[Any], Any] | None
"""One of several outputs: its key, attribute or position, or a function of what the network returns."""


@dataclass(frozen=True)
class OutputReader:
    """How scores (N, K) are read from what a network returns.

    Attributes
    ----------
    task : str
        One of `TASKS`.
    select : str, int, callable or None
        Which of several outputs; None for the primary tensor.
    class_dim : int or None
        Dimension of the classes in the selected tensor; dimensions other than this and the batch are averaged. None if
        it is not known: then there are no scores.
    has_implicit_class : bool
        Whether one output, for class 1, stands for two classes.
    unreadable : str
        Why there are no scores, if `class_dim` is None.
    """

    task: str = "classification"
    select: OutputSelector = None
    class_dim: int | None = 1
    has_implicit_class: bool = False
    unreadable: str = ""

    def tensor(self, output: object) -> Tensor | None:
        """Return the tensor that holds the scores."""
        return primary_tensor(pick_output(output, self.select))

    def scores(self, output: object) -> Tensor:
        """Return the scores (N, K) float32 in a network's output; (N, 0) if it has none."""
        tensor = self.tensor(output)
        if tensor is None:
            raise ConvscopeError(
                f"the network returns {type(output).__name__}, which contains no floating-point tensor"
            )
        if self.class_dim is None:
            return tensor.new_zeros((len(tensor), 0), dtype=torch.float32)
        tensor = tensor[:, None] if tensor.ndim == 1 else tensor.movedim(self.class_dim, 1)
        scores = (tensor if tensor.ndim == 2 else tensor.flatten(2).mean(2)).float()
        if self.task in LOG_TASKS:
            scores = torch.cat([1 - scores, scores], 1) if self.has_implicit_class else scores
            return scores.clamp_min(torch.finfo(torch.float32).tiny).log()
        return torch.cat([-scores, scores], 1) if self.has_implicit_class else scores

    def probabilities(self, logits: Tensor, final_activation: str | None) -> Tensor:
        """Turn logits (N, K) into probabilities; return the values themselves for `VALUE_TASKS`."""
        if self.task in VALUE_TASKS:
            return logits
        if self.task in LOG_TASKS:
            return logits.exp()
        return logits.sigmoid() if self._by_sigmoid(final_activation) else logits.softmax(1)

    def log_probabilities(self, logits: Tensor, final_activation: str | None) -> Tensor:
        """Turn logits (N, K) into logarithms of probabilities."""
        if self.task in LOG_TASKS:
            return logits
        return F.logsigmoid(logits) if self._by_sigmoid(final_activation) else logits.log_softmax(1)

    def _by_sigmoid(self, final_activation: str | None) -> bool:
        return self.task == "multilabel" or self.has_implicit_class or final_activation == "sigmoid"


def pick_output(output: Any, select: OutputSelector) -> Any:
    """Return one of a network's outputs.

    Parameters
    ----------
    output : object
        What the network returns.
    select : str, int, callable or None
        Key, attribute or position of the output, or a function of `output`; None returns all of it.

    Raises
    ------
    ConvscopeError
        If there is no such output; the message lists those that there are.
    """
    if select is None:
        return output
    if callable(select):
        return _call(select, output)
    part = _by_name(output, select) if not isinstance(output, Tensor) else None
    if part is None:
        raise ConvscopeError(f"the network has no output {select!r}; it returns {describe_output(output)}")
    return part


def _call(function: Callable[[Any], Any], output: object) -> Any:
    try:
        return function(output)
    except ConvscopeError:  # its message is for the user as it is
        raise
    except Exception as error:  # the user's function may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ConvscopeError(
            f"output= raised {type(error).__name__} ({reason}) for {describe_output(output)}, which the network returns"
        ) from error


def _by_name(output: Any, name: str | int) -> Any:
    """Return an output by key, attribute or position; None if there is none."""
    if isinstance(output, Mapping) and isinstance(name, int) and name not in output:
        output = list(output.values())
    by_attribute = isinstance(name, str) and not isinstance(output, Mapping)
    try:
        return getattr(output, str(name)) if by_attribute else output[name]
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def output_names(output: Any) -> list[str]:
    """Return the names of the tensors in a container, by which `pick_output` finds them."""
    if isinstance(output, Tensor):
        return []
    if isinstance(output, Mapping):
        parts: Mapping[Any, Any] = output
    elif hasattr(output, "_fields"):
        parts = dict(zip(output._fields, output, strict=True))
    elif isinstance(output, tuple | list):
        parts = dict(enumerate(output))
    else:
        parts = {k: v for k, v in getattr(output, "__dict__", {}).items() if not k.startswith("_")}
    return [f"{name!r} {_shape(part)}" for name, part in parts.items() if any(True for _ in iter_tensors(part))]


def describe_output(output: Any) -> str:
    """Describe what a network returns, for messages."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    names = output_names(output)
    return f"a {type(output).__name__}" + (f" with {', '.join(names)}" if names else "")


def _shape(part: object) -> str:
    tensor = primary_tensor(part)
    return "" if tensor is None else str(tuple(tensor.shape))
