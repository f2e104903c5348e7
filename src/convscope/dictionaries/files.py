"""Files of dictionaries: safetensors, read without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from convscope.dictionaries.encoder import DictionaryWeights
from convscope.errors import ConvscopeError
from convscope.results import atomic_write

WEIGHTS_FILE = "dictionary.safetensors"


def write_weights(folder: Path, weights: DictionaryWeights) -> None:
    """Write the weights into a folder, which is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / WEIGHTS_FILE) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in weights.tensors().items()}))
    except OSError as error:
        raise ConvscopeError(f"cannot write into {folder}: {error.strerror or error}") from error


def read_weights(folder: Path) -> DictionaryWeights:
    """Read what `write_weights` has written."""
    tensors = read_tensors(folder / WEIGHTS_FILE)
    try:
        return DictionaryWeights(**tensors)
    except TypeError as error:
        raise ConvscopeError(f"{folder / WEIGHTS_FILE} is not a dictionary: it has {', '.join(tensors)}") from error


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Read a safetensors file, or a state dict of PyTorch without anything but tensors."""
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConvscopeError(f"{path} does not exist") from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ConvscopeError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    except UnpicklingError as error:
        raise ConvscopeError(f"{path} is not a state dict of tensors alone, and code is not loaded") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ConvscopeError(f"{path} holds a {type(loaded).__name__}; expected a state dict of tensors")
    return loaded
