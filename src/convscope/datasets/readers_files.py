"""Pictures in files and in tars: listed without decoding any, read one by one."""

from __future__ import annotations

import json
import operator
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import numpy as np

from convscope.datasets.storage import Storage
from convscope.errors import ConvscopeError
from convscope.images.loading import one_line

Label = str | int | None  # a name, a number (below 0: unknown), or nothing known

_IMAGE = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|gif|tiff?|bmp|p[pgbn]m|jp2|j2k|jpf|avif|npy)", re.IGNORECASE)
_MOST_TEXT = 1 << 20  # bytes of a label in a tar


class ImageReader(Protocol):
    """Reads a picture, by its position and its name: bytes of a file, an image or an array. Picklable.

    held: the pictures lie in memory, and are handed to worker processes one by one rather than all to each.
    """

    held: bool

    def read(self, index: int, name: str) -> Any: ...


@dataclass
class DatasetIndex:
    """Pictures found: a unique name of each, its size in bytes where that says anything, a label, and their origin.

    label_names: the classes that labels count, where that is known; otherwise the labels that occur are the classes.
    content: whatever else tells this data set from another.
    """

    names: Sequence[str]
    origin: ImageReader
    sizes: Sequence[int] | np.ndarray = ()
    labels: Sequence[Label] | None = None
    label_names: tuple[str, ...] | None = None
    content: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Files:
    """Files that each hold one picture and are named by their address."""

    storage: Storage
    held = False

    def read(self, index: int, name: str) -> Any:
        return self.storage.read(name)


def is_image(name: str) -> bool:
    """Whether a file looks like a picture, by its extension."""
    return bool(_IMAGE.fullmatch(os.path.splitext(name)[1]))


def of_folder(storage: Storage, folder: str) -> DatasetIndex:
    """The pictures in a folder, at any depth, sorted by name; folders of the first level are the classes.

    A picture that lies in none of them has no label; where all do, there are no labels.
    """
    root = folder if folder.endswith("/") else folder + "/"
    rows, left_out = _images(storage.walk(folder))
    if not rows:
        found = Counter(name.rpartition(".")[2].lower() for name in left_out)
        kind = next((kind for kind in ("tar", "parquet") if found[kind]), None)
        advice = f"; it holds {kind} files: give {root}*.{kind}" if kind else ""
        raise ConvscopeError(f"there are no pictures in {folder}{advice}")
    labels: list[Label] = [name.partition("/")[0] if "/" in name else None for name, _ in rows]
    listing = DatasetIndex([root + name for name, _ in rows], Files(storage), [size for _, size in rows])
    listing.labels = labels if any(label is not None for label in labels) else None
    listing.notes += _left_out(left_out, folder)
    return listing


def of_matches(storage: Storage, found: Iterable[tuple[str, int]], pattern: str) -> DatasetIndex:
    """The pictures among the files that a glob names, sorted by name."""
    rows, left_out = _images(found)
    if not rows:
        raise ConvscopeError(f"no picture, tar or Parquet file is named by {pattern}")
    listing = DatasetIndex([name for name, _ in rows], Files(storage), [size for _, size in rows])
    listing.notes += _left_out(left_out, pattern)
    return listing


def of_addresses(storage: Storage, addresses: Sequence[str]) -> DatasetIndex:
    """One picture at each address, in their order; one that is not there fails when it is read."""
    return DatasetIndex(addresses, Files(storage), [storage.size(address) for address in addresses])


def of_text(storage: Storage, address: str) -> DatasetIndex:
    """The pictures that a text file lists: an address a line, a tab and a label may follow.

    Relative addresses count from the list's own folder. Raises ConvscopeError for lists that are not there, or no text.
    """
    try:
        with storage.open(address) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConvscopeError(f"{address} is no text in UTF-8: {error}") from error
    folder = address.rpartition("/")[0]
    places: list[str] = []
    labels: list[Label] = []
    for line in filter(str.strip, lines):
        place, _, label = line.partition("\t")
        places.append(_beside(folder, place.strip()))
        labels.append(plain_label(sys.intern(label.partition("\t")[0])))
    listing = of_addresses(storage, places)
    listing.labels = labels if any(label is not None for label in labels) else None
    return listing


def _beside(folder: str, address: str) -> str:
    return address if "://" in address or os.path.isabs(address) or not folder else f"{folder}/{address}"


def plain_label(text: str) -> Label:
    """A label as it is written: a whole number, a name, or nothing."""
    text = text.strip()
    return int(text) if text.removeprefix("-").isdecimal() else text or None


def _images(found: Iterable[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[str]]:
    """Those files that look like pictures, sorted part by part of their names, and the names of the others."""
    rows, others = [], []
    for name, size in found:
        if is_image(name) and _is_text(name):
            rows.append((name, size))
        else:
            others.append(name)
    return sorted(rows, key=lambda row: row[0].split("/")), others


def _is_text(name: str) -> bool:
    """Whether a name can be kept: Linux lets any bytes name a file."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _left_out(names: Sequence[str], where: str) -> list[str]:
    """A note on files that are no pictures by their names, if there are any."""
    few = ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)
    return [one_line(f"{where}: left out as no pictures by their names: {len(names):,} ({few})")] if names else []


@dataclass(frozen=True, eq=False)
class Tars:
    """Members of tars that are not compressed, each read by its offset: `which` tar, `starts` and `sizes` in bytes."""

    storage: Storage
    tars: tuple[str, ...]
    which: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    held = False

    def read(self, index: int, name: str) -> Any:
        tar = self.tars[self.which[index]]
        return self.storage.read(tar, int(self.starts[index]), int(self.sizes[index]))


def of_tars(storage: Storage, tars: Sequence[str]) -> DatasetIndex:
    """The pictures of WebDataset tars, in the order of the tars and of their members.

    A member KEY.jpg (.png, .webp, ...) is a picture; KEY ends at the first dot of its file name. Its label is the
    content of KEY.cls, a number or a name, or what KEY.json calls "label". Raises ConvscopeError for tars that are
    compressed, damaged or not there.
    """
    names: list[str] = []
    labels: list[Label] = []
    places: list[tuple[int, int, int]] = []
    left_out: list[str] = []
    for number, tar in enumerate(tars):
        keys: list[str] = []
        known: dict[str, Label] = {}
        for member, file in _members(storage, tar):
            folder, _, last = member.name.rpartition("/")
            stem, _, extension = last.partition(".")
            key, extension = f"{folder}/{stem}", extension.lower()
            if "." not in extension and is_image(last) and _is_text(member.name):
                names.append(f"{tar}!{member.name}")
                keys.append(key)
                places.append((number, member.offset_data, member.size))
            elif extension in ("cls", "json"):
                label = _label_in(file.read(min(member.size, _MOST_TEXT)), extension)
                known[key] = label if extension == "cls" or key not in known else known[key]
            elif stem:  # not hidden
                left_out.append(member.name)
        labels += [known.get(key) for key in keys]
    which, starts, sizes = np.array(places, np.int64).reshape(-1, 3).T
    listing = DatasetIndex(
        names, Tars(storage, tuple(tars), which.astype(np.int32), starts.copy(), sizes.copy()), sizes
    )
    listing.labels = labels if any(label is not None for label in labels) else None
    listing.notes += _left_out(left_out, tars[0] if len(tars) == 1 else f"{len(tars)} tars")
    return listing


def _members(storage: Storage, address: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The files in a tar, each with the tar opened where its content begins."""
    with _as_tar(address), storage.open(address) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if member.isreg():
                file.seek(member.offset_data)
                yield member, file
            tar.members.clear()  # type: ignore[attr-defined] # it would keep them all


@contextmanager
def _as_tar(address: str) -> Iterator[None]:
    """What tarfile raises, in words."""
    try:
        yield
    except (tarfile.TarError, OSError) as error:
        expected = "expected a whole tar without compression, from which pictures can be read by their offset"
        raise ConvscopeError(f"{address} cannot be read as a tar ({error}); {expected}") from error


def _label_in(content: bytes, extension: str) -> Label:
    """The label in a .cls or a .json of a tar; None where there is none."""
    text = content.decode("utf-8", errors="replace")
    if extension == "cls":
        return plain_label(text)
    try:
        told = json.loads(text)
    except ValueError:
        return None  # other people's notes need not be ours
    label = told.get("label") if isinstance(told, dict) else None
    return as_label(label)


def as_label(value: Any) -> Label:
    """A label from whatever a data set hands out: a name, anything that is a whole number, else None."""
    if isinstance(value, str):
        return plain_label(value)
    try:
        return operator.index(value)
    except TypeError:
        return None
