"""Observations and contexts that tests construct."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

import convscope
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.observations import Observations

SIDE = 32


def make_observations(
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    features: np.ndarray | None = None,
    thumbnails: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Observations:
    """Make observations of N images; what is not given is random."""
    count, num_classes = logits.shape
    generator = np.random.default_rng(0)
    features = generator.normal(size=(count, 8)).astype(np.float16) if features is None else features
    if thumbnails is None:
        thumbnails = generator.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return Observations(
        image_names=tuple(names or (f"{i:03d}.png" for i in range(count))),
        image_ids=np.arange(count),
        labels=np.asarray(labels, np.int64),
        classes=tuple(classes or (f"class {k}" for k in range(num_classes))),
        logits=logits.astype(np.float32),
        features=features,
        peaks=features,
        evidence=generator.random((count, 4, 4)).astype(np.float16),
        facts=np.empty((count, 0), np.float32),
        fact_names=(),
        thumbnails=thumbnails,
    )


def make_context(observations: Observations, memory: int = 1 << 24) -> DiagnosisContext:
    """Make a context for analyses that need no network."""
    nothing = cast(Any, SimpleNamespace())
    return DiagnosisContext(nothing, nothing, observations, nothing, 0, lambda _done, _total: None, memory)


def drawn_labels(logits: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw a label (N,) for each row from the probabilities of logits (N, K)."""
    return np.asarray((logits + generator.gumbel(size=logits.shape)).argmax(1))


def average_precision(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean precision at the rank of each positive image, with the highest scores first."""
    ranked = is_positive[np.argsort(-scores, kind="stable")]
    precision = ranked.cumsum() / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())


def make_small_model(classes: Sequence[str]) -> convscope.Model:
    """Make a network that is not trained, with a class for each name."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, len(classes))
    )
    return convscope.load(net, preprocessing={"size": SIDE}, classes=list(classes))
