"""torchvision's models, with the preprocessing and class names that their weights carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convscope.errors import ConvscopeError, nearest
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.spec import ModelSpec, seeded

CLASSIFICATION = "classification"
KINDS = (CLASSIFICATION, "segmentation")


def names() -> list[str]:
    """What `load` accepts behind "torchvision:"."""
    from torchvision.models import list_models

    return [f"torchvision:{name}" for name in list_models() if _kind(name) in KINDS]


def from_name(name: str, weights: str) -> ModelSpec:
    """A torchvision model by name; downloads its weights unless they are "random" or a file."""
    from torchvision.models import get_model, get_model_weights, list_models

    if name not in list_models():
        raise ConvscopeError(f"torchvision has no model {name!r}; nearest: {nearest(name, list_models())}")
    if _kind(name) not in KINDS:
        raise ConvscopeError(
            f"torchvision:{name} is for {_kind(name).replace('_', ' ')}; expected a network that gives each picture "
            "its scores (of a detector, load the backbone: load(detector.backbone))"
        )
    entry: Any = get_model_weights(name).DEFAULT if len(get_model_weights(name)) else None
    # Without weights_backbone=None, segmentation models would download a backbone's weights on their own.
    inner: dict[str, Any] = {"weights_backbone": None} if _has_backbone(name) else {}
    if weights == "default":
        with files.downloading(f"torchvision:{name}"):
            module = get_model(name, weights=entry, **inner)
    else:
        with seeded():
            module = get_model(name, weights=None, **inner)
        if weights != "random":
            files.put_weights(module, Path(weights))
    preprocessing = _preprocessing(entry.transforms()) if entry is not None else None
    classes = tuple(entry.meta["categories"]) if entry is not None and "categories" in entry.meta else None
    return ModelSpec(module, f"torchvision:{name}", preprocessing=preprocessing, classes=classes)


def _preprocessing(transforms: Any) -> Preprocessing:
    """Of classifiers, or of segmentation, which has no crop."""
    if hasattr(transforms, "crop_size"):
        return Preprocessing.of(transforms)
    size = transforms.resize_size
    words = {"size": size[0] if len(size) == 1 else size, "interpolation": transforms.interpolation.value}
    return Preprocessing.of({**words, "mean": transforms.mean, "std": transforms.std})


def _kind(name: str) -> str:
    """What a network is for: the package within torchvision.models that its builder is in."""
    from torchvision.models import get_model_builder

    package = get_model_builder(name).__module__.split(".")
    return package[2] if len(package) > 3 else CLASSIFICATION


def _has_backbone(name: str) -> bool:
    import inspect

    from torchvision.models import get_model_builder

    return "weights_backbone" in inspect.signature(get_model_builder(name)).parameters
