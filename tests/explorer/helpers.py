"""Helpers that read pages and event streams."""

from __future__ import annotations

import io
import json
import re
from html import unescape

import numpy as np
import pytest
from PIL import Image

from convscope.explorer.service import compute


def page_data(html: str) -> dict:
    """Return the data that a page gives to its scripts."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def image_on_page(client, html: str, route: str) -> np.ndarray:
    """Fetch the first image on a page whose URL starts with a route; int (H, W, 3)."""
    url = re.search(rf'(?:src|href)="({route}[^"]*)"', html)[1]
    return np.asarray(Image.open(io.BytesIO(client.get(unescape(url)).content)).convert("RGB"), int)


def read_events(client, path: str) -> list[tuple[str, str]]:
    """Listen to an event stream to its end; return names and data."""
    with client.stream("GET", path) as response:
        text = "".join(response.iter_text())
    events = [part.split("\n", 1) for part in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), data.removeprefix("data: ")) for name, data in events]


def assert_packed(packed: dict, expected: np.ndarray) -> None:
    """Compare a packed map with its values, to the precision of 16-bit integers."""
    assert compute.unpack_map(packed) == pytest.approx(expected, abs=float(np.abs(expected).max()) / 30000)
