"""Pipelines of other libraries give the network exactly what they give in their own library."""

from __future__ import annotations

import pickle

import albumentations
import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms import v2

import convscope
from convscope.errors import ConvscopeError
from convscope.images.batches import Batch
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
V1_END = [v1.ToTensor(), v1.Normalize(MEAN, STD)]
V2_END = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def to_bgr_minus_mean(image: Image.Image) -> Tensor:
    """Preprocess as Caffe does."""
    pixels = np.array(image.resize((96, 80)))[..., ::-1].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() - 120


def padded(image: Image.Image) -> Tensor:
    """Show the whole image between black bars."""
    pipeline = v2.Compose([v2.Resize(40, max_size=64), v2.CenterCrop(64), *V2_END[:2]])
    return pipeline(image)


def mirrored(image: Image.Image) -> Tensor:
    return v1.functional.to_tensor(image.resize((64, 48)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def batch_of(preprocessing: Preprocessing, photos: list[str], fit: str) -> Batch:
    return next(ImageBatchLoader(photos, preprocessing, fit=fit).batches(len(photos)))


def own_output(pipeline, path: str) -> Tensor:
    image = Image.open(path).convert("RGB")
    if isinstance(pipeline, albumentations.Compose):
        return pipeline(image=np.array(image))["image"]
    return pipeline(image)


READ = {
    "crop": (v1.Compose([v1.Resize(72), v1.CenterCrop(64), *V1_END]), "crop", 0),
    "squash": (v1.Compose([v1.Resize((40, 50), v1.InterpolationMode.BICUBIC), *V1_END]), "squash", 0),
    "nested": (v1.Compose([v1.Compose([v1.Resize((40, 50))]), v1.ToTensor()]), "squash", 0),
    "gray": (v1.Compose([v1.Grayscale(), v1.Resize(32), v1.CenterCrop(28), v1.ToTensor()]), "crop", 0),
    "v2": (v2.Compose([v2.Resize(72), v2.CenterCrop(64), *V2_END]), "crop", 1e-6),
    "v2 on tensors": (v2.Compose([v2.ToImage(), v2.Resize(72), v2.CenterCrop(64), *V2_END[1:]]), "crop", 0.04),
    "timm": (create_transform((3, 64, 64), is_training=False, interpolation="bicubic", crop_pct=0.9), "crop", 0),
}

CALLED = {
    "albumentations": albumentations.Compose(
        [albumentations.SmallestMaxSize(72), albumentations.CenterCrop(64, 64), albumentations.Normalize()]
    ),
    "0..255": v1.Compose([v1.Resize((64, 64)), v1.PILToTensor(), v1.Lambda(lambda x: x.float())]),
    "crop only": v1.Compose([v1.CenterCrop(200), *V1_END]),
    "function": to_bgr_minus_mean,
    "padded": padded,
}


@pytest.mark.parametrize("name", READ)
def test_pipelines_that_are_read(name, photos):
    pipeline, fit, tolerance = READ[name]
    preprocessing = Preprocessing.of(pipeline)
    assert preprocessing.transform is None
    batch = batch_of(preprocessing, photos, fit)
    expected = torch.stack([own_output(pipeline, photo) for photo in photos])
    assert float((batch.x - expected).abs().max()) <= tolerance


def test_fields_that_are_read():
    read = Preprocessing.of(READ["crop"][0])
    assert (read.size, read.resize, read.interpolation) == ((64, 64), 72, "bilinear")
    assert (read.mean, read.std, read.channel_order) == (MEAN, STD, "RGB")
    assert Preprocessing.of(READ["gray"][0]).channel_order == "L"


@pytest.mark.parametrize("name", CALLED)
def test_pipelines_that_are_called(name, photos):
    pipeline = CALLED[name]
    preprocessing = Preprocessing.of(pipeline)
    for fit in ("squash", "crop"):
        batch = batch_of(preprocessing, photos, fit)
        expected = [own_output(pipeline, photo) for photo in photos]
        expected = [torch.from_numpy(x).permute(2, 0, 1) if isinstance(x, np.ndarray) else x for x in expected]
        assert torch.equal(batch.x, torch.stack(expected))
    assert preprocessing.transform.notes[0].endswith("for each image; fit does not apply")
    assert f"by {preprocessing.transform.name}" in str(preprocessing)


def test_measured_values():
    caffe = Preprocessing.of(to_bgr_minus_mean)
    assert (caffe.channel_order, caffe.size) == ("BGR", (80, 96))
    assert np.allclose(caffe.std, 1 / 255)
    assert np.allclose(caffe.mean, 120 / 255)
    assert np.allclose(Preprocessing.of(CALLED["crop only"]).mean, MEAN, atol=1e-5)
    assert np.allclose(Preprocessing.of(padded).std, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("pipeline", "box"),
    [
        (CALLED["crop only"], (50, 100, 250, 300)),  # the middle 200 x 200 of 300 x 400
        (CALLED["0..255"], (0, 0, 300, 400)),
        (padded, (-90, -37.7, 390, 445.3)),  # 40 x 53 in 64 x 64: the input is 480 x 483 pixels of the image
        (CALLED["albumentations"], (16.7, 66.7, 283.3, 333.3)),  # 64 / 72 of the shorter side
    ],
    ids=["crop only", "squash", "padded", "albumentations"],
)
def test_measured_geometry(pipeline, box):
    loader = ImageBatchLoader(np.zeros((300, 400, 3), np.uint8), Preprocessing.of(pipeline))
    (geometry,) = next(loader.batches(1)).geometry
    assert geometry.image_size == (300, 400)
    assert np.allclose(geometry.box, box, atol=1.5)


def test_mirrored_images_are_noted():
    preprocessing = Preprocessing.of(mirrored)
    assert "turns, mirrors or warps" in preprocessing.transform.notes[1]
    loader = ImageBatchLoader(np.zeros((30, 40, 3), np.uint8), preprocessing)
    assert next(loader.batches(1)).geometry[0].box == (0, 0, 30, 40)


def test_nonlinear_values_are_noted():
    preprocessing = Preprocessing.of(lambda image: v1.functional.to_tensor(image.resize((8, 8))) ** 2)
    assert any("no linear function" in note for note in preprocessing.transform.notes)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (v1.Compose([v1.RandomResizedCrop(32), v1.ToTensor()]), "random step RandomResizedCrop; .* for evaluation"),
        (v2.Compose([v2.Compose([v2.ColorJitter(0.5)]), v2.ToImage()]), "random step ColorJitter"),
        (albumentations.Compose([albumentations.RandomCrop(8, 8)]), "random step RandomCrop"),
        (
            albumentations.Compose([albumentations.LongestMaxSize(32), albumentations.HorizontalFlip(p=0.5)]),
            "random step HorizontalFlip",
        ),
        (lambda image: torch.rand(3, 32, 32), "preprocessing <lambda> makes another input of the same image each time"),
        (
            albumentations.Compose([albumentations.Resize(32, 32), albumentations.Rotate(p=1)]),
            "Compose makes another input of the same image each time",
        ),
        (lambda image: image, r"<lambda> returns Image; expected a tensor \(C, H, W\)"),
        (lambda image: image.missing, "<lambda> fails .AttributeError"),
    ],
)
def test_pipelines_that_are_refused(pipeline, message):
    with pytest.raises(ConvscopeError, match=message):
        Preprocessing.of(pipeline)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def test_everything_works_with_a_pipeline_that_is_called(net, photos, tmp_path):
    model = convscope.load(net, preprocessing=padded)
    assert "preprocessing calls padded for each image" in model.notes[0]
    with torch.no_grad():
        expected = net(torch.stack([padded(Image.open(photo).convert("RGB")) for photo in photos]))
    assert np.allclose(convscope.predict(model, photos).logits, expected, atol=1e-5)
    heatmaps = convscope.heatmaps(model, photos, layer="0", scale=(1, 2))
    for photo, resized, overlay in zip(photos, heatmaps.resized(), heatmaps.overlay(), strict=True):
        assert resized.shape[1:] == Image.open(photo).size[::-1]
        assert np.abs(resized).min(axis=(0, 2)).max() >= 0
        assert np.asarray(overlay).shape[-3:-1] == resized.shape[1:]
    assert convscope.patterns(model, "0", [0], steps=1).images.shape[-1] == 3
    store = convscope.scan(model, photos[:2], tmp_path / "store", "1", k=1, workers=0)
    best = store.unit("1", 0).examples()[0]
    maps = convscope.activations(model, photos[:2], "1")["1"]
    assert best.value == pytest.approx(maps[best.image, 0].max(), rel=1e-4)
    floats = np.asarray(Image.open(photos[1]).convert("RGB")) / np.float32(255)
    assert np.allclose(convscope.predict(model, floats).logits, expected[1], atol=1e-5)


def test_pickle_and_manifest():
    preprocessing = Preprocessing.of(padded)
    again = pickle.loads(pickle.dumps(preprocessing))
    image = Image.new("RGB", (30, 20), "red")
    assert torch.equal(again.transform(image)[0], preprocessing.transform(image)[0])
    described = preprocessing.as_dict()
    assert described["transform"] == "padded"
    assert Preprocessing.of(described).size == (64, 64)
