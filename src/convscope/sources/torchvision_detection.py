"""Detectors of torchvision: their classes and the size of their input."""

from __future__ import annotations

from typing import Any

from torch import nn

from convscope.engine.candidates import DetectionReader
from convscope.images.preprocessing import Preprocessing
from convscope.sources.spec import ModelSpec

MASKS_NOTE = "of the detector's outputs, boxes, labels and scores are read; masks and keypoints are not"


def is_detector(module: nn.Module) -> bool:
    """Whether a module is a detector of torchvision: it resizes and normalises images itself, and returns boxes."""
    transform = getattr(module, "transform", None)
    return type(transform).__name__ == "GeneralizedRCNNTransform" and _num_classes(module) is not None


def from_module(module: Any, name: str) -> ModelSpec:
    """Describe a detector; images come in [0, 1], at the size to which it would resize square ones."""
    transform: Any = module.transform
    side = transform.fixed_size or (min(transform.min_size[-1], transform.max_size),) * 2
    spec = ModelSpec(
        module,
        name,
        task="detection",
        select=DetectionReader(_num_classes(module)),
        preprocessing=Preprocessing(size=tuple(side), range=(0, 1), mean=(0.0,) * 3, std=(1.0,) * 3),
        preprocessing_origin="the detector's own transform, which normalises images itself",
    )
    if len(module.state_dict()) and hasattr(getattr(module, "roi_heads", None), "mask_head"):
        has_more = any(getattr(module.roi_heads, head, None) is not None for head in ("mask_head", "keypoint_head"))
        spec.notes += [MASKS_NOTE] * has_more
    return spec


def _num_classes(module: Any) -> int | None:
    """Return the number of classes, the background among them."""
    for part in module.modules():
        for attribute in ("cls_score", "classification_head"):
            head = getattr(part, attribute, None)
            count = getattr(head, "num_classes", None) or getattr(head, "num_columns", None)
            count = count or getattr(head, "out_features", None)
            if isinstance(count, int):
                return count
    return None
