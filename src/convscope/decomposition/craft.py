"""Of which few concepts a class is made: parts that a layer's activations are sums of, and how much each one counts.

T. Fel et al., CRAFT: Concept Recursive Activation FacTorization for Explainability, CVPR 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convscope.decomposition.crops import crop_boxes, non_overlapping_top_k
from convscope.decomposition.layer_access import (
    check_image_model,
    iter_activations,
    last_nonnegative_layer,
    layer_activations,
    logits_from_layer,
    resolve_class,
    spatial_layer,
)
from convscope.decomposition.nmf import coefficients, factorize
from convscope.decomposition.sobol import saltelli_points, total_indices
from convscope.engine import capture
from convscope.engine.batching import MEMORY, Progress, forward_batch_size, pad_to_fixed_batch
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError, require_int
from convscope.images.geometry import Geometry
from convscope.images.loading import DEFAULT_MAX_PIXELS, Batch, ImageBatchLoader
from convscope.results import Result

PATCH = 112  # pixels a side of the patches that are kept
VIEW = 160  # pixels a side of the judged pictures that are kept
OVERLAP = 0.3  # of two patches of one concept, as intersection over union


@dataclass(frozen=True, eq=False)
class Concepts(Result):
    """R concepts of one class at one layer, the most important first.

    `bank` float32 (R, C): each concept as a direction of length 1 in the layer's channels. `importance` float64 (R,):
    the total Sobol index of each for the class's logit, the mean over J pictures of `indices` (J, R). `effects` (R,):
    by how much the logit falls when the concept is taken out of these pictures, on the average; negative where it
    speaks against the class. `heats` float32 (J, R, h, w): how much of each concept is at each place of these
    pictures, `judged` (J,) their positions in `pictures`. `views` uint8 (J, 160, 160, 3) show what the heats lie over,
    in the original `shapes` int64 (J, 2) pixels high and wide. `logits` (J,) are the class's; `rebuilt` (J,) those
    from activations put together from the concepts alone.

    `crops` int32 (M, 5): which of the `pictures`, and top, left, bottom, right in its pixels; `coefficients` float32
    (M, R) say how much of each concept is in each. `examples` int64 (R, P) are the crops with most of it, -1 where
    there are no more, `patches` uint8 (R, P, 112, 112, 3) how they look. `error` is |A - U W| / |A| over the crops.
    """

    bank: np.ndarray
    importance: np.ndarray
    indices: np.ndarray
    ablation_effects: np.ndarray
    heatmaps: np.ndarray
    evaluated_indices: np.ndarray
    thumbnails: np.ndarray
    shapes: np.ndarray
    logits: np.ndarray
    reconstructed_logits: np.ndarray
    crops: np.ndarray
    coefficients: np.ndarray
    examples: np.ndarray
    patches: np.ndarray
    reconstruction_error: float
    layer: str
    target: int
    crop: float
    sobol_points: int
    seed: int
    fit: str
    memory: int
    max_pixels: int
    image_names: tuple[str, ...]
    geometry: tuple[Geometry, ...] = field(repr=False)
    image_source: ImageBatchLoader = field(repr=False)
    image_indices: tuple[int, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The class's."""
        return self.model.class_name(self.target)

    def original(self, image: int) -> np.ndarray:
        """One of the `pictures` as it is, uint8 (H, W, 3)."""
        return self.image_source.original(self.image_indices[image])

    def heatmap(self, images: Any) -> np.ndarray:
        """How much of each concept is at each place of other pictures: float32 (N, R, h, w), 0 and more.

        The non-negative least squares of each place's activations on the bank. Raises ConvscopeError if one of the
        pictures cannot be used.
        """
        pictures = ImageBatchLoader(images, self.model.preprocessing, fit=self.fit, max_pixels=self.max_pixels)
        with iter_activations(self.model, self.layer, self.memory) as maps_of:
            found = [encode(self.bank, maps) for _, maps in maps_of(pictures)]
        if pictures.failed:
            raise ConvscopeError(str(pictures.failed[0]))
        return torch.cat(found).numpy()

    def parameters(self) -> dict[str, Any]:
        names = (
            "layer",
            "target",
            "name",
            "crop",
            "sobol_points",
            "seed",
            "fit",
            "reconstruction_error",
            "image_names",
        )
        rows = ("importance", "ablation_effects")
        return {n: getattr(self, n) for n in names} | {n: getattr(self, n).tolist() for n in rows}


def encode(bank: np.ndarray, maps: Tensor) -> Tensor:
    """How much of each concept of a bank (R, C) is at each place of maps (N, C, h, w): (N, R, h, w), 0 and more."""
    return _laid(coefficients(_at_positions(maps), torch.from_numpy(bank)), maps)


def concepts(
    model: Model,
    images: Any,
    target: int | str,
    *,
    layer: str | None = None,
    count: int = 10,
    crop: float = 1 / 3,
    crops: int = 32,
    only_predicted: bool = True,
    patches: int = 8,
    sobol_points: int = 32,
    n_evaluated: int = 32,
    seed: int = 0,
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> Concepts:
    """The concepts that a class is made of: what recurs in crops of its pictures, as the layer sees them.

    The activations of all crops, each the mean over its places, are taken apart into sums of `count` non-negative
    directions. How important each is, the rest of the network says: of whole pictures, put together from the concepts
    with more or less of each, what share of the variance of the class's logit is each one's doing?

    Parameters
    ----------
    model
        From `convscope.load`.
    images
        Pictures of the class, in any form that `convscope` takes. Crops are cut from them at their own resolution.
    target
        The class, by index or name.
    layer
        A layer that is nowhere negative (behind a ReLU, say). Default: the last one.
    count
        How many concepts.
    crop
        A crop's sides, as a share of the picture's (above 0, up to 1); crops have the proportions of the network's
        input.
    crops
        At most so many a picture, on a grid with half a crop from one to the next; of a larger grid, so many at random.
    only_predicted
        Keep out pictures whose likeliest class, by the network, is another one.
    patches
        How many crops of each concept are shown, as far as they do not overlap.
    masks
        Points of the quasi-Monte-Carlo sequence, a power of two: `masks` * (`count` + 2) passes behind the layer for
        each of the pictures judged.
    judged
        At most so many pictures, evenly spread, on which importance is measured.
    seed
        Of random crops and of the masks. The same for the same picture at the same position, whatever the others are.
    fit
        "squash" shows the network whole pictures, "crop" its own evaluation crop.
    memory, max_pixels
        As of `activations`.
    progress
        Called with the number of steps done, one for each picture looked at, cut up or judged, and the number in all.

    Raises
    ------
    ConvscopeError
        For an unknown class or layer, a layer with negative values, settings out of range, and when no picture is left.
    """
    number = resolve_class(model, target)
    check_image_model(model.preprocessing, "concepts")
    if layer is not None:
        spatial_layer(model, layer)
    if not 0 < crop <= 1:
        raise ConvscopeError(f"crop is {crop!r}; expected a share of the picture's sides, above 0 and up to 1")
    for name, value in {"count": count, "crops": crops, "patches": patches, "n_evaluated": n_evaluated}.items():
        require_int(name, value)
    require_int("sobol_points", sobol_points, 2)
    pictures = ImageBatchLoader(images, model.preprocessing, fit=fit, max_pixels=max_pixels)
    total = 2 * len(pictures) + min(n_evaluated, len(pictures))

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, total)

    positions, logits, notes = _kept(model, pictures, number, only_predicted, memory, tell)
    first = next(pictures.batches(1)).x
    row = last_nonnegative_layer(model, first, layer)
    vectors, cut = [], []
    with iter_activations(model, row.name, memory) as maps_of:
        for i, index in enumerate(positions):
            original = pictures.original(index)
            where = crop_boxes(original.shape[:2], model.preprocessing.image_size, crop, crops, (seed, index))
            parts = [original[top:bottom, left:right] for top, left, bottom, right in where]
            vectors += [_pooled(maps) for _, maps in maps_of(ImageBatchLoader(parts, model.preprocessing))]
            cut.append(np.insert(where, 0, i, axis=1))
            tell(len(pictures) + index + 1)
    factors = factorize(torch.cat(vectors), count)
    chosen = np.unique(np.linspace(0, len(positions) - 1, min(n_evaluated, len(positions))).round().astype(int))
    wanted = {positions[i] for i in chosen}
    points = saltelli_points(count, sobol_points, seed)
    opinions: list[_ImageImportance] = []
    for batch in pictures.batches(1):
        if batch.indices[0] in wanted:
            opinions.append(_judged(model, row.name, batch, factors.bank, number, points, memory))
            tell(total - len(wanted) + len(opinions))
    indices = torch.stack([opinion.indices for opinion in opinions])
    order = indices.mean(0).argsort(descending=True, stable=True)
    contents, crops_cut = factors.coefficients[:, order].float().numpy(), np.concatenate(cut)
    examples = np.stack([non_overlapping_top_k(column, crops_cut, patches, OVERLAP) for column in contents.T])
    views, shapes = _views(pictures, [positions[i] for i in chosen], [opinion.where for opinion in opinions])
    return Concepts(
        model,
        bank=factors.bank[order].float().numpy(),
        importance=indices.mean(0)[order].numpy(),
        indices=indices[:, order].numpy(),
        ablation_effects=torch.stack([opinion.effects for opinion in opinions]).mean(0)[order].numpy(),
        heatmaps=torch.cat([opinion.heatmap for opinion in opinions])[:, order].numpy(),
        evaluated_indices=chosen,
        thumbnails=views,
        shapes=shapes,
        logits=logits[chosen],
        reconstructed_logits=np.array([opinion.rebuilt for opinion in opinions]),
        crops=crops_cut,
        coefficients=contents,
        examples=examples,
        patches=_patches(pictures, positions, crops_cut, examples, model.preprocessing.image_size),
        reconstruction_error=factors.error,
        layer=row.name,
        target=number,
        crop=crop,
        sobol_points=sobol_points,
        seed=seed,
        fit=fit,
        memory=memory,
        max_pixels=max_pixels,
        image_names=tuple(pictures.names[i] for i in positions),
        geometry=tuple(opinion.where for opinion in opinions),
        image_source=pictures,
        image_indices=tuple(positions),
        notes=(*pictures.notes, *notes),
        failed=tuple(pictures.failed),
    )


def _kept(
    model: Model,
    images: ImageBatchLoader,
    target: int,
    only_predicted: bool,
    memory: int,
    tell: Callable[[int], None],
) -> tuple[list[int], np.ndarray, list[str]]:
    """Which pictures are looked at, the class's logit of each, and what is to be said of the others."""
    kept: list[int] = []
    values: list[float] = []
    others: Counter[int] = Counter()
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        for batch in images.batches(forward_batch_size(model, memory)):
            logits = run(pad_to_fixed_batch(model, batch.x)).logits
            require_finite(model, logits, "the network's output")
            for index, row in zip(batch.indices, logits.cpu(), strict=False):
                top = int(row.argmax())
                if only_predicted and top != target:
                    others[top] += 1
                    continue
                kept.append(index)
                values.append(float(row[target]))
            tell(batch.indices[-1] + 1)
    name, out = model.class_name(target), others.total()
    seen = ", ".join(f"{model.class_name(k)} ({n})" for k, n in others.most_common(3))
    if not kept:
        raise ConvscopeError(
            f"the network counts none of these {out} pictures to {name!r} but to {seen}; give others, or "
            "only_predicted=False"
        )
    notes = [f"{out} of {out + len(kept)} pictures are not counted to {name!r} but to {seen}: kept out"] if out else []
    return kept, np.array(values), notes


class _ImageImportance(NamedTuple):
    """What the rest of the network makes of the concepts (R) in one picture; `heat` is (1, R, h, w)."""

    indices: Tensor
    effects: Tensor
    rebuilt: float
    heatmap: Tensor
    where: Geometry


def _judged(
    model: Model, layer: str, one: Batch, bank: Tensor, target: int, points: Tensor, memory: int
) -> _ImageImportance:
    """One picture: its concepts are turned down, each by its own share and everywhere alike, at `points`; and taken
    out one by one."""
    maps = layer_activations(model, layer, one.x)
    count = len(bank)
    contents = coefficients(_at_positions(maps), bank)
    shares = torch.cat([points, 1 - torch.eye(count), torch.ones(1, count)])

    def together(part: Tensor) -> Tensor:
        found = (part[:, None] * contents) @ bank
        return found.float().transpose(1, 2).reshape(len(part), -1, *maps.shape[2:]).to(model.device)

    values = logits_from_layer(model, layer, one.x, shares, together, memory)[:, target].double()
    without, whole = values[len(points) : -1], values[-1]
    return _ImageImportance(
        total_indices(values[: len(points)], count),
        whole - without,
        float(whole),
        _laid(contents, maps),
        one.geometry[0],
    )


def _pooled(maps: Tensor) -> Tensor:
    """The mean over the places of maps (N, C, h, w): (N, C)."""
    return maps.flatten(2).mean(2)


def _at_positions(maps: Tensor) -> Tensor:
    """Maps (N, C, h, w) as vectors, place after place: (N h w, C)."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def _laid(contents: Tensor, maps: Tensor) -> Tensor:
    """What belongs to the places of maps (N, C, h, w), (N h w, R), as maps (N, R, h, w), float32."""
    rows = contents.float().reshape(len(maps), -1, contents.shape[1])
    return rows.transpose(1, 2).reshape(len(maps), -1, *maps.shape[2:])


def _patches(
    images: ImageBatchLoader, positions: Sequence[int], crops: np.ndarray, examples: np.ndarray, like: tuple[int, int]
) -> np.ndarray:
    """How the examples (R, P) look, uint8 (R, P, h, w, 3); white where there is none. Each picture is read once."""
    height, width = PATCH, max(1, round(PATCH * like[1] / like[0]))
    found = np.full((*examples.shape, height, width, 3), 255, np.uint8)
    pictured = np.where(examples >= 0, crops[examples, 0], -1)
    for image in np.unique(pictured[pictured >= 0]):
        original = images.original(positions[image])
        for where in zip(*np.nonzero(pictured == image), strict=True):
            top, left, bottom, right = crops[examples[where], 1:]
            patch = Image.fromarray(original[top:bottom, left:right])
            found[where] = np.asarray(patch.resize((width, height), Image.Resampling.BICUBIC))
    return found


def _views(
    images: ImageBatchLoader, positions: Sequence[int], where: Sequence[Geometry]
) -> tuple[np.ndarray, np.ndarray]:
    """Of some pictures what the network sees, uint8 (J, 160, 160, 3); how high and wide it was, in pixels (J, 2)."""
    views, shapes = [], []
    for position, geometry in zip(positions, where, strict=True):
        original = Image.fromarray(images.original(position))
        ends = (original.height, original.width, original.height, original.width)
        top, left, bottom, right = (min(max(0.0, side), end) for side, end in zip(geometry.box, ends, strict=True))
        seen = original.resize((VIEW, VIEW), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        views.append(np.asarray(seen))
        shapes.append((max(1, round(bottom - top)), max(1, round(right - left))))
    return np.stack(views), np.array(shapes)
