"""Models of torchvision, with the preprocessing and class names of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convscope.errors import ConvscopeError
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files, torchvision_detection
from convscope.sources.spec import ModelSpec, fixed_seed
from convscope.suggestions import suggest

CLASSIFICATION, VIDEO, QUANTIZED, DETECTION = "classification", "video", "quantization", "detection"
KINDS = (CLASSIFICATION, "segmentation", VIDEO, QUANTIZED, DETECTION)
CLIP_LENGTH = 16  # frames, on which most of the networks for videos are trained


def names() -> list[str]:
    """List the names that `load` accepts after "torchvision:"."""
    from torchvision.models import list_models

    return [f"torchvision:{name}" for name in list_models() if _kind(name) in KINDS]


def from_name(name: str, weights: str, num_classes: int | None = None) -> ModelSpec:
    """Make a torchvision model; weights are downloaded unless they are "random" or a file."""
    from torchvision.models import get_model_weights, list_models

    if name not in list_models():
        raise ConvscopeError(f"torchvision has no model {name!r}; {suggest(name, list_models())}")
    kind = _kind(name)
    if kind not in KINDS:
        raise ConvscopeError(
            f"torchvision:{name} is for {kind.replace('_', ' ')}; expected a network for images or clips"
        )
    entry: Any = get_model_weights(name).DEFAULT if len(get_model_weights(name)) else None
    module, notes = _build(name, kind, entry, weights, num_classes)
    if kind == DETECTION:
        spec = torchvision_detection.from_module(module.eval(), f"torchvision:{name}")
        spec.notes += notes
        spec.classes = tuple(entry.meta["categories"])
        return spec
    spec = ModelSpec(module, f"torchvision:{name}", notes=notes)
    if entry is not None:
        categories = entry.meta.get("categories")
        spec.classes = None if categories is None else tuple(categories)
        spec.preprocessing = _clip_preprocessing(entry) if kind == VIDEO else _preprocessing(entry.transforms())
    if kind == VIDEO:
        frames = f"torchvision.models.get_model_weights({name!r}).DEFAULT.transforms()(frames)"
        spec.notes.append(f"clips (N, 3, T, H, W) come preprocessed: {frames}, frames (N, T, 3, H, W) in uint8")
    spec.task = None if kind == "segmentation" else CLASSIFICATION
    return spec


def _build(name: str, kind: str, entry: Any, weights: str, num_classes: int | None) -> tuple[Any, list[str]]:
    """Return the network and notes on its weights."""
    from torchvision.models import get_model

    # Without weights_backbone=None, segmentation models download weights of their backbone.
    options: dict[str, Any] = {"weights_backbone": None} if _has_backbone(name) else {}
    if kind == QUANTIZED:
        options["quantize"] = True
    try:
        if weights == "default":
            with files.download_errors(f"torchvision:{name}"):
                return get_model(name, weights=entry, **options), []
        with fixed_seed():
            head_options = {} if num_classes is None else {"num_classes": num_classes}
            module = get_model(name, weights=None, **options, **head_options)
    except RuntimeError as error:
        if kind != QUANTIZED:
            raise
        raise ConvscopeError(
            f"torchvision:{name} does not run on this processor ({files.first_line(error)}); load the network in "
            f"floating point: torchvision:{name.removeprefix('quantized_')}"
        ) from error
    return module, [] if weights == "random" else files.load_weights_file(module, Path(weights))


def _clip_preprocessing(entry: Any) -> Preprocessing:
    """Read the transforms of networks for videos: the size of a frame, mean and standard deviation."""
    transforms = entry.transforms()
    length = max(CLIP_LENGTH, entry.meta.get("min_temporal_size", 0))
    return Preprocessing(
        size=(length, *transforms.crop_size),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        channel_order="channels",
    )


def _preprocessing(transforms: Any) -> Preprocessing:
    """Read the transforms of classifiers, or of segmentation models, which have no crop."""
    if hasattr(transforms, "crop_size"):
        return Preprocessing.of(transforms)
    size = transforms.resize_size
    words = {"size": size[0] if len(size) == 1 else size, "interpolation": transforms.interpolation.value}
    return Preprocessing.of({**words, "mean": transforms.mean, "std": transforms.std})


def _kind(name: str) -> str:
    """Return what a model is for: the package of torchvision.models that holds its builder."""
    from torchvision.models import get_model_builder

    package = get_model_builder(name).__module__.split(".")
    return package[2] if len(package) > 3 else CLASSIFICATION


def _has_backbone(name: str) -> bool:
    import inspect

    from torchvision.models import get_model_builder

    return "weights_backbone" in inspect.signature(get_model_builder(name)).parameters
