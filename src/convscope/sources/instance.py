"""Models that the user already has: an `nn.Module` or a Keras model, used as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convscope.errors import ConvscopeError
from convscope.sources import keras, timm
from convscope.sources.spec import IMAGENET_MEAN, IMAGENET_STD, ModelSpec


def wrap(module: Any) -> ModelSpec:
    """What can be known about a model in hand. Wrappers (DataParallel, torch.compile) are looked through."""
    origin = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    if origin & {"keras", "tf_keras"}:
        return keras.from_model(module)
    if not isinstance(module, nn.Module):
        raise ConvscopeError(
            f"cannot look into a {type(module).__name__}; expected a name such as 'lite0' or 'torchvision:vgg16', "
            "a file, an nn.Module or a Keras model"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ConvscopeError(
            "a TorchScript module does not let its layers be watched; pass the module it was made from, "
            "or save that with torch.export and load the .pt2 file"
        )
    module = unwrap(module)
    name = type(module).__name__
    if hasattr(module, "pretrained_cfg") and origin & {"timm"}:
        found = ModelSpec(module, name, preprocessing=timm.data_config(module), classes=timm.classes_of(module))
    elif "torchvision" in origin:
        found = ModelSpec(module, name, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    else:
        found = ModelSpec(module, name)
    found.loaded_by_convscope = False
    return found


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile, whose weights it shares."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module
