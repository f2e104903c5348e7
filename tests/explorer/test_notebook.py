"""The explorer in a notebook."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

import convscope
from tests.oracles.explorer import smooth_image


def wait_until(condition) -> None:
    for _ in range(400):  # the decoder, which may be starting, takes long on a busy machine
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("not within 40 s")


def test_notebook_shows_a_frame_until_it_is_closed(tiny):
    threads = set(threading.enumerate())
    frame = convscope.show(tiny, smooth_image(0), height=500)
    try:
        assert f'<iframe src="{frame.url}" width="100%" height="500"' in frame._repr_html_()
        page = httpx.get(frame.url, follow_redirects=True)
        assert page.status_code == 200
        assert page.url.path.endswith("/image/image-0")
        assert "frame-ancestors 'self' http://localhost:*" in page.headers["content-security-policy"]
        assert "x-frame-options" not in page.headers
    finally:
        frame.close()
    wait_until(lambda: not [t for t in set(threading.enumerate()) - threads if t.name.startswith("convscope")])


def test_show_refuses_what_it_cannot_show(tiny):
    with pytest.raises(convscope.ConvscopeError, match="model is a list; the model comes first, the images second"):
        convscope.show([])
    with pytest.raises(convscope.ConvscopeError, match=r"none\.png"):
        convscope.show(tiny, "none.png")
    with pytest.raises(convscope.ConvscopeError, match="height is 50"):
        convscope.show(tiny, height=50)
