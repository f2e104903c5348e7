"""Facts about images: closed forms, and other libraries."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from convscope.diagnosis import facts
from convscope.diagnosis.facts import FACTS, ImageData, measure_image, srgb_to_lab
from convscope.diagnosis.forward import POSITION_FACTS, position_facts


def measured(image: Image.Image, content: bytes | None = None) -> dict[str, float]:
    return dict(zip(FACTS, measure_image([image], content).tolist(), strict=True))


def plain(color: tuple[int, int, int], size: tuple[int, int] = (300, 200)) -> Image.Image:
    return Image.new("RGB", size, color)


def textured(size: tuple[int, int] = (300, 200)) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_a_plain_image():
    values = measured(plain((51, 51, 51)))
    assert values["brightness"] == pytest.approx(0.2)
    assert values["contrast"] == pytest.approx(0, abs=1e-6)
    assert values["saturation"] == pytest.approx(0, abs=1e-6)
    assert values["sharpness"] == pytest.approx(-2)
    assert (values["width"], values["height"], values["aspect ratio"]) == (300, 200, 1.5)
    assert values["megapixels"] == pytest.approx(0.06)
    assert values["margin"] == 1
    assert math.isnan(values["JPEG quality"])
    assert math.isnan(values["bits per pixel"])


def test_colors():
    corners = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0.5, 0.5, 0.5]], np.float32)
    published = [
        [100, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [0, 0, 0],
        [53.39, 0, 0],
    ]
    np.testing.assert_allclose(srgb_to_lab(corners), published, atol=0.03)
    red, blue, green = (measured(plain(color)) for color in ((255, 0, 0), (0, 0, 255), (0, 255, 0)))
    assert red["redness"] > 50 > 0 > green["redness"]
    assert green["yellowness"] > 50 > 0 > blue["yellowness"]
    assert red["saturation"] == pytest.approx(1)


def test_light():
    half = np.zeros((200, 200, 3), np.uint8)
    half[:, 100:] = 255
    values = measured(Image.fromarray(half))
    assert values["brightness"] == pytest.approx(0.5, abs=0.01)
    assert values["contrast"] == pytest.approx(0.5, abs=0.01)
    assert values["shadows"] == pytest.approx(0.5, abs=0.01)
    assert values["highlights"] == pytest.approx(0.5, abs=0.01)


def test_sharpness_falls_with_blur_and_hardly_changes_with_size(photos):
    photo = Image.open(photos[1]).convert("RGB")
    values = [measured(photo.filter(ImageFilter.GaussianBlur(radius)))["sharpness"] for radius in (0, 2, 4, 8)]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 1
    sizes = [measured(photo.resize((width, width * 9 // 16)))["sharpness"] for width in (600, 900)]
    assert max(sizes) - min(sizes) < 0.3


def test_the_laplacian_is_that_of_a_quadratic():
    y = (np.arange(50)[:, None] ** 2 * 0.05 * np.ones(50)).astype(np.uint8)
    image = ImageData(50, 50, Image.fromarray(y).convert("RGB"))
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], float)
    gray = image.gray.astype(float)
    laplacian = sum(kernel[i, j] * gray[i : 48 + i, j : 48 + j] for i in range(3) for j in range(3))
    assert facts.sharpness(image) == pytest.approx(math.log10(laplacian.var() + 0.01))


def test_margins():
    framed = plain((255, 255, 255), (400, 400))
    framed.paste(textured((400, 200)), (0, 100))
    assert measured(framed)["margin"] == pytest.approx(0.5, abs=0.02)
    assert measured(framed.rotate(90))["margin"] == pytest.approx(0.5, abs=0.02)
    assert measured(textured())["margin"] == 0


def test_edge_density_is_that_of_the_part_with_text():
    stripes = np.full((256, 256, 3), 128, np.uint8)
    stripes[:128] = np.tile(np.array([0, 0, 255, 255], np.uint8), 64)[None, :, None]
    assert measured(Image.fromarray(stripes))["edge density"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 90, 99, 100])
def test_jpeg_quality(quality):
    buffer = io.BytesIO()
    textured((64, 64)).save(buffer, format="JPEG", quality=quality)
    content = buffer.getvalue()
    values = measured(Image.open(buffer).convert("RGB"), content)
    assert values["JPEG quality"] == quality
    assert values["bits per pixel"] == pytest.approx(8 * len(content) / 64**2)


def test_other_modes_and_extreme_sizes():
    gray = textured().convert("L")
    levels = [Image.fromarray(np.asarray(gray, np.float32) / 255)]
    expected = measure_image([gray], None)
    np.testing.assert_allclose(measure_image(levels, None), expected, atol=0.02)
    np.testing.assert_allclose(measure_image(levels * 3, None), expected, atol=0.02)
    np.testing.assert_allclose(measure_image(levels * 2, None), expected, atol=0.02)
    for size in ((1, 1), (2000, 1), (1, 3000), (3, 3)):
        values = measured(textured(size))
        assert 0 <= values["brightness"] <= 1
        assert (values["width"], values["height"]) == size


def test_where_the_evidence_lies():
    evidence = torch.zeros(4, 8, 8)
    evidence[0, 0, 7] = 2  # the upper right corner
    evidence[1] = 1
    evidence[2, 3:5, 3:5] = 0.5
    evidence[2, 0, 0] = -3  # evidence against the class does not count
    values = position_facts(evidence)
    x, y, spread, rim = (values[:, list(POSITION_FACTS).index(name)] for name in POSITION_FACTS)
    torch.testing.assert_close(x[:3], torch.tensor([7.5 / 8, 0.5, 0.5]))
    torch.testing.assert_close(y[:3], torch.tensor([0.5 / 8, 0.5, 0.5]))
    torch.testing.assert_close(spread[:3], torch.tensor([1 / 64, 1, 4 / 64]))
    torch.testing.assert_close(rim[:3], torch.tensor([1, 28 / 64, 0]))
    assert values[3].isnan().all()


def test_planted_facts_separate_images(photos):
    photo = Image.open(photos[2]).convert("RGB").resize((320, 180))
    dark = photo.point(lambda level: level // 3)
    buffer = io.BytesIO()
    photo.save(buffer, format="JPEG", quality=15)
    original, changed = measured(photo), measured(dark)
    assert changed["brightness"] < original["brightness"] / 2
    assert changed["width"] == original["width"]
    assert measured(Image.open(buffer), buffer.getvalue())["JPEG quality"] == 15
