"""What the user gave as data, as a catalogue: pictures in a fixed order, their labels, and how each is read."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from convscope.datasets import readers_arrow, readers_files, readers_memory
from convscope.datasets.readers_files import DatasetIndex, ImageReader, Label
from convscope.datasets.storage import Storage, expanded, is_glob
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_extra
from convscope.images.loading import one_line

if TYPE_CHECKING:
    import pyarrow

_ACCEPTED = (
    "a folder, a glob, a list of addresses in a .txt file, .tar files, .parquet files, torchvision:NAME:ROOT, a folder "
    "that Hugging Face's save_to_disk made, a list of addresses or pictures, an array (N, H, W, 3), or a data set"
)
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_CHUNK = 1 << 14  # names that are hashed at a time


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Pictures in a fixed order; a picture's id is its position. Made by `catalogue`; goes to worker processes.

    name: as the user gave it, for people. fingerprint: SHA-256 over names, sizes in bytes and labels; over the pixels
    of what is in memory. names: pyarrow strings, a unique address of each picture. labels: int32 (N,), the index of
    each picture's name in `label_names`, -1 where it is not known; None where no picture has one. notes: what else
    there is to say, such as files left out.
    """

    name: str
    fingerprint: str
    names: pyarrow.Array = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    origin: ImageReader = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Any:
        """A picture as it is kept: the bytes of its file, a PIL image or an array.

        Raises ConvscopeError, with the reason alone, if it cannot be read; whatever a data set in hand raises is one.
        """
        if not 0 <= index < len(self):
            raise ConvscopeError(f"picture {index} is out of range: there are {len(self):,}, from 0 on")
        try:
            return self.origin.read(index, self.names[index].as_py())
        except ConvscopeError:
            raise
        except Exception as error:
            raise ConvscopeError(one_line(f"cannot be read ({type(error).__name__}: {error})")) from error


def catalogue(data: Any, *, storage: Mapping[str, Any] | None = None) -> Catalogue:
    """The pictures of a data set, in an order that does not depend on the file system; none of them is decoded.

    Parameters
    ----------
    data
        A folder: its pictures at any depth, sorted by name; folders of the first level are classes. A glob. A .txt
        file: an address a line, a tab and a label may follow. WebDataset tars, uncompressed: KEY.jpg with KEY.cls or
        KEY.json. Parquet with a column of bytes or of struct<bytes, path>, and a column label, labels or cls. A folder
        of Hugging Face's save_to_disk. Several tars or Parquet files by a list, a glob or a range such as
        part-{000..003}.tar. All these are local, or addresses that fsspec knows. "torchvision:CIFAR10:ROOT", with the
        data at ROOT. In hand: a list of addresses, PIL images and arrays, an array (N, H, W, 3), a `datasets.Dataset`,
        or anything with a length whose items are (picture, label), as torchvision's data sets are.
    storage
        fsspec's options for the addresses: keys, endpoints.

    Raises ConvscopeError for what is not known, not there, damaged or empty, and for two pictures of one name.
    """
    place = Storage(dict(storage or {}))
    data = os.fspath(data) if isinstance(data, os.PathLike) else data
    return _finished(_called(data), _listing(data, place))


def _called(data: Any) -> str:
    if isinstance(data, str):
        return data
    if isinstance(data, list | tuple):
        return str(data[0]) if len(data) == 1 and isinstance(data[0], str | os.PathLike) else f"{len(data):,} pictures"
    return "pictures in hand" if isinstance(data, np.ndarray | Image.Image) else type(data).__name__


def _listing(data: Any, place: Storage) -> DatasetIndex:
    if isinstance(data, str):
        return readers_memory.of_torchvision(data) if data.startswith("torchvision:") else _at(data, place)
    if isinstance(data, list | tuple):
        given = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in data]
        every = all(isinstance(item, str) for item in given)
        return (every and _packed(given, place)) or readers_memory.of_items(place, given)
    if isinstance(data, Image.Image):
        return readers_memory.of_items(place, [data])
    if isinstance(data, np.ndarray):
        one = data.ndim == 2 or (data.ndim == 3 and data.shape[2] in (1, 3, 4))
        if not one and data.ndim not in (3, 4):
            raise ConvscopeError(
                f"an array of shape {data.shape}; expected (N, H, W, 3), or (N, H, W) of gray pictures"
            )
        return readers_memory.of_items(place, data[None] if one else data)
    if readers_memory.is_hugging_face(data):
        return readers_memory.of_hugging_face(place, data)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, Mapping):
        return readers_memory.of_dataset(data)
    raise ConvscopeError(f"a {type(data).__name__} is no data set that is known; expected {_ACCEPTED}")


def _at(address: str, place: Storage) -> DatasetIndex:
    """What lies at an address, or at the several ones that it stands for."""
    kind = place.kind(address)
    if kind == "folder":
        folder = address if address.endswith("://") else address.rstrip("/") or "/"
        readers_arrow.require_one_split(place, folder)
        if place.kind(f"{folder}/state.json") == "file" and place.kind(f"{folder}/dataset_info.json") == "file":
            return readers_arrow.of_arrow(place, folder)
        return readers_files.of_folder(place, folder)
    if kind == "file":
        if address.endswith(".txt"):
            return readers_files.of_text(place, address)
        listing = _packed([address], place)
        if listing is None and not readers_files.is_image(address):
            raise ConvscopeError(f"{address} is no data set that is known; expected {_ACCEPTED}")
        return listing or readers_files.of_addresses(place, [address])
    found = [match for part in expanded(address) for match in _matches(part, place)]
    if not found:
        what = "names no file" if is_glob(address) else "is not there"
        raise ConvscopeError(f"{address} {what}; expected {_ACCEPTED}")
    return _packed([name for name, _ in found], place) or readers_files.of_matches(place, found, address)


def _matches(pattern: str, place: Storage) -> list[tuple[str, int]]:
    if is_glob(pattern):
        return sorted(place.matches(pattern), key=lambda match: match[0].split("/"))
    if place.kind(pattern) != "file":
        raise ConvscopeError(f"{pattern} is not there; expected {_ACCEPTED}")
    return [(pattern, place.size(pattern))]


def _packed(addresses: Sequence[str], place: Storage) -> DatasetIndex | None:
    """The pictures in files that hold many: tars or Parquet. None if the addresses are of neither."""
    if any(address.endswith(_PACKED) for address in addresses):
        raise ConvscopeError(f"{addresses[0]} is compressed as a whole, so no picture can be read alone; unpack it")
    for ending, listed in ((".tar", readers_files.of_tars), (".parquet", readers_arrow.of_parquet)):
        if addresses and all(address.endswith(ending) for address in addresses):
            return listed(place, addresses)
    return None


def _finished(name: str, listing: DatasetIndex) -> Catalogue:
    """The catalogue of a listing."""
    arrow = require_extra("pyarrow")
    if not len(listing.names):
        raise ConvscopeError(f"there are no pictures in {name}; expected {_ACCEPTED}")
    names = arrow.array(listing.names, arrow.string())
    if len(names.unique()) < len(names):
        twice, count = Counter(listing.names).most_common(1)[0]
        raise ConvscopeError(f"{name} names {twice} {count} times; each picture is scanned once: leave it out")
    labels, label_names = None, None
    if listing.labels is not None:
        labels, label_names = _indexed(listing.labels, listing.label_names)
    digest = hashlib.sha256(listing.content.encode())
    for begin in range(0, len(listing.names), _CHUNK):
        digest.update("\0".join([*listing.names[begin : begin + _CHUNK], ""]).encode())
    digest.update(np.asarray(listing.sizes, "<i8").tobytes())
    digest.update("\0".join(label_names or ()).encode() + (b"" if labels is None else labels.astype("<i4").tobytes()))
    return Catalogue(name, digest.hexdigest(), names, labels, label_names, tuple(listing.notes), listing.origin)


def _indexed(values: Sequence[Label], names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) int32 as indices into names, -1 where unknown.

    Without names to count, those that occur become the classes: numbers in their order, else names in theirs.
    """
    if names is not None:
        fits = [value if isinstance(value, int) and 0 <= value < len(names) else -1 for value in values]
        return np.array(fits, np.int32), names
    given = {value for value in values if isinstance(value, str) or (isinstance(value, int) and value >= 0)}
    whole = all(isinstance(value, int) for value in given)
    order: list[Any] = sorted(given) if whole else sorted(given, key=str)
    index: dict[Label, int] = {value: i for i, value in enumerate(order)}
    return np.array([index.get(value, -1) for value in values], np.int32), tuple(map(str, order))


def class_indices(catalogue: Catalogue, model: Model) -> np.ndarray | None:
    """The network's class of each of the data set's labels, int32 (number of label names,), -1: it has none.

    By the first of these that fits any label: the names of classes (case and underscores do not matter, and of several
    synonyms the first counts); ImageNet's WordNet ids, for a network with ImageNet's classes; whole numbers, if the
    highest is the network's last class. None if nothing fits, or if there are no labels.
    """
    names = catalogue.label_names
    if names is None:
        return None
    ways = (_by_name(names, model.classes), _by_wordnet(names, model.num_outputs), _by_number(names, model.num_outputs))
    return next((np.array(found, np.int32) for found in ways if any(index >= 0 for index in found)), None)


def _by_name(names: Sequence[str], classes: Sequence[str] | None) -> list[int]:
    """By the whole name, or else by the first of several synonyms; a name that several classes bear tells nothing."""
    whole, first = (_places(map(plain, classes or ())) for plain in (_plain, _first))
    return [whole.get(_plain(name), first.get(_first(name), -1)) for name in names]


def _places(names: Iterable[str]) -> dict[str, int]:
    """Where each name stands, those that stand several times left out."""
    every = list(names)
    counts = Counter(every)
    return {name: i for i, name in enumerate(every) if counts[name] == 1}


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def _first(name: str) -> str:
    return _plain(name.partition(",")[0])


def _by_wordnet(names: Sequence[str], outputs: int | None) -> list[int]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": outputs})
    known = {} if subset is None else {wnid: i for i, wnid in enumerate(ImageNetInfo(subset).label_names())}
    return [known.get(name, -1) for name in names]


def _by_number(names: Sequence[str], outputs: int | None) -> list[int]:
    numbers = [int(name) if name.isdecimal() else -1 for name in names]
    return numbers if min(numbers) >= 0 and max(numbers) + 1 == outputs else []
