"""Reduce activations to statistics during the forward pass, so that no feature map is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convscope.engine import capture
from convscope.engine.acceleration import accelerate
from convscope.engine.function_modes import without_function_modes
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.scanning.statistics import BatchReduction, reduce_maps, reduce_maps_compilable


class BatchStatistics(NamedTuple):
    """Reductions of one batch.

    Attributes
    ----------
    layers : dict
        Reductions of each layer; also of "logits", if requested.
    logits : float32 tensor of shape (N, K)
    """

    layers: dict[str, BatchReduction]
    logits: Tensor

    def finite_rows(self) -> Tensor:
        """Return which images (N,), bool, have finite values in every layer and in the logits."""
        finite = self.logits.isfinite().all(1)
        for reduction in self.layers.values():
            finite = finite & reduction.shifted_sum.isfinite().all(1)
        return finite.cpu()


StatisticsForward = Callable[[Tensor, Mapping[str, Tensor]], BatchStatistics]


@contextmanager
def forward_with_statistics(
    model: Model, layers: Sequence[str], batch_size: int, *, compiled: bool = False
) -> Iterator[StatisticsForward]:
    """Provide a forward pass that returns statistics of layers instead of their maps.

    The block gets ``forward(x, thresholds)``: x is a batch (B, C, H, W), and thresholds (U,) of each layer are as of
    `reduce_maps`. All batches have the same size. The convolutions of a model that `load` made are fused first.

    Parameters
    ----------
    model : Model
    layers : sequence of str
        Names of layers, "logits" among them if it is to be reduced as well.
    batch_size : int
        Images per batch.
    compiled : bool
        Compile the whole pass, reductions included, with the weights as constants. This takes about a minute, and
        minima are never skipped. Raises ConvscopeError if it fails.
    """
    reducer = _Reducer(compiled)
    height, width = model.preprocessing.image_size
    # Noise on which an accelerated pass is verified; one image is as good as a batch.
    example = torch.randn(
        (model.fixed_batch_size or (batch_size if compiled else 1), model.preprocessing.channels, height, width),
        generator=torch.Generator().manual_seed(0),
    )
    example = example.to(model.device, memory_format=torch.channels_last)
    with (
        torch.no_grad(),
        capture.capture_layers(model, [name for name in layers if name != LOGITS], on_output=reducer) as run,
    ):

        def forward(x: Tensor, module: nn.Module | None = None) -> BatchStatistics:
            reducer.reductions.clear()
            logits = run(x, module).logits
            if LOGITS in layers:
                reducer(LOGITS, logits)
            return BatchStatistics(dict(reducer.reductions), logits)

        accelerated = accelerate(forward, model.module, example, enabled=model.can_accelerate and not compiled)
        program = _compile(forward, example) if compiled else accelerated

        def forward_with_thresholds(x: Tensor, thresholds: Mapping[str, Tensor]) -> BatchStatistics:
            reducer.thresholds = thresholds
            return program(x)

        yield forward_with_thresholds


@dataclass
class _Reducer:
    """Reduces each layer's maps as they are computed."""

    compiled: bool
    thresholds: Mapping[str, Tensor] = field(default_factory=dict)
    reductions: dict[str, BatchReduction] = field(default_factory=dict)

    def __call__(self, name: str, maps: Tensor) -> None:
        if self.compiled:
            self.reductions[name] = reduce_maps_compilable(maps)
            return
        maps = maps.detach()  # the one use of the maps that a function mode sees
        with without_function_modes():  # a mode that fuses the network's convolutions has no business here
            self.reductions[name] = reduce_maps(maps, self.thresholds.get(name))


def _compile(forward: Callable[[Tensor], BatchStatistics], example: Tensor) -> Callable[[Tensor], BatchStatistics]:
    """Trace all computations for a batch, reductions included, and compile them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names: list[str] = []

    def flat_forward(x: Tensor) -> list[Tensor | None]:
        statistics = forward(x)
        names[:] = statistics.layers
        return [statistics.logits, *(part for reduction in statistics.layers.values() for part in reduction)]

    try:
        program = torch.compile(make_fx(flat_forward)(example), options={"freezing": True})
        program(example)
    except Exception as error:  # from the network's own code, or from a missing compiler
        raise ConvscopeError(
            f"the network cannot be compiled here ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "scan without compiling"
        ) from error
    width = len(BatchReduction._fields)

    def compiled_forward(x: Tensor) -> BatchStatistics:
        logits, *parts = program(x)
        reductions = {name: BatchReduction(*parts[i * width : (i + 1) * width]) for i, name in enumerate(names)}
        return BatchStatistics(reductions, logits)

    return compiled_forward
