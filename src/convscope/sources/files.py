"""Read files of weights without running code that they may contain."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from convscope.errors import ConvscopeError


def require_file(path: Path) -> None:
    """Refuse a path that is not a readable file."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ConvscopeError(f"{path} {what}; expected a file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConvscopeError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def download_errors(name: str) -> Iterator[None]:
    """Turn the errors of a failed download into one clear line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConvscopeError(
            f"the weights of {name} could not be downloaded ({reason}); connect to the network, or give weights=FILE "
            "or weights='random'"
        ) from error


def read_pth(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .pth file; refuse pickles of anything but tensors, numbers and containers."""
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):
            raise ConvscopeError(f"{path} is not a file of PyTorch weights: it is neither a zip archive nor a pickle")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvscopeError(
            f"{path} holds code or objects besides weights and is not opened: unpickling could run arbitrary code; "
            "save the weights alone: torch.save(model.state_dict(), FILE), or use safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ConvscopeError(f"{path} is not a file of PyTorch weights: {first_line(error)}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    named = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in named if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ConvscopeError(f"{path} holds no named weights")
    # Weights saved from DataParallel or torch.compile carry the wrapper's prefix.
    for _ in range(2):
        for wrapper in ("module.", "_orig_mod."):
            if all(key.startswith(wrapper) for key in tensors):
                tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConvscopeError(f"{path} is not a safetensors file: {first_line(error)}") from error
    return tensors


READERS = {
    ".safetensors": read_safetensors,
    ".pth": read_pth,
    ".pt": read_pth,
    ".ckpt": read_pth,
    ".bin": read_pth,
}


def load_weights_file(module: nn.Module, path: Path) -> None:
    """Load a file of weights into a PyTorch module; every key must fit."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConvscopeError(f"weights {str(path)!r}: expected 'default', 'random' or a {', '.join(READERS)} file")
    require_file(path)
    load_state(module, reader(path), str(path))


def load_state(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load `state` into the module; raise with the keys that are missing, unknown or of another shape."""
    expected = module.state_dict()
    # Batch counters are missing from files of old PyTorch versions and are not used in inference.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in expected]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    complaints = [
        f"{what} {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        for what, keys in (("missing:", missing), ("unknown:", unknown), ("other shape:", shapes))
        if keys
    ]
    if complaints:
        raise ConvscopeError(f"the weights in {origin} do not fit {type(module).__name__}; {'; '.join(complaints)}")
    module.load_state_dict(state, strict=False)


def refuse_pickle(path: Path, _weights: str | None) -> NoReturn:
    """Refuse a .pth file as a model: it holds weights, or a pickle that is not safe to open."""
    raise ConvscopeError(
        f"{path} holds weights, or a pickled network, which is not opened because it can run code; name the network "
        f"and give the file as its weights: load('torchvision:resnet50', weights={str(path)!r})"
    )


def refuse_weights(path: Path, _weights: str | None) -> NoReturn:
    """Refuse a file of weights as a model: it does not name its network."""
    raise ConvscopeError(f"{path} holds weights without a network; load('NAME', weights={str(path)!r})")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
