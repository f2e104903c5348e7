"""An atlas of what a layer tells apart: activations of many pictures laid out on a plane, and what each region shows.

S. Carter et al., Exploring Neural Networks with Activation Atlases, Distill 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.decomposition.layer_access import (
    check_image_model,
    layer_activations,
    logits_from_layer,
    resolve_class,
    spatial_layer,
)
from convscope.engine.batching import MEMORY, Progress
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_int
from convscope.featurevis.api import patterns
from convscope.featurevis.objectives import direction
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.results import Result

Reducer = Callable[[np.ndarray], np.ndarray]  # vectors (n, C) to positions (n, 2)

NUM_CLASSES = 3  # classes of each cell
RIM = 0.01  # of the positions on each side of an axis that do not stretch the grid


@dataclass(frozen=True, eq=False)
class Atlas(Result):
    """n activation vectors of a layer on a grid of `grid` x `grid` cells, of which m hold enough of them.

    `positions` float32 (n, 2), across and down, in [0, 1]; `sources` int64 (n, 3): which of the `pictures` and at which
    row and column of the layer; `cell` int64 (n,): in which of the m cells, -1 for a cell with too few.

    `cells` int64 (m, 2): row and column in the grid; `counts` (m,): vectors in each; `means` float32 (m, C): their
    mean; `icons` uint8 (m, s, s, 3): a picture drawn for it; `classes` int64 (m, 3 or fewer): those that its vectors
    speak for most, and `effects` float32, how much: by how much a class's logit falls when a vector is taken out of its
    picture, set to 0 at its place, the mean over the cell.
    """

    positions: np.ndarray
    sources: np.ndarray
    cell_index: np.ndarray
    cells: np.ndarray
    counts: np.ndarray
    means: np.ndarray
    icons: np.ndarray
    classes: np.ndarray
    effects: np.ndarray
    layer: str
    target: int | None
    grid: int
    positions_per_image: int
    min_count: int
    top_k: int
    steps: int
    power: float
    seed: int
    fit: str
    image_names: tuple[str, ...]

    @property
    def names(self) -> list[list[str]]:
        """The classes' names, as `classes`."""
        return [[self.model.class_name(int(k)) for k in row] for row in self.classes]


def atlas(
    model: Model,
    images: Any,
    *,
    layer: str | None = None,
    target: int | str | None = None,
    grid: int = 12,
    positions_per_image: int = 4,
    min_count: int = 4,
    top_k: int | None = None,
    reducer: Reducer | None = None,
    size: int = 128,
    steps: int = 96,
    power: float = 2,
    seed: int = 0,
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> Atlas:
    """Lay out what a layer gives at random places of many pictures, and draw what each region of the plane stands for.

    Parameters
    ----------
    model
        From `convscope.load`.
    images
        Pictures, in any form that `convscope` takes; the more and the more diverse, the better.
    layer
        Any layer with places. Default: the last one.
    target
        A class, by index or name: only vectors that speak for it are laid out. A vector does if the class's logit falls
        when the vector is set to 0 at its place, and no more than `among` - 1 other classes' fall further.
    grid
        Cells a side.
    places
        Random places of each picture, without one twice.
    least
        Vectors that a cell must hold to be drawn.
    among
        Default: a hundredth of the classes, at least one.
    reduce
        What brings vectors (n, C) to positions (n, 2). Default: UMAP (cosine distance, `seed`), which comes with
        `convscope[atlas]`.
    size, steps
        Pixels a side, and steps of the ascent, of the icons.
    power
        Of the cosine in the icons' objective: the higher, the closer an icon keeps to its direction (`direction`).
    seed
        Of places, which belong to the picture at its position whatever the others are, of UMAP, and of icons.
    fit, memory, max_pixels
        As of `activations`.
    progress
        Called with what is done and what there is in all: half of it is looking, half is drawing.

    Raises
    ------
    ConvscopeError
        For an unknown class or layer, settings out of range, a missing UMAP, a `reduce` that gives something else than
        finite (n, 2), where all vectors are 0, and where no cell holds enough vectors.
    """
    check_image_model(model.preprocessing, "atlases")
    row = model.layers.last_spatial() if layer is None else spatial_layer(model, layer)
    number = None if target is None else resolve_class(model, target)
    settings = {
        "grid": grid,
        "positions_per_image": positions_per_image,
        "min_count": min_count,
        "size": size,
        "steps": steps,
    }
    for name, value in settings.items():
        require_int(name, value)
    first = max(1, (model.num_outputs or 1) // 100) if top_k is None else top_k
    require_int("top_k", first)
    lay_out = umap_reducer(seed) if reducer is None else reducer

    def tell(done: float, total: float, half: int) -> None:
        if progress is not None:
            progress(half + done / total, 2)

    pictures = ImageBatchLoader(images, model.preprocessing, fit=fit, max_pixels=max_pixels)
    vectors, effects, sources = [], [], []
    used: list[int] = []
    for batch in pictures.batches(1):
        (index,), maps = batch.indices, layer_activations(model, row.name, batch.x)
        at = _drawn(math.prod(maps.shape[2:]), positions_per_image, (seed, index))
        vectors.append(maps[0].flatten(1)[:, at].T)
        effects.append(_effects(model, row.name, batch.x, maps, at, memory))
        sources.append(np.stack([np.full(len(at), len(used)), *np.divmod(at.numpy(), maps.shape[3])], axis=1))
        used.append(index)
        tell(index + 1, len(pictures), 0)
    found, effect, origin = torch.cat(vectors), torch.cat(effects), np.concatenate(sources)
    # Where all channels are 0 there is no direction to draw.
    speaks = found.any(1)
    mute = len(found) - int(speaks.sum())
    if mute == len(found):
        raise ConvscopeError(f"all channels of {row.name!r} are 0 at every place that was looked at")
    found, effect, origin = found[speaks], effect[speaks], origin[speaks.numpy()]
    if number is not None:
        speaks = _among(effect, number, first)
        found, effect, origin = found[speaks], effect[speaks], origin[speaks.numpy()]
        if len(found) == 0:
            raise ConvscopeError(
                f"no vector speaks for {model.class_name(number)!r} more than for all but {first - 1} others; give "
                "more pictures of the class, or a larger among="
            )
    positions = _normalised(_laid_out(lay_out, found))
    cells, cell, counts = _gridded(positions, grid, min_count)
    members = [torch.from_numpy(cell == i) for i in range(len(cells))]
    means = torch.stack([found[own].mean(0) for own in members])
    best = torch.stack([effect[own].mean(0) for own in members]).topk(min(NUM_CLASSES, model.num_outputs or 0), dim=1)
    icons = patterns(
        model,
        [direction(row.name, mean, power) for mean in means],
        size=size,
        steps=steps,
        seed=seed,
        memory=memory,
        progress=lambda done, total: tell(done, total, 1),
    )
    return Atlas(
        model,
        positions=positions,
        sources=origin,
        cell_index=cell,
        cells=cells,
        counts=counts,
        means=means.numpy(),
        icons=icons.images,
        classes=best.indices.numpy(),
        effects=best.values.numpy(),
        layer=row.name,
        target=number,
        grid=grid,
        positions_per_image=positions_per_image,
        min_count=min_count,
        top_k=first,
        steps=steps,
        power=power,
        seed=seed,
        fit=fit,
        image_names=tuple(pictures.names[i] for i in used),
        notes=(
            *pictures.notes,
            *([f"{mute} vectors were left out: all their channels are 0"] if mute else []),
            f"{int((cell >= 0).sum())} of {len(cell)} vectors are in cells that are drawn",
        ),
        failed=tuple(pictures.failed),
    )


def umap_reducer(seed: int) -> Reducer:
    """The atlas's own reduction: UMAP with 20 neighbours, cosine distance, a fixed seed, in one thread.

    Raises ConvscopeError if umap-learn is not installed.
    """
    try:
        from umap import UMAP
    except ImportError as error:
        raise ConvscopeError(
            "an atlas is laid out by UMAP, which is not installed: pip install 'convscope[atlas]'; or give reduce="
        ) from error

    def reduce(vectors: np.ndarray) -> np.ndarray:
        if len(vectors) < 4:
            raise ConvscopeError(f"{len(vectors)} vectors are too few to lay out; give more pictures, or more places")
        neighbours = min(20, len(vectors) - 1)
        start = "spectral" if len(vectors) > 50 else "random"  # too few make no eigenvectors
        settings = {"n_neighbors": neighbours, "min_dist": 0.01, "metric": "cosine", "init": start}
        return np.asarray(UMAP(n_components=2, random_state=seed, n_jobs=1, **settings).fit_transform(vectors))

    return reduce


def _drawn(count: int, wanted: int, seed: tuple[int, int]) -> Tensor:
    """Places of one picture, `wanted` of `count`, in ascending order."""
    chosen = np.random.default_rng(seed).choice(count, min(wanted, count), replace=False)
    return torch.from_numpy(np.sort(chosen))


def _effects(model: Model, layer: str, x: Tensor, maps: Tensor, at: Tensor, memory: int) -> Tensor:
    """By how much each logit falls when the vector at one of the places `at` (P,) is set to 0: (P, K).

    x: one picture (1, C, H, W); maps: what the layer gives for it (1, C, h, w).
    """

    def without(part: Tensor) -> Tensor:
        found = maps.flatten(2).repeat(len(part), 1, 1)
        rows = (part >= 0).nonzero()[:, 0]
        found[rows, :, part[rows]] = 0
        return found.reshape(-1, *maps.shape[1:]).to(model.device)

    logits = logits_from_layer(model, layer, x, torch.cat([at, torch.tensor([-1])]), without, memory)
    return logits[-1] - logits[:-1]


def _among(effects: Tensor, target: int, first: int) -> Tensor:
    """Which rows (n,) of effects (n, K) speak for the target, and for fewer than `first` classes more."""
    own = effects[:, target : target + 1]
    return ((effects > own).sum(1) < first) & (own[:, 0] > 0)


def _laid_out(reduce: Reducer, vectors: Tensor) -> np.ndarray:
    found = np.asarray(reduce(vectors.numpy()), dtype=np.float64)
    if found.shape != (len(vectors), 2) or not np.isfinite(found).all():
        raise ConvscopeError(f"reduce gave {found.shape}; expected finite numbers ({len(vectors)}, 2)")
    return found


def _normalised(positions: np.ndarray) -> np.ndarray:
    """Each axis from 0 to 1: half its own scale, the outermost hundredth on either side clipped, and half its ranks.

    Islands, of which a reduction makes many where pictures are few, get room by how much there is on them; on either
    axis the order stays what it was.
    """
    low, high = np.quantile(positions, (RIM, 1 - RIM), axis=0)
    scale = ((positions - low) / np.where(high > low, high - low, 1)).clip(0, 1)
    ranks = positions.argsort(axis=0, kind="stable").argsort(axis=0) / max(1, len(positions) - 1)
    mixed: np.ndarray = ((scale + ranks) / 2).astype(np.float32)
    return mixed


def _gridded(positions: np.ndarray, grid: int, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells (m, 2) with enough positions, row by row; which of them each position is in, -1: none; how many are."""
    across, down = np.minimum((positions * grid).astype(int), grid - 1).T
    numbers, which, counts = np.unique(down * grid + across, return_inverse=True, return_counts=True)
    enough = counts >= least
    if not enough.any():
        raise ConvscopeError(
            f"no cell holds {least} of the {len(positions)} vectors: give more pictures, more places, or a smaller grid"
        )
    order = np.where(enough, np.cumsum(enough) - 1, -1)
    return np.stack(np.divmod(numbers[enough], grid), axis=1), order[which], counts[enough]
