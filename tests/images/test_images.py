"""Image loading, preprocessing and geometry, checked against other programs and closed forms."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFile
from torch import Tensor
from torchvision import transforms

from convscope.errors import ConvscopeError
from convscope.images import decoding, loading
from convscope.images.failures import Failure
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing

RNG = np.random.default_rng(0)
FILTERS = ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def load_batch(images: Any, preprocessing: Preprocessing | None = None, **options: Any) -> Tensor:
    """Return the only batch; without preprocessing: the first image's own pixels / 255."""
    if preprocessing is None:
        preprocessing = Preprocessing(size=ImageBatchLoader(images, Preprocessing()).original(0).shape[:2])
    (batch,) = ImageBatchLoader(images, preprocessing, **options).batches(1000)
    return batch.x


def pixels(x: Tensor) -> np.ndarray:
    """Return the first image as (H, W, C)."""
    return x[0].permute(1, 2, 0).numpy()


def unit_interval(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) / np.float32(255)


def failure_reason(images: Any, preprocessing: Preprocessing | None = None, **options: Any) -> str:
    """Return why the only image is refused."""
    loader = ImageBatchLoader(images, preprocessing or Preprocessing(), **options)
    with pytest.raises(ConvscopeError) as raised:
        list(loader.batches(4))
    assert str(raised.value) == str(loader.failed[0])
    return loader.failed[0].reason


def png(width: int, height: int, depth: int, color: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """Encode a PNG that Pillow cannot write. color: 0 gray, 2 RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    extra = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- Preprocessing ---------------------------------------------------------------------------------------------------


def test_normalize_equals_formula() -> None:
    p = Preprocessing(size=2, range=(-1, 3), mean=(1, 2, 3), std=(2, 4, 5))
    x = p.normalize(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1))
    assert x.flatten().tolist() == pytest.approx([(-1 - 1) / 2, (1 - 2) / 4, (3 - 3) / 5])


def test_bgr_swaps_channels_and_mean_is_in_network_order() -> None:
    p = Preprocessing(range=255, mean=(103.939, 116.779, 123.68), channel_order="BGR")
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert p.normalize(red).flatten().tolist() == pytest.approx([-103.939, -116.779, 255 - 123.68], rel=1e-6)
    from_file = load_batch(np.full((1, 1, 3), (255, 0, 0), np.uint8), p)
    assert torch.equal(from_file, p.normalize(red).expand(1, 3, 224, 224))


@pytest.mark.parametrize("order", ["RGB", "BGR", "L", "channels"])
def test_denormalize_inverts_normalize_and_both_are_differentiable(order: str) -> None:
    p = Preprocessing.of({"channel_order": order, "channels": {"L": 1, "channels": 5}.get(order, 3), "range": 255})
    p = Preprocessing.of(
        {**p.as_dict(), "mean": [10.0 * c for c in range(p.channels)], "std": [2.0 + c for c in range(p.channels)]}
    )
    x = torch.rand(2, p.channels, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(p.denormalize(p.normalize(x)), x, atol=1e-6)
    assert torch.autograd.gradcheck(p.normalize, x)
    assert torch.autograd.gradcheck(p.denormalize, x)
    with pytest.raises(ConvscopeError, match=rf"\(N, {p.channels}, H, W\)"):
        p.normalize(x[:, :0])


def test_single_numbers_are_repeated_and_sizes_squared() -> None:
    p = Preprocessing(size=32, range=2.0, mean=7, std=(3,))
    assert (p.size, p.range, p.mean, p.std, p.channels) == ((32, 32), (0.0, 2.0), (7.0,) * 3, (3.0,) * 3, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": (1, 2, 3)}, "size is (1, 2, 3)"),
        ({"size": (224.5, 3)}, "size is (224.5, 3)"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'"),
        ({"range": (1, 0)}, "range is (1, 0)"),
        ({"range": float("nan")}, "range is nan"),
        ({"mean": (0.0, 0.0)}, "mean is (0.0, 0.0); expected 3"),
        ({"mean": "abc"}, "mean is 'abc'"),
        ({"mean": (0.0, 0.0, float("inf"))}, "mean is (0.0, 0.0, inf)"),
        ({"std": (1.0, 0.0, 1.0)}, "std is (1.0, 0.0, 1.0); expected 3 numbers above 0"),
        ({"channel_order": "GRB"}, "channel_order is 'GRB'"),
        ({"channel_order": "L"}, "expected 1 finite"),
        ({"resize": 223}, "resize is 223"),
        ({"size": (100, 300), "resize": 256}, "from 300 up"),
        ({"resize": 256.0}, "resize is 256.0"),
    ],
)
def test_invalid_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvscopeError) as raised:
        Preprocessing(**fields)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"meen": 1}, "'meen' is not known; nearest: mean"),
        ({"input_size": (3, 8, 8), "crop_pkt": 0.9}, "'crop_pkt' is not known; nearest: crop_pct"),
        ({"channels": 4, "mean": (1, 2, 3)}, "4 channels do not fit mean (1, 2, 3)"),
        ({"channels": 0}, "0 channels"),
        ({"channels": "3"}, "'3' channels"),
        ({"input_size": (224, 224)}, "input_size is (224, 224)"),
        ({"input_size": (3, 8, 8), "crop_pct": "all"}, "crop_pct is 'all'"),
        (7, "preprocessing is 7; expected"),
        ("imagenet", "preprocessing is 'imagenet'; expected"),
    ],
)
def test_of_refuses_unknown_descriptions(value: object, message: str) -> None:
    with pytest.raises(ConvscopeError) as raised:
        Preprocessing.of(value)
    assert message in str(raised.value)


def test_of_repeats_values_over_channels() -> None:
    assert Preprocessing.of({}) == Preprocessing()
    gray = Preprocessing.of({"channel_order": "L", "mean": 0.5})
    assert (gray.mean, gray.std) == ((0.5,), (1.0,))
    assert Preprocessing.of({"channels": 1, "mean": 0.5}) == gray
    five = Preprocessing.of({"channels": 5, "std": 2})
    assert (five.channel_order, five.mean, five.std) == ("channels", (0.0,) * 5, (2.0,) * 5)
    assert Preprocessing.of({"mean": [1, 2, 3, 4], "size": 8}).channel_order == "channels"
    assert Preprocessing.of(five) is five


def test_of_timm_in_closed_form() -> None:
    config = {"input_size": (1, 224, 200), "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    p = Preprocessing.of({**config, "mean": (0.5,), "std": (0.25,)})
    assert p == Preprocessing((224, 200), "bicubic", (0, 1), (0.5,), (0.25,), "L", 248)  # 224 / 0.9 = 248.9
    assert Preprocessing.of({"input_size": (3, 224, 224)}).resize == 256


def test_json_round_trip_and_one_line_text() -> None:
    lite = Preprocessing.of({"interpolation": "bicubic", "range": 255, "mean": 127, "std": 128, "resize": 256})
    assert Preprocessing.of(json.loads(json.dumps(lite.as_dict()))) == lite
    assert lite.as_dict() == json.loads(json.dumps(lite.as_dict()))
    assert str(lite) == "224 x 224 RGB, bicubic, 0..255, mean 127, std 128"
    other = Preprocessing.of({"size": (3, 4), "mean": [0.485, 0.456, 0.406], "channels": 3})
    assert str(other) == "3 x 4 RGB, bilinear, 0..1, mean 0.485 0.456 0.406, std 1"


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "tf_efficientnet_lite0.in1k", "convnext_tiny.in12k_ft_in1k"])
@pytest.mark.parametrize("shape", [(300, 400), (431, 257), (50, 77)])
def test_crop_equals_timm_transform(name: str, shape: tuple[int, int]) -> None:
    cfg = timm.get_pretrained_cfg(name)
    config = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    p = Preprocessing.of(config)
    assert p.size == config["input_size"][1:]
    image = Image.fromarray(noise(*shape))
    expected = timm.data.create_transform(**config)(image)
    assert torch.equal(load_batch([image], p, fit="crop")[0], expected)


@pytest.mark.parametrize("name", ["ResNet50_Weights", "EfficientNet_B0_Weights", "Inception_V3_Weights"])
@pytest.mark.parametrize("shape", [(300, 400), (431, 257), (50, 77), (232, 232)])
def test_crop_equals_torchvision_preset(name: str, shape: tuple[int, int]) -> None:
    preset = getattr(torchvision.models, name).DEFAULT.transforms()
    image = Image.fromarray(noise(*shape))
    assert torch.equal(load_batch([image], Preprocessing.of(preset), fit="crop")[0], preset(image))


@pytest.mark.parametrize("size", [(20, 20), (21, 20), (13, 30)])
@pytest.mark.parametrize("resize", [30, 31, None])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_crop_equals_resize_and_center_crop(size: tuple[int, int], resize: int | None, interpolation: str) -> None:
    p = Preprocessing(size=size, interpolation=interpolation, resize=resize)
    mode, short = transforms.InterpolationMode(interpolation), resize or round(max(size) / 0.875)
    steps = [transforms.Resize(short, mode), transforms.CenterCrop(size), transforms.ToTensor()]
    for shape in [(40, 61), (61, 40), (30, 31), (10, 7), (5, 200), (31, 31)]:
        image = Image.fromarray(noise(*shape))
        assert torch.equal(load_batch([image], p, fit="crop")[0], transforms.Compose(steps)(image)), shape


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape", [(40, 61), (7, 5), (1, 90)])
def test_squash_equals_pillow_resize(interpolation: str, shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    p = Preprocessing(size=(12, 17), interpolation=interpolation)
    expected = np.asarray(image.resize((17, 12), Image.Resampling[interpolation.upper()]))
    assert np.array_equal(pixels(load_batch([image], p)), unit_interval(expected))


def test_preset_with_two_resize_values_is_refused() -> None:
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    preset.resize_size = [256, 300]
    with pytest.raises(ConvscopeError, match="resize"):
        Preprocessing.of(preset)


# --- Geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [(14, 14), (1, 1), (7, 3), (300, 200)])
@pytest.mark.parametrize("shape", [(225, 300), (5, 3), (14, 14), (1, 400)])
def test_to_original_of_whole_image_equals_interpolate(cells: tuple[int, int], shape: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *cells)
    expected = F.interpolate(maps.double(), shape, mode="bilinear", align_corners=False)
    assert torch.allclose(Geometry(shape, (0, 0, *shape)).to_original(maps), expected.float(), atol=2e-6)


def test_to_original_is_exact_without_resizing() -> None:
    maps = torch.randn(4, 30, 50)
    assert torch.equal(Geometry((30, 50), (0, 0, 30, 50)).to_original(maps), maps)
    placed = Geometry((40, 70), (4, 11, 34, 61)).to_original(maps)
    assert torch.equal(placed, F.pad(maps, (11, 9, 4, 6)))


def test_to_original_equals_grid_sample_inside_and_is_zero_outside() -> None:
    top, left, bottom, right = box = (3.25, -0.0, 17.6, 21.1)
    maps = torch.randn(1, 2, 5, 6)
    y = ((torch.arange(20) + 0.5 - top) / (bottom - top) * 2 - 1).view(-1, 1).expand(20, 30)
    x = ((torch.arange(30) + 0.5 - left) / (right - left) * 2 - 1).view(1, -1).expand(20, 30)
    sampled = F.grid_sample(maps, torch.stack([x, y], -1)[None], padding_mode="border", align_corners=False)
    inside = (y.abs() <= 1) & (x.abs() <= 1)
    back = Geometry((20, 30), box).to_original(maps)
    assert torch.allclose(back, sampled * inside, atol=1e-5)
    assert back[..., 3:18, :21].ne(0).all()
    assert inside.sum() == 15 * 21


def test_to_original_keeps_leading_axes_dtype_and_gradients() -> None:
    where = Geometry((9, 7), (1.5, 0.5, 8.0, 6.5))
    assert where.to_original(torch.rand(3, 4)).shape == (9, 7)
    assert where.to_original(torch.rand(2, 5, 3, 4)).shape == (2, 5, 9, 7)
    assert where.to_original(torch.rand(3, 4).half()).dtype == torch.float16
    assert (
        where.to_original(torch.ones(3, 4, dtype=torch.int64)).sum() == 7 * 6
    )  # a mask: the pixels with their centre inside
    assert torch.autograd.gradcheck(where.to_original, torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (333, 331), (24, 40), (40, 24), (900, 150)])
@pytest.mark.parametrize("corner", [(0.42, 0.40), (0.55, 0.48), (0.40, 0.6)])
def test_heatmap_covers_the_square(fit: str, shape: tuple[int, int], corner: tuple[float, float]) -> None:
    height, width = shape
    side = max(2, min(shape) // 12)
    top, left = ((np.array(corner) - 0.5) * min(shape) + np.array(shape) / 2).astype(int)
    image = np.zeros((height, width, 3), np.uint8)
    image[top : top + side, left : left + side] = 255
    (batch,) = ImageBatchLoader(image, Preprocessing(size=112), fit=fit).batches(1)
    white = (batch.x - 114 / 255).clamp(min=0) if fit == "pad" else batch.x  # not the border
    heat = batch.geometry[0].to_original(F.avg_pool2d(white, 8).mean(1))[0]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    box = batch.geometry[0].box
    cell = (box[2] - box[0]) / 14, (box[3] - box[1]) / 14
    assert abs(float((heat * y).sum() / heat.sum()) - (top + side / 2)) < cell[0] / 2
    assert abs(float((heat * x).sum() / heat.sum()) - (left + side / 2)) < cell[1] / 2


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (90, 41), (24, 40)])
def test_pad_keeps_the_aspect_ratio(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    (batch,) = ImageBatchLoader(image, Preprocessing(size=112), fit="pad").batches(1)
    new = tuple(round(side * 112 / max(shape)) for side in shape)
    top, left = ((112 - side) // 2 for side in new)
    expected = torch.full((3, 112, 112), 114 / 255)
    resized = transforms.ToTensor()(image.resize(new[::-1], Image.Resampling.BILINEAR))
    expected[:, top : top + new[0], left : left + new[1]] = resized
    torch.testing.assert_close(batch.x[0], expected)
    corners = torch.tensor([left, top, left + new[1], top + new[0]]) / 112  # of the image in the input
    torch.testing.assert_close(batch.geometry[0].boxes_to_original(corners), torch.tensor([0.0, 0, shape[1], shape[0]]))


def test_crop_box_in_closed_form() -> None:
    (batch,) = ImageBatchLoader(noise(200, 400), Preprocessing(size=50, resize=100), fit="crop").batches(1)
    # 200 x 400 becomes 100 x 200; the crop is rows 25..75 and columns 75..125 of it, twice that in the image.
    assert batch.geometry[0] == Geometry((200, 400), (50, 150, 150, 250))
    (batch,) = ImageBatchLoader(noise(200, 400), Preprocessing(size=50), fit="squash").batches(1)
    assert batch.geometry[0] == Geometry((200, 400), (0, 0, 200, 400))


# --- Very long images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 1)])
def test_very_long_images_can_be_squashed(shape: tuple[int, int]) -> None:
    across = shape[0] == 1
    ramp = np.linspace(0, 1, 50_000, dtype=np.float32).reshape(shape)
    x = load_batch(ramp, Preprocessing(size=100, interpolation="box"))[0, 0]
    means = torch.from_numpy(ramp.reshape(100, 500).mean(1))
    expected = means.expand(100, 100) if across else means.expand(100, 100).T
    assert torch.allclose(x, expected, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_very_long_images_are_cropped_at_the_right_position(transposed: bool) -> None:
    stripes = (np.arange(50_001) % 2).astype(np.float32)[None]  # resized as a whole: 250 x 12,500,250 pixels
    p = Preprocessing(size=224, resize=250)
    (batch,) = ImageBatchLoader(stripes.T if transposed else stripes, p, fit="crop").batches(1)
    left = (12_500_250 - 224) / 2 / 250
    assert batch.geometry[0].box[0 if transposed else 1] == pytest.approx(left, abs=1e-9)
    at = left + (np.arange(224) + 0.5) / 250 - 0.5  # in pixels from the centre of the first one
    expected = np.interp(at, np.arange(25_000 - 3, 25_000 + 4), stripes[0, 25_000 - 3 : 25_000 + 4])
    x = batch.x[0, 0].T if transposed else batch.x[0, 0]
    assert np.allclose(x.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("interpolation", FILTERS[1:])
@pytest.mark.parametrize("shape", [(30, 900), (900, 30)])
def test_bounded_resizing_equals_unbounded(interpolation: str, shape: tuple[int, int]) -> None:
    p = Preprocessing(size=64, interpolation=interpolation)
    image = np.asarray(Image.fromarray(noise(4, 4)).resize(shape[::-1], Image.Resampling.BICUBIC))
    for fit in ("crop", "squash"):
        (ample,) = ImageBatchLoader(image, p, fit=fit).batches(1)
        (tight,) = ImageBatchLoader(image, p, fit=fit, max_pixels=30 * 900).batches(1)
        assert (ample.x - tight.x).abs().max() <= 1.5 / 255
        assert ample.geometry == tight.geometry


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1)])
def test_intermediate_images_are_bounded(fit: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    areas = []
    original = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        areas.append(size[0] * max(size[1], self.height))  # Pillow: first the width of all rows, then the height
        return original(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    load_batch(np.zeros(shape, np.uint8), Preprocessing(size=100), fit=fit, max_pixels=30_000)
    assert areas
    assert max(areas) <= 30_000


# --- Accepted images ------------------------------------------------------------------------------------------------


def test_accepted_arrays() -> None:
    a = noise(5, 6)
    assert np.array_equal(pixels(load_batch(a)), unit_interval(a))
    assert np.array_equal(pixels(load_batch(a[..., 0])), np.dstack([unit_interval(a[..., 0])] * 3))
    assert np.array_equal(pixels(load_batch(a[..., :1])), np.dstack([unit_interval(a[..., 0])] * 3))
    assert np.array_equal(pixels(load_batch(a[:, ::-1])), unit_interval(a[:, ::-1]))
    alpha = noise(5, 6, 4)
    share = unit_interval(alpha[..., 3:])
    assert np.allclose(pixels(load_batch(alpha)), unit_interval(alpha[..., :3]) * share + 1 - share, atol=1 / 255)
    assert np.allclose(
        pixels(load_batch(unit_interval(alpha))), unit_interval(alpha[..., :3]) * share + 1 - share, atol=1e-6
    )
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        assert np.array_equal(pixels(load_batch((a / 255).astype(dtype))), (a / 255).astype(dtype).astype(np.float32))
    many = RNG.integers(0, 256, (3, 5, 6, 3), dtype=np.uint8)
    assert np.array_equal(load_batch(many).permute(0, 2, 3, 1).numpy(), unit_interval(many))


@pytest.mark.parametrize("interpolation", FILTERS)
def test_floats_are_not_quantised(interpolation: str) -> None:
    a = RNG.random((12, 12, 3)).astype(np.float32)
    p = Preprocessing(size=5, interpolation=interpolation)
    resample = Image.Resampling[interpolation.upper()]
    expected = np.dstack([np.asarray(Image.fromarray(a[..., c]).resize((5, 5), resample)) for c in range(3)])
    assert np.array_equal(pixels(load_batch(a, p)), expected.clip(0, 1))
    assert np.array_equal(
        pixels(load_batch(np.full((4, 4), 0.123456, np.float32), p))[2, 2], np.full(3, 0.123456, np.float32)
    )


def test_overshoot_is_clipped() -> None:
    edge = np.zeros((8, 8), np.float32)
    edge[:, 4:] = 1
    x = load_batch(edge, Preprocessing(size=32, interpolation="bicubic"))
    assert x.min() == 0
    assert x.max() == 1


def test_pil_images_and_mixed_lists(tmp_path: Path) -> None:
    a = noise(5, 6)
    Image.fromarray(a).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as lazy:
        loader = ImageBatchLoader((str(tmp_path / "a.png"), lazy, a, tmp_path / "a.png"), Preprocessing(size=(5, 6)))
        assert loader.names == (str(tmp_path / "a.png"), "image 1", "image 2", str(tmp_path / "a.png"))
        (batch,) = loader.batches(8)
    assert np.array_equal(batch.x.permute(0, 2, 3, 1).numpy(), np.stack([unit_interval(a)] * 4))
    assert batch.x.is_contiguous(memory_format=torch.channels_last)
    assert batch.x.dtype == torch.float32


def test_user_pil_image_is_unchanged() -> None:
    image = Image.fromarray(noise(5, 6))
    image.getexif()[0x0112] = 6
    load_batch([image])
    assert (image.size, image.getexif()[0x0112]) == ((6, 5), 6)
    with_alpha = Image.fromarray(noise(5, 6, 4))
    before = with_alpha.tobytes(), dict(with_alpha.info)
    load_batch([with_alpha])
    assert (with_alpha.tobytes(), with_alpha.info) == before


def test_preprocessed_tensors_are_used_unchanged() -> None:
    p = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2))
    x = torch.randn(3, 3, 17, 31, requires_grad=True)
    one, two = ImageBatchLoader(x, p).batches(2)
    assert torch.equal(torch.cat([one.x, two.x]), x)
    assert not one.x.requires_grad
    assert (one.indices, two.indices) == ((0, 1), (2,))
    assert one.geometry == (Geometry((17, 31), (0, 0, 17, 31)),) * 2
    assert one.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(load_batch(x[0], p), x[:1])
    half = x.detach().bfloat16()
    assert torch.equal(load_batch(half, p), half.float())
    assert load_batch(x.double(), p).dtype == torch.float32
    expected = (x[1].detach() * torch.tensor(p.std).view(3, 1, 1) + torch.tensor(p.mean).view(3, 1, 1)).clamp(0, 1)
    assert np.array_equal(ImageBatchLoader(x, p).original(1), expected.mul(255).round().byte().permute(1, 2, 0).numpy())


def test_nan_in_a_tensor_fails_one_image() -> None:
    x = torch.zeros(3, 3, 4, 4)
    x[1, 2, 3, 3] = float("nan")
    loader = ImageBatchLoader(x, Preprocessing())
    (batch,) = loader.batches(3)
    assert batch.indices == (0, 2)
    assert str(loader.failed[0]) == "image 1: holds NaN or infinity"
    with pytest.raises(ConvscopeError, match="image 1: holds NaN"):
        loader.original(1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "NoneType is not an image; expected a path"),
        ([], "there are no images"),
        (7, "int is not an image"),
        (b"image.png", "bytes is not an image"),
        (["a.png", 7], "int is not an image"),
        ([{}], "dict is not an image"),
        (iter(["a.png"]), "list_iterator is not an image"),
        (np.zeros((0, 4, 4, 3)), "there are no images"),
        (np.zeros((3, 4, 5)), "shape (3, 4, 5); expected (H, W), (H, W, 1)"),
        (np.zeros(3), "shape (3,)"),
        (np.zeros((1, 3, 4, 5)), "shape (1, 3, 4, 5)"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "(3, 4, 4) of torch.int32; expected a preprocessed, floating one"),
        (torch.zeros(1, 1, 4, 4), "(N, 3, H, W)"),
        (torch.zeros(4, 4), "(4, 4)"),
        (torch.zeros(0, 3, 4, 4), "there are no images"),
    ],
)
def test_unknown_types_are_refused_at_once(images: Any, message: str) -> None:
    with pytest.raises(ConvscopeError) as raised:
        ImageBatchLoader(images, Preprocessing())
    assert message in str(raised.value)


def test_options_are_checked() -> None:
    with pytest.raises(ConvscopeError, match="fit is 'stretch'; expected one of 'squash', 'crop', 'pad'"):
        ImageBatchLoader("a.png", Preprocessing(), fit="stretch")
    with pytest.raises(ConvscopeError, match="max_pixels is 0"):
        ImageBatchLoader("a.png", Preprocessing(), max_pixels=0)
    with pytest.raises(ConvscopeError, match="size is 0"):
        next(ImageBatchLoader("a.png", Preprocessing()).batches(0))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.int64), "an array of int64; expected uint8"),
        (np.zeros((4, 4, 3), bool), "an array of bool"),
        (np.zeros((4, 4, 3), np.uint16), "an array of uint16"),
        (np.zeros((4, 4, 3), object), "an array of object"),
        (np.full((4, 4, 3), 255.0), "values from 255 to 255; floats are expected in [0, 1]"),
        (np.full((4, 4), -0.1), "values from -0.1 to -0.1"),
        (np.full((4, 4), np.nan), "NaN or infinity"),
        (np.full((4, 4), np.inf), "NaN or infinity"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
    ],
)
def test_arrays_out_of_range_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    assert message in failure_reason(array)
    assert message in failure_reason([array])
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    assert message in failure_reason(tmp_path / "a.npy")


def test_rounding_at_the_ends_of_the_range_is_accepted() -> None:
    assert load_batch(np.full((3, 3), 1 + 1e-6, np.float32)).max() == 1


def test_one_channel_network_gets_luma() -> None:
    p = Preprocessing.of({"size": (5, 6), "channels": 1})
    a = noise(5, 6)
    luma = np.asarray(Image.fromarray(a).convert("L"))
    assert np.array_equal(load_batch([Image.fromarray(a)], p)[0, 0].numpy(), unit_interval(luma))
    assert np.allclose(
        load_batch(unit_interval(a), p)[0, 0].numpy(), unit_interval(a) @ [0.299, 0.587, 0.114], atol=1e-6
    )
    assert np.array_equal(load_batch(a[..., 0], p)[0, 0].numpy(), unit_interval(a[..., 0]))
    assert np.array_equal(load_batch(unit_interval(a[..., 0]), p)[0, 0].numpy(), unit_interval(a[..., 0]))
    many = RNG.integers(0, 256, (7, 5, 6), dtype=np.uint8)
    assert np.array_equal(load_batch(many, p)[:, 0].numpy(), unit_interval(many))
    assert np.array_equal(ImageBatchLoader(a, p).original(0), a)
    assert np.array_equal(ImageBatchLoader(many, p).original(3), np.dstack([many[3]] * 3))


def test_network_with_other_channels_takes_arrays(tmp_path: Path) -> None:
    p = Preprocessing.of({"size": (5, 6), "channels": 5})
    a = noise(5, 6, 5)
    np.save(tmp_path / "a.npy", a)
    assert np.array_equal(pixels(load_batch(a, p)), unit_interval(a))
    assert np.array_equal(pixels(load_batch(tmp_path / "a.npy", p)), unit_interval(a))
    assert np.array_equal(pixels(load_batch(unit_interval(a)[None], p)), unit_interval(a))
    assert np.array_equal(ImageBatchLoader(a, p).original(0), a[..., :3])
    half = Preprocessing.of({"size": 2, "channels": 5})
    expected = np.dstack(
        [np.asarray(Image.fromarray(a[..., c]).resize((2, 2), Image.Resampling.BILINEAR)) for c in range(5)]
    )
    assert np.array_equal(pixels(load_batch(a, half)), unit_interval(expected))
    two = Preprocessing.of({"size": (5, 6), "channels": 2})
    assert np.array_equal(ImageBatchLoader(a[..., :2], two).original(0), np.dstack([a[..., 0]] * 3))
    four = Preprocessing.of({"size": (5, 6), "channels": 4})
    assert np.array_equal(
        pixels(load_batch(a[..., :4], four)), unit_interval(a[..., :4])
    )  # the fourth is a channel here, no alpha
    assert "this network takes arrays (H, W, 5)" in failure_reason([Image.fromarray(a[..., :3])], p)
    with pytest.raises(ConvscopeError, match=r"expected \(H, W, 5\)"):
        ImageBatchLoader(a[..., :3], p)


# --- Files -----------------------------------------------------------------------------------------------------------

RGB = noise(6, 8)
GRAY = RGB[..., 0]
CLEAR = np.concatenate([RGB, noise(6, 8, 1)], axis=2)
WORD = RNG.integers(0, 65536, (6, 8), dtype=np.uint16)
WORD[0, :2] = 65535, 0
FLOAT = RNG.random((6, 8)).astype(np.float32)


def on_white(rgba: np.ndarray) -> np.ndarray:
    share = unit_interval(rgba[..., 3:])
    return unit_interval(rgba[..., :3]) * share + 1 - share


def to_rgb(gray: np.ndarray) -> np.ndarray:
    return np.dstack([gray] * 3)


def palette() -> Image.Image:
    image = Image.fromarray((np.arange(48) % 4).astype(np.uint8).reshape(6, 8), "L")
    image = image.convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0, 7, 7, 7])
    return image


PALETTE = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0], [7, 7, 7]], np.uint8)[np.arange(48) % 4].reshape(6, 8, 3)
SOME_WHITE = np.where((np.arange(48) % 4 == 1).reshape(6, 8, 1), 255, PALETTE).astype(np.uint8)
HALF_WHITE = np.dstack([PALETTE, np.array([255, 128, 0, 255], np.uint8)[np.arange(48) % 4].reshape(6, 8)])
BITS = (GRAY > 127).astype(np.uint8) * 255

FILES: dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]] = {
    "rgb.png": (Image.fromarray(RGB), {}, unit_interval(RGB)),
    "gray.png": (Image.fromarray(GRAY), {}, to_rgb(unit_interval(GRAY))),
    "alpha.png": (Image.fromarray(CLEAR), {}, on_white(CLEAR)),
    "gray-alpha.png": (Image.fromarray(CLEAR[..., 2:]), {}, on_white(CLEAR[..., [2, 2, 2, 3]])),
    "palette.png": (palette(), {}, unit_interval(PALETTE)),
    "palette-one-clear.png": (palette(), {"transparency": 1}, unit_interval(SOME_WHITE)),
    "palette-alpha.png": (palette(), {"transparency": bytes([255, 128, 0, 255])}, on_white(HALF_WHITE)),
    "bits.png": (Image.fromarray(BITS).convert("1"), {}, to_rgb(unit_interval(BITS))),
    "word.png": (Image.fromarray(WORD), {}, to_rgb(WORD.astype(np.float32) / 65535)),
    "rgb.webp": (Image.fromarray(RGB), {"lossless": True}, unit_interval(RGB)),
    "alpha.webp": (Image.fromarray(CLEAR), {"lossless": True, "exact": True}, on_white(CLEAR)),
    "palette.gif": (palette(), {}, unit_interval(PALETTE)),
    "clear.gif": (palette(), {"transparency": 1}, unit_interval(SOME_WHITE)),
    "rgb.bmp": (Image.fromarray(RGB), {}, unit_interval(RGB)),
    "rgb.ppm": (Image.fromarray(RGB), {}, unit_interval(RGB)),
    "rgb.jp2": (Image.fromarray(RGB), {}, unit_interval(RGB)),
    "rgb.tif": (Image.fromarray(RGB), {}, unit_interval(RGB)),
    "lzw.tif": (Image.fromarray(RGB), {"compression": "tiff_lzw"}, unit_interval(RGB)),
    "alpha.tif": (Image.fromarray(CLEAR), {}, on_white(CLEAR)),
    "word.tif": (Image.fromarray(WORD), {}, to_rgb(WORD.astype(np.float32) / 65535)),
    "float.tif": (Image.fromarray(FLOAT), {}, to_rgb(FLOAT)),
    "cmyk.tif": (
        Image.fromarray(CLEAR, "CMYK"),
        {},
        unit_interval(np.asarray(Image.fromarray(CLEAR, "CMYK").convert("RGB"))),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_give_back_the_stored_pixels(name: str, tmp_path: Path) -> None:
    image, options, expected = FILES[name]
    image.save(tmp_path / name, **options)
    got = pixels(load_batch(tmp_path / name))
    exact = "alpha" not in name and "one-clear" not in name
    assert np.abs(got - expected).max() <= (1e-7 if exact else 0.51 / 255)  # Pillow composes in 8 bits
    original = ImageBatchLoader(tmp_path / name, Preprocessing()).original(0)
    assert original.dtype == np.uint8
    assert original.flags.writeable
    assert np.abs(original / 255 - expected).max() <= 0.51 / 255


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_within_compression_loss(mode: str, tmp_path: Path) -> None:
    colors = np.array([[[200, 30, 60], [10, 180, 90]], [[250, 250, 250], [5, 10, 20]]], np.uint8)
    image = Image.fromarray(colors.repeat(16, axis=0).repeat(16, axis=1)).convert(mode)
    image.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    expected = np.asarray(image.convert("RGB"))
    assert np.abs(pixels(load_batch(tmp_path / "a.jpg")) * 255 - expected).max() <= 3
    with Image.open(tmp_path / "a.jpg") as again:
        assert again.mode == mode
        assert np.array_equal(pixels(load_batch(tmp_path / "a.jpg")), unit_interval(np.asarray(again.convert("RGB"))))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(8, 1, 1, 0, b"\0\x55", struct.pack(">H", 0)), [255] * 8),
        (png(8, 1, 1, 0, b"\0\x55", struct.pack(">H", 1)), [0, 255] * 4),
        (png(4, 1, 2, 0, b"\0\x1b", struct.pack(">H", 2)), [0, 85, 255, 255]),
        (png(2, 1, 4, 0, b"\0\x5a", struct.pack(">H", 5)), [255, 170]),
        (png(2, 1, 8, 0, b"\0\x05\x06", struct.pack(">H", 5)), [255, 6]),
        (png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 514, 771), struct.pack(">H", 514)), [255, 3]),
        (png(1, 1, 8, 2, b"\0\x01\x02\x03", struct.pack(">HHH", 1, 2, 3)), [255]),
        (png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 300, 600, 900), struct.pack(">HHH", 300, 600, 900)), [255]),
        (png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 257, 257, 257)), [1]),
        (png(1, 1, 16, 2, b"\0" + b"\xff" * 6), [255]),
    ],
    ids=["1 bit: 0", "1 bit: 1", "2 bits", "4 bits", "8 bits", "16 bits", "RGB 8", "RGB 16", "opaque 16", "white 16"],
)
def test_transparent_colors_of_png_at_every_depth(data: bytes, expected: list[int], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    assert np.allclose(pixels(load_batch(tmp_path / "a.png"))[0] * 255, to_rgb(np.array([expected]))[0], atol=1e-4)


UPRIGHT = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40 + 20, np.ones((16, 16), np.uint8))
STORED = {  # where the specification of EXIF says that row 0 and column 0 of the file are in the scene
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.T,  # left, top
    6: UPRIGHT[:, ::-1].T,  # right, top
    7: UPRIGHT[::-1, ::-1].T,  # right, bottom
    8: UPRIGHT[::-1].T,  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "lzw.tif"])
def test_exif_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(kind, {})
    path = tmp_path / f"a.{kind}"
    image.save(path, exif=exif, **options, **({"compression": "tiff_lzw"} if "lzw" in kind else {}))
    # Opened by name, Pillow 13 maps an uncompressed TIFF into memory and gets turned ones wrong; not so from a stream.
    loader = ImageBatchLoader([path, Image.open(io.BytesIO(path.read_bytes()))], Preprocessing(size=UPRIGHT.shape))
    (batch,) = loader.batches(2)
    for x, geometry in zip(batch.x, batch.geometry, strict=True):
        assert np.abs(x[0].numpy() * 255 - UPRIGHT).max() <= 2
        assert geometry.image_size == UPRIGHT.shape
    assert loader.original(0).shape == (*UPRIGHT.shape, 3)


def test_broken_exif_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(pixels(load_batch(tmp_path / "a.png")), unit_interval(RGB))

    def broken(self: Image.Image) -> None:
        raise SyntaxError("no EXIF")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert np.array_equal(pixels(load_batch([Image.fromarray(RGB)])), unit_interval(RGB))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_first_frame_is_used_and_noted_once(kind: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((6, 8, 3), 20 * i, np.uint8)) for i in range(12)]
    path = tmp_path / f"walk.{kind}"
    options = {"webp": {"lossless": True}}.get(kind, {})
    frames[3].save(path, save_all=True, append_images=[*frames[4:], *frames[:3]], **options)
    loader = ImageBatchLoader(path, Preprocessing(size=(6, 8)))
    for _ in range(2):
        (batch,) = loader.batches(1)
        assert torch.equal(batch.x, torch.full((1, 3, 6, 8), 60.0) / 255)
    assert (loader.original(0) == 60).all()
    assert loader.notes == [f"{path}: 12 frames, the first one is used"]


def test_previews_of_phone_photographs_are_not_noted(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((16, 16, 3), 128, np.uint8))
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[image])
    with Image.open(tmp_path / "a.jpg") as again:
        assert (again.format, again.n_frames) == ("MPO", 2)
    loader = ImageBatchLoader(tmp_path / "a.jpg", Preprocessing())
    assert np.abs(loader.original(0).astype(int) - 128).max() <= 1
    assert loader.notes == []


@pytest.mark.parametrize(
    "array",
    [RGB, GRAY, GRAY[..., None], unit_interval(RGB), unit_interval(RGB).astype(np.float64), np.asfortranarray(RGB)],
)
def test_npy_files_are_arrays(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    expected = unit_interval(array) if array.dtype == np.uint8 else array.astype(np.float32)
    expected = expected if expected.shape[2:] == (3,) else to_rgb(expected.reshape(6, 8))
    assert np.array_equal(pixels(load_batch(tmp_path / "a.npy")), expected)


@pytest.mark.parametrize(
    "name", ["two message.png", "new\nline\t.png", "лев 獅子 أسد 🦁.png", "-rf", "%s{}.png", "a:b.png"]
)
def test_file_names_in_any_script(name: str, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / name, format="PNG")
    assert np.array_equal(pixels(load_batch(str(tmp_path / name))), unit_interval(RGB))
    gone = str(tmp_path / "gone" / name)
    loader = ImageBatchLoader(["nothing", gone, Path(gone)], Preprocessing())
    assert loader.names[1:] == (gone, gone)
    with pytest.raises(ConvscopeError):
        list(loader.batches(1))
    assert loader.failed[1].name == gone
    line = str(loader.failed[1])
    assert line.endswith(": No such file or directory")
    assert line.splitlines() == [line]
    assert ("\n" in name) == (r"\n" in line)
    assert ("獅子" in name) == ("獅子" in line)


def test_undecodable_name_can_be_printed(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.fromarray(RGB).save(path, format="PNG")
    assert np.array_equal(pixels(load_batch(path)), unit_interval(RGB))
    assert str(Failure(path, "a\u2028b\u2029c\x1b")).encode("utf-8").endswith(rb"caf\udce9.png: a\u2028b\u2029c\x1b")


# --- Files that cannot be used ---------------------------------------------------------------------------------------


def test_each_failure_has_its_reason_and_the_rest_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(64, 64)).save("good.png")
    whole = Path("good.png").read_bytes()
    encoded = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(encoded, "JPEG")
    Path("cut.png").write_bytes(whole[:2000])
    Path("cut.jpg").write_bytes(encoded.getvalue()[:1500])
    Path("head.png").write_bytes(whole[:20])
    Path("empty.jpg").touch()
    Path("text.jpg").write_text("not a image at all")
    Path("folder.png").mkdir()
    Path("loop.png").symlink_to("loop.png")
    Path("dangling.png").symlink_to("nowhere")
    Path("huge.png").write_bytes(png(60_000, 60_000, 8, 2, b"tiny"))
    Path("script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    Image.fromarray(np.arange(12, dtype=np.int32).reshape(3, 4)).save("int.tif")
    Image.fromarray(np.full((3, 4), 300, np.float32)).save("float.tif")
    Image.fromarray(np.full((3, 4), np.nan, np.float32)).save("nan.tif")
    np.save("object.npy", np.array([{}, None], object), allow_pickle=True)
    np.save("object2.npy", np.full((3, 4), None), allow_pickle=True)
    np.save("long.npy", np.zeros((3, 4), np.int64))
    np.save("many.npy", np.zeros((2, 3, 4, 3), np.uint8))
    np.save("nan.npy", np.full((3, 4), np.nan))
    np.save("range.npy", np.full((3, 4), 255.0))
    np.save("cut.npy", np.zeros((30, 40), np.uint8))
    Path("cut.npy").write_bytes(Path("cut.npy").read_bytes()[:500])
    with open("huge.npy", "wb") as stream:
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "|u1", "fortran_order": False, "shape": (60_000, 60_000, 3)}
        )
    os.mkfifo("pipe.png")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket.png")
    limit = "has 60000 x 60000 = 3,600,000,000 pixels, more than the limit of 100,000,000; max_pixels= raises it"
    expected = {
        "cut.png": "truncated",
        "cut.jpg": "truncated",
        "head.png": "Truncated",
        "empty.jpg": "is empty (0 bytes)",
        "text.jpg": "is not an image in a known format",
        "folder.png": "is a directory",
        "loop.png": "Too many levels of symbolic links",
        "dangling.png": "No such file or directory",
        "missing.png": "No such file or directory",
        "nul\0byte.png": "embedded null byte",
        "x" * 300: "File name too long",
        "huge.png": limit,
        "script.eps": "is not an image in a known format",
        "int.tif": "32-bit integers of unknown range",
        "float.tif": "holds values from 300 to 300; floats are expected in [0, 1]",
        "nan.tif": "holds NaN or infinity",
        "object.npy": "is an array of shape (2,)",
        "object2.npy": "is an array of object",
        "long.npy": "is an array of int64",
        "many.npy": "is an array of shape (2, 3, 4, 3)",
        "nan.npy": "holds NaN or infinity",
        "range.npy": "holds values from 255 to 255",
        "cut.npy": "cannot be decoded",
        "huge.npy": limit,
        "pipe.png": "is a pipe, a socket or a device",
        "socket.png": "is a pipe, a socket or a device",
        "/dev/zero": "is a pipe, a socket or a device",
    }
    images = ["good.png", *expected, "good.png", "good.png"]
    loader = ImageBatchLoader(images, Preprocessing(size=64))
    batches: list[loading.Batch] = []
    # In a thread, so that a hang becomes a failure.
    worker = threading.Thread(target=lambda: batches.extend(loader.batches(2)), daemon=True)
    worker.start()
    worker.join(20)
    listener.close()
    assert [batch.indices for batch in batches] == [(0, len(images) - 2), (len(images) - 1,)]
    assert torch.equal(batches[0].x[0], batches[1].x[0])
    actual = {failure.name: failure.reason for failure in loader.failed}
    assert list(actual) == list(expected)
    for name, message in expected.items():
        assert message in actual[name], name


def test_permission_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)

    def refused(*_: Any) -> None:  # root may read everything, so the error is simulated
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(decoding, "open", refused, raising=False)
    assert failure_reason(path) == "Permission denied"


def test_truncated_files_are_used_or_refused(tmp_path: Path) -> None:
    paths = []
    for name, (image, options, _) in FILES.items():
        image.save(tmp_path / name, **options)
        whole = (tmp_path / name).read_bytes()
        for cut in np.linspace(1, len(whole) - 1, 12).astype(int):
            paths.append(tmp_path / f"{cut}-{name}")
            paths[-1].write_bytes(whole[:cut])
    loader = ImageBatchLoader([*paths, GRAY], Preprocessing(size=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used = sum(len(batch.indices) for batch in loader.batches(50))
    assert used + len(loader.failed) == len(paths) + 1
    assert len(loader.failed) > len(paths) * 0.8


def test_files_are_closed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in FILES]
    for path, (image, options, _) in zip(paths, FILES.values(), strict=True):
        image.save(path, **options)
    frames = [Image.fromarray(noise(6, 8)) for _ in range(3)]
    for kind in ("gif", "tif", "webp", "png"):
        paths.append(tmp_path / f"many.{kind}")
        frames[0].save(paths[-1], save_all=True, append_images=frames[1:])
    for path in list(paths):
        paths.append(path.with_name(f"cut-{path.name}"))
        paths[-1].write_bytes(path.read_bytes()[:60])
    np.save(tmp_path / "a.npy", RGB)
    before = os.listdir("/proc/self/fd")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        loader = ImageBatchLoader([*paths, tmp_path / "a.npy"], Preprocessing(size=8))
        assert sum(len(batch.indices) for batch in loader.batches(3)) >= len(FILES) + 5
        loader.original(0)
    assert os.listdir("/proc/self/fd") == before
    assert not [warning for warning in told if warning.category is ResourceWarning]


def test_each_failure_is_reported_once_and_no_usable_image_raises(tmp_path: Path) -> None:
    one = ImageBatchLoader("gone.png", Preprocessing())
    with pytest.raises(ConvscopeError, match=r"^gone.png: No such file or directory$"):
        list(one.batches(4))
    with pytest.raises(ConvscopeError, match=r"^gone.png: No such file or directory$"):
        one.original(0)
    many = ImageBatchLoader([f"{i}.png" for i in range(5)], Preprocessing())
    for _ in range(2):
        with pytest.raises(ConvscopeError) as raised:
            list(many.batches(4))
        assert len(many.failed) == 5
    several = "; ".join(f"{i}.png: No such file or directory" for i in range(3))
    assert str(raised.value) == f"none of the 5 images can be used: {several}; ..."
    some = ImageBatchLoader([RGB, "gone.png"], Preprocessing())
    assert [len(list(some.batches(4))) for _ in range(2)] == [1, 1]
    assert len(some.failed) == 1


def test_images_are_decoded_when_their_batch_is_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(1) or original(*args, **options))
    loader = ImageBatchLoader([tmp_path / "a.png"] * 7, Preprocessing(size=8))
    batches = loader.batches(3)
    assert len(loader) == 7
    assert not opened
    counts = []
    for batch in batches:
        counts.append((len(batch.indices), len(opened)))
    assert counts == [(3, 3), (3, 6), (1, 7)]


# --- The limit -------------------------------------------------------------------------------------------------------


def test_pixel_limit_applies_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(self: ImageFile.ImageFile) -> None:
        raise MemoryError("memory is spent")

    monkeypatch.setattr(ImageFile.ImageFile, "load", spent)
    (tmp_path / "a.png").write_bytes(png(20_000, 10_000, 8, 0, b"tiny"))  # Pillow itself refuses from 178,956,971 up
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "10000 x 20000 = 200,000,000 pixels, more than the limit of 100,000,000" in failure_reason(
            tmp_path / "a.png"
        )
        assert "memory is spent" in failure_reason(tmp_path / "a.png", max_pixels=200_000_000)
        assert "more than the limit of 199,999,999" in failure_reason(tmp_path / "a.png", max_pixels=199_999_999)


def test_pixel_limit_holds_for_arrays_and_images() -> None:
    assert "has 5 x 6 = 30 pixels, more than the limit of 29" in failure_reason(noise(5, 6), max_pixels=29)
    assert "more than the limit of 29" in failure_reason([Image.new("L", (6, 5))], max_pixels=29)
    assert len(load_batch(noise(5, 6), max_pixels=30)) == 1


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("name", ["rgb.png", "rgb.tif", "lzw.tif", "rgb.webp", "palette.gif", "rgb.bmp", "rgb.jp2"])
def test_pillow_limit_is_suspended_and_restored(
    name: str, fit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, options, expected = FILES[name]
    image.save(tmp_path / name, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = Preprocessing(size=(6, 6), resize=6)
        middle = expected[:, 1:7] if fit == "crop" else load_batch(expected, p)[0].permute(1, 2, 0).numpy()
        assert np.allclose(
            pixels(load_batch(tmp_path / name, p, fit=fit)), middle, atol=1e-7 if fit == "crop" else 1.5 / 255
        )
        assert Image.MAX_IMAGE_PIXELS == 2
        assert failure_reason(tmp_path / name, max_pixels=3)
    assert Image.MAX_IMAGE_PIXELS == 2


def test_pillow_limit_is_restored_when_threads_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    before, inside = Image.MAX_IMAGE_PIXELS, []
    entered, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    original = decoding.upright_opaque

    def slow(image: Image.Image) -> Image.Image:
        number = int(threading.current_thread().name)
        entered[number].set()
        assert leave[number].wait(10)
        inside.append(Image.MAX_IMAGE_PIXELS)
        return original(image)

    monkeypatch.setattr(decoding, "upright_opaque", slow)
    read = [
        threading.Thread(target=load_batch, args=(tmp_path / "a.png", Preprocessing()), name=str(i)) for i in range(2)
    ]
    for thread, event in zip(read, entered, strict=True):
        thread.start()
        assert event.wait(10)
    for thread, event in zip(read, leave, strict=True):  # the first thread in leaves first
        event.set()
        thread.join(10)
    assert inside == [None, None]
    assert before == Image.MAX_IMAGE_PIXELS
