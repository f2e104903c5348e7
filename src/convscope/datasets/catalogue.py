"""Turn any kind of data set into a catalogue: images in a fixed order, their labels, and a reader."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.datasets import readers_arrow, readers_files, readers_memory
from convscope.datasets.index import DatasetIndex, ImageReader, Label
from convscope.datasets.storage import Storage, absolute_location, expand_ranges, is_glob
from convscope.errors import ConvscopeError, require_extra
from convscope.images.failures import one_line

if TYPE_CHECKING:
    import pyarrow

_ACCEPTED = (
    "a folder, a glob, a .txt or .csv file of addresses, .tar files, .parquet files, torchvision:NAME:ROOT, a folder "
    "written by Hugging Face's save_to_disk, a list of addresses or images, an array (N, H, W, 3), or a data set object"
)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_WORDNET_ID = re.compile(r"n\d{8}")
_NAMES_PER_HASH = 1 << 14  # names that are hashed at a time


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Images in a fixed order; the id of an image is its position. Picklable.

    Attributes
    ----------
    name : str
        The data set for display; local paths are absolute.
    fingerprint : str
        SHA-256 of names, file sizes and labels; for images in memory also of their pixels.
    names : pyarrow.Array of str
        A unique name for each of the N images.
    labels : int32 array of shape (N,), or None
        For each image an index into `label_names`, -1 if unknown; None if no image has a label.
    label_names : tuple of str or None
        The classes of the data set.
    notes : tuple of str
        Remarks for the user, such as files left out.
    reader : ImageReader
        Reads the images.
    """

    name: str
    fingerprint: str
    names: pyarrow.Array = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    reader: ImageReader = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> object:
        """Return an image as it is stored: the bytes of a file, a PIL image or an array.

        Raises ConvscopeError with the reason if it cannot be read, whatever the reader raises.
        """
        if not 0 <= index < len(self):
            raise ConvscopeError(f"image {index} is out of range: there are {len(self):,}, from 0 on")
        try:
            return self.reader.read(index, self.names[index].as_py())
        except ConvscopeError:
            raise
        except Exception as error:
            raise ConvscopeError(one_line(f"cannot be read ({type(error).__name__}: {error})")) from error


def build_catalogue(data: object, *, storage: Mapping[str, object] | None = None) -> Catalogue:
    """List the images of a data set in an order that does not depend on the file system, without decoding them.

    Parameters
    ----------
    data : str, path, sequence, array, image or data set object
        One of these:

        - a folder: its images at any depth, sorted by name; its direct subfolders are the classes;
        - a glob;
        - a .txt file: one location per line, optionally followed by a tab and a label;
        - a .csv file with the columns image and, optionally, label;
        - WebDataset tars, uncompressed: KEY.jpg with KEY.cls or KEY.json;
        - Parquet with a column of bytes or of struct<bytes, path>, and a column label, labels or cls;
        - a folder of Hugging Face's `save_to_disk`;
        - several tars or Parquet files, as a list, a glob or a range such as ``part-{000..003}.tar``;
        - "torchvision:CIFAR10:ROOT", with the data at ROOT;
        - a list of locations, PIL images, arrays and encoded files, or an array (N, H, W, 3);
        - a `datasets.Dataset`, or an object with a length whose items are (image, label), as in torchvision.

        A location is a local path or an fsspec URL. Images are named by their locations, with absolute paths.
    storage : mapping, optional
        Options for fsspec, such as keys and endpoints.

    Raises
    ------
    ConvscopeError
        For unknown, missing, damaged and empty data, and if two images have the same name.
    """
    backend = Storage(dict(storage or {}))
    data = _absolute(data)
    return _catalogue_of(_display_name(data), index_data(data, backend))


def _absolute(data: object) -> object:
    """Return data with absolute local paths, so that every way to write a path names the same data set and images."""
    if isinstance(data, list | tuple):
        return [_absolute(item) for item in data]
    if isinstance(data, os.PathLike):
        data = os.fspath(data)
    if not isinstance(data, str):
        return data
    if data.startswith("torchvision:"):
        kind, _, root = data.rpartition(":")
        return f"{kind}:{os.path.abspath(root)}" if root and kind != "torchvision" else data
    return absolute_location(data)


def _display_name(data: object) -> str:
    if isinstance(data, str):
        return data
    if isinstance(data, list | tuple):
        return str(data[0]) if len(data) == 1 and isinstance(data[0], str | os.PathLike) else f"{len(data):,} images"
    return "images in memory" if isinstance(data, np.ndarray | Image.Image) else type(data).__name__


def index_data(data: object, storage: Storage) -> DatasetIndex:
    """List the images of a data set, of a kind that `build_catalogue` takes; raise ConvscopeError for others."""
    if isinstance(data, str):
        is_torchvision = data.startswith("torchvision:")
        return readers_memory.index_torchvision(data) if is_torchvision else _index_location(data, storage)
    if isinstance(data, list | tuple):
        items = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in data]
        locations = [item for item in items if isinstance(item, str)]
        packed = _index_packed(locations, storage) if len(locations) == len(items) else None
        return packed or readers_memory.index_items(storage, items)
    if isinstance(data, Image.Image):
        return readers_memory.index_items(storage, [data])
    if isinstance(data, np.ndarray):
        is_single = data.ndim == 2 or (data.ndim == 3 and data.shape[2] in (1, 3, 4))
        if not is_single and data.ndim not in (3, 4):
            raise ConvscopeError(f"an array of shape {data.shape}; expected (N, H, W, 3), or (N, H, W) for gray images")
        return readers_memory.index_items(storage, data[None] if is_single else data)
    if readers_memory.is_hugging_face(data):
        return readers_memory.index_hugging_face(storage, data)
    if isinstance(data, readers_memory.IndexableDataset) and not isinstance(data, Mapping):
        return readers_memory.index_dataset(data)
    raise ConvscopeError(f"a {type(data).__name__} is not a known kind of data set; expected {_ACCEPTED}")


def _index_location(location: str, storage: Storage) -> DatasetIndex:
    """Index the data at a location, or at several ones that it expands to."""
    kind = storage.kind(location)
    if kind == "folder":
        folder = location if location.endswith("://") else location.rstrip("/") or "/"
        readers_arrow.require_one_split(storage, folder)
        if all(storage.kind(f"{folder}/{name}") == "file" for name in ("state.json", "dataset_info.json")):
            return readers_arrow.index_saved_dataset(storage, folder)
        return readers_files.index_folder(storage, folder)
    if kind == "file":
        if location.endswith(".txt"):
            return readers_files.index_text_list(storage, location)
        if location.endswith(".csv"):
            return readers_files.index_csv(storage, location)
        index = _index_packed([location], storage)
        if index is None and not readers_files.has_image_extension(location):
            raise ConvscopeError(f"{location} is not a known kind of data set; expected {_ACCEPTED}")
        return index or readers_files.index_locations(storage, [location])
    matches = [match for part in expand_ranges(location) for match in _matches(part, storage)]
    if not matches:
        problem = "matches no file" if is_glob(location) else "does not exist"
        raise ConvscopeError(f"{location} {problem}; expected {_ACCEPTED}")
    names = [name for name, _ in matches]
    return _index_packed(names, storage) or readers_files.index_matches(storage, matches, location)


def _matches(pattern: str, storage: Storage) -> list[tuple[str, int]]:
    if is_glob(pattern):
        return sorted(storage.glob(pattern), key=lambda match: match[0].split("/"))
    if storage.kind(pattern) != "file":
        raise ConvscopeError(f"{pattern} does not exist; expected {_ACCEPTED}")
    return [(pattern, storage.size(pattern))]


def _index_packed(locations: Sequence[str], storage: Storage) -> DatasetIndex | None:
    """Index tars or Parquet files; return None if the locations are neither."""
    if any(location.endswith(_COMPRESSED) for location in locations):
        raise ConvscopeError(f"{locations[0]} is compressed, so that single images cannot be read; unpack it first")
    for extension, index in ((".tar", readers_files.index_tars), (".parquet", readers_arrow.index_parquet)):
        if locations and all(location.endswith(extension) for location in locations):
            return index(storage, locations)
    return None


def _catalogue_of(name: str, index: DatasetIndex) -> Catalogue:
    arrow = require_extra("pyarrow")
    if not len(index.names):
        raise ConvscopeError(f"there are no images in {name}; expected {_ACCEPTED}")
    names = arrow.array(index.names, arrow.string())
    if len(names.unique()) < len(names):
        duplicate, count = Counter(index.names).most_common(1)[0]
        raise ConvscopeError(f"{name} names {duplicate} {count} times; expected each image once")
    labels, label_names = None, None
    if index.labels is not None:
        labels, label_names = _encode_labels(index.labels, index.label_names)
    return Catalogue(
        name, _fingerprint(index, labels, label_names), names, labels, label_names, tuple(index.notes), index.reader
    )


def _fingerprint(index: DatasetIndex, labels: np.ndarray | None, label_names: tuple[str, ...] | None) -> str:
    digest = hashlib.sha256(index.fingerprint_extra.encode())
    for start in range(0, len(index.names), _NAMES_PER_HASH):
        digest.update("\0".join([*index.names[start : start + _NAMES_PER_HASH], ""]).encode())
    digest.update(np.asarray(index.sizes, "<i8").tobytes())
    digest.update("\0".join(label_names or ()).encode() + (b"" if labels is None else labels.astype("<i4").tobytes()))
    return digest.hexdigest()


def _encode_labels(labels: Sequence[Label], names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels (N,) int32 as indices into class names, -1 for unknown ones, and the names.

    Without names the labels that occur become the classes, in numerical order if all are integers.
    """
    if names is not None:
        valid = [value if isinstance(value, int) and 0 <= value < len(names) else -1 for value in labels]
        return np.array(valid, np.int32), names
    values = {value for value in labels if isinstance(value, str) or (isinstance(value, int) and value >= 0)}
    integers = [value for value in values if isinstance(value, int)]
    order: list[int] | list[str | int] = sorted(integers) if len(integers) == len(values) else sorted(values, key=str)
    index: dict[Label, int] = {value: i for i, value in enumerate(order)}
    return np.array([index.get(value, -1) for value in labels], np.int32), tuple(map(str, order))


def match_classes(
    label_names: Sequence[str] | None, classes: Sequence[str] | None, num_outputs: int | None
) -> np.ndarray | None:
    """Match the classes of a data set to those of a network.

    The first of these rules that matches any class is applied to all: names, ignoring case and underscores, where the
    first of several synonyms suffices; WordNet ids, for networks with the classes of ImageNet; integers, if the highest
    is the network's last class.

    Parameters
    ----------
    label_names : sequence of str or None
        The L classes of the data set.
    classes : sequence of str or None
        Class names of the network.
    num_outputs : int or None
        Number of the network's outputs.

    Returns
    -------
    int32 array of shape (L,), or None
        For each class of the data set the network's class, -1 if there is none; None if nothing matches.
    """
    if label_names is None:
        return None
    rules = (
        _match_names(label_names, classes),
        _match_wordnet(label_names, num_outputs),
        _match_integers(label_names, num_outputs),
    )
    return next((np.array(matches, np.int32) for matches in rules if any(index >= 0 for index in matches)), None)


def _match_names(names: Sequence[str], classes: Sequence[str] | None) -> list[int]:
    """Match whole names, or else the first synonyms; names that several classes share match none."""
    whole, first = (_unique_positions(map(normalize, classes or ())) for normalize in (_normalize, _first_synonym))
    return [whole.get(_normalize(name), first.get(_first_synonym(name), -1)) for name in names]


def _unique_positions(names: Iterable[str]) -> dict[str, int]:
    """Return the position of each name that occurs once."""
    every = list(names)
    counts = Counter(every)
    return {name: i for i, name in enumerate(every) if counts[name] == 1}


def _normalize(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def _first_synonym(name: str) -> str:
    return _normalize(name.partition(",")[0])


def _match_wordnet(names: Sequence[str], num_outputs: int | None) -> list[int]:
    if not any(map(_WORDNET_ID.fullmatch, names)):
        return [-1] * len(names)  # without the import of timm, which takes seconds
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_outputs})
    index = {} if subset is None else {wnid: i for i, wnid in enumerate(ImageNetInfo(subset).label_names())}
    return [index.get(name, -1) for name in names]


def _match_integers(names: Sequence[str], num_outputs: int | None) -> list[int]:
    numbers = [int(name) if name.isdecimal() else -1 for name in names]
    return numbers if min(numbers) >= 0 and max(numbers) + 1 == num_outputs else []
