"""The table of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from convscope.dictionaries.methods.base import Method, Settings
from convscope.dictionaries.methods.topk import TopK

MethodFactory: TypeAlias = Callable[[Settings, Tensor, Tensor], Method]
"""Called with the settings, the atoms (F, C) and the bias (C,) with which training begins."""

METHODS: Mapping[str, MethodFactory] = {
    "topk": TopK,
}
"""Methods by name."""
