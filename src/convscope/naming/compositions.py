"""Compositions of two words, where they suit a unit better than one word on images that did not serve the choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
import torch
from torch import Tensor

from convscope.naming.assignment import Activations
from convscope.naming.significance import rank_evidence
from convscope.naming.similarity import midranks, soft_auc
from convscope.naming.word_scores import WordScores
from convscope.progress import Progress

BEAM = 8  # words of a unit, those with the highest soft WPMI, that are combined
COUNTEREXAMPLES = 4  # words of images that have the unit's word and do not excite it, for "and not"
MIN_EVIDENCE_GAIN = 3.0  # nats on the other images: e^3 = 20
MIN_AUC_GAIN = 0.01

OPERATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "and": lambda p, q: p * q,
    "or": lambda p, q: 1 - (1 - p) * (1 - q),
    "and not": lambda p, q: p * (1 - q),
}
"""The probability that a composition describes an image, from those of its words, taken as independent."""


@dataclass(frozen=True)
class Composition:
    """Two words with an operator, and how well they suit a unit on the other images."""

    operator: str
    first: int
    second: int
    auc: float
    evidence: float

    def text(self, words: tuple[str, ...]) -> str:
        """Return the composition as a name, such as "red and not striped"."""
        return f"{words[self.first]} {self.operator} {words[self.second]}"


def pairs(beam: list[int], counterexamples: list[int]) -> Iterator[tuple[str, int, int]]:
    """Yield the compositions that are tried: of words of the beam, and of its first word without counterexamples."""
    for operator in ("and", "or"):
        for first, second in combinations(beam, 2):
            yield operator, first, second
    for first, second in permutations(beam, 2):
        yield "and not", first, second
    for second in counterexamples:
        if second not in beam:
            yield "and not", beam[0], second


def find_compositions(
    activations: Activations,
    scores: WordScores,
    halves: tuple[np.ndarray, np.ndarray],
    beams: np.ndarray,
    report: Progress,
) -> dict[int, Composition]:
    """Find the units that a composition of two words suits better than the best single word.

    The composition with the most evidence on the first half of the images is taken if it has more evidence, and a
    higher area under the ROC curve, on the second half than the single word.

    Parameters
    ----------
    activations : Activations
    scores : WordScores
    halves : tuple of ndarray
        Numbers of the images for the choice and for the check.
    beams : ndarray of shape (U + R, C)
        The words with the highest soft WPMI of each unit, the best first; -1 for none.
    report : callable

    Returns
    -------
    dict of int to Composition
        By position of the unit.

    References
    ----------
    Mu and Andreas, Compositional explanations of neurons, NeurIPS 2020, section 2.
    """
    compositions: dict[int, Composition] = {}
    count = len(activations.rows)
    choice, check = (activations.blocks(images) for images in halves)
    for (units, first_block), (_, second_block) in zip(choice, check, strict=True):
        for i in range(units.start, min(units.stop, count)):
            if beams[i, 0] < 0:
                continue
            ranks = tuple(midranks(block[i - units.start][None]) for block in (first_block, second_block))
            composition = _find(ranks, scores, halves, [int(word) for word in beams[i] if word >= 0])
            if composition is not None:
                compositions[i] = composition
            report(i + 1, count)
    return compositions


def _find(
    ranks: tuple[Tensor, ...], scores: WordScores, halves: tuple[np.ndarray, np.ndarray], beam: list[int]
) -> Composition | None:
    """Return the composition for one unit, with ranks (1, N) on both halves; None if one word does as well."""
    others = _counterexamples(ranks[0], scores, halves[0], beam[0])
    candidates = list(pairs(beam, others))
    if not candidates:
        return None
    numbers = list(dict.fromkeys([*beam, *others]))
    tables = [scores.probabilities(images, np.array(numbers)).T for images in halves]
    column = {word: i for i, word in enumerate(numbers)}

    def probabilities(half: int, candidate: tuple[str, int, int]) -> Tensor:
        operator, first, second = candidate
        return OPERATORS[operator](tables[half][column[first]], tables[half][column[second]])

    composed = torch.stack([tables[0][0], *(probabilities(0, candidate) for candidate in candidates)])
    evidence = rank_evidence(ranks[0].expand(len(composed), -1), composed)
    best = int(evidence[1:].argmax())
    if evidence[best + 1] <= evidence[0]:
        return None
    both = torch.stack([tables[1][0], probabilities(1, candidates[best])])
    second_ranks = ranks[1].expand(2, -1)
    evidence, auc = rank_evidence(second_ranks, both), soft_auc(second_ranks, both)
    if float(evidence.diff()) < MIN_EVIDENCE_GAIN or float(auc.diff()) < MIN_AUC_GAIN:
        return None
    return Composition(*candidates[best], float(auc[1]), float(evidence[1]))


def _counterexamples(ranks: Tensor, scores: WordScores, images: np.ndarray, word: int) -> list[int]:
    """Return the words that images with a word have more often where the unit is less active than on most images."""
    table = scores.probabilities(images, slice(None))
    weights = table[:, word] * (1 - 2 * ranks[0].float() / len(images)).clamp_min(0)
    lift = weights @ table / weights.sum().clamp_min(1e-12) - table.mean(0)
    order = lift.argsort(descending=True, stable=True)[: COUNTEREXAMPLES + 1].tolist()
    return [number for number in order if number != word and lift[number] > 0][:COUNTEREXAMPLES]
