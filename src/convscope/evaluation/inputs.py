"""Check what is evaluated: heatmaps and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from convscope.attribution.api import heatmaps as compute_heatmaps
from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.result import Heatmaps
from convscope.attribution.targets import Targets, TargetSpec, parse_targets
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.evaluation.context import Recompute
from convscope.formatting import count_of
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader

LOGITS_TOLERANCE = 0.02  # of the largest logit: above the effect of another device, batch size or half precision


@dataclass(frozen=True)
class HeatmapInput:
    """Maps to evaluate.

    Attributes
    ----------
    values : Tensor
        (R, T, h, w).
    row_of_image : dict of int to int
        The row of each image, by the image's index.
    targets : TargetSpec
        What the maps explain.
    result : Heatmaps or None
        The result that holds the maps, unless they came as an array.
    """

    values: Tensor
    row_of_image: dict[int, int]
    targets: TargetSpec
    result: Heatmaps | None = None

    @property
    def method(self) -> str:
        """Name of the method; "given" for arrays."""
        return self.result.method if self.result else "given"

    @property
    def layer(self) -> str:
        """Name of the layer; "given" for arrays."""
        return self.result.layer if self.result else "given"

    def recompute_function(self, model: Model, indices: Sequence[int], memory: int) -> Recompute | None:
        """Return a function that computes maps of these images by the same method; None for arrays."""
        return partial(_recompute, model, self.result, indices, memory) if self.result else None

    def batch_targets(self, indices: Sequence[int], logits: Tensor) -> BatchTargets:
        """Return what the maps of a batch explain; `logits` (B, K) are the batch's."""
        if self.result is None:
            return self.targets.for_batch(indices, logits)
        geometry = [self.result.geometry[self.row_of_image[i]] for i in indices]
        targets = self.targets.for_batch(indices, logits, geometry)
        classes = self.result.targets[[self.row_of_image[i] for i in indices]]
        return replace(targets, classes=torch.from_numpy(classes).to(logits.device))

    def check_same_logits(
        self, indices: Sequence[int], logits: Tensor, target_logits: Tensor, names: Sequence[str]
    ) -> None:
        """Refuse heatmaps of other images or another network: their stored logits must equal the current ones.

        Parameters
        ----------
        indices : sequence of int
            The batch's images.
        logits : Tensor
            (B, K), of the network now.
        target_logits : Tensor
            (B, T): the targets' logits among them.
        names : sequence of str
            Names of all images.
        """
        if self.result is None:
            return
        stored = torch.from_numpy(self.result.logits[[self.row_of_image[i] for i in indices]])
        tolerance = LOGITS_TOLERANCE * logits.abs().amax(1, keepdim=True).cpu()
        different = ((stored - target_logits.cpu()).abs() > tolerance).any(1)
        for image, is_different in zip(indices, different.tolist(), strict=True):
            if is_different and self.result.model.is_stochastic:
                raise ConvscopeError(
                    f"{names[image]}: {self.result.model.name} gives another output each time it runs (dropout or "
                    "other random numbers that stay on in eval mode), so stored heatmaps cannot be evaluated"
                )
            if is_different:
                raise ConvscopeError(
                    f"{names[image]}: the network's output differs from the one stored with the heatmaps: they are of "
                    "other images, or the weights have changed; to evaluate maps of another model, pass "
                    "heatmaps.values and targets="
                )


def parse_heatmaps(model: Model, images: ImageBatchLoader, maps: object, targets: Targets | None) -> HeatmapInput:
    """Accept `Heatmaps` of these images, or an array (N, h, w) or (N, T, h, w).

    Raises
    ------
    ConvscopeError
        For anything else, and for heatmaps of other images.
    """
    if isinstance(maps, Heatmaps):
        if targets is not None:
            raise ConvscopeError("targets= is for maps given as an array; these heatmaps have their own targets")
        maps = _fit_to_images(images, maps)
        rows = {index: row for row, index in enumerate(maps.image_indices)}
        return HeatmapInput(torch.from_numpy(maps.values), rows, maps.target_spec, maps)
    if not isinstance(maps, np.ndarray | Tensor | list | tuple):
        kind = type(maps).__name__
        raise ConvscopeError(f"heatmaps is a {kind}; expected what convscope.heatmaps returns, or an array (N, h, w)")
    values = _numbers(maps, "heatmaps")
    spec = parse_targets(model, targets, len(images))
    axes, shape = model.preprocessing.axes, values.shape
    values = values[:, None] if values.ndim == 1 + axes else values
    if values.ndim != 2 + axes or values.shape[:2] != (len(images), spec.num_targets) or 0 in values.shape:
        shapes = " or ".join(f"({len(images)}, {prefix}h, w)" for prefix in ("", f"{spec.num_targets}, "))
        advice = "; say which targets they are of: targets=" if targets is None and values.ndim == 2 + axes else ""
        raise ConvscopeError(f"heatmaps of shape {shape}; expected Heatmaps, or an array {shapes}{advice}")
    if not np.isfinite(values).all():
        raise ConvscopeError("the heatmaps hold NaN or infinity")
    return HeatmapInput(torch.from_numpy(values.astype(np.float32)), {i: i for i in range(len(images))}, spec)


def _fit_to_images(images: ImageBatchLoader, maps: Heatmaps) -> Heatmaps:
    """Return heatmaps whose images are counted as `images` are; raise ConvscopeError if they are of others.

    The images are all those that the heatmaps were computed from, or those of a selection such as ``heatmaps[2]``.
    """
    if tuple(images.names) == maps.image_names and len(images) < len(maps.image_source):
        spec, indices = maps.target_spec.select(maps.image_indices), tuple(range(len(images)))
        return replace(maps, target_spec=spec, image_indices=indices)
    names = tuple(images.names[i] for i in maps.image_indices if i < len(images))
    if len(maps.image_source) != len(images):
        expected, actual = (count_of(len(loader), "image") for loader in (maps.image_source, images))
        raise ConvscopeError(f"heatmaps of {expected}, but {actual} given; expected the same ones")
    if names != maps.image_names:
        raise ConvscopeError(
            f"heatmaps of {maps.image_names[0]}, ..., but images {names[0]}, ... given; expected the same ones"
        )
    return maps


def parse_masks(masks: object, num_images: int, num_targets: int) -> list[Tensor]:
    """Accept a mask per image.

    Parameters
    ----------
    masks : array or list
        An array (N, H, W) or (N, T, H, W), or a list of arrays (H, W) or (T, H, W) or of PIL images; bool, or numbers
        of which 0 is outside and a single other value inside.
    num_images, num_targets : int
        N and T.

    Returns
    -------
    list of Tensor
        (T, H, W) bool, or (1, H, W) for all targets.
    """
    sequence = list(_numbers(masks, "masks")) if isinstance(masks, np.ndarray | Tensor) else masks
    if not isinstance(sequence, list | tuple) or len(sequence) != num_images:
        actual = f"{len(sequence)} masks" if isinstance(sequence, list | tuple) else type(masks).__name__
        expected = "expected one per image, as a list or an array (N, H, W)"
        raise ConvscopeError(f"{actual} for {num_images} images; {expected}")
    return [_parse_mask(mask, number, num_targets) for number, mask in enumerate(sequence)]


def _parse_mask(value: object, number: int, num_targets: int) -> Tensor:
    mask = _numbers(np.asarray(value) if isinstance(value, Image.Image) else value, f"mask {number}")
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, num_targets):
        raise ConvscopeError(f"mask {number} has shape {mask.shape}; expected (H, W) or ({num_targets}, H, W)")
    inside = mask != 0
    if mask.dtype != np.bool_ and len(np.unique(mask[inside])) > 1:
        raise ConvscopeError(f"mask {number} holds more than two values; threshold it and pass bool")
    if not inside.any((1, 2)).all():
        raise ConvscopeError(f"mask {number} is empty: no pixel belongs to the target")
    return torch.from_numpy(np.ascontiguousarray(inside))


def check_mask_size(mask: Tensor, geometry: Geometry, name: str) -> None:
    """Refuse a mask of another size than its image."""
    if tuple(mask.shape[1:]) != geometry.image_size:
        sizes = (" x ".join(map(str, size)) for size in (mask.shape[1:], geometry.image_size))
        raise ConvscopeError("the mask of {} has {} pixels, the image {}".format(name, *sizes))


def _numbers(values: object, name: str) -> npt.NDArray[np.generic]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise ConvscopeError(f"{name}: {type(values).__name__} of {array.dtype}; expected numbers")
    return array


def _recompute(
    model: Model,
    result: Heatmaps,
    indices: Sequence[int],
    memory: int,
    x: Tensor,
    image_rows: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    """Compute maps of inputs `x` by the method and for the targets of `result`."""
    spec = result.target_spec
    row_of_image = {index: row for row, index in enumerate(result.image_indices)}
    images = [indices[row] for row in image_rows.tolist()]
    targets = result.targets[[row_of_image[i] for i in images]].tolist() if classes is None else classes.tolist()
    recomputed = compute_heatmaps(
        model,
        x,
        list(spec.functions) or targets,
        layer=None if result.layer == "input" else result.layer.split(" + "),
        method=result.method,
        against=None if spec.against is None else spec.against[images].tolist(),
        memory=memory,
        **result.settings,
    )
    return torch.from_numpy(recomputed.values).to(x.device)
