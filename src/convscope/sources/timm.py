"""Models of timm, with their data configs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from convscope.errors import ConvscopeError
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.spec import ModelSpec, fixed_seed, imagenet_classes
from convscope.suggestions import suggest


def names() -> list[str]:
    """List the names that `load` accepts after "timm:"."""
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


def from_name(name: str, weights: str, num_classes: int | None = None) -> ModelSpec:
    """Make a timm model; weights are downloaded unless they are "random" or a file."""
    import timm

    notes: list[str] = []
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ConvscopeError(f"timm has no model {name!r}; {suggest(name, timm.list_models())}")
    if tag and not timm.models.is_model_pretrained(name):
        known = timm.list_pretrained(f"{base}.*")
        raise ConvscopeError(f"timm has no weights {tag!r} for {base!r}; {suggest(name, known)}")
    if weights == "default":
        if not timm.models.is_model_pretrained(name):
            raise ConvscopeError(f"timm has no weights for {name!r}; give weights='random' or a file")
        with files.download_errors(f"timm:{name}"):
            module = timm.create_model(name, pretrained=True, **_cached_weights(name))
    else:
        with fixed_seed():
            module = timm.create_model(name, **({} if num_classes is None else {"num_classes": num_classes}))
        if weights != "random":
            notes = files.load_weights_file(module, Path(weights))
    return ModelSpec(
        module,
        f"timm:{name}",
        preprocessing=data_config(module),
        classes=class_names(module),
        task=task(module) or "classification",
        notes=notes,
    )


def _cached_weights(name: str) -> dict[str, Any]:
    """Use weights of the local cache when the hub cannot be reached, without a minute of retries."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return {}
    endpoint = urlsplit(getproxies().get("https", constants.ENDPOINT))
    try:
        socket.create_connection(
            (endpoint.hostname, endpoint.port or {"http": 80}.get(endpoint.scheme, 443)), timeout=5
        ).close()
        return {}
    except OSError as error:
        for file in ("model.safetensors", "pytorch_model.bin"):
            cached = try_to_load_from_cache(config.hf_hub_id, file)
            if isinstance(cached, str):
                return {"pretrained_cfg_overlay": {"file": cached}}
        raise OSError(f"{endpoint.hostname} cannot be reached") from error


def data_config(module: Any) -> Preprocessing:
    """Return the preprocessing of a timm model."""
    from timm.data import resolve_model_data_config

    return Preprocessing.of(resolve_model_data_config(module))


def task(module: Any) -> str | None:
    """Return "classification" for ImageNet's classes, "embedding" for a model without a head, or None."""
    return {0: "embedding", 1000: "classification"}.get(getattr(module, "num_classes", -1))


def class_names(module: Any) -> tuple[str, ...] | None:
    """Return ImageNet's class names for a model with 1000 outputs."""
    return imagenet_classes() if getattr(module, "num_classes", None) == 1000 else None
