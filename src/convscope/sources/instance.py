"""Modules that the user passes in: an `nn.Module` or a Keras model, used as it is."""

from __future__ import annotations

import torch
from torch import nn

from convscope.errors import ConvscopeError
from convscope.sources import (
    black_box,
    exported,
    huggingface,
    keras,
    open_clip,
    timm,
    torchscript,
    torchvision_detection,
)
from convscope.sources.spec import IMAGENET_MEAN, IMAGENET_STD, ModelSpec


def wrap(module: object) -> ModelSpec:
    """Describe a module; wrappers (DataParallel, torch.compile) are removed."""
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    if packages & {"keras", "tf_keras"}:
        return keras.from_model(module)
    if isinstance(module, torch.export.ExportedProgram):
        return exported.from_program(module, "exported program")
    if not isinstance(module, nn.Module) and callable(module) and not isinstance(module, type):
        return black_box.from_function(module)
    if not isinstance(module, nn.Module):
        raise ConvscopeError(
            f"cannot load a {type(module).__name__}; expected a name such as 'lite0' or 'torchvision:vgg16', "
            "a file, an nn.Module, a Keras model or a function of images (N, C, H, W)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return torchscript.from_module(module)
    module = unwrap(module)
    name = type(module).__name__
    if huggingface.is_pretrained_model(module):
        return huggingface.from_model(module)
    if open_clip.is_text_image_model(module):
        return open_clip.from_model(module)
    if hasattr(module, "pretrained_cfg") and packages & {"timm"}:
        classes, task = timm.class_names(module), timm.task(module)
        spec = ModelSpec(module, name, preprocessing=timm.data_config(module), classes=classes, task=task)
    elif "torchvision" in packages and torchvision_detection.is_detector(module):
        spec = torchvision_detection.from_module(module, name)
    elif "torchvision" in packages:
        spec = ModelSpec(module, name, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    else:
        spec = ModelSpec(module, name)
    spec.loaded_by_convscope = False
    return spec


def unwrap(module: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel and torch.compile; weights are shared."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]  # noqa: SLF001
        else:
            return module
