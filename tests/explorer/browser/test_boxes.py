"""A click on a detected box shows its heatmap."""

from __future__ import annotations

import pytest

from tests.oracles.detectors import cell_detector, image_with_squares


@pytest.fixture
def address():
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    from convscope.explorer import server
    from convscope.explorer.app import create_app
    from convscope.explorer.service.state import Explorer

    explorer = Explorer({"cells": cell_detector()})
    image = image_with_squares({(8, 16): (255, 255, 255), (24, 0): (204, 204, 204)}).repeat(8, 0).repeat(8, 1)
    explorer.images.add_sample(image, "squares.png", "squares.png")
    listening = server.bind_socket("127.0.0.1", 0)
    running = server.serve_in_thread(create_app(explorer), listening)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True


def test_click_on_a_box_shows_its_heatmap(tab, address, tmp_path):
    tab.goto(f"{address}/m/cells/image/squares")
    tab.locator("rect[data-box='1']").click()
    tab.locator(".caption", has_text="gray, box 1 · odam").wait_for()
    assert tab.url.endswith("#box-1")
    assert tab.locator("#boxes a[data-box='1']").get_attribute("aria-current") == "true"
    assert "--box 1" in tab.locator("[data-language='shell']").text_content()
    tab.screenshot(path=tmp_path / "box.png", full_page=True)
    tab.locator("#classes a").first.click()
    tab.locator(".caption", has_text="gray · grad-cam").wait_for()
    assert tab.locator("[data-box][aria-current]").count() == 0


def test_address_of_a_box_opens_it(tab, address):
    tab.goto(f"{address}/m/cells/image/squares#box-0")
    tab.locator(".caption", has_text="gray, box 0").wait_for()
    assert tab.locator("#boxes a[data-box='0']").get_attribute("aria-current") == "true"
    assert tab.url.endswith("#box-0")
