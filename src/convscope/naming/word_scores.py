"""Scores of images for words: checked, and as probabilities, a block of words at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.store.tables import StoreTables

OUTPUTS = ("probability", "softmax", "sigmoid")
SOFTMAX_NOTE = (
    "the scores are taken for logits of words that exclude each other: output='sigmoid' is for words that do not"
)
ROWS_PER_BLOCK = 256  # images that are checked at a time


@dataclass(frozen=True, eq=False)
class WordScores:
    """The scores of N images for W words.

    Attributes
    ----------
    words : tuple of str
    matrix : ndarray of shape (M, W)
        Scores of M images; read in parts, so that it may be a memory map.
    rows : ndarray of shape (N,)
        The rows of `matrix` that belong to the images.
    output : {"probability", "softmax", "sigmoid"}
        How scores become probabilities: as they are; by a softmax over the words; by a sigmoid.
    normalizers : ndarray of shape (N,)
        For "softmax": the logarithm of the sum over the words of exp(score).
    notes : tuple of str
        What is to be known of the scores.
    """

    words: tuple[str, ...]
    matrix: np.ndarray
    rows: np.ndarray
    output: str
    normalizers: np.ndarray
    notes: tuple[str, ...] = ()

    def probabilities(self, images: np.ndarray, words: slice | np.ndarray) -> Tensor:
        """Return the probabilities (n, w) float32 that some of the words describe some of the images.

        Parameters
        ----------
        images : ndarray
            Numbers of images, below N.
        words : slice or ndarray
            Numbers of the words.
        """
        rows = self.rows[images]
        part = self.matrix[rows, words] if isinstance(words, slice) else self.matrix[rows[:, None], words]
        scores = torch.from_numpy(np.ascontiguousarray(part, np.float32))
        if self.output == "softmax":
            return (scores - torch.from_numpy(self.normalizers[images])[:, None]).exp_()
        return scores.sigmoid_() if self.output == "sigmoid" else scores


def check_matrix(words: tuple[str, ...], scores: object, store: StoreTables) -> np.ndarray:
    """Return scores as a matrix with a row for each image of the data set or of the sample.

    Raises ConvscopeError for another shape, and for what are no numbers.
    """
    matrix = scores if isinstance(scores, np.ndarray) else np.asarray(_to_numpy(scores))
    sample = store.sample_images
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiub":
        raise ConvscopeError(
            f"scores has shape {matrix.shape} and type {matrix.dtype}; expected numbers (images, words)"
        )
    if matrix.shape[1] != len(words):
        raise ConvscopeError(f"scores has {matrix.shape[1]} columns; expected one for each of the {len(words)} words")
    if len(matrix) not in (store.num_images, len(sample)):
        raise ConvscopeError(
            f"scores has {len(matrix)} rows; expected one for each of the {store.num_images} images in the order of "
            f"store.image_names, or of the {len(sample)} images of store.sample_images"
        )
    return matrix


def parse_scores(
    words: tuple[str, ...], matrix: np.ndarray, store: StoreTables, images: np.ndarray, output: str | None
) -> WordScores:
    """Check the values of a matrix of scores and describe it.

    Parameters
    ----------
    words : tuple of str
    matrix : ndarray
        From `check_matrix`.
    store : StoreTables
    images : ndarray of shape (N,)
        Positions in the sample of the images that are used.
    output : str or None
        As of `WordScores`; None for "probability" if all scores are in [0, 1], else "softmax".

    Raises
    ------
    ConvscopeError
        For values that are not finite, and values outside [0, 1] given as probabilities.
    """
    sample = store.sample_images
    rows = (sample if len(matrix) == store.num_images else np.arange(len(sample)))[images]
    low, high, normalizers = _scan_rows(matrix, rows)
    in_range = low >= 0 and high <= 1
    notes: tuple[str, ...] = ()
    if output is None:
        output = "probability" if in_range else "softmax"
        notes = () if in_range else (SOFTMAX_NOTE,)
    if output == "probability" and not in_range:
        raise ConvscopeError(
            f"scores has values from {low:g} to {high:g}; probabilities are in [0, 1]: output='softmax' makes them of "
            "logits of words that exclude each other, output='sigmoid' of others"
        )
    return WordScores(words, matrix, rows, output, normalizers, notes)


def _to_numpy(scores: object) -> object:
    return scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores


def _scan_rows(matrix: np.ndarray, rows: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Return the lowest and highest score, and each row's logarithm of the sum of exp(score).

    Raises ConvscopeError for scores that are not finite.
    """
    low, high, normalizers = np.inf, -np.inf, np.empty(len(rows), np.float32)
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = torch.from_numpy(np.asarray(matrix[rows[start : start + ROWS_PER_BLOCK]], np.float32))
        if not bool(block.isfinite().all()):
            image, word = (int(i) for i in (~block.isfinite()).nonzero()[0])
            raise ConvscopeError(
                f"scores has {float(block[image, word])} for word {word} in row {int(rows[start + image])}; expected "
                "finite numbers for every image that the scan could use"
            )
        low, high = min(low, float(block.min())), max(high, float(block.max()))
        normalizers[start : start + len(block)] = block.logsumexp(1).numpy()
    return low, high, normalizers


def label_scores(store: StoreTables) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the data set's classes, and for each image of the sample 1 for its class, else 0.

    Raises ConvscopeError for a data set without labels.
    """
    if store.labels is None:
        raise ConvscopeError(f"{store.address} is a scan of data without labels; give words and scores=, or judge=")
    labels = [row["label"] for row in store.image_rows(store.sample_images.tolist(), ["image", "label"])]
    scores = np.zeros((len(labels), len(store.labels)), np.float32)
    known = [i for i, label in enumerate(labels) if label is not None]
    scores[known, [labels[i] for i in known]] = 1
    return tuple(store.labels), scores
