"""Which classes a heatmap is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.model import Model


def resolve(model: Model, targets: Any, count: int) -> Tensor | None:
    """Class indices (count, T) for `count` pictures; None where each picture's top class is meant.

    Accepted: None; one class (index or name) for all; one per picture; a list of several for each picture; with a
    single picture also a plain list of several. Raises ConvscopeError for anything else and for unknown classes.
    """
    if targets is None:
        return None
    if isinstance(targets, np.ndarray | Tensor):
        targets = targets.tolist()
    if _is_class(targets):
        return torch.tensor([[model.class_index(targets)]] * count)
    if not isinstance(targets, Sequence) or not targets:
        raise ConvscopeError(f"targets {targets!r}: expected None, a class, one class per picture, or a list of lists")
    if all(_is_class(t) for t in targets):
        rows = [list(targets)] if count == 1 else [[t] for t in targets]
    elif all(isinstance(t, Sequence) and t and all(_is_class(c) for c in t) for t in targets):
        rows = [list(t) for t in targets]
    else:
        raise ConvscopeError(
            f"targets {targets!r}: classes are indices or names, several per picture are lists of them"
        )
    if len(rows) != count:
        raise ConvscopeError(
            f"{len(rows)} targets for {count} pictures; give one class for all, one per picture, "
            "or a list of several for each picture"
        )
    if len({len(row) for row in rows}) > 1:
        raise ConvscopeError("every picture needs the same number of targets")
    return torch.tensor([[model.class_index(t) for t in row] for row in rows])


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int | np.integer) and not isinstance(value, bool)
