"""Randomise weights temporarily and restore them bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convscope.engine.model import Model

SetParameter = Callable[[nn.Parameter, Tensor], None]


@contextmanager
def temporary_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[SetParameter]:
    """Yield a function that replaces the values of parameters inside the block; restore them on exit.

    `parameter.data` is swapped, so the original memory is never written: afterwards the parameters have the same
    storage, memory format and version counter, and views of a weight do not see the temporary values. Weights created
    under `inference_mode`, which have no version counter, are overwritten and copied back.
    """
    original = [(p, p.clone() if p.is_inference() else p.data) for p in parameters]
    try:
        yield _set_parameter
    finally:
        for p, values in original:
            _set_parameter(p, values)


def _set_parameter(p: nn.Parameter, values: Tensor) -> None:
    if p.is_inference():
        with torch.inference_mode():
            p.copy_(values)
    else:
        p.data = values


def randomize(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return random values of the same shape.

    Kernels and matrices: normal with mean 0 and the same root mean square, so that activations keep their scale.
    Vectors (biases, scales of normalisation layers, statistics) are shuffled, so that positive values stay positive.
    """
    if not values.is_floating_point():
        return values
    if values.ndim < 2:
        return values[torch.randperm(len(values), generator=generator).to(values.device)] if values.ndim else values
    rms = values.float().square().mean().sqrt()
    normal = torch.randn(values.shape, generator=generator).to(values.device) * rms
    return torch.empty_like(values).copy_(normal)  # same memory format


def cascade_order(model: Model) -> list[tuple[str, list[nn.Parameter]]]:
    """Return layers and their parameters, the last layer to run first; each parameter appears once.

    A parameter belongs to the innermost layer that has it, which finishes before its parents. Parameters of layers that
    did not run come last.
    """
    modules, parameters = model.modules_and_parameters()
    remaining = {id(p): p for p in parameters}
    layers: list[tuple[str, list[nn.Parameter]]] = []
    for layer in model.layers:
        module = modules.get(layer.call) or modules.get(layer.call.partition("#")[0])
        candidates = [] if module is None else list(model.adapter.parameters(module))
        new = [p for p in candidates if remaining.pop(id(p), None) is not None]
        if new:
            layers.append((layer.name, new))
    rest = [("the rest", list(remaining.values()))] if remaining else []
    return [*reversed(layers), *rest]
