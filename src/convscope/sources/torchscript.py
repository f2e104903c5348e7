"""TorchScript programs: files and instances. Their inputs have gradients, but hooks do not fire inside them."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from convscope.engine.adapters import TorchAdapter
from convscope.errors import ConvscopeError
from convscope.sources.files import first_line
from convscope.sources.spec import ModelSpec

# Operators that read or write files, and those of other libraries.
UNSAFE_CODE = re.compile(
    r"\b(from_file|torch\.save|torch\.load)\b|\bops\.(?!(aten|prim|prims|torchvision|quantized)\.)\w+"
)


@dataclass(frozen=True)
class ScriptAdapter(TorchAdapter):
    """Adapter of TorchScript modules, whose layers cannot be observed."""

    name = "torchscript"

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return no layers: hooks do not fire inside TorchScript."""
        del module
        return {}


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def from_file(path: Path, weights: str | None) -> ModelSpec:
    """Open a TorchScript archive, unless its code uses operators that read or write files."""
    if weights not in (None, "default"):
        raise ConvscopeError(f"{path} is a TorchScript program with its own weights; weights= does not apply")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            match = UNSAFE_CODE.search(archive.read(name).decode("utf-8", "replace")) if name.endswith(".py") else None
            if match:
                raise ConvscopeError(f"{path} is not opened: its code calls {match.group(0)}")
    try:
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise ConvscopeError(f"{path} cannot be read as TorchScript: {first_line(error)}") from error
    spec = from_module(module.eval())
    spec.name = path.name
    return spec


def from_module(module: nn.Module) -> ModelSpec:
    """Describe a ScriptModule."""
    notes = ["TorchScript shows no layers; methods at the input work, such as saliency, occlusion and rise"]
    name = str(getattr(module, "original_name", type(module).__name__))
    return ModelSpec(module, name, ScriptAdapter(), notes=notes, loaded_by_convscope=False)
