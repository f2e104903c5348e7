"""The networks of the zoo: one of each family of timm, torchvision, keras.applications and transformers.

All have random weights. Of a family the member with the fewest parameters is taken, with the smallest input at which it
runs and its last stage has at least two by two positions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (64, 96, 128, 160, 192, 224, 256)
TIMM_SIZES = (96, 128, 160, 192, 224, 256)
VIDEO_FRAMES = 8
COLLECTIONS = ("timm", "torchvision", "keras", "transformers")


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes
    ----------
    name : str
        The member of the family.
    module : nn.Module
        With random weights, in eval mode.
    size : tuple of int
        (H, W) of the input; (T, H, W) of clips.
    preprocessing : mapping
        As `convscope.load` takes it.
    grid : tuple of int or None
        Height and width of the last stage, where the library itself says it.
    """

    name: str
    module: nn.Module
    size: tuple[int, ...]
    preprocessing: dict[str, Any]
    grid: tuple[int, int] | None = None


def families(collection: str) -> list[str]:
    """List a collection's families."""
    return sorted(_FAMILIES[collection]())


def build(collection: str, family: str, cache: Path) -> Network:
    """Make a family's network; `cache` holds numbers of parameters."""
    return _BUILDERS[collection](family, cache)


# --- timm ------------------------------------------------------------------------------------------------------------


def _timm_families() -> list[str]:
    from timm.models import list_modules

    return list(list_modules())


def _timm(family: str, cache: Path) -> Network:
    import timm

    name = _smallest(f"timm/{family}", timm.list_models(module=family), timm.create_model, cache)
    for size in TIMM_SIZES:
        for options in ({}, {"img_size": size}):
            try:
                module = timm.create_model(name, **options).eval()
                _run(module, (size, size))
            except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, KeyError, AttributeError):
                continue
            grid = _timm_grid(module, size)
            if grid is None or grid[0] > 1:
                return Network(name, _with_head(module), (size, size), {"size": size}, grid)
    module = timm.create_model(name).eval()
    size = module.pretrained_cfg["input_size"][-1]
    return Network(name, _with_head(module), (size, size), {"size": size}, _timm_grid(module, size))


@torch.no_grad()
def _timm_grid(module: Any, size: int) -> tuple[int, int] | None:
    """Return the grid of the maps that timm's `forward_features` returns, before a final pooling; None for tokens."""
    pooled: list[tuple[Tensor, Tensor]] = []
    poolings = [layer for layer in module.modules() if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d)]
    handles = [layer.register_forward_hook(lambda _, x, y: pooled.append((x[0], y))) for layer in poolings]
    features = module.forward_features(torch.zeros(2, 3, size, size)) if hasattr(module, "forward_features") else None
    for handle in handles:
        handle.remove()
    features = next((x for x, y in pooled if y is features), features)
    if not isinstance(features, Tensor) or features.ndim != 4:
        return None
    channels_last = features.shape[-1] == module.num_features != features.shape[1]
    height, width = features.shape[1:3] if channels_last else features.shape[2:]
    return height, width


def _smallest(key: str, names: list[str], create: Callable[..., nn.Module], cache: Path) -> str:
    """Return the name of the network with the fewest parameters, counted without memory for them."""
    known = json.loads(cache.read_text()) if cache.exists() else {}
    if key not in known:
        known[key] = {name: count for name in names if (count := _count(create, name)) is not None}
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known))
        part.replace(cache)
    return min(known[key], key=known[key].get)


def _count(create: Callable[..., nn.Module], name: str) -> int | None:
    try:
        with torch.device("meta"):
            return count_parameters(create(name))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
        return None


# --- torchvision -----------------------------------------------------------------------------------------------------


def _torchvision_members() -> dict[str, list[str]]:
    from torchvision.models import get_model_builder, list_models

    members: dict[str, list[str]] = {}
    for name in list_models():
        module = get_model_builder(name).__module__.removeprefix("torchvision.models.")
        members.setdefault(module, []).append(name)
    return members


def _torchvision(family: str, cache: Path) -> Network:
    def create(name: str) -> nn.Module:
        import inspect

        from torchvision.models import get_model, get_model_builder

        keywords = inspect.signature(get_model_builder(name)).parameters
        options = {"weights_backbone": None} if "weights_backbone" in keywords else {}
        if family.startswith("quantization."):
            return get_model(name, weights=None, quantize=True)
        if family in {"googlenet", "inception"}:
            options["init_weights"] = False
        return get_model(name, weights=None, **options)

    name = min(_torchvision_members()[family], key=_published_parameters)
    module = create(name).eval()
    kind = family.partition(".")[0]
    if kind in {"detection", "optical_flow"}:
        return Network(name, module, (128, 128), {"size": 128})
    if kind == "video":
        return _video(name, module)
    size = _size(module, (224,) if "vision_transformer" in family else SIZES[1:])
    return Network(name, _with_head(module), (size, size), {"size": size, "mean": 0.5, "std": 0.25})


def _published_parameters(name: str) -> int:
    """Return a model's number of parameters from the description of its weights."""
    from torchvision.models import get_model_weights

    return min(entry.meta["num_params"] for entry in get_model_weights(name))


def _video(name: str, module: nn.Module) -> Network:
    for frames, size in ((VIDEO_FRAMES, 64), (VIDEO_FRAMES, 112), (16, 224)):
        try:
            _run(module, (frames, size, size))
        except (RuntimeError, AssertionError, ValueError):
            continue
        shape = (frames, size, size)
        return Network(name, _with_head(module), shape, {"size": shape, "channels": 3})
    raise RuntimeError(f"{name} runs at no size")


# --- keras -----------------------------------------------------------------------------------------------------------


def _keras_families() -> list[str]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    return [name for name in vars(keras.applications) if name[0].isupper()]


def _keras(family: str, cache: Path) -> Network:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    size = 128 if "Inception" in family or "Xception" in family else 96
    module = getattr(keras.applications, family)(weights=None, input_shape=(size, size, 3))
    return Network(family, module, (size, size), {"size": size})


# --- transformers ----------------------------------------------------------------------------------------------------

SCALARS = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "d_latents": 32,
    "num_latents": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "projection_dim": 32,
}
MERGING = {"swin", "swinv2", "donut-swin", "focalnet"}  # each stage but the last merges two by two patches


def _transformers_families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    return list(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def _transformers(family: str, cache: Path) -> Network:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    entry = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[family]
    name = entry if isinstance(entry, str) else entry[0]
    for size in (96, 224):
        if family == "timm_wrapper":
            config = transformers.TimmWrapperConfig(architecture="resnet18", num_labels=10)
        else:
            config = _small_config(transformers.AutoConfig.for_model(family), size)
        module = getattr(transformers, name)(config).eval()
        try:
            _run(module, (size, size))
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        break
    grid = None
    if family in MERGING:
        side = size // (config.patch_size * 2 ** (len(config.depths) - 1))
        grid = side, side
    return Network(name, _with_head(module), (size, size), {"size": size, "mean": 0.5, "std": 0.25}, grid)


def _small_config(config: Any, size: int) -> Any:
    """Return a configuration of the same kind with few and narrow layers."""
    options: dict[str, Any] = {"num_labels": 10}
    for part in ("vision_config", "text_config"):
        if hasattr(config, part):
            options[part] = _small_config(getattr(config, part), size).to_dict()
    known = config.to_dict()
    if isinstance(known.get("num_hidden_layers"), int) and "depths" not in known and "hidden_sizes" not in known:
        options |= {key: value for key, value in SCALARS.items() if isinstance(known.get(key), int)}
    if isinstance(known.get("depths"), list):
        options["depths"] = [1] * len(known["depths"])
        if "out_indices" in known:
            options["out_indices"] = None
    if "image_size" in known:
        options["image_size"] = [size, size] if isinstance(known["image_size"], list | tuple) else size
    return type(config)(**options)


# --- all -------------------------------------------------------------------------------------------------------------

_FAMILIES: dict[str, Callable[[], Any]] = {
    "timm": _timm_families,
    "torchvision": _torchvision_members,
    "keras": _keras_families,
    "transformers": _transformers_families,
}
_BUILDERS: dict[str, Callable[[str, Path], Network]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "keras": _keras,
    "transformers": _transformers,
}


def count_parameters(module: nn.Module) -> int:
    """Count the weights of a network."""
    return sum(parameter.numel() for parameter in module.parameters())


def _size(module: nn.Module, sizes: tuple[int, ...]) -> int:
    """Return the first size of a square image that a network takes."""
    for size in sizes:
        try:
            _run(module, (size, size))
        except (RuntimeError, AssertionError, ValueError):
            continue
        return size
    raise RuntimeError(f"{type(module).__name__} runs at no size of {sizes}")


@torch.no_grad()
def _run(module: nn.Module, size: tuple[int, ...]) -> Any:
    return module(torch.zeros(2, 3, *size))


def _with_head(module: nn.Module) -> nn.Module:
    """Fill matrices that are initialised with zeros: behind one no layer has influence on the scores."""
    generator = torch.Generator().manual_seed(0)
    for parameter in _parameters(module):
        if parameter.ndim > 1 and not parameter.detach().any():
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    return (p for p in module.parameters() if p.is_floating_point())
