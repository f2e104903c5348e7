"""The published site, opened from the disk, and properties of all pages, live and published."""

from __future__ import annotations

import re

import numpy as np
import pytest

import convscope
from tests.explorer.browser.test_live import open_page, painted
from tests.oracles.explorer import smooth_image

PAGES = {
    "image": "/m/tiny/image/first",
    "image_units": "/m/tiny/image/first/units",
    "network": "/m/tiny",
    "layer": "/m/tiny/layer/relu3",
    "units": "/m/tiny/units/relu3",
    "unit": "/m/tiny/unit/relu3/2",
    "class": "/m/tiny/class/1",
    "saved_results": "/m/tiny/concepts",
    "concepts": "/m/tiny/concepts/1",
    "atlas": "/m/tiny/atlas/relu3",
    "diagnosis": "/m/tiny/diagnosis",
    "story": "/m/tiny/story",
    "example": "/m/tiny/data/3",
    "glossary": "/glossary",
}


def test_a_published_image_page_responds_to_clicks(tab, site):
    open_page(tab, f"{site}/index.html")
    before = painted(tab)
    tab.locator("#classes a").nth(1).click()
    tab.wait_for_function("() => document.querySelectorAll('#classes a')[1].getAttribute('aria-current') === 'true'")
    assert np.abs(painted(tab) - before).max() > 20
    tab.locator('[name="compare"]').select_option(index=1)
    tab.locator('[data-stage="comparison"]').wait_for(state="visible")
    tab.locator('[name="evidence"]').select_option("signed")
    assert tab.locator("#scale-high").inner_text() == "for the class"
    assert tab.locator("#drop, #faithfulness").count() == 0


def test_a_published_layer_page_lists_the_units_at_a_position(tab, site, tiny):
    open_page(tab, f"{site}/m/tiny/layer/relu3.html")
    maps = convscope.activations(tiny, [smooth_image(0, 240, 360)], ["relu3"])["relu3"][0]
    tab.locator("#position").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#position-units p")
    units = [u for u in np.argsort(-maps[:, 8, 8], kind="stable") if maps[u, 8, 8] > 0]
    assert tab.locator("#position-units li a").all_inner_texts() == [f"unit {u}" for u in units[:6]]
    layer = tiny.layers.find("relu3")
    left = max(0, layer.origin[1] + 8 * layer.stride[1]) / 32
    assert float(tab.locator("#field").get_attribute("x")) == pytest.approx(100 * left)
    tab.locator("#position-units li a").first.click()
    tab.wait_for_url(re.compile(rf"unit/relu3/{units[0]}\.html$"))


def test_published_pages_link_from_the_network_to_units_examples_and_classes(tab, site):
    open_page(tab, f"{site}/index.html")
    tab.locator("nav a", has_text="Layers").click()
    tab.locator("#layers a", has_text="relu3").first.click()
    tab.wait_for_url(re.compile("layer/relu3.html$"))
    tab.locator("#grid a").first.click()
    tab.wait_for_url(re.compile(r"unit/relu3/\d+\.html$"))
    assert tab.locator(".patches li").count() == 9
    tab.locator(".patches a").first.click()
    tab.wait_for_url(re.compile(r"data/\d+\.html$"))
    tab.locator(".classes a").first.click()
    tab.wait_for_url(re.compile(r"class/\d+\.html$"))
    tab.go_back()
    tab.go_back()
    assert re.search(r"unit/relu3/\d+\.html$", tab.url)


@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_pages_fit_the_window_load_nothing_from_elsewhere_and_do_not_shift(new_tab, url_of, width):
    tab, requests = new_tab(width), []
    tab.on("request", lambda request: requests.append(request.url))
    for kind, path in PAGES.items():
        open_page(tab, url_of(path))
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, kind
        assert tab.evaluate("window.layoutShift") < 0.02, kind
    start = url_of(PAGES["network"]).partition("/m/")[0]
    assert [url for url in requests if not url.startswith((start, "data:", "blob:"))] == []


@pytest.mark.parametrize("width", [1024, 390])
def test_pages_do_not_shift_on_a_slow_connection(new_tab, live, width):
    tab = new_tab(width)
    devtools = tab.context.new_cdp_session(tab)
    devtools.send("Network.enable")
    conditions = {"offline": False, "latency": 60, "downloadThroughput": 60_000, "uploadThroughput": 60_000}
    devtools.send("Network.emulateNetworkConditions", conditions)
    for kind in ("image", "unit", "class") * 2:  # on the second visit cached styles no longer delay the first paint
        open_page(tab, live[1] + PAGES[kind]).wait_for_timeout(200)  # layout shifts are reported with a delay
        assert tab.evaluate("window.layoutShift") < 0.02, kind


def test_pages_meet_wcag_a_and_aa(new_tab, url_of, axe):
    """All rules in the light theme; color contrast in the dark theme as well."""
    tab = new_tab(color_scheme="light", bypass_csp=True)

    def violations(scheme: str, rules: list[str]) -> list[tuple[str, str, str]]:
        tab.emulate_media(color_scheme=scheme)
        result = tab.evaluate("(rules) => axe.run({ preload: false, runOnly: rules })", rules)
        return [(scheme, v["id"], v["nodes"][0]["html"][:160]) for v in result["violations"]]

    failures = {}
    for kind, path in PAGES.items():
        open_page(tab, url_of(path))
        tab.evaluate(axe)
        failures[kind] = violations("light", ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"])
        failures[kind] += violations("dark", ["color-contrast"])
    assert failures == {kind: [] for kind in PAGES}


def test_the_theme_is_remembered(tab, live):
    background = "getComputedStyle(document.body).backgroundColor"
    open_page(tab, f"{live[1]}/glossary")
    light = tab.evaluate(background)
    tab.locator("#theme").click()
    assert tab.evaluate(background) != light
    open_page(tab, f"{live[1]}/m/tiny")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
