"""Pictures in hand: lists, arrays, data sets of torchvision's kind and of Hugging Face's."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor

from convscope.datasets.readers_arrow import byte_sizes, class_names, image_column, label_column
from convscope.datasets.readers_files import DatasetIndex, Label, as_label, of_addresses
from convscope.datasets.storage import Storage
from convscope.errors import ConvscopeError, nearest

_UNSAFE = ("LSUN", "LSUNClass")  # unpickle a file that lies beside the data
_KINDS = "a (picture, label) pair or a picture, which is a PIL image, an array or the bytes of a file"


@dataclass(frozen=True, eq=False)
class InMemoryReader:
    """Pictures in memory; of a path only the file is not."""

    storage: Storage
    items: Sequence[Any] | np.ndarray
    held = True

    def read(self, index: int, name: str) -> Any:
        item = self.items[index]
        return self.storage.read(item) if isinstance(item, str) else item


def of_items(storage: Storage, given: Sequence[Any] | np.ndarray) -> DatasetIndex:
    """Addresses, images and arrays in hand, in their order. Raises ConvscopeError for anything else among them."""
    items = given if isinstance(given, np.ndarray) else [_item(i, item) for i, item in enumerate(given)]
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return of_addresses(storage, items)
    digest = hashlib.sha256()
    for item in items:
        digest.update(_content(item))
    names = [item if isinstance(item, str) else f"image {i}" for i, item in enumerate(items)]
    return DatasetIndex(names, InMemoryReader(storage, items), content=digest.hexdigest())


def _item(number: int, item: Any) -> Any:
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    if not isinstance(item, bytes | Image.Image | np.ndarray):
        kind = type(item).__name__
        raise ConvscopeError(f"item {number} is a {kind}; expected addresses, PIL images, arrays or bytes of files")
    return item


def _content(item: Any) -> bytes:
    """What tells a picture in hand from another; of an opened file that is its name, for it need not be decoded yet."""
    if isinstance(item, ImageFile.ImageFile):
        return f"{item.mode} {item.size} {item.filename!r}".encode()
    if isinstance(item, Image.Image):
        return f"{item.mode} {item.size}".encode() + item.tobytes()
    if isinstance(item, np.ndarray):
        return f"{item.dtype} {item.shape}".encode() + item.tobytes()
    return item if isinstance(item, bytes) else item.encode()


@dataclass(frozen=True, eq=False)
class Indexed:
    """A data set that gives its pictures one by one."""

    dataset: Any
    held = False

    def read(self, index: int, name: str) -> Any:
        return _image_of(self.dataset[index])


def of_dataset(dataset: Any) -> DatasetIndex:
    """A data set with `__len__` and `__getitem__`, as torchvision's are.

    Its labels are what it keeps as `targets` or `labels`; where it keeps none, it is gone through once to ask for them.
    Raises ConvscopeError if its first item holds no picture.
    """
    count = len(dataset)
    if not count:
        raise ConvscopeError(f"{type(dataset).__name__} is empty; expected pictures")
    first = dataset[0]
    image = _image_of(first)
    if not isinstance(image, Image.Image | np.ndarray | bytes):
        advice = "; leave its transform out: convscope prepares pictures itself" if isinstance(image, Tensor) else ""
        raise ConvscopeError(f"{type(dataset).__name__} gives {_told(first)}; expected {_KINDS}{advice}")
    paired = isinstance(first, tuple | list) and len(first) > 1
    listing = DatasetIndex([f"image {i}" for i in range(count)], Indexed(dataset))
    listing.content = hashlib.sha256(_content(image)).hexdigest()
    kept = _kept_labels(dataset) if paired else None
    if kept is None and paired:
        kept = list(_asked(dataset))
        listing.notes.append(f"{type(dataset).__name__} keeps no list of its labels: they were asked of every picture")
    if kept is not None and any(label is not None for label in kept):
        listing.labels, listing.label_names = kept, _kept_names(dataset, kept)
    return listing


def _told(item: Any) -> str:
    kinds = [type(part).__name__ for part in item] if isinstance(item, tuple | list) else [type(item).__name__]
    return f"({', '.join(kinds)})" if len(kinds) > 1 else "".join(kinds)


def _image_of(item: Any) -> Any:
    return item[0] if isinstance(item, tuple | list) and item else item


def _asked(dataset: Any) -> Iterator[Label]:
    """The label of every item; a picture that cannot be read has none."""
    for index in range(len(dataset)):
        try:
            item = dataset[index]
        except Exception:  # whatever ails it is said when it is its turn to be shown
            yield None
            continue
        yield as_label(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else None


def _kept_labels(dataset: Any) -> list[Label] | None:
    """The labels that a data set keeps beside its pictures, seen through `torch.utils.data.Subset`."""
    inner, chosen = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and chosen is not None:
        whole = _kept_labels(inner)
        return None if whole is None else [whole[i] for i in chosen]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for word in ("targets", "labels", "_labels"):
        values = getattr(dataset, word, None)
        if isinstance(values, Tensor | np.ndarray) and values.ndim == 1 and len(values) == len(dataset):
            return [as_label(value) for value in values.tolist()]
        if isinstance(values, list | tuple) and len(values) == len(dataset):
            return [as_label(value) for value in values]
    return None


def _kept_names(dataset: Any, labels: Sequence[Label]) -> tuple[str, ...] | None:
    """The names of the classes that labels count, if the data set keeps them and every label has one."""
    names = getattr(dataset, "classes", None) or getattr(getattr(dataset, "dataset", None), "classes", None)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None
    fits = all(label is None or (isinstance(label, int) and label < len(names)) for label in labels)
    return tuple(names) if fits else None


def of_torchvision(address: str) -> DatasetIndex:
    """The data set that "torchvision:NAME:ROOT" names, of torchvision's class of that name; nothing is downloaded.

    Raises ConvscopeError for names that are not known or not safe to open, and for data that are not there.
    """
    from torchvision import datasets

    _, name, root = [*address.split(":", 2), "", ""][:3]
    known = [word for word in datasets.__all__ if "root" in inspect.signature(getattr(datasets, word)).parameters]
    known = [word for word in known if word not in _UNSAFE]
    if name not in known or not root:
        near = nearest(name, known)
        raise ConvscopeError(f"{address!r}: expected torchvision:NAME:ROOT, with a NAME such as {near}, and a folder")
    kind = getattr(datasets, name)
    never = {"download": False} if "download" in inspect.signature(kind).parameters else {}
    try:
        dataset = kind(root, **never)
    except Exception as error:  # each of them complains in its own way
        raise ConvscopeError(f"{address!r} cannot be opened ({type(error).__name__}: {error})") from error
    return of_dataset(dataset)


@dataclass(frozen=True, eq=False)
class HuggingFace:
    """A data set of Hugging Face's in hand, reduced to its column of pictures, which are not decoded."""

    storage: Storage
    dataset: Any
    column: str
    held = False

    def read(self, index: int, name: str) -> Any:
        value = self.dataset[index][self.column]
        if not isinstance(value, dict):
            return value
        if value.get("bytes") is None and not value.get("path"):
            raise ConvscopeError("holds no bytes and no path")
        return self.storage.read(value["path"]) if value.get("bytes") is None else value["bytes"]


def is_hugging_face(data: Any) -> bool:
    """Whether it is an object of the `datasets` package, which is not imported to find out."""
    return type(data).__module__ in ("datasets.arrow_dataset", "datasets.dataset_dict", "datasets.iterable_dataset")


def of_hugging_face(storage: Storage, dataset: Any) -> DatasetIndex:
    """A `datasets.Dataset` in hand. Raises ConvscopeError for several splits, streams, and columns without pictures."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        raise ConvscopeError(
            f"the data set has the splits {', '.join(dataset)}; give one of them: data[{next(iter(dataset))!r}]"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise ConvscopeError(f"a {type(dataset).__name__} has no fixed order and length; expected a datasets.Dataset")
    schema = dataset.features.arrow_schema
    column, label = image_column(schema, "the data set"), label_column(schema)
    plain = dataset.with_format(None)
    images = plain.select_columns([column])
    if isinstance(dataset.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    listing = DatasetIndex([f"image {i}" for i in range(len(dataset))], HuggingFace(storage, images, column))
    listing.sizes = [size for table in images.with_format("arrow").iter(1000) for size in byte_sizes(table.column(0))]
    if label is not None:
        listing.labels, listing.label_names = [as_label(v) for v in plain[label]], class_names(schema, label)
    return listing
