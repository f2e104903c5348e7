"""Predictions: the top classes of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch

from convscope.arguments import check_arguments
from convscope.datasets.image_inputs import open_images
from convscope.engine import capture
from convscope.engine.batching import MEMORY, batch_size, forward_bytes, iter_batches
from convscope.engine.text_targets import TextTarget, model_of_texts, parse_texts
from convscope.engine.validation import require_finite
from convscope.errors import require_int, warns_of_failures
from convscope.formatting import Row, base_name, count_of
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import ProgressOption, progress_bar
from convscope.result_items import IndexedResult, ItemKey
from convscope.results import format_csv
from convscope.sources.coercion import ModelLike, as_model


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(IndexedResult):
    """The top classes of N images.

    Attributes
    ----------
    indices : ndarray
        (N, top) class indices, best first.
    probabilities : ndarray
        (N, top) float32 in [0, 1]; for regression and embeddings the values themselves.
    logits : ndarray
        (N, K) float32: the scores of all K classes before any softmax or sigmoid.
    image_names : tuple of str
        Names of the images, in the order of the first axis.
    fit : {"squash", "crop", "pad"}
        How images were brought to the network's size.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = {"indices": 0, "probabilities": 0, "logits": 0, "image_names": 0}

    indices: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray
    image_names: tuple[str, ...]
    fit: str

    def __getitem__(self, key: ItemKey) -> Self:
        return self.select(key)

    @property
    def names(self) -> list[list[str]]:
        """The names of the classes, in the order of `indices`."""
        return [[self.model.class_name(int(i)) for i in row] for row in self.indices]

    def text_files(self) -> dict[str, str]:
        """Return ``predictions.csv``: one row for each image and class."""
        count, top = self.indices.shape
        return {
            "predictions.csv": format_csv(
                {
                    "image": [name for name in self.image_names for _ in range(top)],
                    "rank": np.tile(np.arange(1, top + 1), count),
                    "index": self.indices.ravel(),
                    "name": [name for names in self.names for name in names],
                    self.model.score_name: self.probabilities.ravel(),
                    "logit": np.take_along_axis(self.logits, self.indices, axis=1).ravel(),
                }
            )
        }

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [int(index) for index in self.indices.ravel()]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per image and class, the most probable first: class, probability (or value), logit."""
        return [
            {
                "image": name,
                "class": self.names[n][k],
                self.model.score_name: float(self.probabilities[n, k]),
                "logit": float(self.logits[n, index]),
            }
            for n, name in enumerate(self.image_names)
            for k, index in enumerate(self.indices[n])
        ]

    def _title(self) -> str:
        count, top = len(self.indices), self.indices.shape[1]
        if self.model.has_values:
            return f"{count_of(top, 'value')} of {count_of(count, 'image')}"
        return f"top {count_of(top, 'class')} of {count_of(count, 'image')}" if top > 1 else count_of(count, "image")

    def _display_rows(self) -> Sequence[Row]:
        shows_all = self.model.has_values or self.model.has_independent_classes or len(self.indices) == 1
        rows = self.rows() if shows_all else self.rows()[:: self.indices.shape[1]]
        noun, score = self.model.output_noun, self.model.score_name
        return [
            {"image": base_name(row["image"]), noun: row["class"], score: self.model.format_score(row[score])}
            for row in rows
        ]

    def parameters(self) -> dict[str, object]:
        """Return the number of classes, image names, `fit` and the classes' names."""
        return {"top": self.indices.shape[1], "image_names": self.image_names, "fit": self.fit, "classes": self.names}


@warns_of_failures
@check_arguments
def predict(
    model: ModelLike,
    images: object,
    top: int = 5,
    *,
    targets: TextTarget | Sequence[TextTarget] | None = None,
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Predictions:
    """Compute the top classes of images, and all logits.

    What the probabilities are depends on ``model.task``: the softmax of the logits for classification and segmentation;
    the sigmoid of each for binary and multi-label networks; the network's own outputs where it returns probabilities.
    For regression they are the values, in the network's own order.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        One image or N, in any of these forms. Images are opened when their batch is due, so that memory does not limit
        their number.

        - A path; a folder (its images at any depth, sorted by name); a glob such as ``"photos/*.jpg"``; a .txt list,
          .tar or .parquet files, or a URL, as for `convscope.scan`.
        - A PIL image. An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, or of floats in [0, 1]; an array
          (N, H, W, 3) of N images. Alpha is put on white.
        - A uint8 tensor (3, H, W) or (N, 3, H, W), as `torchvision.io.decode_image` returns: images like any others.
        - A floating tensor (3, H, W) or (N, 3, H, W): the network's input, already preprocessed, used as it is; a
          size or values that do not fit are noted. Networks on signals (N, C, L) and volumes (N, C, D, H, W) take
          tensors only.
        - A list, tuple or iterator of paths, PIL images, arrays, tensors and files in memory (io.BytesIO).
        - A data set of torchvision or Hugging Face, or any `torch.utils.data.Dataset` with a length whose items are
          images or (image, label) pairs; or a DataLoader of one, whose images are read in the order of its sampler, or
          of its data set if the sampler is random.
    top : int
        Number of classes per image; all K if that is less.
    targets : TextTarget or sequence of TextTarget, optional
        Texts, made by `convscope.text_target`, that a network such as CLIP compares the images with, instead of its
        classes. There is one output for each text: its logit, which is the cosine similarity times the network's scale,
        plus its bias, if it has one. Networks with a bias (SigLIP) give each text a probability, others do not.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    memory : int
        Bytes that a batch's intermediate results may take.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` after every batch with numbers of images; exceptions raised in it cancel cleanly.

    Returns
    -------
    Predictions
        ``indices`` and ``probabilities`` (N, top), ``logits`` (N, K). Images that cannot be read are left out and
        listed in ``failed``.

    Raises
    ------
    ConvscopeError
        For logits that are not finite, when no image can be read, and for texts if the network takes none.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> predictions = convscope.predict(model, convscope.samples.photographs(), top=3)
    >>> predictions.probabilities.shape
    (4, 3)
    >>> predictions.names[0][0]
    'Egyptian cat'
    """
    require_int("top", top)
    model = as_model(model, images)
    if targets is not None:
        model = model_of_texts(model, parse_texts(targets))
        top = model.num_outputs or top
    model.require_scores()
    loader = ImageBatchLoader(open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels)
    parts: list[torch.Tensor] = []
    indices: list[int] = []
    with progress_bar(progress, "predict") as report, torch.no_grad(), capture.capture_layers(model, []) as run:
        for batch in iter_batches(loader, batch_size(model, forward_bytes(model), memory), report):
            logits = run(batch.x).logits
            require_finite(model, logits, "the network's output")
            parts.append(logits.cpu())
            indices += batch.indices
    logits = torch.cat(parts)
    scores = model.probabilities(logits)
    # Values of a regression have no order: they stay in the network's own.
    order = (
        torch.arange(scores.shape[1]).expand_as(scores)
        if model.has_values
        else scores.argsort(dim=1, descending=True, stable=True)
    )
    best = order[:, :top]
    return Predictions(
        model,
        indices=best.numpy().copy(),
        probabilities=scores.gather(1, best).numpy(),
        logits=logits.numpy(),
        image_names=tuple(loader.names[i] for i in indices),
        fit=fit,
        notes=tuple(loader.notes),
        failed=tuple(loader.failed),
    )
