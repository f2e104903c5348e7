"""The third technique: which places of a picture speak for a class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convscope import tap
from convscope.budget import MEMORY, Progress, batch_size, forward_bytes
from convscope.colour import blend
from convscope.errors import ConvscopeError, nearest
from convscope.heatmaps.cam import METHODS
from convscope.heatmaps.targets import resolve
from convscope.images import DEFAULT_MAX_PIXELS, Geometry, Pictures
from convscope.model import Layer, Model
from convscope.results import Result
from convscope.sound import require_finite


@dataclass(frozen=True, eq=False)
class Heatmaps(Result):
    """Evidence for N x T targets, per place.

    `values` is float32 (N, T, h, w): raw, signed, at the layer's own resolution. `targets` and `logits` are (N, T).
    """

    values: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    layer: str
    method: str
    fit: str
    pictures: tuple[str, ...]
    geometry: tuple[Geometry, ...] = field(repr=False)
    source: Pictures = field(repr=False)
    indices: tuple[int, ...] = field(repr=False)

    @property
    def names(self) -> list[list[str]]:
        """The targets' names, as `targets`."""
        return [[self.model.class_name(int(t)) for t in row] for row in self.targets]

    def resized(self) -> list[np.ndarray]:
        """Per picture (T, H, W), raw, in that picture's own geometry; 0 where the network did not look."""
        maps = torch.from_numpy(self.values)
        return [where.back(m).numpy() for where, m in zip(self.geometry, maps, strict=True)]

    def overlay(self, alpha: float = 0.4, colormap: str = "jet") -> list[Image.Image]:
        """The N x T pictures, picture by picture, under their heat: rectified, divided by its maximum, coloured.

        `colormap` is any of matplotlib's ("viridis" and "inferno" are perceptually uniform). Where there is no positive
        evidence at all the map is zero everywhere, and `notes` say so.
        """
        return list(self.overlays(alpha, colormap))

    def overlays(self, alpha: float = 0.4, colormap: str = "jet") -> Iterator[Image.Image]:
        """The pictures of `overlay` one after another, so that memory does not grow with their number."""
        for index, where, maps in zip(self.indices, self.geometry, torch.from_numpy(self.values), strict=True):
            original = self.source.original(index)
            for heat in where.back(maps).numpy():
                yield blend(original, _unit_range(heat), alpha, colormap)

    def parameters(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "method": self.method,
            "fit": self.fit,
            "pictures": self.pictures,
            "targets": self.targets.tolist(),
            "classes": self.names,
        }


def heatmaps(
    model: Model,
    images: Any,
    targets: Any = None,
    *,
    layer: str | None = None,
    method: str = "grad-cam",
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> Heatmaps:
    """Evidence for each target, per place of a layer.

    The part of the network in front of the layer runs once, without gradients; several targets share it.

    Parameters
    ----------
    model
        From `convscope.load`.
    images
        Pictures in any form that `convscope` takes.
    targets
        None (each picture's top class), a class (index or name) for all pictures, one per picture, or a list of several
        for each picture.
    layer
        Where to look. Default: the last layer with spatial extent that is not a pooling, named in the result.
    method
        "grad-cam".
    fit
        "squash" shows the network the whole picture, "crop" its own evaluation crop.
    memory
        Bytes that a batch's intermediate results may take.
    max_pixels
        Pictures with more are refused before memory is spent on them.
    progress
        Called after every batch with the number of pictures done and the number in all.

    Raises
    ------
    ConvscopeError
        For an unknown method, layer or target, for a layer without spatial extent, for numbers that are not finite, and
        when no picture can be used. If only some cannot, they are named in `.failed`.
    """
    if method not in METHODS:
        raise ConvscopeError(f"method {method!r} is not known; nearest: {nearest(method, list(METHODS))}")
    row = model.layers.last_spatial() if layer is None else _spatial(model, layer)
    pictures = Pictures(images, model.preprocessing, fit=fit, max_pixels=max_pixels)
    wanted = resolve(model, targets, len(pictures))

    values: list[Tensor] = []
    chosen: list[Tensor] = []
    logits: list[Tensor] = []
    geometry: list[Geometry] = []
    done: list[int] = []
    size = batch_size(model, forward_bytes(model, row.name), memory)
    with torch.no_grad(), tap.attach(model, [row.name], leaf=True) as run:
        for batch in pictures.batches(size):
            seen = run(batch.x)
            assert seen.logits is not None
            require_finite(model, seen.logits, "the network's output")
            classes = seen.logits.argmax(1, keepdim=True) if wanted is None else wanted[list(batch.indices)]
            classes = classes.to(seen.logits.device)
            found = evidence(seen.maps[row.name], seen.logits, classes, METHODS[method])
            require_finite(model, found, f"the evidence at layer {row.name!r}")
            values.append(found.cpu())
            chosen.append(classes.cpu())
            logits.append(seen.logits.detach().gather(1, classes).cpu())
            geometry += batch.geometry
            done += batch.indices
            if progress is not None:
                progress(len(done) + len(pictures.failed), len(pictures))
    maps, indices = torch.cat(values), torch.cat(chosen)
    names = tuple(pictures.names[i] for i in done)
    return Heatmaps(
        model,
        values=maps.numpy(),
        targets=indices.numpy(),
        logits=torch.cat(logits).numpy(),
        layer=row.name,
        method=method,
        fit=fit,
        pictures=names,
        geometry=tuple(geometry),
        source=pictures,
        indices=tuple(done),
        notes=(*pictures.notes, *remarks(model, maps, indices, names)),
        failed=tuple(pictures.failed),
    )


def evidence(activation: Tensor, logits: Tensor, targets: Tensor, method: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The maps (N, T, h, w), float32, of T targets per picture (N, T), from one forward pass.

    A picture's logit depends on no other picture, so the gradient of the sum holds each picture's own.
    """
    maps = []
    if not logits.requires_grad:  # nothing leads from the layer to the classes
        return activation.new_zeros((*targets.shape, *activation.shape[2:]), dtype=torch.float32)
    for t in range(targets.shape[1]):
        with torch.enable_grad():
            score = logits.gather(1, targets[:, t : t + 1]).sum()
        last = t + 1 == targets.shape[1]
        (gradient,) = torch.autograd.grad(score, activation, retain_graph=not last, allow_unused=True)
        gradient = torch.zeros_like(activation) if gradient is None else gradient
        maps.append(method(activation.detach().float(), gradient.float()))
    return torch.stack(maps, dim=1)


def remarks(model: Model, maps: Tensor, targets: Tensor, names: tuple[str, ...]) -> list[str]:
    """In words: maps that an overlay would show as nothing."""
    said = []
    for n, t in (maps.amax((2, 3)) <= 0).nonzero().tolist():
        what = f"{names[n]}, {model.class_name(int(targets[n, t]))}"
        if not bool(maps[n, t].any()):
            said.append(f"{what}: the map is zero everywhere; this layer has no influence on the class")
        else:
            said.append(f"{what}: the map is negative everywhere; this layer speaks against the class")
    return said


def _spatial(model: Model, name: str) -> Layer:
    layer = model.layers.find(name)
    if not layer.has_space:
        known = [row.name for row in model.layers.distinct()]
        raise ConvscopeError(
            f"layer {name!r} gives {' x '.join(map(str, layer.shape))} and has no spatial extent; the last that do: "
            f"{', '.join(known[-4:])}"
        )
    return layer


def _unit_range(heat: np.ndarray) -> np.ndarray:
    highest = heat.max()
    return np.maximum(heat, 0) / highest if highest > 0 else np.zeros_like(heat)
