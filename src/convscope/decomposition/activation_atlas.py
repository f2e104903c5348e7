"""Arrange the activations of many images on a plane, and draw an icon for each region (activation atlas)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.attribution.default_layer import choose_layer
from convscope.datasets.image_inputs import open_images
from convscope.decomposition.layer_access import (
    check_image_model,
    layer_activations,
    logits_from_layer,
    resolve_class,
    spatial_layer,
)
from convscope.decomposition.projection import (
    Cells,
    Reducer,
    assign_cells,
    normalize_coordinates,
    reduce_vectors,
    umap_reducer,
)
from convscope.decomposition.result import Atlas
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_int, warns_of_failures
from convscope.featurevis.api import patterns
from convscope.featurevis.objectives import direction
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model

MAX_CLASSES = 3  # classes of each cell in a result


@warns_of_failures
@check_arguments
def atlas(
    model: ModelLike,
    images: object,
    *,
    layer: LayerLike | None = None,
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
    progress: ProgressOption = None,
) -> Atlas:
    """Arrange a layer's activations at random positions of many images on a plane, with an icon for each region.

    Activation vectors are reduced to two dimensions and grouped by the cells of a grid. The icon of a cell is the
    pattern of its mean vector; its classes are those whose logits fall most when a vector is set to 0.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        Any form that `convscope.predict` takes; the more and the more diverse, the better.
    layer : str, Layer or nn.Module, optional
        A layer, as in `convscope.activations`, with spatial positions. By default that of `convscope.heatmaps`.
    target : int or str, optional
        A class, by index or name: only vectors that support it are shown. A vector does if the class's logit falls when
        the vector is set to 0, and the logits of at most `top_k` - 1 other classes fall further.
    grid : int
        Cells along each side.
    positions_per_image : int
        Random positions of each image, without replacement.
    min_count : int
        Minimum number of vectors of a cell that is shown.
    top_k : int, optional
        See `target`. By default 1 % of the number of classes, at least 1.
    reducer : callable, optional
        Reduces vectors (n, C) to coordinates (n, 2). By default UMAP with cosine distance and `seed`, which needs
        ``convscope[atlas]``.
    size, steps : int
        Side of an icon in pixels, and steps of gradient ascent.
    power : float
        Exponent of the cosine in the icons' objective (`convscope.objectives.direction`). The higher, the closer an
        icon keeps to its direction.
    seed : int
        Seed of positions, UMAP and icons. An image has the same positions whatever the other images are.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    memory : int
        Bytes for intermediate results.
    max_pixels : int
        Images with more pixels are refused.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        with the amount done and the total of 2: 1 for the images, 1 for the icons.

    Returns
    -------
    Atlas
        Positions, cells and their icons.

    Raises
    ------
    ConvscopeError
        For an unknown class or layer, arguments out of range, a missing UMAP, a `reducer` that does not return finite
        numbers (n, 2), if all vectors are 0, and if no cell has enough vectors.

    References
    ----------
    Carter et al., Exploring Neural Networks with Activation Atlases, Distill 2019.

    Examples
    --------
    >>> import convscope
    >>> from convscope import samples
    >>> model = convscope.load("lite0")
    >>> result = convscope.atlas(
    ...     model, samples.photographs(), grid=2, positions_per_image=8, reducer=lambda v: v[:, :2], size=32, steps=2
    ... )
    >>> result.positions.shape[1], result.icons.shape[1:]
    (2, (32, 32, 3))
    """
    model = as_model(model)
    check_image_model(model.preprocessing, "activation atlases")
    with progress_bar(progress, "atlas") as report:
        job = _Job(
            model=model,
            loader=ImageBatchLoader(open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels),
            layer=(choose_layer(model)[0] if layer is None else spatial_layer(model, layer)).name,
            target=None if target is None else resolve_class(model, target),
            grid=grid,
            positions_per_image=positions_per_image,
            min_count=min_count,
            top_k=max(1, (model.num_outputs or 1) // 100) if top_k is None else top_k,
            size=size,
            steps=steps,
            power=power,
            seed=seed,
            fit=fit,
            memory=memory,
            progress=report,
        )
        job.check()
        reduce = umap_reducer(seed) if reducer is None else reducer
        sampled, indices = _sample_vectors(job)
        vectors, num_zero = _select_vectors(job, sampled)
        positions = normalize_coordinates(reduce_vectors(reduce, vectors.values))
        cells = assign_cells(positions, grid, min_count)
        return _collect(job, vectors, positions, cells, num_zero, indices)


@dataclass(frozen=True)
class _Job:
    """The arguments of `atlas`."""

    model: Model
    loader: ImageBatchLoader
    layer: str
    target: int | None
    grid: int
    positions_per_image: int
    min_count: int
    top_k: int
    size: int
    steps: int
    power: float
    seed: int
    fit: str
    memory: int
    progress: Progress

    def check(self) -> None:
        """Raise ConvscopeError for a number out of range."""
        for name in ("grid", "positions_per_image", "min_count", "size", "steps", "top_k"):
            require_int(name, getattr(self, name))

    def report(self, stage: int, done: float, total: float) -> None:
        """Report the progress of stage 0 (images) or 1 (icons)."""
        self.progress(stage + done / total, 2)


class _Vectors(NamedTuple):
    """Activation vectors (n, C), decreases of all logits without them (n, K), and where they are from (n, 3)."""

    values: Tensor
    effects: Tensor
    sources: np.ndarray

    def select(self, mask: Tensor) -> _Vectors:
        """Keep the vectors of a mask (n,)."""
        return _Vectors(self.values[mask], self.effects[mask], self.sources[mask.numpy()])


def _sample_vectors(job: _Job) -> tuple[_Vectors, list[int]]:
    """Read the layer's activations at random positions of all images; also return the indices of these images."""
    parts: list[_Vectors] = []
    indices: list[int] = []
    for batch in job.loader.batches(1):
        (index,), maps = batch.indices, layer_activations(job.model, job.layer, batch.x)
        positions = _random_positions(math.prod(maps.shape[2:]), job.positions_per_image, (job.seed, index))
        image = np.full(len(positions), len(indices))
        rows, columns = np.divmod(positions.numpy(), maps.shape[3])
        effects = _removal_effects(job, batch.x, maps, positions)
        parts.append(_Vectors(maps[0].flatten(1)[:, positions].T, effects, np.stack([image, rows, columns], axis=1)))
        indices.append(index)
        job.report(0, index + 1, len(job.loader))
    values, effects, sources = zip(*parts, strict=True)
    return _Vectors(torch.cat(values), torch.cat(effects), np.concatenate(sources)), indices


def _random_positions(num_positions: int, count: int, seed: tuple[int, int]) -> Tensor:
    """Draw positions of one image without replacement, in ascending order."""
    positions = np.random.default_rng(seed).choice(num_positions, min(count, num_positions), replace=False)
    return torch.from_numpy(np.sort(positions))


def _removal_effects(job: _Job, x: Tensor, maps: Tensor, positions: Tensor) -> Tensor:
    """Compute the decrease of all logits (P, K) when the vector at one of the positions (P,) is set to 0.

    `x` is the image (1, C, H, W), `maps` are the layer's activations for it.
    """
    unchanged = torch.tensor([-1])
    make_maps = partial(_without_vector, maps, job.model.device)
    logits = logits_from_layer(job.model, job.layer, x, torch.cat([positions, unchanged]), make_maps, job.memory)
    return logits[-1] - logits[:-1]


def _without_vector(maps: Tensor, device: torch.device, positions: Tensor) -> Tensor:
    """Copy maps (1, C, h, w) once per position and set the vector there to 0; -1 leaves a copy unchanged."""
    copies = maps.flatten(2).repeat(len(positions), 1, 1)
    rows = (positions >= 0).nonzero()[:, 0]
    copies[rows, :, positions[rows]] = 0
    return copies.reshape(-1, *maps.shape[1:]).to(device)


def _select_vectors(job: _Job, vectors: _Vectors) -> tuple[_Vectors, int]:
    """Leave out vectors that are 0 and those that do not support the target; also return the number that are 0."""
    nonzero = vectors.values.any(1)  # a zero vector has no direction
    num_zero = len(nonzero) - int(nonzero.sum())
    if num_zero == len(nonzero):
        raise ConvscopeError(f"all channels of {job.layer!r} are 0 at every sampled position; choose another layer")
    vectors = vectors.select(nonzero)
    if job.target is not None:
        vectors = vectors.select(_supports(vectors.effects, job.target, job.top_k))
        if len(vectors.values) == 0:
            name, others = job.model.class_name(job.target), f"all but {job.top_k - 1} other classes"
            advice = "give more images of the class, or a larger top_k"
            raise ConvscopeError(f"no vector supports {name!r} more than {others}; {advice}")
    return vectors, num_zero


def _supports(effects: Tensor, target: int, top_k: int) -> Tensor:
    """Return a mask of the rows of effects (n, K) that are positive for the target and among the `top_k` largest."""
    target_effect = effects[:, target : target + 1]
    return ((effects > target_effect).sum(1) < top_k) & (target_effect[:, 0] > 0)


def _collect(
    job: _Job, vectors: _Vectors, positions: np.ndarray, cells: Cells, num_zero: int, indices: Sequence[int]
) -> Atlas:
    """Average the vectors of each cell, draw the icons, and make the result."""
    members = [torch.from_numpy(cells.cell_index == i) for i in range(len(cells.cells))]
    means = torch.stack([vectors.values[mask].mean(0) for mask in members])
    effects = torch.stack([vectors.effects[mask].mean(0) for mask in members])
    top = effects.topk(min(MAX_CLASSES, job.model.num_outputs or 0), dim=1)
    icons = patterns(
        job.model,
        [direction(job.layer, mean, job.power) for mean in means],
        size=job.size,
        steps=job.steps,
        seed=job.seed,
        memory=job.memory,
        progress=partial(job.report, 1),
    )
    notes = [f"{num_zero} vectors were left out: all their channels are 0"] if num_zero else []
    num_in_cells = int((cells.cell_index >= 0).sum())
    if num_in_cells < len(positions):
        notes.append(f"{num_in_cells} of {len(positions)} vectors are in cells that are shown")
    return Atlas(
        job.model,
        positions=positions,
        sources=vectors.sources,
        cell_index=cells.cell_index,
        cells=cells.cells,
        counts=cells.counts,
        means=means.numpy(),
        icons=icons.images,
        classes=top.indices.numpy(),
        effects=top.values.numpy(),
        layer=job.layer,
        target=job.target,
        grid=job.grid,
        positions_per_image=job.positions_per_image,
        min_count=job.min_count,
        top_k=job.top_k,
        steps=job.steps,
        power=job.power,
        seed=job.seed,
        fit=job.fit,
        image_names=tuple(job.loader.names[i] for i in indices),
        notes=(*job.loader.notes, *notes),
        failed=tuple(job.loader.failed),
    )
