"""What removals change, on live and published pages: the table of a layer's units, a unit's page, an image in words."""

from __future__ import annotations

import numpy as np
import pytest

import convscope
from convscope.explorer.service import compute, removals
from tests.explorer.browser.test_live import open_page
from tests.oracles.explorer import smooth_image


@pytest.fixture(scope="module")
def x(tiny):
    return compute.preprocess(tiny, smooth_image(0, 240, 360))


def first_cells(tab) -> list[int]:
    """Return the numbers of the units, from top to bottom."""
    return [int(text.split()[0]) for text in tab.locator("#units tbody th").all_inner_texts()]


def test_the_table_is_sorted_by_the_effect_on_a_class(tab, url_of, tiny, x):
    open_page(tab, url_of("/m/tiny/units/relu3"))
    tab.wait_for_function("() => !document.querySelector('#units').textContent.includes('…')")
    classes = convscope.predict(tiny, x).indices[0]
    for target in classes[:2].tolist():
        tab.locator('[name="target"]').select_option(str(target))
        tab.wait_for_function("() => !document.querySelector('#units').textContent.includes('…')")
        effects = -convscope.effects(tiny, x, "relu3", targets=target).logits[:, 0, 0]
        order = np.argsort(-effects, kind="stable")
        assert first_cells(tab) == order.tolist()
        shown = [float(text) for text in tab.locator("#units tbody td.number:nth-child(3)").all_inner_texts()]
        np.testing.assert_allclose(shown, effects[order], atol=1e-3)
    tab.locator('[name="order"]').select_option("unit")
    assert first_cells(tab) == list(range(10))
    assert tab.locator("#units .tile image").count() == 10
    tab.locator("#units th a").nth(3).click()
    tab.wait_for_function("() => document.querySelector('h1').textContent.includes('unit 3')")


def test_a_unit_page_shows_what_changes_without_it(tab, url_of, tiny, tiny_store, x):
    open_page(tab, url_of("/m/tiny/unit/relu3/2"))
    mean = float(tiny_store.unit("relu3", 2).statistics["mean"])
    for how, value in (("zero", 0.0), ("mean", mean)):
        tab.locator('[name="how"]').select_option(how)
        expected = [
            f"{row['before']:.2f} → {row['after']:.2f}" for row in removals.logit_changes(tiny, x, "relu3", 2, value)
        ]
        tab.wait_for_function("(text) => document.querySelector('#removal td')?.textContent === text", arg=expected[0])
        assert tab.locator("#removal td:nth-child(2)").all_inner_texts() == expected
    headings = tab.locator("#removal h3").all_inner_texts()
    assert headings == ["Lower without it: the unit speaks for them", "Higher without it: it speaks against them"]


def test_an_image_is_explained_in_words(tab, url_of, tiny, x):
    open_page(tab, url_of("/m/tiny/image/first"))
    for position, target in enumerate(convscope.predict(tiny, x).indices[0, :2].tolist()):
        tab.locator("#classes a").nth(position).click()
        expected = convscope.explain(tiny, x, target, features=removals.FEATURES)
        tab.wait_for_function(
            "(text) => document.getElementById('explanation-sentence').textContent === text", arg=expected.sentences[0]
        )
        assert tab.locator("#explanation-units li").count() == expected.counts[0]
