"""Files of weights and exported networks, opened without running code that they may hold."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from convscope.errors import ConvscopeError
from convscope.sources.found import Found


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
def downloading(name: str) -> Iterator[None]:
    """Turn whatever a framework raises when it cannot download into one clear line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConvscopeError(
            f"the weights of {name} could not be downloaded ({reason}); connect to the network, or give weights=FILE "
            "or weights='random'"
        ) from error


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file. Refuses pickles that hold anything but tensors, numbers and containers."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvscopeError(
            f"{path} holds code or objects, not only weights, and is not opened: unpickling it could run anything; "
            "save the weights alone: torch.save(model.state_dict(), FILE), or use safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ConvscopeError(f"{path} is not a file of PyTorch weights: {_line(error)}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ConvscopeError(f"{path} holds no named weights")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConvscopeError(f"{path} is not a safetensors file: {_line(error)}") from error
    return tensors


READERS = {
    ".safetensors": read_safetensors,
    ".pth": read_pth,
    ".pt": read_pth,
    ".ckpt": read_pth,
    ".bin": read_pth,
}


def put_weights(module: nn.Module, path: Path) -> None:
    """Load a file of weights into a PyTorch module; every key must fit."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConvscopeError(f"weights {str(path)!r}: expected 'default', 'random' or a {', '.join(READERS)} file")
    require_file(path)
    fit(module, reader(path), str(path))


def fit(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Put `state` into the module, or say which keys are missing, unknown or of another shape."""
    own = module.state_dict()
    # Counters of batches are missing from files of old PyTorch versions and play no part in inference.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    complaints = [
        f"{what} {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        for what, keys in (("missing:", missing), ("unknown:", unknown), ("other shape:", shapes))
        if keys
    ]
    if complaints:
        raise ConvscopeError(f"the weights in {origin} do not fit {type(module).__name__}; {'; '.join(complaints)}")
    module.load_state_dict(state, strict=False)


def from_pt2(path: Path, weights: str | None) -> Found:
    """A network saved by `torch.export.save`, its layers under their own names again."""
    if weights not in (None, "default"):
        raise ConvscopeError("a .pt2 file holds its own weights; weights= is for models made by name")
    _refuse_code(path)
    try:
        program = torch.export.load(path)
        module = torch.export.unflatten(program)
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise ConvscopeError(f"{path} cannot be read as an exported program: {_line(error)}") from error
    shape = next(
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    )
    batch, channels, height, width = [n if isinstance(n, int) else None for n in shape]
    if batch not in (None, 1):
        raise ConvscopeError(
            f"{path} takes batches of exactly {batch}; export it with a free or single batch: "
            "dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    size = (height, width) if height is not None and width is not None else None
    found = Found(module, path.name, size=size, channels=channels, fixed_batch=batch)
    found.owned = False  # its graph was checked for these very tensors and layouts
    return found


def _refuse_code(path: Path) -> None:
    """`torch.export.load` falls back to full unpickling and to loading machine code: look for either beforehand."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            if any("aotinductor" in m or m.endswith((".so", ".cubin", ".dll")) for m in members):
                raise ConvscopeError(f"{path} is a compiled package with machine code; save it with torch.export.save")
            for member in members:
                head = archive.open(member).read(4)
                if member.rpartition("/")[2].startswith("custom_obj") or (
                    member.endswith("_config.json") and '"use_pickle": true' in _normal_json(archive.read(member))
                ):
                    raise ConvscopeError(f"{path} holds pickled objects ({member}) and is not opened")
                if head == b"PK\x03\x04" or member.endswith((".pt", ".pkl")):
                    torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise ConvscopeError(f"{path} is not an exported program (.pt2): it is not a zip archive") from error
    except pickle.UnpicklingError as error:
        raise ConvscopeError(f"{path} holds pickled code or objects and is not opened") from error


def _normal_json(raw: bytes) -> str:
    return json.dumps(json.loads(raw))


def refuse_pickle(path: Path, weights: str | None) -> NoReturn:
    """A .pth file holds weights or a pickle, never a network that can be opened safely."""
    raise ConvscopeError(
        f"{path} holds weights, or a pickled network, which is not opened because it can run code; name the network "
        f"and give the file as its weights: load('torchvision:resnet50', weights={str(path)!r})"
    )


def refuse_weights(path: Path, weights: str | None) -> NoReturn:
    """A file of weights alone does not say which network they belong to."""
    raise ConvscopeError(f"{path} holds weights without a network; load('NAME', weights={str(path)!r})")


def _line(error: BaseException) -> str:
    text: Any = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
