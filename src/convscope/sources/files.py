"""Read files of weights without running code that they may contain."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from convscope.errors import ConvscopeError

MAX_PREFIX_PARTS = 3  # of prefixes of weights' names: "_orig_mod.module.model."


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
    if zipfile.is_zipfile(path) and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(path).namelist()):
        raise ConvscopeError(f"{path} is a TorchScript program, which holds its own network; load({str(path)!r})")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvscopeError(
            f"{path} holds code or objects besides weights (a whole pickled network?) and is not opened: unpickling "
            "could run arbitrary code; save the weights alone: torch.save(model.state_dict(), FILE), or use safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ConvscopeError(f"{path} is not a file of PyTorch weights: {first_line(error)}") from error
    tensors = _named_tensors(state)
    if not tensors:
        raise ConvscopeError(f"{path} holds no named weights")
    return tensors


def _named_tensors(state: object) -> dict[str, Tensor]:
    """Return the named tensors of a checkpoint: at its top, or in the member that holds the most."""
    if not isinstance(state, dict):
        return {}
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    members = [_named_tensors(v) for k, v in state.items() if isinstance(v, dict) and "optim" not in str(k).lower()]
    return max([tensors, *members], key=len)


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


def load_weights_file(module: nn.Module, path: Path) -> list[str]:
    """Load a file of weights into a PyTorch module; every key must fit. Return notes."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConvscopeError(f"weights {str(path)!r}: expected 'default', 'random' or a {', '.join(READERS)} file")
    require_file(path)
    return load_state(module, reader(path), str(path))


def load_state(module: nn.Module, state: dict[str, Tensor], origin: str) -> list[str]:
    """Load `state` into the module; raise with the keys that are missing, unknown or of another shape. Return notes."""
    expected = module.state_dict()
    state, notes = match_keys(state, expected)
    # Batch counters are missing from files of old PyTorch versions and are not used in inference.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in expected]
    differing = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if differing and not missing and not unknown:
        _refuse_head(module, {k: (state[k].shape, expected[k].shape) for k in differing}, origin)
    shapes = [f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}" for k in differing]
    complaints = [
        f"{what} {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        for what, keys in (("missing:", missing), ("unknown:", unknown), ("other shape:", shapes))
        if keys
    ]
    if complaints:
        raise ConvscopeError(f"the weights in {origin} do not fit {type(module).__name__}; {'; '.join(complaints)}")
    module.load_state_dict(state, strict=False)
    return notes


def match_keys(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove or add the prefix with which the most keys agree with those expected; return notes on what was done.

    Wrappers add prefixes: ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` (Lightning).
    Keys without the prefix belong to something else, such as a loss or a teacher, and are left out.
    """
    if state.keys() & expected.keys():
        return state, []
    parts = [key.split(".") for key in state]
    prefixes = {".".join(p[:n]) + "." for p in parts for n in range(1, min(len(p), MAX_PREFIX_PARTS + 1))}
    renamed = {
        prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} for prefix in prefixes
    }
    best = max(sorted(renamed), key=lambda prefix: len(renamed[prefix].keys() & expected.keys()), default=None)
    if best is not None and renamed[best].keys() & expected.keys():
        dropped = [k for k in state if not k.startswith(best)]
        note = f"prefix {best!r} removed from the names of the weights"
        return renamed[best], [note + (f"; left out: {shorten(dropped)}" if dropped else "")]
    roots = {key.partition(".")[0] + "." for key in expected}
    if len(roots) == 1 and (root := roots.pop()) and {root + k for k in state} & expected.keys():
        return {root + k: v for k, v in state.items()}, [f"prefix {root!r} added to the names of the weights"]
    return state, []


def shorten(names: Sequence[str], count: int = 4) -> str:
    """Join the first names; say how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _refuse_head(module: nn.Module, shapes: Mapping[str, tuple[torch.Size, torch.Size]], origin: str) -> None:
    """Raise an error that names both numbers of classes if the weights differ in one head only."""
    sizes = {(actual[0], expected[0]) for actual, expected in shapes.values() if actual[1:] == expected[1:]}
    layers = {key.rpartition(".")[0] for key in shapes}
    if len(sizes) == 1 and len(layers) == 1:
        actual, expected = sizes.pop()
        raise ConvscopeError(
            f"the head {layers.pop()!r} has {actual} outputs in {origin} and {expected} in {type(module).__name__}; "
            f"give the names of the {actual} classes: classes=[...]"
        )


def refuse_pickle(path: Path, _weights: str | None) -> NoReturn:
    """Refuse a .pth file as a model: it holds weights, or a pickle that is not safe to open."""
    named = f"name the network: load('torchvision:resnet50', weights={str(path)!r})"
    read_pth(path)  # raises for pickles that hold objects
    raise ConvscopeError(f"{path} holds weights without their network; {named}")


OTHER_FORMATS = {
    ".tflite": "a TensorFlow Lite file; pass a function that runs its interpreter: load(lambda x: ...)",
    ".pb": "a TensorFlow graph; save the model as .keras, or pass a function that runs it",
    ".mlmodel": "a Core ML file; pass a function that runs it: load(lambda x: ...)",
    ".mlpackage": "a Core ML file; pass a function that runs it: load(lambda x: ...)",
    ".engine": "a TensorRT engine; pass a function that runs it: load(lambda x: ...)",
    ".plan": "a TensorRT engine; pass a function that runs it: load(lambda x: ...)",
    ".pkl": "a pickle, which can run code and is not opened; load the network yourself and pass it",
    ".pickle": "a pickle, which can run code and is not opened; load the network yourself and pass it",
    ".joblib": "a pickle, which can run code and is not opened; load the network yourself and pass it",
}


def refuse_other_format(path: Path) -> None:
    """Raise an error that names the format of a file or folder that cannot be loaded, if it is known."""
    if (path / "saved_model.pb").is_file():
        raise ConvscopeError(
            f"{path} is a TensorFlow SavedModel; save the model as .keras, or pass a function of images (N, C, H, W)"
        )
    if path.is_dir() and (path / "config.json").is_file():
        raise ConvscopeError(f"{path} is a folder of Hugging Face; load('hf:{path}')")
    if path.suffix.lower() in OTHER_FORMATS and path.exists():
        raise ConvscopeError(f"{path} is {OTHER_FORMATS[path.suffix.lower()]}")


def refuse_weights(path: Path, _weights: str | None) -> NoReturn:
    """Refuse a file of weights as a model: it does not name its network."""
    raise ConvscopeError(f"{path} holds weights without a network; load('NAME', weights={str(path)!r})")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
