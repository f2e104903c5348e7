"""`Observations`: what one pass over a labelled data set recorded about every image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Observations:
    """What one pass recorded about N images, K classes and a layer of C units on a grid (h, w).

    Large arrays may be memory-mapped files. An image that could not be read is left out of all of them.

    Attributes
    ----------
    image_names : tuple of str
    image_ids : ndarray of shape (N,), int64
        Positions of the images in the data set.
    labels : ndarray of shape (N,), int64
        The right class of each image, an index into `classes`; -1 if unknown.
    classes : tuple of str
        Names of the network's K classes.
    logits : ndarray of shape (N, K), float16 or float32
        Their softmax is the network's probabilities, also of a network with a single, binary output.
    features : ndarray of shape (N, C), float16
        The layer's activations, mean over positions.
    peaks : ndarray of shape (N, C), float16
        The layer's activations, maximum over positions.
    evidence : ndarray of shape (N, h, w), float16
        Grad-CAM of the predicted class at the layer: signed, not normalised.
    facts : ndarray of shape (N, F), float32
        Simple facts about each image as it was stored, such as its brightness; NaN where a fact does not apply.
    fact_names : tuple of str
    thumbnails : ndarray of shape (N, s, s, 3), uint8
        The network's input, resized.
    """

    image_names: tuple[str, ...]
    image_ids: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    logits: np.ndarray
    features: np.ndarray
    peaks: np.ndarray
    evidence: np.ndarray
    facts: np.ndarray
    fact_names: tuple[str, ...]
    thumbnails: np.ndarray

    def __len__(self) -> int:
        return len(self.image_names)

    @cached_property
    def predictions(self) -> np.ndarray:
        """The predicted class (N,) of each image."""
        return np.asarray(self.logits.argmax(1), np.int64)

    @cached_property
    def is_labelled(self) -> np.ndarray:
        """Which images (N,) have a known label."""
        return self.labels >= 0

    @cached_property
    def is_correct(self) -> np.ndarray:
        """Which images (N,) are classified as labelled; False without a label."""
        return np.asarray(self.predictions == self.labels, bool)
