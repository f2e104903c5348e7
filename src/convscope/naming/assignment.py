"""Choose words for units on one half of the images, and check them on the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convscope.naming.significance import rank_evidence
from convscope.naming.similarity import midranks, soft_auc, soft_wpmi, top_images
from convscope.naming.word_scores import WordScores
from convscope.progress import Progress
from convscope.scanning.plan import splitmix64
from convscope.store.tables import StoreTables

WORDS_PER_BLOCK = 1024
UNITS_PER_BLOCK = 512
MIN_TOP, MAX_TOP, TOP_FRACTION = 5, 100, 50  # top images of a unit: a 50th of the images, from 5 to 100


def report_part(report: Progress, start: float, share: float) -> Progress:
    """Return a function that reports the fraction of a part of the work."""

    def report_fraction(done: float, total: int) -> None:
        report(start + share * done / total, 1)

    return report_fraction


@dataclass(frozen=True, eq=False)
class Activations:
    """The maxima of U units on N images of the sample, read a block of units at a time, followed by R shuffled units.

    A shuffled unit orders the images at random. As everything here depends on the order of the images by activation
    only, it stands for any unit whose activations are shuffled.

    Attributes
    ----------
    store : StoreTables
    rows : ndarray of shape (U,)
        Rows of the units table.
    images : ndarray of shape (N,)
        Positions in the sample of the images that are used.
    shuffled : ndarray of shape (R, N)
        Activations of the shuffled units.
    """

    store: StoreTables
    rows: np.ndarray
    images: np.ndarray
    shuffled: np.ndarray

    def __len__(self) -> int:
        return len(self.rows) + len(self.shuffled)

    def blocks(self, images: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """Yield positions of units, and their activations (units, n) on n of the N images."""
        for start in range(0, len(self.rows), UNITS_PER_BLOCK):
            rows = self.rows[start : start + UNITS_PER_BLOCK]
            first = int(rows[0])
            block = self.store.sample_rows(first, int(rows[-1]) + 1)[rows - first][:, self.images[images]]
            yield slice(start, start + len(rows)), torch.from_numpy(np.nan_to_num(block, nan=0.0))
        count = len(self.rows)
        for start in range(0, len(self.shuffled), UNITS_PER_BLOCK):
            block = self.shuffled[start : start + UNITS_PER_BLOCK, images]
            yield slice(count + start, count + start + len(block)), torch.from_numpy(block)


@dataclass(frozen=True, eq=False)
class Check:
    """How well words suit units on the images that took no part in the choice.

    Attributes
    ----------
    auc : ndarray of shape (U + R, 2)
        As of `soft_auc`, for both words.
    evidence : ndarray of shape (U + R,)
        As of `rank_evidence`, for the best word.
    """

    auc: np.ndarray
    evidence: np.ndarray


def split_images(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split images into halves by a hash of their ids; return the positions of both, in the order of the hash."""
    hashes = splitmix64(splitmix64(images.astype(np.uint64)))  # the sample itself is chosen by the hash
    order = np.argsort(hashes, kind="stable")
    return order[: len(order) // 2], order[len(order) // 2 :]


def num_top(num_images: int) -> int:
    """Return how many images with the highest activations a name is chosen on."""
    return max(MIN_TOP, min(MAX_TOP, num_images // TOP_FRACTION))


def choose_words(
    activations: Activations, scores: WordScores, images: np.ndarray, count: int, report: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Choose for each unit the words with the highest soft WPMI.

    Returns
    -------
    words : ndarray of shape (U + R, count), int64
        The best first; ties in the order of the words. -1 for a unit without top images.
    wpmi : ndarray of shape (U + R, count), float32
    """
    k = num_top(len(images))
    tops = torch.empty(len(activations), min(k, len(images)), dtype=torch.int64)
    for units, block in activations.blocks(images):
        tops[units] = top_images(block, k)
    values = torch.full((len(tops), count), -torch.inf)
    words = torch.full((len(tops), count), -1)
    num_words = len(scores.words)
    for start in range(0, num_words, WORDS_PER_BLOCK):
        stop = min(start + WORDS_PER_BLOCK, num_words)
        wpmi = soft_wpmi(scores.probabilities(images, slice(start, stop)), tops)
        numbers = torch.arange(start, stop).expand(len(tops), -1)
        best = wpmi.topk(min(count, stop - start), 1)
        values, order = torch.cat([values, best.values], 1).sort(dim=1, descending=True, stable=True)
        words = torch.cat([words, numbers.gather(1, best.indices)], 1).gather(1, order)
        values, words = values[:, :count], words[:, :count]
        report(stop, num_words)
    words[(tops == len(images)).all(1)] = -1
    return words.numpy(), values.numpy()


def check_words(
    activations: Activations, scores: WordScores, images: np.ndarray, words: np.ndarray, report: Progress
) -> Check:
    """Measure how well two words suit each unit on some images; NaN and 0 for units without a word.

    Parameters
    ----------
    activations : Activations
    scores : WordScores
    images : ndarray
        Numbers of images, below N.
    words : ndarray of shape (U + R, 2)
        Numbers of words, the best first; -1 for none.
    report : callable
    """
    auc, evidence = np.full(words.shape, np.nan), np.zeros(len(words))
    for units, block in activations.blocks(images):
        has_word = words[units, 0] >= 0
        if has_word.any():
            positions = np.arange(units.start, units.stop)[has_word]
            ranks = midranks(block[torch.from_numpy(has_word)])
            for column in range(words.shape[1]):
                distinct, inverse = np.unique(words[positions, column], return_inverse=True)
                probabilities = scores.probabilities(images, distinct).T[torch.from_numpy(inverse)]
                auc[positions, column] = soft_auc(ranks, probabilities).numpy()
                if column == 0:
                    evidence[positions] = rank_evidence(ranks, probabilities).numpy()
        report(units.stop, len(words))
    return Check(auc, evidence)
