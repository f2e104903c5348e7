"""The table of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from convscope.dictionaries.methods.archetypal import Archetypal
from convscope.dictionaries.methods.base import Method, Settings, Start
from convscope.dictionaries.methods.batch_topk import BatchTopK
from convscope.dictionaries.methods.jumprelu import JumpReLU
from convscope.dictionaries.methods.matryoshka import Matryoshka
from convscope.dictionaries.methods.nmf import Nmf
from convscope.dictionaries.methods.topk import TopK


class MethodClass(Protocol):
    """Makes a method from its settings and what training begins with.

    Attributes
    ----------
    is_centred : bool
    is_sparse : bool
    """

    is_centred: bool
    is_sparse: bool

    def __call__(self, settings: Settings, start: Start) -> Method:
        """Make the method."""


METHODS: Mapping[str, MethodClass] = {
    "topk": TopK,
    "batch-topk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "archetypal": Archetypal,
    "nmf": Nmf,
}
"""Methods by name; `convscope.names.DICTIONARY_DESCRIPTIONS` has a line on each."""
