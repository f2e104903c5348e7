"""Other weights for a while: drawn anew, and the network's own put back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convscope.engine.model import Model

Put = Callable[[nn.Parameter, Tensor], None]


@contextmanager
def temporary_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[Put]:
    """The block gets a function that puts other values in a parameter's place; behind it all are as they were.

    The values' memory changes hands, and nothing is written into the network's own: the parameters are the very same
    objects, with the same storage, layout and version counter, and a view of a weight that somebody holds does not see
    the other values. Weights made under `inference_mode`, which have no version counter, are written and copied back.
    """
    own = [(p, p.clone() if p.is_inference() else p.data) for p in parameters]
    try:
        yield _put
    finally:
        for p, values in own:
            _put(p, values)


def _put(p: nn.Parameter, values: Tensor) -> None:
    if p.is_inference():
        with torch.inference_mode():
            p.copy_(values)
    else:
        p.data = values


def randomize(values: Tensor, draw: torch.Generator) -> Tensor:
    """As many values that know nothing of these.

    Kernels and matrices: normal, of mean 0 and the same root mean square, so that what passes keeps its scale. Vectors
    (biases, scales of normalisations, statistics) are shuffled: what must be positive stays so.
    """
    if not values.is_floating_point():
        return values
    if values.ndim < 2:
        return values[torch.randperm(len(values), generator=draw).to(values.device)] if values.ndim else values
    spread = values.float().square().mean().sqrt()
    drawn = torch.randn(values.shape, generator=draw).to(values.device) * spread
    return torch.empty_like(values).copy_(drawn)  # laid out as they were


def cascade_order(model: Model) -> list[tuple[str, list[nn.Parameter]]]:
    """The layers with parameters of their own, the last to run first, and these; none twice.

    A parameter belongs to the innermost layer that has it, which is done before those around it. What no layer has that
    ran comes last.
    """
    modules, parameters = model.modules_and_parameters()
    left = {id(p): p for p in parameters}
    found: list[tuple[str, list[nn.Parameter]]] = []
    for row in model.layers:
        module = modules.get(row.name) or modules.get(row.name.partition("#")[0])
        of = [] if module is None else list(model.adapter.parameters(module))
        own = [p for p in of if left.pop(id(p), None) is not None]
        if own:
            found.append((row.name, own))
    rest = [("the rest", list(left.values()))] if left else []
    return [*reversed(found), *rest]
