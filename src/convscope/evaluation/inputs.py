"""What is to be judged, as the user gives it, checked: maps, masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convscope.attribution.api import heatmaps
from convscope.attribution.result import Heatmaps
from convscope.attribution.targets import BatchTargets, TargetSpec, parse_targets
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader


@dataclass(frozen=True)
class HeatmapInput:
    """Maps to be judged: `values` (R, T, ...), row `row[i]` that of picture i; `result` if convscope made them."""

    values: Tensor
    row: dict[int, int]
    targets: TargetSpec
    result: Heatmaps | None = None

    @property
    def method(self) -> str:
        return self.result.method if self.result else "given"

    @property
    def layer(self) -> str:
        return self.result.layer if self.result else "given"

    def again(self, model: Model, indices: Sequence[int], memory: int) -> Callable[..., Tensor] | None:
        """What makes these pictures' maps by the same method anew; None for maps of others."""
        return partial(_again, model, self.result, indices, memory) if self.result else None

    def chosen(self, indices: Sequence[int], logits: Tensor) -> BatchTargets:
        """What the maps of some of the pictures, whose logits are (B, K), are evidence for."""
        chosen = self.targets.for_batch(indices, logits)
        if self.result is None:
            return chosen
        classes = self.result.targets[[self.row[i] for i in indices]]
        return replace(chosen, classes=torch.from_numpy(classes).to(logits.device))

    def require_same(self, indices: Sequence[int], logits: Tensor, own: Tensor, names: Sequence[str]) -> None:
        """Refuse maps of other pictures or of another network, by what it said then. Raises ConvscopeError.

        `logits` (B, K) is what the network says now, `own` (B, T) the targets' part of it.
        """
        if self.result is None:
            return
        then = torch.from_numpy(self.result.logits[[self.row[i] for i in indices]])
        apart = (then - own.cpu()).abs() > LOOSE * logits.abs().amax(1, keepdim=True).cpu()
        for image, differs in zip(indices, apart.any(1).tolist(), strict=True):
            if differs:
                raise ConvscopeError(
                    f"{names[image]}: the model does not say of it what it said when the heatmaps were made: "
                    "they are of other pictures, or its weights have changed; to judge maps of another model, give "
                    "heatmaps.values and targets="
                )


LOOSE = 0.02  # of the largest logit; above what another device, batch size or half precision changes


def parse(model: Model, images: ImageBatchLoader, maps: Any, targets: Any) -> HeatmapInput:
    """The maps as given: `Heatmaps` of these pictures, or an array (N, h, w) or (N, T, h, w). Raises ConvscopeError."""
    if isinstance(maps, Heatmaps):
        if targets is not None:
            raise ConvscopeError("targets= goes with maps given as an array; these heatmaps have their own")
        names = tuple(images.names[i] for i in maps.image_indices if i < len(images))
        if len(maps.image_source) != len(images) or names != maps.image_names:
            raise ConvscopeError(
                f"heatmaps of {len(maps.image_source)} pictures, and {len(images)} pictures given; expected the same ones"
                if len(maps.image_source) != len(images)
                else f"heatmaps of {maps.image_names[0]}, ..., and pictures {names[0]}, ... given; expected the same ones"
            )
        row = {index: r for r, index in enumerate(maps.image_indices)}
        return HeatmapInput(torch.from_numpy(maps.values), row, maps.target_spec, maps)
    values = _array(maps, "heatmaps")
    asked = parse_targets(model, targets, len(images))
    axes = model.preprocessing.axes
    values = values[:, None] if values.ndim == 1 + axes else values
    if values.ndim != 2 + axes or values.shape[:2] != (len(images), asked.num_targets) or 0 in values.shape:
        shape = " or ".join(f"({len(images)}, {more}h, w)" for more in ("", f"{asked.num_targets}, "))
        raise ConvscopeError(f"heatmaps of shape {tuple(np.shape(maps))}; expected Heatmaps, or an array {shape}")
    if not np.isfinite(values).all():
        raise ConvscopeError("the heatmaps hold NaN or infinity")
    return HeatmapInput(torch.from_numpy(values.astype(np.float32)), dict(enumerate(range(len(images)))), asked)


def take_masks(masks: Any, count: int, targets: int) -> list[Tensor]:
    """For each of `count` pictures where its target is: (T, H, W) bool, or (1, H, W) for all targets alike.

    Accepted: an array (N, H, W) or (N, T, H, W), or a list of arrays (H, W) or (T, H, W), or of PIL images; bool, or
    numbers of which 0 is outside and a single other value inside. Raises ConvscopeError for anything else.
    """
    many = list(_array(masks, "masks")) if isinstance(masks, np.ndarray | Tensor) else masks
    if not isinstance(many, list | tuple) or len(many) != count:
        found = f"{len(many)} masks" if isinstance(many, list | tuple) else type(masks).__name__
        raise ConvscopeError(f"{found} for {count} pictures; expected one for each, as a list or an array (N, H, W)")
    return [_mask(mask, n, targets) for n, mask in enumerate(many)]


def _mask(given: Any, number: int, targets: int) -> Tensor:
    mask = _array(np.asarray(given) if isinstance(given, Image.Image) else given, f"mask {number}")
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, targets):
        raise ConvscopeError(f"mask {number} has shape {mask.shape}; expected (H, W) or ({targets}, H, W)")
    inside = mask != 0
    if mask.dtype != np.bool_ and len(np.unique(mask[inside])) > 1:
        raise ConvscopeError(f"mask {number} holds more than two values; expected bool, so say where its border is")
    if not inside.any((1, 2)).all():
        raise ConvscopeError(f"mask {number} is empty: there is nothing to find in the picture")
    return torch.from_numpy(np.ascontiguousarray(inside))


def check_mask_size(mask: Tensor, where: Geometry, name: str) -> None:
    """Refuse a mask that is not as large as its picture. Raises ConvscopeError."""
    if tuple(mask.shape[1:]) != where.image_size:
        sizes = (" x ".join(map(str, size)) for size in (mask.shape[1:], where.image_size))
        raise ConvscopeError("the mask of {} has {} pixels, the picture {}".format(name, *sizes))


def _array(values: Any, what: str) -> np.ndarray:
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.dtype.kind not in "fiub":
        raise ConvscopeError(f"{what}: {type(values).__name__} of {found.dtype}; expected numbers")
    return found


def _again(
    model: Model,
    made: Heatmaps,
    indices: Sequence[int],
    memory: int,
    x: Tensor,
    rows: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    asked = made.target_spec
    row = {index: r for r, index in enumerate(made.image_indices)}
    images = [indices[r] for r in rows.tolist()]
    targets = made.targets[[row[i] for i in images]].tolist() if classes is None else classes.tolist()
    found = heatmaps(
        model,
        x,
        list(asked.functions) or targets,
        layer=None if made.layer == "input" else made.layer.split(" + "),
        method=made.method,
        against=None if asked.against is None else asked.against[images].tolist(),
        memory=memory,
        **made.settings,
    )
    return torch.from_numpy(found.values).to(x.device)
