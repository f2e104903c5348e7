"""What all results share: saving, drawing, showing. How each kind looks is registered from above, in `figures`."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import singledispatch
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.format import write_array
from PIL import Image

from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.images.loading import Failure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Shown = Image.Image | Sequence[Image.Image] | str  # a picture, the pictures of a film, a page


def _plotting_loaded() -> bool:
    """Import the plotting functions; whether they were imported before."""
    loaded = "convscope.plotting" in sys.modules
    import_module("convscope.plotting")
    return loaded


@singledispatch
def draw(result: Any) -> Figure:
    """Draw a matplotlib figure of a result."""
    if _plotting_loaded():
        raise TypeError(f"no figure is known for {type(result).__name__}")
    return draw(result)


@singledispatch
def render(result: Any) -> Iterable[tuple[str, Shown]]:
    """What a result is saved as: file names without folder, and pictures, films or pages."""
    if _plotting_loaded():
        raise TypeError(f"no pictures are known for {type(result).__name__}")
    return render(result)


@dataclass(frozen=True, eq=False)
class Result:
    """The base of all results: frozen, with numpy arrays for data.

    `notes` say in words what a number alone would hide (a dead unit, a map that is negative everywhere, an assumption);
    `failed` names the pictures that could not be used, and why.
    """

    model: Model = field(repr=False)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    failed: tuple[Failure, ...] = field(default=(), kw_only=True)

    def arrays(self) -> dict[str, np.ndarray]:
        """All data, under the names by which it is saved."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), np.ndarray)}

    def parameters(self) -> dict[str, Any]:
        """All settings that made the result, JSON-able."""
        plain = (str, int, float, bool, tuple, list, type(None))
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in own.items() if isinstance(v, plain) and k not in ("model", "notes", "failed")}

    def text_files(self) -> Mapping[str, str]:
        """Tables that are saved beside the pictures: file names, and what is in them."""
        return {}

    def figure(self) -> Figure:
        """A matplotlib figure that shows the result."""
        return draw(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write PNG pictures, films (animated WebP), tables, `arrays.npz` and, last, `manifest.json` into `folder`.

        The folder is made if need be. Each file is written under a temporary name and renamed, so a file that is there
        is whole; a folder without a manifest was not finished. Raises ConvscopeError if the folder is an address, or
        cannot be written.
        """
        where = local_folder(folder)
        try:
            where.mkdir(parents=True, exist_ok=True)
            (where / "manifest.json").unlink(missing_ok=True)  # of an earlier save: it does not speak for this one
            files = []
            for name, image in render(self):
                with atomic_write(where / name) as file:
                    _write_shown(file, image)
                files.append(name)
            for name, text in self.text_files().items():
                with atomic_write(where / name) as file:
                    file.write(text.encode(errors="backslashreplace"))
                files.append(name)
            with atomic_write(where / "arrays.npz") as file:
                write_npz(file, self.arrays())
            write_json(where / "manifest.json", self.manifest([*files, "arrays.npz"]))
        except OSError as error:
            raise ConvscopeError(f"cannot write into {where}: {error.strerror or error}") from error
        return where

    def manifest(self, files: Iterable[str] = ()) -> dict[str, Any]:
        """What made the result, with what, and what was saved."""
        return {
            "kind": type(self).__name__.lower(),
            "model": self.model.describe(),
            "parameters": self.parameters(),
            "notes": list(self.notes),
            "failed": [{"name": f.name, "reason": f.reason} for f in self.failed],
            "files": list(files),
            "versions": versions(),
        }

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue()


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder to write into. Raises ConvscopeError for an address, also where a Path made one slash of its two."""
    if re.match(r"\w[\w+.-]+:/", os.fspath(folder)):
        raise ConvscopeError(
            f"{os.fspath(folder)} is an address, and what is made is written into a folder on a disk of this machine; "
            "give one, and copy it when it is finished: a store is read at any address"
        )
    return Path(folder)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name only once it is written whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_names(layers: Iterable[str]) -> dict[str, str]:
    """For each layer a name that any file system takes and that no other layer has, in whatever case."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for layer in layers:
        plain = name = "".join(c if c.isalnum() or c in "._-" else "-" for c in layer)[:100]
        count = 1
        while name.casefold() in taken:
            count += 1
            name = f"{plain}~{count}"
        taken.add(name.casefold())
        names[layer] = name
    return names


def pattern_folders(layers: Iterable[str]) -> dict[str, str]:
    """Map the layers of a store to the folders of their patterns, relative to the store."""
    return {layer: f"patterns/{name}" for layer, name in file_names(layers).items()}


def pattern_file(layer: str, unit: int | str) -> str:
    """Name the PNG file of a unit's pattern, as `Patterns.save` writes it."""
    return f"{file_names([layer])[layer]}_{unit}.png"


FRAME = 120  # milliseconds


def _write_shown(file: IO[bytes], image: Shown) -> None:
    if isinstance(image, str):
        file.write(image.encode(errors="backslashreplace"))
    elif isinstance(image, Image.Image):
        image.save(file, format="PNG")
    else:
        shown = [FRAME] * (len(image) - 1) + [8 * FRAME]  # the last one is what it is about
        image[0].save(file, format="WEBP", save_all=True, append_images=image[1:], duration=shown, loop=0, quality=90)


def write_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """As numpy's own savez_compressed, but under any name ("file", say) and never with a pickle."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write_array(member, np.asanyarray(array), allow_pickle=False)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(path) as file:
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
        file.write(text.encode(errors="backslashreplace"))  # a file's name need not be Unicode


def versions() -> dict[str, str]:
    """Of what took part in a result."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for package in ("convscope", "torchvision", "timm", "keras"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
