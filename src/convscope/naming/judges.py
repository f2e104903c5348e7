"""Scores of the images of a store by a network: one that compares images with text, or a classifier."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from convscope.datasets.image_inputs import open_images
from convscope.engine import capture
from convscope.engine.batching import MEMORY, batch_size, forward_bytes, iter_batches
from convscope.engine.class_names import find_class
from convscope.engine.model import Model
from convscope.engine.text_targets import model_of_texts
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError
from convscope.images.loading import ImageBatchLoader
from convscope.progress import Progress
from convscope.store.tables import StoreTables


class StoredSample(Dataset[Image.Image]):
    """Some images of a store: the files where they are unchanged, else their thumbnails.

    Attributes
    ----------
    from_thumbnails : set of int
        The positions of the images that came from thumbnails so far.
    """

    def __init__(self, store: StoreTables, images: np.ndarray) -> None:
        self._store, self._images = store, images
        self.from_thumbnails: set[int] = set()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        view = self._store.view(int(self._images[index]))
        if view.source != "original":
            self.from_thumbnails.add(index)
        return view.image


def words_of_classes(judge: Model, words: tuple[str, ...]) -> list[int]:
    """Return the classes of a classifier that words stand for. Raises ConvscopeError for words that are none."""
    if judge.classes is None or judge.has_values:
        raise ConvscopeError(
            f"judge is {judge.name}, which has no named classes and does not compare images with text; give such a "
            "network (open_clip:..., hf:...), a classifier, or scores="
        )
    return [find_class(word, judge.classes) for word in words]


def class_names(judge: Model) -> tuple[str, ...]:
    """Return the names of a classifier's classes; those that several classes share with their numbers."""
    words_of_classes(judge, ())
    names = list(judge.classes or ())
    return tuple(name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names))


def score_images(
    judge: Model,
    words: tuple[str, ...],
    store: StoreTables,
    images: np.ndarray,
    columns: list[int] | None,
    report: Progress,
) -> tuple[np.ndarray, str, list[str]]:
    """Score images of a store for words.

    Parameters
    ----------
    judge : Model
    words : tuple of str
    store : StoreTables
    images : ndarray
        Ids of images.
    columns : list of int or None
        The classes of a classifier that the words stand for; None to compare images with the words as texts.
    report : callable
        Called with the number of images done and of all.

    Returns
    -------
    scores : ndarray of shape (len(images), W), float32
    output : str
        What they are, as of `WordScores`.
    notes : list of str
    """
    network = model_of_texts(judge, words) if columns is None else judge
    sample = StoredSample(store, images)
    loader = ImageBatchLoader(
        open_images(sample), network.preprocessing, fit=store.manifest["plan"].get("fit", "squash")
    )
    scores = np.full((len(images), len(words)), np.nan, np.float32)
    with torch.no_grad(), capture.capture_layers(network, []) as run:
        for batch in iter_batches(loader, batch_size(network, forward_bytes(network), MEMORY), report):
            logits = run(batch.x).logits
            require_finite(network, logits, "the judge's output")
            values = logits if columns is None else network.probabilities(logits)[:, columns]
            scores[list(batch.indices)] = values.float().cpu().numpy()
    if loader.failed:
        raise ConvscopeError(f"judge: {loader.failed[0]}; it was readable when it was scanned")
    count = len(sample.from_thumbnails)
    notes = [f"{count} of {len(images)} images were scored from their thumbnails: originals are missing"] * bool(count)
    output = "probability" if columns is not None else "sigmoid" if network.has_independent_classes else "softmax"
    return scores, output, [*loader.notes, *notes]
