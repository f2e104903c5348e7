"""The result of `convscope.dictionary`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convscope.datasets.image_inputs import open_images
from convscope.decomposition.layer_access import iter_activations
from convscope.dictionaries.attachment import attach, require_layer
from convscope.dictionaries.encoder import DictionaryWeights, FeatureEncoder
from convscope.dictionaries.files import WEIGHTS_FILE, write_weights
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike, find_layer
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, warn
from convscope.formatting import Row
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.results import FILE_SUFFIXES, TABLE_SUFFIX, Result, local_folder
from convscope.sources.coercion import ModelLike, as_model

METRIC_NAMES = {
    "r2": "explained variance on held-out images",
    "l0": "features active at a position",
    "dead": "features active at no training position",
    "logits_kept": "logit of the top class kept with the reconstruction in place",
    "loss_kept": "probabilities of all classes kept",
    "top1_kept": "held-out images whose top class stays",
    "accuracy_kept": "accuracy on held-out images kept",
}


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary(Result):
    """A sparse dictionary of a layer's activations.

    Attributes
    ----------
    atoms : ndarray of shape (F, C), float32
        The direction of each feature, of length 1.
    encoder : ndarray of shape (F, C), float32
        Weights that features are computed with.
    encoder_bias : ndarray of shape (F,), float32
    bias : ndarray of shape (C,), float32
        What is decoded where no feature is active.
    thresholds : ndarray of shape (F,), float32
    layer : str
        Empty for a file that does not say it.
    method : str
    activation : {"topk", "threshold", "nnls"}
        How features are selected.
    active : int
        Features per position that were asked for.
    steps : int
        Training steps.
    seed : int
    num_images : int
        Number of images that the dictionary was trained on.
    metrics : dict of str to float
        See `convscope.dictionary`.
    density : ndarray of shape (F,), float32
        Fraction of the training positions at which each feature is active.
    history : ndarray of shape (steps,), float32
        Explained variance of each training batch.
    """

    atoms: np.ndarray
    encoder: np.ndarray
    encoder_bias: np.ndarray
    bias: np.ndarray
    thresholds: np.ndarray
    layer: str
    method: str
    activation: str
    active: int
    steps: int
    seed: int
    num_images: int
    metrics: dict[str, float]
    density: np.ndarray
    history: np.ndarray

    @property
    def features(self) -> int:
        """Number of features F."""
        return len(self.atoms)

    @property
    def dead(self) -> np.ndarray:
        """Numbers of the features that are active at no training position."""
        return np.flatnonzero(self.density == 0)

    @cached_property
    def feature_encoder(self) -> FeatureEncoder:
        """The encoder and decoder, as a module on the CPU."""
        return FeatureEncoder(self._weights(), self.activation, self.active)

    def _weights(self) -> DictionaryWeights:
        arrays = (self.atoms, self.encoder, self.encoder_bias, self.bias, self.thresholds)
        return DictionaryWeights(*(torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in arrays))

    def encode(
        self,
        model: ModelLike,
        images: object,
        *,
        layer: LayerLike | None = None,
        fit: str = "squash",
        memory: int = MEMORY,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> np.ndarray:
        """Compute the features of images.

        Parameters
        ----------
        model : Model, nn.Module, Keras model or str
            The network that the dictionary is of.
        images : path, sequence of paths, PIL images, arrays or tensor
            Any form that `convscope.predict` takes.
        layer : str, Layer or nn.Module, optional
            By default the layer that the dictionary was trained on.
        fit : {"squash", "crop", "pad"}
            How images are brought to the network's size.
        memory : int
            Bytes for intermediate results.
        max_pixels : int
            Images with more pixels are refused.

        Returns
        -------
        ndarray of shape (N, F, h, w), float32
            Non-negative. Of images that cannot be used there are no rows.

        Raises
        ------
        ConvscopeError
            For a layer that does not fit, and when no image can be read.
        """
        model = as_model(model, images)
        row = self._layer_of(model, layer)
        loader = ImageBatchLoader(open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels)
        with iter_activations(model, row.name, memory) as iterate, torch.no_grad():
            parts = [self.feature_encoder(image[None]) for _, maps in iterate(loader) for image in maps]
        return torch.cat(parts).contiguous().numpy()

    def attach(self, model: ModelLike, layer: LayerLike | None = None) -> Model:
        """Return the model with the features as the layer "LAYER/dictionary".

        What follows the layer gets x + (g - f) A, where f are the features, g the features after edits, and A the
        atoms: the network's answers are exactly those of `model`, until features are edited. Patterns, scans,
        heatmaps, edits and effects take the layer like any other.

        Parameters
        ----------
        model : Model, nn.Module, Keras model or str
            The network that the dictionary is of. Weights are shared.
        layer : str, Layer or nn.Module, optional
            By default the layer that the dictionary was trained on.

        Returns
        -------
        Model

        Raises
        ------
        ConvscopeError
            For a layer that does not fit.

        Warns
        -----
        ConvscopeWarning
            If the network's weights are not those that the dictionary was trained on.

        Examples
        --------
        >>> import convscope
        >>> model = convscope.load("lite0")
        >>> photos = convscope.samples.photographs()
        >>> dictionary = convscope.dictionary(model, photos, "blocks.6", features=64, active=8, steps=5)
        >>> attached = dictionary.attach(model)
        >>> attached.layers["blocks.6/dictionary"].shape
        (64, 7, 7)
        >>> convscope.effects(attached, photos, "blocks.6/dictionary", [3]).logits.shape
        (1, 4, 1)
        """
        model = as_model(model)
        row = self._layer_of(model, layer)
        trained_on = self.model.describe().get("weights_sha256") if self.layer else None
        if trained_on and not model.edits and trained_on != model.weights_hash():
            warn(f"the weights of {model.name} are not those that the dictionary of {self.layer} was trained on")
        encoder = FeatureEncoder(self._weights(), self.activation, self.active)  # on the network's device
        return attach(model, row, encoder, self.method)

    def _layer_of(self, model: Model, layer: LayerLike | None) -> Layer:
        if layer is None and not self.layer:
            raise ConvscopeError("layer is missing: the file of this dictionary does not say it; give layer=")
        row = find_layer(model, self.layer if layer is None else layer)
        require_layer(row, self.atoms.shape[1])
        return row

    def save(self, folder: str | os.PathLike[str], **options: object) -> Path:
        """Save the dictionary into a folder, which `convscope.load_dictionary` reads, or its figure into a file.

        Writes ``dictionary.safetensors`` with the weights, the figure, ``arrays.npz`` and, last, ``manifest.json``.

        Parameters
        ----------
        folder : path
            A local folder, created if it does not exist, or the name of an image file for the figure, or of a .csv
            file for the table of features.
        **options
            None are taken.

        Returns
        -------
        pathlib.Path
            The folder or file.

        Raises
        ------
        ConvscopeError
            If it cannot be written.
        """
        path = local_folder(folder)
        if path.suffix.lower() not in (*FILE_SUFFIXES, TABLE_SUFFIX):
            write_weights(path, self._weights())
        return super().save(folder, **options)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is saved beside the weights."""
        return {"density": self.density, "history": self.history}

    def parameters(self) -> dict[str, object]:
        """Return all settings, and the metrics."""
        return super().parameters() | {"metrics": self.metrics, "weights": WEIGHTS_FILE}

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per feature: its number and the fraction of the positions at which it is active."""
        return [{"feature": n, "density": float(value)} for n, value in enumerate(self.density)]

    def _title(self) -> str:
        of_layer = f"of {self.layer}" if self.layer else "of a layer that is not known"
        return f"{self.features} features {of_layer} ({self.atoms.shape[1]} units), {self.method}"

    def metric_rows(self) -> list[dict[str, str]]:
        """Return one row per metric: its name, value and meaning."""
        return [
            {"metric": name, "value": f"{value:.1f}" if name == "l0" else f"{value:.1%}", "meaning": METRIC_NAMES[name]}
            for name, value in self.metrics.items()
        ]

    def _display_rows(self) -> Sequence[Row]:
        return self.metric_rows()
