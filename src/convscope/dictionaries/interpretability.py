"""A measured proxy of how interpretable features are: how well another network tells their examples from others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.datasets.image_inputs import open_images
from convscope.decomposition.layer_access import iter_activations, spatial_layer
from convscope.dictionaries.encoder import FeatureEncoder
from convscope.dictionaries.result import Dictionary
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_int
from convscope.evaluation.statistics import bootstrap
from convscope.images.loading import ImageBatchLoader
from convscope.sources.coercion import ModelLike, as_model

MIN_EXAMPLES = 4
RANDOM = 512  # positions


@dataclass(frozen=True)
class Separation:
    """How well a judge distinguishes the examples of channels: areas under the ROC curve, 0.5 by chance and 1 at best.

    Attributes
    ----------
    from_random : ndarray of shape (n,)
        The examples of each of n channels from random positions.
    from_others : ndarray of shape (n,)
        From the examples of the other channels.
    judged : float
        Fraction of all channels that are active in enough images; the n are drawn from these.
    """

    from_random: np.ndarray
    from_others: np.ndarray
    judged: float

    def summary(self) -> dict[str, tuple[float, float, float]]:
        """Return the mean of each measure and its 95 % bootstrap interval over the channels; NaN for none."""
        return {name: _summary(getattr(self, name)) for name in ("from_random", "from_others")}


@dataclass(frozen=True)
class Interpretability:
    """How well another network distinguishes examples of features, beside those of the layer's units.

    Attributes
    ----------
    features, units : Separation
        Of the features of the dictionary and of the units of the layer.
    directions : Separation
        Of random directions of the layer: what units without a meaning of their own would score.
    """

    features: Separation
    units: Separation
    directions: Separation


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
    """Measure how well a judge distinguishes the examples of features, units and random directions.

    The examples of a feature are the positions of its largest activation in the images where that is largest. Half of
    them make a prototype, the mean of the judge's vectors there; the measure is the probability that one of the other
    half is more similar to it, by the cosine, than a random position, and than an example of another feature.

    Random positions are a weak control if most of them show background: every channel that responds to objects is then
    easy to distinguish from them, even a random direction. The examples of other channels are a stronger control, since
    they can be distinguished only if channels respond to different things.

    A network other than the model should judge, at a layer about as local as the dictionary's.

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
        Examples of each feature, from as many images. Features that are active in fewer images are not judged.
    count : int
        Maximum number of features, units and directions, drawn at random.
    seed : int
    memory : int
        Bytes for intermediate results.

    Returns
    -------
    Interpretability

    Raises
    ------
    ConvscopeError
        For fewer images than examples.

    References
    ----------
    Zimmermann et al., Measuring Per-Unit Interpretability at Scale Without Humans, NeurIPS 2024: a network judges
    whether images belong to a unit's examples.
    """
    require_int("examples", examples, MIN_EXAMPLES)
    model, judge = as_model(model), as_model(judge)
    layer = spatial_layer(model, dictionary.layer)
    judging = judge.layers.last_spatial() if judge_layer is None else spatial_layer(judge, judge_layer)
    opened = open_images(images)
    maps = _maps(model, layer.name, opened, memory)
    if len(maps) < examples:
        raise ConvscopeError(
            f"{len(maps)} images; expected at least {examples} that the dictionary was not trained on (examples=)"
        )
    vectors = _maps(judge, judging.name, opened, memory)
    if len(vectors) != len(maps):
        raise ConvscopeError("some of the images can be used by one of the two networks only; leave them out")
    return compare(dictionary.feature_encoder, maps, vectors, examples, count, seed)


def compare(
    encoder: FeatureEncoder, maps: Tensor, vectors: Tensor, examples: int, count: int, seed: int
) -> Interpretability:
    """Measure features, units and random directions; see `interpretability`.

    Parameters
    ----------
    encoder : FeatureEncoder
    maps : Tensor
        (N, C, h, w) activations of the dictionary's layer.
    vectors : Tensor
        (N, D, H, W) what the judge sees in the same images, at positions of its own.
    examples, count, seed : int
    """
    vectors = F.interpolate(vectors, maps.shape[2:], mode="bilinear")
    with torch.no_grad():
        features = torch.cat([encoder(one[None]) for one in maps])
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, maps.shape[1], generator=generator)
    projected = torch.einsum("nchw,dc->ndhw", maps - maps.mean((0, 2, 3), keepdim=True), directions)
    return Interpretability(*(separation(m, vectors, examples, count, generator) for m in (features, maps, projected)))


def separation(maps: Tensor, vectors: Tensor, examples: int, count: int, generator: torch.Generator) -> Separation:
    """Return the areas under the ROC curve for up to `count` random channels of maps that have enough examples.

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
    enough = ((best > 0).sum(0) >= examples).nonzero()[:, 0]
    channels = enough[torch.randperm(len(enough), generator=generator)[:count]]
    images = best[:, channels].argsort(dim=0, descending=True, stable=True)[:examples]  # (examples, n)
    examples_at = table[images, positions[images, channels]].transpose(0, 1)  # (n, examples, D)
    prototypes = F.normalize(examples_at[:, ::2].mean(1), dim=1)
    tested = examples_at[:, 1::2]
    to_random, to_tested = prototypes @ random.T, torch.einsum("nd,med->nme", prototypes, tested)
    from_random, from_others = [], []
    for n in range(len(channels)):
        is_other = torch.arange(len(channels)) != n
        from_random.append(_roc_area(to_tested[n, n], to_random[n]))
        from_others.append(_roc_area(to_tested[n, n], to_tested[n, is_other].flatten()))
    return Separation(np.array(from_random), np.array(from_others), len(enough) / maps.shape[1])


def _roc_area(positive: Tensor, negative: Tensor) -> float:
    """Return the probability that a positive value is above a negative one; ties count half."""
    difference = positive[:, None] - negative[None]
    return float(((difference > 0).float() + (difference == 0).float() / 2).mean())


def _maps(model: Model, layer: str, images: object, memory: int) -> Tensor:
    loader = ImageBatchLoader(images, model.preprocessing)
    with iter_activations(model, layer, memory) as iterate:
        return torch.cat([maps for _, maps in iterate(loader)])


def _summary(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and its bootstrap interval; NaN for no values."""
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    low, high = bootstrap(values)
    return float(values.mean()), float(low), float(high)
