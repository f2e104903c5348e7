"""`DiagnosisContext`: what an analysis may use besides the observations: the network, and the images again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from convscope.diagnosis.observations import Observations
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.store.store import Store


@dataclass(frozen=True)
class DiagnosisContext:
    """What the analyses of a diagnosis share.

    Attributes
    ----------
    model : Model
    layer : Layer
        The layer of the observations.
    observations : Observations
    load_inputs : callable
        Takes positions in the observations; returns these images as the network's input (n, 3, H, W).
    seed : int
    report_progress : callable
        Called as ``report_progress(done, total)``; what it raises cancels cleanly.
    memory : int
        Bytes that intermediate results may take.
    store : Store or None
        A scan of the same images with the same weights, for statistics and examples of units.
    """

    model: Model
    layer: Layer
    observations: Observations
    load_inputs: Callable[[Sequence[int]], Tensor]
    seed: int
    report_progress: Callable[[int, int], None]
    memory: int
    store: Store | None = None
