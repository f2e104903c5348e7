"""A measured proxy of how interpretable features are: how well another network tells their examples from others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.datasets.image_inputs import open_images
from convscope.decomposition.layer_access import iter_activations, spatial_layer
from convscope.dictionaries.result import Dictionary
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_int
from convscope.evaluation.statistics import bootstrap
from convscope.images.loading import ImageBatchLoader
from convscope.sources.coercion import ModelLike, as_model

MIN_IMAGES = 4  # with an example each
RANDOM = 512  # positions


@dataclass(frozen=True)
class Interpretability:
    """How well another network distinguishes examples of features from random positions.

    Attributes
    ----------
    features, units : ndarray
        The area under the ROC curve, 0.5 by chance and 1 at best, for each feature of the dictionary and for each unit
        of the layer that has enough examples.
    mean_features, mean_units : float
    interval_features, interval_units : tuple of float
        95 % bootstrap intervals of the means, over features and over units.
    """

    features: np.ndarray
    units: np.ndarray
    mean_features: float
    mean_units: float
    interval_features: tuple[float, float]
    interval_units: tuple[float, float]


def interpretability(
    dictionary: Dictionary,
    model: ModelLike,
    images: object,
    judge: ModelLike,
    *,
    judge_layer: LayerLike | None = None,
    examples: int = 16,
    count: int = 256,
    seed: int = 0,
    memory: int = MEMORY,
) -> Interpretability:
    """Measure how well a judge distinguishes examples of features and of units from random positions.

    The examples of a feature are the positions of its largest activation in the images where that is largest. Half of
    them make a prototype, the mean of the judge's vectors there; the measure is the probability that one of the other
    half is more similar to it, by the cosine, than a random position. A network other than the model should judge.

    Parameters
    ----------
    dictionary : Dictionary
    model : Model, nn.Module, Keras model or str
        The network that the dictionary is of.
    images : path, sequence of paths, PIL images, arrays or tensor
        Images that the dictionary was not trained on.
    judge : Model, nn.Module, Keras model or str
        Another network.
    judge_layer : str, Layer or nn.Module, optional
        The layer whose vectors judge; its last with positions by default.
    examples : int
        Examples of each feature, from as many images.
    count : int
        Features, and units, that are drawn at random.
    seed : int
    memory : int
        Bytes for intermediate results.

    Returns
    -------
    Interpretability

    Raises
    ------
    ConvscopeError
        For fewer than four images.

    References
    ----------
    Zimmermann et al., Measuring Per-Unit Interpretability at Scale Without Humans, NeurIPS 2024: a network judges
    whether images belong to a unit's examples.
    """
    require_int("examples", examples, MIN_IMAGES)
    model, judge = as_model(model), as_model(judge)
    layer = spatial_layer(model, dictionary.layer)
    judging = judge.layers.last_spatial() if judge_layer is None else spatial_layer(judge, judge_layer)
    opened = open_images(images)
    maps = _maps(model, layer.name, opened, memory)
    if len(maps) < MIN_IMAGES:
        raise ConvscopeError(
            f"{len(maps)} images; expected at least {MIN_IMAGES} that the dictionary was not trained on"
        )
    vectors = F.interpolate(_maps(judge, judging.name, opened, memory), maps.shape[2:], mode="bilinear")
    if len(vectors) != len(maps):
        raise ConvscopeError("some of the images can be used by one of the two networks only; leave them out")
    with torch.no_grad():
        features = torch.cat([dictionary.feature_encoder(one[None]) for one in maps])
    generator = torch.Generator().manual_seed(seed)
    of_features, of_units = (separations(m, vectors, examples, count, generator) for m in (features, maps))
    (mean_features, interval_features), (mean_units, interval_units) = map(_summary, (of_features, of_units))
    return Interpretability(of_features, of_units, mean_features, mean_units, interval_features, interval_units)


def separations(maps: Tensor, vectors: Tensor, examples: int, count: int, generator: torch.Generator) -> np.ndarray:
    """Return the area under the ROC curve for up to `count` random channels of maps that have enough examples.

    Parameters
    ----------
    maps : Tensor
        (N, F, h, w) activations.
    vectors : Tensor
        (N, D, h, w) what the judge sees there.
    examples : int
        Examples of each channel, from as many images.
    count : int
        Maximum number of channels.
    generator : torch.Generator
    """
    best, positions = maps.flatten(2).max(2)  # (N, F)
    table = F.normalize(vectors.flatten(2).transpose(1, 2), dim=2)  # (N, h w, D)
    table = F.normalize(table - table.mean((0, 1)), dim=2)
    random = table.flatten(0, 1)[torch.randint(table.shape[0] * table.shape[1], (RANDOM,), generator=generator)]
    values = []
    for channel in torch.randperm(maps.shape[1], generator=generator)[:count].tolist():
        images = best[:, channel].argsort(descending=True, stable=True)[:examples]
        images = images[best[images, channel] > 0]
        if len(images) < MIN_IMAGES:
            continue
        examples_at = table[images, positions[images, channel]]
        prototype = F.normalize(examples_at[::2].mean(0), dim=0)
        values.append(_roc_area(examples_at[1::2] @ prototype, random @ prototype))
    return np.array(values)


def _roc_area(positive: Tensor, negative: Tensor) -> float:
    """Return the probability that a positive value is above a negative one; ties count half."""
    difference = positive[:, None] - negative[None]
    return float(((difference > 0).float() + (difference == 0).float() / 2).mean())


def _maps(model: Model, layer: str, images: object, memory: int) -> Tensor:
    loader = ImageBatchLoader(images, model.preprocessing)
    with iter_activations(model, layer, memory) as iterate:
        return torch.cat([maps for _, maps in iterate(loader)])


def _summary(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return the mean and its bootstrap interval; NaN for no values."""
    if not len(values):
        return float("nan"), (float("nan"), float("nan"))
    low, high = bootstrap(values)
    return float(values.mean()), (float(low), float(high))
