"""Folders, globs, data sets and DataLoaders go wherever images go."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import convscope
from convscope.datasets.image_inputs import open_images
from convscope.images.lazy import LazyImages
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return convscope.load(net, preprocessing={"size": 32})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos) -> Path:
    """Two classes of two photographs each, and a file that is no image."""
    root = tmp_path_factory.mktemp("photographs")
    for i, photo in enumerate(photos):
        (root / "ab"[i // 2]).mkdir(exist_ok=True)
        shutil.copy(photo, root / "ab"[i // 2] / f"{i}{Path(photo).suffix}")
    (root / "readme.md").write_text("text")
    return root


@pytest.fixture(scope="module")
def logits(model, photos) -> np.ndarray:
    """The logits of the four photographs, given as a list of paths."""
    return convscope.predict(model, photos).logits


def test_folder_and_glob(model, folder, logits):
    files = sorted(str(path) for path in folder.glob("*/*"))
    for images in (folder, str(folder), f"{folder}/*/*", folder.glob("*/*")):
        predictions = convscope.predict(model, images)
        order = [files.index(name) for name in predictions.image_names]
        assert sorted(order) == [0, 1, 2, 3]
        assert np.array_equal(predictions.logits, logits[order])
    heatmaps = convscope.heatmaps(model, folder, scale=(1, 2))
    assert heatmaps.image_names == tuple(files)
    assert len(heatmaps.overlay()) == 4
    assert any("readme.md" in note or "left out" in note for note in heatmaps.notes)
    assert convscope.evaluate(model, folder, heatmaps, steps=2)["deletion"].shape == (4, 1)


def test_one_path_is_one_image(model, photos, tmp_path):
    assert open_images(photos[0]) == photos[0]
    odd = tmp_path / "photo[1].jpg"
    shutil.copy(photos[0], odd)
    assert open_images(odd) == odd
    with pytest.raises(convscope.ConvscopeError, match=r"none\.jpg: No such file"):
        convscope.predict(model, "none.jpg")
    with pytest.raises(convscope.ConvscopeError, match=r"\*\.jpg matches no file"):
        convscope.predict(model, "nowhere/*.jpg")
    odd.unlink()
    with pytest.raises(convscope.ConvscopeError, match="there are no images in"):
        convscope.predict(model, tmp_path)


def test_torchvision_data_set(model, folder, logits):
    predictions = convscope.predict(model, ImageFolder(folder))
    assert np.array_equal(predictions.logits, logits)
    assert predictions.image_names[0].startswith(f"{folder}/a/0.")
    subset = convscope.predict(model, Subset(ImageFolder(folder), [2, 0]))
    assert np.array_equal(subset.logits, logits[[2, 0]])
    assert subset.image_names[0].startswith(f"{folder}/b/2")


def test_hugging_face_data_set(model, folder, photos, logits):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": photos, "label": [0, 1, 0, 1]}, features=features)
    assert np.array_equal(convscope.predict(model, data).logits, logits)
    assert np.array_equal(convscope.predict(model, data.select([3, 1])).logits, logits[[3, 1]])
    with pytest.raises(convscope.ConvscopeError, match="splits train"):
        convscope.predict(model, datasets.DatasetDict({"train": data}))


@pytest.fixture(scope="module")
def tensors(model, photos) -> torch.Tensor:
    """The network's input for the four photographs."""
    return next(ImageBatchLoader(photos, model.preprocessing).batches(4)).x


class TensorData(Dataset):
    """Preprocessed images with labels; counts how many are read."""

    def __init__(self, tensors: torch.Tensor) -> None:
        self.tensors, self.reads = tensors, []

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads.append(index)
        return self.tensors[index], index


def test_list_of_tensors(model, tensors, logits):
    assert np.allclose(convscope.predict(model, list(tensors)).logits, logits, atol=1e-6)
    scaled = convscope.heatmaps(model, list(tensors), scale=2).values
    assert np.array_equal(scaled, convscope.heatmaps(model, tensors, scale=2).values)
    predictions = convscope.predict(model, [tensors[0], torch.zeros(3, 20, 20), tensors[1], torch.zeros(1, 32, 32)])
    assert np.allclose(predictions.logits, logits[:2], atol=1e-6)
    assert [str(failure) for failure in predictions.failed] == [
        "image 1: has the size 20 x 20; the first input has 32 x 32, and all must have the same",
        "image 3: is a tensor (1, 32, 32) of torch.float32; expected a preprocessed, floating one, (3, H, W)",
    ]


def test_data_loader(model, tensors, logits):
    data = TensorData(tensors)
    predictions = convscope.predict(model, DataLoader(data, batch_size=3))
    assert np.allclose(predictions.logits, logits, atol=1e-6)
    assert predictions.image_names == ("image 0", "image 1", "image 2", "image 3")
    shuffled = convscope.predict(model, DataLoader(data, batch_size=3, shuffle=True))
    assert np.allclose(shuffled.logits, logits, atol=1e-6)
    assert shuffled.notes == ("the DataLoader shuffles; its images are taken in the order of its data set",)
    sampled = convscope.predict(model, DataLoader(data, sampler=SubsetRandomSampler([3, 1])))
    assert sampled.image_names == ("image 1", "image 3")
    assert np.allclose(sampled.logits, logits[[1, 3]], atol=1e-6)
    assert convscope.heatmaps(model, DataLoader(data)).values.shape == (4, 1, 30, 30)


def test_memory_is_bounded(model, tensors):
    """An image is read when its batch is, not before."""
    data = TensorData(tensors)
    batches = ImageBatchLoader(open_images(DataLoader(data)), model.preprocessing).batches(1)
    assert data.reads == []
    next(batches)
    assert data.reads == [0]


def test_data_sets_without_order_are_refused(model):
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 32, 32)

    for images in (Stream(), DataLoader(Stream())):
        with pytest.raises(convscope.ConvscopeError, match="no fixed order and length; pass a list"):
            convscope.predict(model, images)
    with pytest.raises(convscope.ConvscopeError, match="there are no images in this TensorData"):
        convscope.predict(model, TensorData(torch.zeros(0, 3, 32, 32)))


def test_what_a_data_set_raises_concerns_one_image(model, photos):
    class Broken(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> object:
            if index == 1:
                raise KeyError("missing")
            return [Image.open(photos[0]), None, {"image": 7}][index]

    predictions = convscope.predict(model, Broken())
    assert [str(f) for f in predictions.failed] == [
        "image 1: cannot be read (KeyError: 'missing')",
        "image 2: is of type int, which is no image",
    ]


def test_tensors_of_a_transform_are_used_as_they_are(model, folder):
    transform = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = ImageFolder(folder, transform=transform)
    expected = model.module(torch.stack([x for x, _ in data]))
    assert np.allclose(convscope.predict(model, data).logits, expected.detach().numpy(), atol=1e-5)


def test_lazy_images_are_their_own_reader():
    images = LazyImages(["a"], lambda _: b"")
    with pytest.raises(convscope.ConvscopeError, match="a: is empty"):
        next(ImageBatchLoader(images, Preprocessing()).batches(1))
