"""Find the units of a store that an example image excites more than other images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from convscope.datasets.image_inputs import open_images
from convscope.engine import capture
from convscope.engine.batching import pad_to_fixed_batch
from convscope.engine.model import LOGITS, Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError, require_int
from convscope.images.loading import ImageBatchLoader
from convscope.store.search import Match, Matches
from convscope.store.tables import StoreTables


def find_units_of_image(store: StoreTables, image: object, n: int, model: Model | None) -> Matches:
    """Find units by an example image, as `Store.search` describes."""
    require_int("n", n)
    if model is None:
        raise ConvscopeError("model= is missing: the network that was scanned, which a search by image runs")
    store.check_weights(model)
    return rank_units(store, image, n, model)


def rank_units(store: StoreTables, image: object, n: int, model: Model) -> Matches:
    """Do the same with a network that is known to be the one that was scanned."""
    loader = ImageBatchLoader(open_images(image), model.preprocessing, fit=store.manifest["plan"].get("fit", "squash"))
    if len(loader) != 1:
        raise ConvscopeError(f"{len(loader)} images are given; expected one example image")
    x = next(loader.batches(1)).x
    names, matches = store.names(), []
    for layer, values in _maxima(model, store.layers, x):
        relevance, distance = rank_among(values, store.samples(layer))
        for unit in np.lexsort((-distance, -relevance))[:n].tolist():
            position = None if names is None else names.position(layer, unit)
            if names is None or position is None:
                name, score = str(store.unit_label(layer, unit)) if layer == LOGITS and store.classes else "", None
            else:
                name, score = str(names.names[position]), float(names.scores[position])
            matches.append((-relevance[unit], -distance[unit], Match(layer, unit, name, score, float(relevance[unit]))))
    matches.sort(key=lambda entry: entry[:2])
    return Matches(store, Path(loader.names[0]).name, tuple(match for *_, match in matches[:n]))


def rank_among(values: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare units' maxima on one image with those on the sample.

    Parameters
    ----------
    values : ndarray of shape (U,)
    sample : ndarray of shape (U, R)
        NaN where an image failed.

    Returns
    -------
    relevance : ndarray of shape (U,)
        Fraction of the sample's images that excite the unit less; as strongly counts half.
    distance : ndarray of shape (U,)
        Standard deviations above the mean of the sample; 0 for a unit that is constant there.
    """
    usable = np.isfinite(sample)
    count = np.maximum(usable.sum(1), 1)
    below = (sample < values[:, None]).sum(1) + 0.5 * (sample == values[:, None]).sum(1)
    filled = np.where(usable, sample, 0).astype(np.float64)
    mean = filled.sum(1) / count
    deviation = np.sqrt((np.square(filled - mean[:, None]) * usable).sum(1) / count)
    distance = np.divide(values - mean, deviation, out=np.zeros(len(values)), where=deviation > 0)
    return below / count, distance


def _maxima(model: Model, layers: list[str], x: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
    """Yield layers, and the maximum of each unit over the positions of one image, as a scan stores it."""
    with torch.no_grad(), capture.capture_layers(model, [name for name in layers if name != LOGITS]) as run:
        outputs = run(pad_to_fixed_batch(model, x))
    for name in layers:
        values = outputs.logits if name == LOGITS else outputs.maps[name].movedim(model.layers[name].unit_axis, 1)
        require_finite(model, values[:1], f"layer {name!r}")
        yield (
            name,
            values[0].float().flatten(1).amax(1).cpu().numpy() if values.ndim > 2 else values[0].float().cpu().numpy(),
        )
