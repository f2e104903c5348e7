"""The published pages from the disk, in a real browser; and what holds for both kinds of pages."""

from __future__ import annotations

import re

import numpy as np
import pytest

import convscope
from tests.explorer.browser.test_live import opened, painted

PAGES = {
    "picture": ("/m/tiny/picture/first", "/m/tiny/picture/first.html"),
    "network": ("/m/tiny", "/m/tiny.html"),
    "layer": ("/m/tiny/layer/relu3", "/m/tiny/layer/relu3.html"),
    "unit": ("/m/tiny/unit/relu3/2", "/m/tiny/unit/relu3/2.html"),
    "class": ("/m/tiny/class/1", "/m/tiny/class/1.html"),
    "kept": ("/m/tiny/concepts", "/m/tiny/concepts.html"),
    "concepts": ("/m/tiny/concepts/1", "/m/tiny/concepts/1.html"),
    "atlas": ("/m/tiny/atlas/relu3", "/m/tiny/atlas/relu3.html"),
    "story": ("/m/tiny/story", "/m/tiny/story.html"),
    "example": ("/m/tiny/data/3", "/m/tiny/data/3.html"),
    "glossary": ("/glossary", "/glossary.html"),
}


@pytest.fixture(params=["live", "published"])
def address_of(request, live, site):
    """The address of a page, by its kind."""
    base, which = (live[1], 0) if request.param == "live" else (site, 1)
    return lambda kind: base + PAGES[kind][which]


def test_a_published_picture_answers_clicks_from_the_disk(tab, site):
    opened(tab, f"{site}/index.html")
    before = painted(tab)
    tab.locator("#classes a").nth(1).click()
    tab.wait_for_function("() => document.querySelectorAll('#classes a')[1].getAttribute('aria-current') === 'true'")
    assert np.abs(painted(tab) - before).max() > 20
    tab.locator('[name="beside"]').select_option(index=1)
    tab.locator('[data-stage="beside"]').wait_for(state="visible")
    tab.locator('[name="sign"]').select_option("signed")
    assert tab.locator("#scale-high").inner_text() == "for"
    assert tab.locator("#drop, #truth").count() == 0


def test_a_published_layer_knows_who_speaks_at_a_place(tab, site, model):
    from tests.oracles.explorer import smooth_image

    opened(tab, f"{site}/m/tiny/layer/relu3.html")
    maps = convscope.activations(model, [smooth_image(0, 240, 360)], ["relu3"])["relu3"][0]
    tab.locator("#place").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#there p")
    best = [u for u in np.argsort(-maps[:, 8, 8], kind="stable") if maps[u, 8, 8] > 0]
    assert tab.locator("#there li a").all_inner_texts() == [f"unit {u}" for u in best[:6]]
    row = model.layers.find("relu3")
    left = max(0, row.origin[1] + 8 * row.stride[1]) / 32
    assert float(tab.locator("#field").get_attribute("x")) == pytest.approx(100 * left)
    tab.locator("#there li a").first.click()
    tab.wait_for_url(re.compile(rf"unit/relu3/{best[0]}\.html$"))


def test_a_walk_through_the_published_pages(tab, site):
    opened(tab, f"{site}/index.html")
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


def test_nothing_is_loaded_from_elsewhere(tab, address_of):
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    for kind in PAGES:
        opened(tab, address_of(kind))
    start = address_of("network").partition("/m/")[0]
    assert [url for url in asked if not url.startswith((start, "data:", "blob:"))] == []


@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_pages_fit_their_window(new_tab, address_of, width):
    tab = new_tab(width)
    for kind in PAGES:
        opened(tab, address_of(kind))
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, kind
        assert tab.evaluate("window.shifts") < 0.02, kind


@pytest.mark.parametrize("width", [1024, 390])
def test_pages_come_whole_by_a_slow_connection(new_tab, live, width):
    """Parts of a page that come one after the other must not push those that are read already."""
    tab = new_tab(width)
    slow = {"offline": False, "latency": 60, "downloadThroughput": 60_000, "uploadThroughput": 60_000}
    devtools = tab.context.new_cdp_session(tab)
    devtools.send("Network.enable")
    devtools.send("Network.emulateNetworkConditions", slow)
    for kind in ("picture", "unit", "class") * 2:  # styles that are kept from the first visit no longer hold paint back
        opened(tab, live[1] + PAGES[kind][0]).wait_for_timeout(200)  # what moved is told a little later
        assert tab.evaluate("window.shifts") < 0.02, kind


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_can_be_used_by_everybody(new_tab, address_of, axe, scheme):
    """WCAG A and AA, as far as a program can tell."""
    tab = new_tab(color_scheme=scheme, bypass_csp=True)
    found = {}
    for kind in PAGES:
        opened(tab, address_of(kind))
        tab.evaluate(axe)
        told = tab.evaluate("axe.run({ preload: false, runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'] })")
        found[kind] = [(v["id"], v["nodes"][0]["html"][:160]) for v in told["violations"]]
    assert found == {kind: [] for kind in PAGES}


def test_light_and_dark_are_remembered(tab, live):
    opened(tab, f"{live[1]}/glossary")
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.locator("#theme").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != light
    opened(tab, f"{live[1]}/m/tiny")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
