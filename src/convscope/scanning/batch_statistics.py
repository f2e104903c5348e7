"""A network with an eye on its layers: what each makes of a batch is read off as it is made, and never kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from convscope.engine import capture
from convscope.engine.acceleration import conv_fusion
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.scanning.statistics import BatchReduction, fused, reduced


class BatchStatistics(NamedTuple):
    """What one batch gave: of every layer, "logits" among them if they were asked for, and the logits (N, K)."""

    layers: dict[str, BatchReduction]
    logits: Tensor


Looking = Callable[[Tensor, Mapping[str, Tensor]], BatchStatistics]


@contextmanager
def forward_with_statistics(
    model: Model, layers: Sequence[str], batch: int, *, compiled: bool = False
) -> Iterator[Looking]:
    """The block gets a function of a batch (B, C, H, W) and, for each layer, of the values (U,) that are the highest of
    interest among the lowest (see `reduced`).

    All batches have the same size. A model that `load` made is folded first: convolutions and what follows them run as
    one. compiled: the whole pass, reading off included, becomes one program with the weights baked in; that takes about
    a minute on two cores, and nothing is left out. Raises ConvscopeError where it cannot be done.
    """
    eye = _Reducer(compiled)
    height, width = model.preprocessing.image_size
    blank = torch.zeros((batch, model.preprocessing.channels, height, width), device=model.device)
    blank = blank.contiguous(memory_format=torch.channels_last)
    with (
        torch.no_grad(),
        capture.capture_layers(model, [name for name in layers if name != LOGITS], on_output=eye) as run,
    ):
        if model.loaded_by_convscope and not compiled:
            run = conv_fusion.with_fusion(run, conv_fusion.find_fusions(run, blank))

        def looked(x: Tensor) -> BatchStatistics:
            eye.found.clear()
            logits = run(x).logits
            if LOGITS in layers:
                eye(LOGITS, logits)
            return BatchStatistics(dict(eye.found), logits)

        program = _program(looked, blank) if compiled else looked

        def once(x: Tensor, below: Mapping[str, Tensor]) -> BatchStatistics:
            eye.below = below
            return program(x)

        yield once


@dataclass
class _Reducer:
    """Reads maps off as they are made; `compiled` in the way that a compiler makes the best of."""

    compiled: bool
    below: Mapping[str, Tensor] = field(default_factory=dict)
    found: dict[str, BatchReduction] = field(default_factory=dict)

    def __call__(self, name: str, maps: Tensor) -> None:
        self.found[name] = fused(maps) if self.compiled else reduced(maps, self.below.get(name))


def _program(looked: Callable[[Tensor], BatchStatistics], blank: Tensor) -> Callable[[Tensor], BatchStatistics]:
    """All that is computed for a batch, traced through the network's own code and the eye, and compiled."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names: list[str] = []

    def flat(x: Tensor) -> list[Tensor | None]:
        found = looked(x)
        names[:] = found.layers
        return [found.logits, *(part for one in found.layers.values() for part in one)]

    try:
        program = torch.compile(make_fx(flat)(blank), options={"freezing": True})
        program(blank)
    except Exception as error:  # the network's own code, a compiler that is missing: anything can come
        raise ConvscopeError(
            f"the network cannot be compiled here ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "scan without compiling"
        ) from error
    width = len(BatchReduction._fields)

    def once(x: Tensor) -> BatchStatistics:
        logits, *parts = program(x)
        return BatchStatistics(
            {name: BatchReduction(*parts[i * width : (i + 1) * width]) for i, name in enumerate(names)}, logits
        )

    return once


def finite(looked: BatchStatistics) -> Tensor:
    """Which pictures (N,) kept every layer, and the logits, within finite numbers."""
    fine = looked.logits.isfinite().all(1)
    for found in looked.layers.values():
        fine = fine & found.total.isfinite().all(1)
    return fine.cpu()
