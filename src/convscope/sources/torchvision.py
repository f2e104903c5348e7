"""Models of torchvision, with the preprocessing and class names of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convscope.errors import ConvscopeError, nearest
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.spec import ModelSpec, fixed_seed

CLASSIFICATION = "classification"
TASKS = (CLASSIFICATION, "segmentation")


def names() -> list[str]:
    """List the names that `load` accepts after "torchvision:"."""
    from torchvision.models import list_models

    return [f"torchvision:{name}" for name in list_models() if _task(name) in TASKS]


def from_name(name: str, weights: str, num_classes: int | None = None) -> ModelSpec:
    """Make a torchvision model; weights are downloaded unless they are "random" or a file."""
    from torchvision.models import get_model, get_model_weights, list_models

    if name not in list_models():
        raise ConvscopeError(f"torchvision has no model {name!r}; nearest: {nearest(name, list_models())}")
    if _task(name) not in TASKS:
        raise ConvscopeError(
            f"torchvision:{name} is for {_task(name).replace('_', ' ')}; expected a network with scores per image "
            "(of a detector, load the backbone: load(detector.backbone))"
        )
    notes: list[str] = []
    entry: Any = get_model_weights(name).DEFAULT if len(get_model_weights(name)) else None
    # Without weights_backbone=None, segmentation models download weights of their backbone.
    backbone_options: dict[str, Any] = {"weights_backbone": None} if _has_backbone(name) else {}
    if weights == "default":
        with files.download_errors(f"torchvision:{name}"):
            module = get_model(name, weights=entry, **backbone_options)
    else:
        with fixed_seed():
            head_options = {} if num_classes is None else {"num_classes": num_classes}
            module = get_model(name, weights=None, **backbone_options, **head_options)
        if weights != "random":
            notes = files.load_weights_file(module, Path(weights))
    preprocessing = _preprocessing(entry.transforms()) if entry is not None else None
    classes = tuple(entry.meta["categories"]) if entry is not None and "categories" in entry.meta else None
    task = CLASSIFICATION if _task(name) == CLASSIFICATION else None
    name = f"torchvision:{name}"
    return ModelSpec(module, name, preprocessing=preprocessing, classes=classes, task=task, notes=notes)


def _preprocessing(transforms: Any) -> Preprocessing:
    """Read the transforms of classifiers, or of segmentation models, which have no crop."""
    if hasattr(transforms, "crop_size"):
        return Preprocessing.of(transforms)
    size = transforms.resize_size
    words = {"size": size[0] if len(size) == 1 else size, "interpolation": transforms.interpolation.value}
    return Preprocessing.of({**words, "mean": transforms.mean, "std": transforms.std})


def _task(name: str) -> str:
    """Return a model's task: the package of torchvision.models that holds its builder."""
    from torchvision.models import get_model_builder

    package = get_model_builder(name).__module__.split(".")
    return package[2] if len(package) > 3 else CLASSIFICATION


def _has_backbone(name: str) -> bool:
    import inspect

    from torchvision.models import get_model_builder

    return "weights_backbone" in inspect.signature(get_model_builder(name)).parameters
