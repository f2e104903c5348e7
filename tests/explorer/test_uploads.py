"""Uploads: keys, bounds, broken files, the decoder's process."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service.display_names import display_name
from convscope.explorer.service.state import Explorer
from convscope.explorer.service.uploads import UploadDecoder
from tests.oracles.explorer import encode_image, smooth_image


@pytest.fixture(scope="module")
def client(tiny):
    decoder = UploadDecoder(max_bytes=300_000, max_pixels=400_000, timeout=20)
    with TestClient(create_app(Explorer({"tiny": tiny}), decoder=decoder), base_url="http://localhost") as client:
        yield client


def upload(client, content: bytes, name: str = "x"):
    return client.post(f"/api/images?name={name}", content=content)


def test_the_same_pixels_get_the_same_key(client):
    png, bmp = (upload(client, encode_image(smooth_image(7), f), f"x.{f}") for f in ("PNG", "BMP"))
    assert png.json()["key"] == bmp.json()["key"]
    assert png.json() | {"key": "", "name": ""} == {"key": "", "name": "", "height": 40, "width": 60}
    assert client.get(f"/m/tiny/image/{png.json()['key']}").status_code == 200


def test_overlay_of_a_large_upload_is_bounded(client):
    key = upload(client, encode_image(smooth_image(2, 40, 3000))).json()["key"]
    png = client.get(f"/api/models/tiny/images/{key}/heatmap.png?target=1").content
    assert Image.open(io.BytesIO(png)).size == (2048, 27)


def test_broken_files_are_refused_and_do_no_harm(client):
    jpeg, png = encode_image(smooth_image(3), "JPEG"), encode_image(smooth_image(3))
    generator = np.random.default_rng(0)
    broken = [
        b"",
        b"x",
        b"\x89PNG\r\n\x1a\n",
        encode_image(smooth_image(1, 700, 700)),
        b"GIF89a" + b"\xff" * 100,
        b"%!PS-Adobe",
        b"\x93NUMPY" * 9,
    ]
    broken += [jpeg[: int(n)] for n in generator.integers(1, len(jpeg), 12)]
    broken += [png[: int(n)] for n in generator.integers(1, len(png), 12)]
    for n in range(24):
        content = bytearray(png if n % 2 else jpeg)
        for position in generator.integers(0, len(content), 6):
            content[position] = generator.integers(256)
        broken.append(bytes(content))
    for content in broken:
        response = upload(client, content)
        assert response.status_code in (200, 422), content[:40]
        assert set(response.json()) in ({"error"}, {"key", "name", "height", "width"})
    assert upload(client, jpeg).status_code == 200


def test_uploads_are_bounded_in_bytes(client):
    response = upload(client, b"0" * 300_001)
    assert response.status_code == 422
    assert "300,000 bytes" in response.json()["error"]


def test_decompression_bombs_are_refused_before_they_are_decoded(client):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    response = upload(client, buffer.getvalue(), "bomb.png")
    assert response.status_code == 422
    assert "400,000,000 pixels" in response.json()["error"]


@pytest.mark.slow
def test_worker_that_takes_too_long_is_killed_and_replaced():
    decoder = UploadDecoder(timeout=20)
    try:
        decoder.warm_up()
        first = decoder.worker
        decoder.timeout = 0.0
        with pytest.raises(convscope.ConvscopeError, match="longer than 0 s"):
            decoder.decode(encode_image(smooth_image(0, 2000, 2000)))
        assert not first.is_alive
        decoder.timeout = 20
        assert (decoder.decode(encode_image(smooth_image(0))) == smooth_image(0)).all()
        second = decoder.worker
        assert second.pid != first.pid
        with pytest.raises(convscope.ConvscopeError, match="known format"):
            decoder.decode(b"not an image")
        assert decoder.worker is second
    finally:
        decoder.close()
    assert decoder.worker is None
    assert not second.is_alive


def test_empty_and_large_uploads_are_refused_without_a_worker():
    decoder = UploadDecoder(max_bytes=10)
    with pytest.raises(convscope.ConvscopeError, match="is empty"):
        decoder.decode(b"")
    with pytest.raises(convscope.ConvscopeError, match="11 bytes; images of up to 10 bytes"):
        decoder.decode(b"0" * 11)
    assert decoder.worker is None


@pytest.mark.slow
def test_application_starts_and_ends_its_decoder(tiny):
    decoder = UploadDecoder()
    with TestClient(create_app(Explorer({"tiny": tiny}), decoder=decoder), base_url="http://localhost"):
        for _ in range(200):
            if decoder.worker is not None:
                break
            time.sleep(0.05)
        assert decoder.worker is not None
        assert decoder.worker.is_alive
    assert decoder.worker is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("C:\\x\\cat.png", "cat.png"),
        ("/etc/passwd", "passwd"),
        ("a\u202egnp.exe\n\x1b[2J", "agnp.exe[2J"),
        ("", "image"),
        ("../..", ".."),
        ("x" * 200, "x" * 71 + "…" + "x" * 8),
    ],
)
def test_file_names_are_displayed_in_one_plain_line(name, expected):
    assert display_name(name) == expected
