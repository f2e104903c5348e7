"""What a Keras model takes: the shape of its input, the layout of its axes, and the range of its pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from convscope.engine.nested import iter_leaves
from convscope.errors import ConvscopeError

PIXEL_SCALE = 16.0  # constants above it belong to pixels of 0..255, not of 0..1
SCALING_LAYERS = ("Rescaling", "Normalization")
SCALING_OPERATIONS = frozenset(
    {"TrueDivide", "Divide", "Multiply", "Subtract", "Add", "GetItem", "Stack", "Concatenate", "Cast", "Flip"}
)


@dataclass(frozen=True)
class KerasInput:
    """The input of a Keras model.

    Attributes
    ----------
    size : tuple of int or None
        (H, W), (L,) or (D, H, W), where the model fixes it.
    channels : int
    channels_first : bool
    others : str
        The other inputs of a model that takes several, for messages.
    """

    size: tuple[int, ...] | None
    channels: int
    channels_first: bool
    others: str = ""


def read_input(module: Any, layers: Iterable[Any]) -> KerasInput:
    """Return the image, signal or volume that a model takes; raise ConvscopeError if there is none."""
    shapes = _input_shapes(module)
    fitting = sorted((shape for shape in shapes if 3 <= len(shape) <= 5), key=lambda shape: len(shape) != 4)
    if not fitting:
        raise ConvscopeError(
            f"this Keras model takes {_join(shapes)}; expected images (N, H, W, C), signals (N, L, C) or volumes "
            "(N, D, H, W, C)"
        )
    shape = fitting[0]
    formats = (getattr(layer, "data_format", None) for layer in layers)
    first = next(filter(None, formats), "channels_last") == "channels_first"
    sides, channels = (shape[2:], shape[1]) if first else (shape[1:-1], shape[-1])
    size = tuple(side for side in sides if side is not None)
    if channels is None:
        raise ConvscopeError(f"this Keras model takes {_join(shapes)}; expected a fixed number of channels")
    if len(size) < len(sides) != 2:
        raise ConvscopeError(
            f"this Keras model takes {_join(shapes)} of any length; say which: "
            f"preprocessing=dict(size=({', '.join(['...'] * len(sides))},), channels={channels})"
        )
    return KerasInput(
        size if len(size) == len(sides) else None, channels, first, _join(shapes) if len(shapes) > 1 else ""
    )


def _input_shapes(module: Any) -> list[tuple[int | None, ...]]:
    shape = getattr(module, "input_shape", None)
    if shape is None:  # a subclassed model: the shape it was built with
        shape = (module.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise ConvscopeError(
            f"the Keras model {module.name!r} is not built, so its input shape is not known; call it once on an image: "
            "model(numpy.zeros((1, H, W, C)))"
        )
    if isinstance(shape, tuple) and not any(isinstance(part, tuple | list) for part in shape):
        return [shape]
    return [tuple(part) for part in (shape.values() if isinstance(shape, dict) else shape)]


def _join(shapes: Iterable[tuple[int | None, ...]]) -> str:
    return ", ".join(map(str, shapes))


def scales_pixels(module: Any, layers: Iterable[Any]) -> bool:
    """Whether a model brings pixels of 0..255 to its own range: by a layer, or by `preprocess_input` in its graph."""
    if any(type(layer).__name__ in SCALING_LAYERS for layer in layers):
        return True
    return any(value > PIXEL_SCALE for value in _leading_constants(module))


def _leading_constants(module: Any) -> Iterator[float]:
    """Yield the constants of the operations between a functional model's input and its first layer."""
    reached = {id(tensor) for tensor in getattr(module, "inputs", None) or ()}
    for operation in getattr(module, "operations", ()):
        if type(operation).__name__ not in SCALING_OPERATIONS:
            continue
        for node in operation._inbound_nodes:  # noqa: SLF001 - Keras has no public name for an operation's calls
            if not reached & {id(tensor) for tensor in node.input_tensors}:
                continue
            reached |= {id(tensor) for tensor in node.output_tensors}
            for value in iter_leaves(list(node.arguments.args)):
                if isinstance(value, int | float | torch.Tensor):
                    yield float(torch.as_tensor(value, dtype=torch.float32).abs().max())
