"""Let functions that take images take folders, globs, data sets and DataLoaders too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, SubsetRandomSampler

from convscope.datasets.catalogue import index_data
from convscope.datasets.index import DatasetIndex
from convscope.datasets.readers_files import FileReader
from convscope.datasets.readers_memory import IndexableDataset, image_of, is_hugging_face
from convscope.datasets.storage import Storage, is_glob
from convscope.errors import ConvscopeError
from convscope.images.lazy import LazyImages

PACKED = (".txt", ".tar", ".parquet")


def open_images(images: object) -> object:
    """Return images in a form that `ImageBatchLoader` takes; none is decoded yet.

    Parameters
    ----------
    images : object
        A folder (its images at any depth), a glob, a URL, a data set file or folder as of `convscope.scan`; a
        `torch.utils.data.Dataset`, a DataLoader or a data set of Hugging Face; an iterator over images. Anything else
        is returned as it is.

    Raises
    ------
    ConvscopeError
        For empty folders and data sets, globs that match nothing, and data sets without a length.
    """
    if isinstance(images, str | os.PathLike):
        location = os.fsdecode(images)
        return images if _is_one_file(location) else _from_index(index_data(location, storage := Storage()), storage)
    if isinstance(images, DataLoader):
        return _from_data_loader(images)
    if is_hugging_face(images):
        return _from_index(index_data(images, storage := Storage()), storage)
    if isinstance(images, IterableDataset):
        raise ConvscopeError(
            f"a {type(images).__name__} has no fixed order and length; pass a list of the images to look at"
        )
    if isinstance(images, Dataset) and isinstance(images, IndexableDataset):
        return _from_dataset(images, range(len(images)))
    return list(images) if isinstance(images, Iterator) else images


def _is_one_file(location: str) -> bool:
    """Return whether a location is that of one image, also if it does not exist."""
    if os.path.isfile(location):
        return not location.lower().endswith(PACKED)
    is_data = os.path.isdir(location) or is_glob(location) or "://" in location or location.startswith("torchvision:")
    return not is_data and "{" not in location


def _from_index(index: DatasetIndex, storage: Storage) -> LazyImages:
    """Return the images of an index; local files as their paths."""
    names = list(index.names)
    if isinstance(index.reader, FileReader) and all(storage.local_path(name) is not None for name in names):
        return LazyImages(names, names.__getitem__, tuple(index.notes))
    return LazyImages(names, lambda i: image_of(index.reader.read(i, names[i])), tuple(index.notes))


def _from_data_loader(loader: DataLoader[object]) -> LazyImages:
    """Return the images of a DataLoader's data set, in the order of its sampler unless that is random."""
    dataset, sampler = loader.dataset, loader.sampler
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, IndexableDataset):
        raise ConvscopeError("this DataLoader has no fixed order and length; pass a list of the images to look at")
    if isinstance(sampler, SequentialSampler | RandomSampler):
        indices: Sequence[int] = range(len(dataset))
    else:
        indices = sorted(sampler.indices) if isinstance(sampler, SubsetRandomSampler) else [int(i) for i in sampler]
    is_random = isinstance(sampler, RandomSampler | SubsetRandomSampler)
    notes = ("the DataLoader shuffles; its images are taken in the order of its data set",) if is_random else ()
    return _from_dataset(dataset, indices, notes)


def _from_dataset(dataset: IndexableDataset, indices: Sequence[int], notes: tuple[str, ...] = ()) -> LazyImages:
    if not len(indices):
        raise ConvscopeError(f"there are no images in this {type(dataset).__name__}")
    paths = _paths(dataset)
    names = [f"image {i}" if paths is None else paths[i] for i in indices]
    return LazyImages(names, partial(_read_item, dataset, indices), notes)


def _read_item(dataset: IndexableDataset, indices: Sequence[int], index: int) -> object:
    item = dataset[indices[index]]
    if isinstance(item, Mapping):
        key = next((key for key in ("image", "img", "pixel_values") if key in item), next(iter(item), None))
        return item.get(key)
    return image_of(item)


def _paths(dataset: object) -> list[str] | None:
    """Return the paths of the files of an image folder of torchvision, also through a Subset."""
    parent, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if parent is not None and indices is not None:
        paths = _paths(parent)
        return None if paths is None else [paths[i] for i in indices]
    samples = getattr(dataset, "samples", None)
    if not isinstance(samples, list) or not isinstance(dataset, IndexableDataset) or len(samples) != len(dataset):
        return None
    is_listing = all(isinstance(sample, tuple) and sample and isinstance(sample[0], str) for sample in samples)
    return [sample[0] for sample in samples] if is_listing else None
