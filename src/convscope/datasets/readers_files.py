"""Index and read images in single files and in WebDataset tars."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np

from convscope.datasets.index import DatasetIndex, Label, labels_or_none, parse_label, to_label
from convscope.datasets.storage import Storage
from convscope.errors import ConvscopeError
from convscope.images.failures import one_line

_IMAGE_EXTENSION = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|gif|tiff?|bmp|p[pgbn]m|jp2|j2k|jpf|avif|npy)", re.IGNORECASE)
_IMAGE_COLUMNS = ("image", "path", "file", "file_name", "filename")  # of CSV files
_LABEL_COLUMNS = ("label", "class")
_MAX_LABEL_BYTES = 1 << 20  # of a label file in a tar


@dataclass(frozen=True)
class FileReader:
    """Reads files that each hold one image and whose names are their locations."""

    storage: Storage
    in_memory = False

    def read(self, index: int, name: str) -> bytes:  # noqa: ARG002 - part of the protocol
        """Return the content of a file."""
        return self.storage.read(name)


def has_image_extension(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return bool(_IMAGE_EXTENSION.fullmatch(os.path.splitext(name)[1]))


def index_folder(storage: Storage, folder: str) -> DatasetIndex:
    """Index the images in a folder at any depth, sorted by name; its direct subfolders are the classes.

    Images outside the subfolders have no label.
    """
    root = folder if folder.endswith("/") else folder + "/"
    files, left_out = _select_images(storage.walk(folder))
    if not files:
        extensions = Counter(name.rpartition(".")[2].lower() for name in left_out)
        packed = next((kind for kind in ("tar", "parquet") if extensions[kind]), None)
        advice = f"; it holds {packed} files: give {root}*.{packed}" if packed else ""
        raise ConvscopeError(f"there are no images in {folder}{advice}")
    return DatasetIndex(
        [root + name for name, _ in files],
        FileReader(storage),
        [size for _, size in files],
        labels=labels_or_none([name.partition("/")[0] if "/" in name else None for name, _ in files]),
        notes=_note_left_out(left_out, folder),
    )


def index_matches(storage: Storage, matches: Iterable[tuple[str, int]], pattern: str) -> DatasetIndex:
    """Index the images among the files that match a glob, sorted by name."""
    files, left_out = _select_images(matches)
    if not files:
        raise ConvscopeError(f"no image, tar or Parquet file matches {pattern}")
    sizes = [size for _, size in files]
    notes = _note_left_out(left_out, pattern)
    return DatasetIndex([name for name, _ in files], FileReader(storage), sizes, notes=notes)


def index_locations(storage: Storage, locations: Sequence[str]) -> DatasetIndex:
    """Index one image per location, in the given order; a missing file fails when it is read."""
    return DatasetIndex(locations, FileReader(storage), [storage.size(location) for location in locations])


def index_text_list(storage: Storage, location: str) -> DatasetIndex:
    """Index the images that a text file lists: one location per line, optionally followed by a tab and a label.

    Relative paths start from the folder of the list. Raises ConvscopeError if the file is missing or not UTF-8 text.
    """
    try:
        with storage.open(location) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConvscopeError(f"{location} is not UTF-8 text: {error}") from error
    folder = location.rpartition("/")[0]
    locations: list[str] = []
    labels: list[Label] = []
    for line in filter(str.strip, lines):
        entry, _, rest = line.partition("\t")
        locations.append(_resolve(folder, entry.strip()))
        labels.append(parse_label(sys.intern(rest.partition("\t")[0])))
    index = index_locations(storage, locations)
    index.labels = labels_or_none(labels)
    return index


def index_csv(storage: Storage, location: str) -> DatasetIndex:
    """Index the images that a CSV file lists: a heading, then one row per image, with its location and its label.

    The columns are image (or path, file, file_name, filename) and, if there are labels, label (or class). Relative
    paths start from the folder of the file. Raises ConvscopeError for other columns, and if it is not UTF-8 text.
    """
    try:
        with storage.open(location) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConvscopeError(f"{location} is not UTF-8 text: {error}") from error
    heading, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    names = [name.strip().casefold() for name in heading]
    image_column, label_column = (
        next((names.index(name) for name in accepted if name in names), None)
        for accepted in (_IMAGE_COLUMNS, _LABEL_COLUMNS)
    )
    if image_column is None:
        raise ConvscopeError(
            f"{location} has the columns {', '.join(heading) or '(none)'}; expected a heading with image and label"
        )
    folder = location.rpartition("/")[0]
    rows = [row for row in rows if len(row) > image_column and row[image_column].strip()]
    index = index_locations(storage, [_resolve(folder, row[image_column].strip()) for row in rows])
    if label_column is not None:
        labels = [parse_label(sys.intern(row[label_column])) if len(row) > label_column else None for row in rows]
        index.labels = labels_or_none(labels)
    return index


def _resolve(folder: str, location: str) -> str:
    return location if "://" in location or os.path.isabs(location) or not folder else f"{folder}/{location}"


def _select_images(files: Iterable[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[str]]:
    """Split files into images, sorted by the parts of their paths, and the names of all others."""
    images, others = [], []
    for name, size in files:
        if has_image_extension(name) and _is_valid_unicode(name):
            images.append((name, size))
        else:
            others.append(name)
    return sorted(images, key=lambda file: file[0].split("/")), others


def _is_valid_unicode(name: str) -> bool:
    """Whether a name can be stored as text; on Linux a file name may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _note_left_out(names: Sequence[str], location: str) -> list[str]:
    if not names:
        return []
    examples = ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)
    return [one_line(f"{location}: {len(names):,} files left out, not images by their names ({examples})")]


@dataclass(frozen=True, eq=False)
class TarReader:
    """Reads members of uncompressed tars by their offsets.

    Attributes
    ----------
    tars : tuple of str
        Locations of the tars.
    tar_numbers, offsets, sizes : array of shape (N,)
        For each image its tar, and the offset and size of its content in bytes.
    """

    storage: Storage
    tars: tuple[str, ...]
    tar_numbers: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    in_memory = False

    def read(self, index: int, name: str) -> bytes:  # noqa: ARG002 - part of the protocol
        """Return the content of a member."""
        tar = self.tars[self.tar_numbers[index]]
        return self.storage.read(tar, int(self.offsets[index]), int(self.sizes[index]))


def index_tars(storage: Storage, tars: Sequence[str]) -> DatasetIndex:
    """Index the images of WebDataset tars, in the order of the tars and their members.

    A member KEY.jpg (.png, .webp, ...) is an image; KEY ends at the first dot of the file name. Its label is the
    content of KEY.cls, a number or a name, or the value of "label" in KEY.json. Raises ConvscopeError for tars that are
    compressed, damaged or missing.
    """
    names: list[str] = []
    labels: list[Label] = []
    extents: list[tuple[int, int, int]] = []
    left_out: list[str] = []
    for number, tar in enumerate(tars):
        keys: list[str] = []
        label_by_key: dict[str, Label] = {}
        for member, file in _members(storage, tar):
            folder, _, last = member.name.rpartition("/")
            stem, _, extension = last.partition(".")
            key, extension = f"{folder}/{stem}", extension.lower()
            if "." not in extension and has_image_extension(last) and _is_valid_unicode(member.name):
                names.append(f"{tar}!{member.name}")
                keys.append(key)
                extents.append((number, member.offset_data, member.size))
            elif extension == "cls":
                label_by_key[key] = parse_label(_read_text(file, member))
            elif extension == "json":
                label_by_key.setdefault(key, _json_label(_read_text(file, member)))
            elif stem:  # not hidden
                left_out.append(member.name)
        labels += [label_by_key.get(key) for key in keys]
    numbers, offsets, sizes = np.array(extents, np.int64).reshape(-1, 3).T
    reader = TarReader(storage, tuple(tars), numbers.astype(np.int32), offsets.copy(), sizes.copy())
    notes = _note_left_out(left_out, tars[0] if len(tars) == 1 else f"{len(tars)} tars")
    return DatasetIndex(names, reader, sizes, labels=labels_or_none(labels), notes=notes)


def _members(storage: Storage, location: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Yield the regular files of a tar, each with the tar opened at the beginning of its content."""
    with _tar_errors(location), storage.open(location) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if member.isreg():
                file.seek(member.offset_data)
                yield member, file
            tar.members.clear()  # type: ignore[attr-defined] # otherwise it keeps them all in memory


@contextmanager
def _tar_errors(location: str) -> Iterator[None]:
    """Convert errors of tarfile to ConvscopeError."""
    try:
        yield
    except (tarfile.TarError, OSError) as error:
        raise ConvscopeError(
            f"{location} cannot be read as a tar ({error}); expected a complete tar without compression"
        ) from error


def _read_text(file: IO[bytes], member: tarfile.TarInfo) -> str:
    return file.read(min(member.size, _MAX_LABEL_BYTES)).decode("utf-8", errors="replace")


def _json_label(text: str) -> Label:
    """Return the value of "label" in a JSON object; None for anything else, since the file may serve other purposes."""
    try:
        metadata = json.loads(text)
    except ValueError:
        return None
    return to_label(metadata.get("label")) if isinstance(metadata, dict) else None
