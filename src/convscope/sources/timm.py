"""timm's models, with the data config that each carries."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from convscope.errors import ConvscopeError, nearest
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.spec import ModelSpec, imagenet_classes, seeded


def names() -> list[str]:
    """What `load` accepts behind "timm:"."""
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


def from_name(name: str, weights: str) -> ModelSpec:
    """A timm model by name; downloads its weights unless they are "random" or a file."""
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ConvscopeError(f"timm has no model {name!r}; nearest: {nearest(name, timm.list_models())}")
    if tag and not timm.models.is_model_pretrained(name):
        known = timm.list_pretrained(f"{base}.*")
        raise ConvscopeError(f"timm has no weights {tag!r} for {base!r}; nearest: {nearest(name, known)}")
    if weights == "default":
        if not timm.models.is_model_pretrained(name):
            raise ConvscopeError(f"timm has no weights for {name!r}; give weights='random' or a file")
        with files.downloading(f"timm:{name}"):
            module = timm.create_model(name, pretrained=True, **_offline(name))
    else:
        with seeded():
            module = timm.create_model(name)
        if weights != "random":
            files.put_weights(module, Path(weights))
    return ModelSpec(module, f"timm:{name}", preprocessing=data_config(module), classes=classes_of(module))


def _offline(name: str) -> dict[str, Any]:
    """Weights from the local cache where the hub cannot be reached: without its minute of retries."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return {}
    gate = urlsplit(getproxies().get("https", constants.ENDPOINT))
    try:
        socket.create_connection((gate.hostname, gate.port or {"http": 80}.get(gate.scheme, 443)), timeout=5).close()
        return {}
    except OSError as error:
        for file in ("model.safetensors", "pytorch_model.bin"):
            cached = try_to_load_from_cache(config.hf_hub_id, file)
            if isinstance(cached, str):
                return {"pretrained_cfg_overlay": {"file": cached}}
        raise OSError(f"{gate.hostname} cannot be reached") from error


def data_config(module: Any) -> Preprocessing:
    """The preprocessing that a timm model carries."""
    from timm.data import resolve_model_data_config

    return Preprocessing.of(resolve_model_data_config(module))


def classes_of(module: Any) -> tuple[str, ...] | None:
    """ImageNet's class names for a model with its thousand outputs."""
    return imagenet_classes() if getattr(module, "num_classes", None) == 1000 else None
