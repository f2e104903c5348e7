"""Index and read images in memory, and data set objects of torchvision's and Hugging Face's kinds."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor

from convscope.datasets.index import DatasetIndex, Label, labels_or_none, to_label
from convscope.datasets.readers_arrow import byte_sizes, find_columns, read_class_names
from convscope.datasets.readers_files import index_locations
from convscope.datasets.storage import Storage
from convscope.errors import ConvscopeError
from convscope.suggestions import suggest

if TYPE_CHECKING:
    import datasets

_UNSAFE = ("LSUN", "LSUNClass")  # these unpickle a file that lies next to the data
_ITEM_KINDS = "an (image, label) pair or an image, which is a PIL image, an array or the bytes of a file"

InMemoryImage = str | bytes | Image.Image | np.ndarray  # a string is a location


@runtime_checkable
class IndexableDataset(Protocol):
    """A data set with a length and items, such as those of torchvision."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> object: ...


@dataclass(frozen=True, eq=False)
class InMemoryReader:
    """Reads images that are in memory; strings among them are locations of files."""

    storage: Storage
    items: Sequence[InMemoryImage] | np.ndarray
    in_memory = True

    def read(self, index: int, name: str) -> object:  # noqa: ARG002 - part of the protocol
        """Return the image, or the content of the file, with this index."""
        item = self.items[index]
        return self.storage.read(item) if isinstance(item, str) else item


def index_items(storage: Storage, images: Sequence[object] | np.ndarray) -> DatasetIndex:
    """Index locations, PIL images, arrays and encoded files in their order; raise ConvscopeError for anything else."""
    items = images if isinstance(images, np.ndarray) else [_check_item(i, item) for i, item in enumerate(images)]
    locations = [item for item in items if isinstance(item, str)]
    if len(locations) == len(items):
        return index_locations(storage, locations)
    digest = hashlib.sha256()
    for item in items:
        digest.update(_fingerprint(item))
    names = [item if isinstance(item, str) else f"image {i}" for i, item in enumerate(items)]
    return DatasetIndex(names, InMemoryReader(storage, items), fingerprint_extra=digest.hexdigest())


def _check_item(number: int, item: object) -> InMemoryImage:
    if isinstance(item, str):
        return item
    if isinstance(item, os.PathLike):
        return str(os.fspath(item))
    if not isinstance(item, bytes | Image.Image | np.ndarray):
        kind = type(item).__name__
        raise ConvscopeError(f"item {number} is a {kind}; expected addresses, PIL images, arrays or bytes of files")
    return item


def _fingerprint(item: InMemoryImage) -> bytes:
    """Return bytes that identify an image; for an opened file its name, because it need not be decoded yet."""
    if isinstance(item, ImageFile.ImageFile):
        return f"{item.mode} {item.size} {item.filename!r}".encode()
    if isinstance(item, Image.Image):
        return f"{item.mode} {item.size}".encode() + item.tobytes()
    if isinstance(item, np.ndarray):
        return f"{item.dtype} {item.shape}".encode() + item.tobytes()
    return item if isinstance(item, bytes) else item.encode()


@dataclass(frozen=True, eq=False)
class ItemReader:
    """Reads the images of an indexable data set."""

    dataset: IndexableDataset
    in_memory = False

    def read(self, index: int, name: str) -> object:  # noqa: ARG002 - part of the protocol
        """Return the image of an item."""
        return image_of(self.dataset[index])


def index_dataset(dataset: IndexableDataset) -> DatasetIndex:
    """Index a data set with `__len__` and `__getitem__`, such as those of torchvision.

    Labels are taken from its attribute `targets` or `labels`; without these every item is read once for its label.
    Raises ConvscopeError if the first item holds no image.
    """
    kind, count = type(dataset).__name__, len(dataset)
    if not count:
        raise ConvscopeError(f"{kind} is empty; expected images")
    first = dataset[0]
    image = image_of(first)
    if not isinstance(image, Image.Image | np.ndarray | bytes):
        advice = "; leave its transform out, because convscope preprocesses images" if isinstance(image, Tensor) else ""
        raise ConvscopeError(f"{kind} gives {_describe(first)}; expected {_ITEM_KINDS}{advice}")
    index = DatasetIndex([f"image {i}" for i in range(count)], ItemReader(dataset))
    index.fingerprint_extra = hashlib.sha256(_fingerprint(image)).hexdigest()
    if isinstance(first, tuple | list) and len(first) > 1:
        labels = _stored_labels(dataset)
        if labels is None:
            labels = list(_item_labels(dataset))
            index.notes.append(f"{kind} stores no list of labels: every item was read once for its label")
        index.labels = labels_or_none(labels)
        index.label_names = _class_names(dataset, labels) if index.labels is not None else None
    return index


def _describe(item: object) -> str:
    if isinstance(item, tuple | list) and len(item) > 1:
        return f"({', '.join(type(part).__name__ for part in item)})"
    return type(item[0] if isinstance(item, tuple | list) and item else item).__name__


def image_of(item: object) -> object:
    """Return the image of an item, which may be an (image, label) pair."""
    return item[0] if isinstance(item, tuple | list) and item else item


def _item_labels(dataset: IndexableDataset) -> Iterator[Label]:
    """Yield the label of every item; an item that cannot be read has none."""
    for index in range(len(dataset)):
        try:
            item = dataset[index]
        except Exception:  # noqa: BLE001 - user code; the error is reported when the image is scanned
            yield None
            continue
        yield to_label(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else None


def _stored_labels(dataset: object) -> list[Label] | None:
    """Return the labels that a data set stores as a list, also through `torch.utils.data.Subset`."""
    parent, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if parent is not None and indices is not None:
        labels = _stored_labels(parent)
        return None if labels is None else [labels[i] for i in indices]
    if getattr(dataset, "target_transform", None) is not None or not isinstance(dataset, IndexableDataset):
        return None
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(dataset, attribute, None)
        if isinstance(values, Tensor | np.ndarray) and values.ndim == 1 and len(values) == len(dataset):
            return [to_label(value) for value in values.tolist()]
        if isinstance(values, list | tuple) and len(values) == len(dataset):
            return [to_label(value) for value in values]
    return None


def _class_names(dataset: object, labels: Sequence[Label]) -> tuple[str, ...] | None:
    """Return the class names that a data set stores, if every label is an index into them."""
    names = getattr(dataset, "classes", None) or getattr(getattr(dataset, "dataset", None), "classes", None)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None
    valid = all(label is None or (isinstance(label, int) and label < len(names)) for label in labels)
    return tuple(names) if valid else None


def index_torchvision(address: str) -> DatasetIndex:
    """Index the torchvision data set that "torchvision:NAME:ROOT" names, without downloading anything.

    Raises ConvscopeError for unknown and unsafe names, and for missing data.
    """
    from torchvision import datasets

    _, name, root = [*address.split(":", 2), "", ""][:3]
    known = [word for word in datasets.__all__ if "root" in inspect.signature(getattr(datasets, word)).parameters]
    known = [word for word in known if word not in _UNSAFE]
    if name not in known or not root:
        raise ConvscopeError(
            f"{address!r}: expected torchvision:NAME:ROOT, with a folder and a NAME; {suggest(name, known)}"
        )
    kind = getattr(datasets, name)
    options = {"download": False} if "download" in inspect.signature(kind).parameters else {}
    try:
        dataset = kind(root, **options)
    except Exception as error:  # each class raises errors of its own
        raise ConvscopeError(f"{address!r} cannot be opened ({type(error).__name__}: {error})") from error
    return index_dataset(dataset)


@dataclass(frozen=True, eq=False)
class HuggingFaceReader:
    """Reads encoded images from the image column of a Hugging Face data set."""

    storage: Storage
    dataset: datasets.Dataset
    column: str
    in_memory = False

    def read(self, index: int, name: str) -> object:  # noqa: ARG002 - part of the protocol
        """Return the image in a row: its bytes, those of the file that it names, or the value itself."""
        value = self.dataset[index][self.column]
        if not isinstance(value, dict):
            return value
        if value.get("bytes") is None and not value.get("path"):
            raise ConvscopeError("holds no bytes and no path")
        return self.storage.read(value["path"]) if value.get("bytes") is None else value["bytes"]


def is_hugging_face(data: object) -> TypeGuard[datasets.Dataset]:
    """Whether an object is a data set of the `datasets` package, without importing the package."""
    return type(data).__module__ in ("datasets.arrow_dataset", "datasets.dataset_dict", "datasets.iterable_dataset")


def index_hugging_face(storage: Storage, dataset: datasets.Dataset) -> DatasetIndex:
    """Index a `datasets.Dataset`; raise ConvscopeError for split dictionaries, streams and data without images."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        raise ConvscopeError(
            f"the data set has the splits {', '.join(dataset)}; give one of them: data[{next(iter(dataset))!r}]"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise ConvscopeError(f"a {type(dataset).__name__} has no fixed order and length; expected a datasets.Dataset")
    schema = dataset.features.arrow_schema
    columns = find_columns(schema, "the data set")
    raw = dataset.with_format(None)
    images = raw.select_columns([columns.image])
    if isinstance(dataset.features[columns.image], datasets.Image):
        images = images.cast_column(columns.image, datasets.Image(decode=False))
    tables = images.with_format("arrow").iter(1000)
    index = DatasetIndex(
        [f"image {i}" for i in range(len(dataset))],
        HuggingFaceReader(storage, images, columns.image),
        sizes=[size for table in tables for size in byte_sizes(table.column(0))],
    )
    if columns.label is not None:
        index.labels = [to_label(value) for value in raw[columns.label]]
        index.label_names = read_class_names(schema, columns.label)
    return index
