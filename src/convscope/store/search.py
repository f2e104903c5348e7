"""Find units of a store by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np

from convscope.engine.model import LOGITS, Model
from convscope.engine.text_targets import require_dual_encoder
from convscope.errors import ConvscopeError, require_int
from convscope.formatting import Row, count_of
from convscope.results import HasFigure
from convscope.store.tables import StoreTables

PARTIAL = 0.5  # what parts of words and runners-up count


class Match(NamedTuple):
    """A unit that a search has found.

    Attributes
    ----------
    layer, unit : str, int
        The unit.
    name : str
        The name that matches; "" for a unit without a name that an image has found.
    score : float or None
        The name's score, as in `UnitNames.scores`; None for the class of a unit of the logits, and without a name.
    relevance : float
        The fraction of the text's words that are in the name; with a judge the cosine similarity of both; for an
        image, the fraction of the sample's images that excite the unit less.
    """

    layer: str
    unit: int
    name: str
    score: float | None
    relevance: float


@dataclass(frozen=True, eq=False, repr=False)
class Matches(HasFigure, Sequence[Match]):
    """The units that a search has found, the best first.

    Attributes
    ----------
    store : StoreTables
        The store.
    text : str
        What was searched for; the name of an image.
    items : tuple of Match
    notes : tuple of str
    """

    store: StoreTables
    text: str
    items: tuple[Match, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Match: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Match]: ...
    def __getitem__(self, index: int | slice) -> Match | Sequence[Match]:
        return self.items[index]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per unit: layer, unit, name, score and relevance."""
        return [match._asdict() for match in self.items]

    def _title(self) -> str:
        return f"{count_of(len(self.items), 'unit')} for {self.text!r}"

    def _display_rows(self) -> Sequence[Row]:
        return [{**match._asdict(), "relevance": f"{match.relevance:.2f}"} for match in self.items]

    def _remarks(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]


class _Candidate(NamedTuple):
    """A name of a unit, the weight of a match with it, and its score."""

    layer: str
    unit: int
    name: str
    weight: float
    score: float | None


def find_units(store: StoreTables, text: str, n: int, judge: Model | None) -> Matches:
    """Find units by name, as `Store.search` describes."""
    if not isinstance(text, str) or not text.strip():
        raise ConvscopeError(f"text is {text!r}; expected what to search for, such as 'striped fur'")
    limit = require_int("n", n)
    candidates = list(_candidates(store))
    if not candidates:
        raise ConvscopeError(f"the units of {store.address} have no names; convscope.name_units names them")
    distinct = list(dict.fromkeys(candidate.name for candidate in candidates))
    values = _word_relevance(text, distinct) if judge is None else _similarity(text, distinct, judge)
    relevance = dict(zip(distinct, values, strict=True))
    best: dict[tuple[str, int], Match] = {}
    for layer, unit, name, weight, score in candidates:
        match = Match(layer, unit, name, score, weight * relevance[name])
        known = best.get((layer, unit))
        if known is None or match.relevance > known.relevance:
            best[layer, unit] = match
    matches = [match for match in best.values() if match.relevance > 0 or judge is not None]
    matches.sort(key=lambda match: (-match.relevance, -(match.score or 0.0)))
    notes = () if store.names() else ("only classes have names; convscope.name_units names other units",)
    return Matches(store, text, tuple(matches[:limit]), notes)


def _candidates(store: StoreTables) -> Iterator[_Candidate]:
    """Yield the names of units that are better than chance, their runners-up, and the classes of the logits."""
    names = store.names()
    if names is not None:
        for i in np.flatnonzero(names.named):
            layer, unit = str(names.layer[i]), int(names.units[i])
            yield _Candidate(layer, unit, str(names.names[i]), 1.0, float(names.scores[i]))
            yield _Candidate(layer, unit, str(names.runner_up[i]), PARTIAL, float(names.runner_up_scores[i]))
    if LOGITS in store.layers:
        for unit, name in enumerate(store.classes or ()):
            yield _Candidate(LOGITS, unit, name, 1.0, None)


def _word_relevance(text: str, names: Sequence[str]) -> list[float]:
    """Return for each name the fraction of the text's words in it; parts of words count half."""
    query = _words(text) or [text.strip().casefold()]
    result = []
    for name in names:
        plain = name.casefold().partition(" and not ")[0]  # of a composition, what excites the unit
        words = set(_words(plain))
        hits = [1.0 if word in words else PARTIAL * (word in plain) for word in query]
        result.append(sum(hits) / len(query))
    return result


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _similarity(text: str, names: Sequence[str], judge: Model) -> list[float]:
    """Return the cosine similarity of the embeddings of a text and of names."""
    embeds = require_dual_encoder(judge, text).text_embeds(judge.module, [text, *names])
    similarity: list[float] = (embeds[1:] @ embeds[0]).tolist()
    return similarity
