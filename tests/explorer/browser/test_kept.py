"""The atlas as a map, and the concepts of a class, in a real browser: live and from the disk."""

from __future__ import annotations

import numpy as np
import pytest

from tests.explorer.browser.test_live import opened

ADDRESSES = {
    "concepts": ("/m/tiny/concepts/1", "/m/tiny/concepts/1.html"),
    "atlas": ("/m/tiny/atlas/relu3", "/m/tiny/atlas/relu3.html"),
}


@pytest.fixture(params=["live", "published"])
def address_of(request, live, site):
    base, which = (live[1], 0) if request.param == "live" else (site, 1)
    return lambda kind: base + ADDRESSES[kind][which]


@pytest.fixture
def atlas(tab, address_of):
    opened(tab, address_of("atlas"))
    tab.locator("#atlas").scroll_into_view_if_needed()
    return tab


@pytest.fixture(scope="session")
def drawn(store):
    (one,) = store.atlases()
    return one.arrays()


def seen(tab) -> np.ndarray:
    """Left, top, width and height of what is seen of the map."""
    return np.array(tab.locator("#atlas").get_attribute("viewBox").split(), float)


def middle_of(tab) -> tuple[float, float]:
    box = tab.locator("#atlas").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_the_whole_map_is_seen_at_first(atlas, drawn):
    left, top, width, height = seen(atlas)
    rows, columns = (drawn["cells"].max(0) - drawn["cells"].min(0) + 1).tolist()
    assert left <= 0.01
    assert top <= 0.01
    assert left + width >= 100 * columns - 0.01
    assert top + height >= 126 * rows - 0.01
    assert width == pytest.approx(100 * columns, abs=0.01) or height == pytest.approx(126 * rows, abs=0.01)
    assert atlas.locator("#farther").is_disabled()


def test_buttons_zoom(atlas):
    before = seen(atlas)
    atlas.locator("#nearer").click()
    nearer = seen(atlas)
    assert nearer[2:] == pytest.approx(before[2:] / 1.4, abs=0.02)
    assert nearer[:2] + nearer[2:] / 2 == pytest.approx(before[:2] + before[2:] / 2, abs=0.02)  # about the middle
    assert atlas.locator("#zoom").inner_text() == "1.4 ×"
    atlas.locator("#nearer").click()
    atlas.locator("#farther").click()
    assert seen(atlas) == pytest.approx(nearer, abs=0.02)
    atlas.locator("#whole").click()
    assert seen(atlas) == pytest.approx(before, abs=0.02)
    for _ in range(12):
        atlas.locator("#nearer").click(force=True)
    assert seen(atlas)[2] == pytest.approx(before[2] / 16, abs=0.02)
    assert atlas.locator("#nearer").is_disabled()


def test_keys_zoom_and_move(atlas):
    atlas.locator("#view").focus()
    before = seen(atlas)
    for _ in range(3):
        atlas.keyboard.press("+")
    nearer = seen(atlas)
    assert nearer[2] == pytest.approx(before[2] / 1.4**3, rel=1e-3)
    for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowLeft", 0, -1), ("ArrowDown", 1, 1), ("ArrowUp", 1, -1)):
        start = seen(atlas)
        atlas.keyboard.press(key)
        moved = seen(atlas) - start
        assert sign * moved[axis] > 0, key
        assert np.delete(moved, axis) == pytest.approx([0, 0, 0], abs=0.02)
    for _ in range(40):
        atlas.keyboard.press("ArrowRight")
    end = seen(atlas)
    atlas.keyboard.press("ArrowRight")
    assert (seen(atlas) == end).all()  # the map's rim
    atlas.keyboard.press("-")
    assert seen(atlas)[2] > nearer[2]
    atlas.keyboard.press("0")
    assert seen(atlas) == pytest.approx(before, abs=0.02)


def test_the_wheel_zooms_where_the_mouse_is(atlas):
    box, before = atlas.locator("#atlas").bounding_box(), seen(atlas)
    share = np.array([0.3, 0.6])
    atlas.mouse.move(box["x"] + share[0] * box["width"], box["y"] + share[1] * box["height"])
    atlas.mouse.wheel(0, -500)
    atlas.wait_for_function("(v) => document.getElementById('atlas').getAttribute('viewBox') !== v", arg=" ".join(
        f"{v:.2f}" for v in before
    ))  # fmt: skip
    after = seen(atlas)
    assert after[2] == pytest.approx(before[2] / np.e, rel=0.01)
    point = before[:2] + share * before[2:]
    margin = np.abs(after[:2] + share * after[2:] - point)
    inside = (after[:2] > 0.01) & (after[:2] + after[2:] < before[:2] + before[2:] - 0.01)
    assert inside.any()
    assert margin[inside] == pytest.approx(0, abs=before[2] / 300)


def test_a_drag_moves_the_map_and_chooses_nothing(atlas):
    atlas.locator("#nearer").click(click_count=4)
    before = seen(atlas)
    x, y = middle_of(atlas)
    atlas.mouse.move(x, y)
    atlas.mouse.down()
    atlas.mouse.move(x - 60, y - 40, steps=5)
    atlas.mouse.up()
    unit = before[2] / atlas.locator("#atlas").bounding_box()["width"]
    assert seen(atlas)[:2] - before[:2] == pytest.approx([60 * unit, 40 * unit], abs=0.05)
    assert atlas.locator(".chosen").count() == 0


PINCH = """([x, y]) => {
  const svg = document.getElementById("atlas");
  const tell = (kind, pointerId, [clientX, clientY]) => svg.dispatchEvent(new PointerEvent(kind, {
    pointerId, pointerType: "touch", clientX, clientY, bubbles: true, button: kind === "pointermove" ? -1 : 0 }));
  tell("pointerdown", 7, [x - 50, y]);
  tell("pointerdown", 8, [x + 50, y]);
  tell("pointermove", 7, [x - 100, y]);
  tell("pointermove", 8, [x + 100, y]);
  tell("pointerup", 7, [x - 100, y]);
  tell("pointerup", 8, [x + 100, y]);
}"""


def test_two_fingers_zoom(atlas):
    atlas.locator("#nearer").click(click_count=4)
    before = seen(atlas)
    atlas.evaluate(PINCH, middle_of(atlas))
    after = seen(atlas)
    assert after[2:] == pytest.approx(before[2:] / 2, rel=1e-3)
    assert after[:2] + after[2:] / 2 == pytest.approx(before[:2] + before[2:] / 2, abs=before[2] / 100)


def told(tab) -> tuple[list[str], list[float]]:
    names = tab.locator("#cell .classes .name").all_inner_texts()
    effects = [float(t.replace("−", "-")) for t in tab.locator("#cell .classes .share").all_inner_texts()]
    return names, effects


def test_a_click_tells_of_a_region(atlas, drawn, model):
    number = len(drawn["cells"]) // 2
    atlas.locator("a[data-cell] .room").nth(number).click()
    row, column = drawn["cells"][number]
    names, effects = told(atlas)
    assert names == [model.class_name(int(k)) for k in drawn["classes"][number]]
    assert effects == pytest.approx(drawn["effects"][number].tolist(), rel=6e-3)
    assert atlas.locator("#cell strong").inner_text() == f"{drawn['counts'][number]} vectors"
    assert atlas.url.endswith(f"#cell-{row}-{column}")
    own = np.unique(drawn["sources"][drawn["cell_index"] == number, 0])
    assert atlas.locator("#cell .sources li").count() == min(6, len(own))
    images = atlas.locator("#cell .sources img")
    images.first.wait_for()
    atlas.wait_for_function("() => [...document.querySelectorAll('.sources img')].every((i) => i.naturalWidth > 0)")
    images.first.click()
    atlas.wait_for_url("**/data/**")


def test_tab_goes_from_region_to_region(atlas, drawn, model):
    atlas.locator("#view").focus()
    atlas.keyboard.press("+")
    atlas.keyboard.press("+")
    for number in range(len(drawn["cells"])):
        atlas.keyboard.press("Tab")
        assert told(atlas)[0] == [model.class_name(int(k)) for k in drawn["classes"][number]]
        left, top, width, height = seen(atlas)
        row, column = (drawn["cells"][number] - drawn["cells"].min(0)).tolist()
        assert left <= 100 * column + 50 <= left + width
        assert top <= 126 * row + 63 <= top + height


def test_a_region_has_an_address(tab, address_of, drawn):
    row, column = drawn["cells"][-1]
    opened(tab, f"{address_of('atlas')}#cell-{row}-{column}")
    assert tab.locator("#zoom").inner_text() == "3.0 ×"
    assert tab.locator(".chosen").get_attribute("href") == f"#cell-{row}-{column}"
    assert tab.locator("#cell strong").inner_text() == f"{drawn['counts'][-1]} vectors"


def test_names_appear_when_one_comes_nearer(new_tab, address_of):
    tab = opened(new_tab(390, 800), address_of("atlas"))
    assert tab.locator("#atlas text").first.evaluate("(t) => getComputedStyle(t).visibility") == "visible"  # 3 x 3
    tab.evaluate("document.getElementById('view').style.width = '150px'")
    tab.wait_for_function("() => getComputedStyle(document.querySelector('#atlas text')).visibility === 'hidden'")
    tab.locator("#nearer").click(click_count=3)
    assert tab.locator("#atlas text").first.evaluate("(t) => getComputedStyle(t).visibility") == "visible"


# --- concepts ---


COLOURS = """(canvas, [rows, columns]) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const middle = (i, count, length) => Math.floor((i + 0.5) / count * length);
  const read = (r, c) => copy.getImageData(middle(c, columns, canvas.width), middle(r, rows, canvas.height), 1, 1).data;
  return Array.from({ length: rows }, (_, r) => Array.from({ length: columns }, (_, c) => [...read(r, c)].slice(0, 3)));
}"""


def pixels(tab, selector: str, rows: int = 8, columns: int = 8) -> np.ndarray:
    """The colours of a canvas in the middle of each cell of a grid."""
    return np.array(tab.locator(selector).first.evaluate(COLOURS, [rows, columns]))


def test_heat_over_the_judged_pictures_is_the_librarys(tab, address_of, store):
    """Each concept on one scale for all pictures; at the middle of a place nothing is interpolated."""
    from convscope.images.colormap import apply_colormap

    opened(tab, address_of("concepts"))
    heats = store.concepts()[0].arrays()["heatmaps"]
    places = heats.shape[2:]

    def agrees(picture: int, concept: int) -> bool:
        known = apply_colormap(heats[picture, concept] / heats[:, concept].max(), "jet").astype(int)
        shown = pixels(tab, f'#judged canvas[data-picture="{picture}"]', *places)
        return bool(np.median(np.abs(shown - known)) <= 12)

    assert all(agrees(number, 0) for number in (0, 5, 11))
    tab.locator('[name="concept"]').select_option("2")
    assert all(agrees(number, 2) for number in (0, 5, 11))
    assert not agrees(0, 0)
    tab.locator('[name="concept"]').select_option("")
    assert tab.locator("#judged canvas:visible").count() == 0


def test_another_picture_is_looked_at(tab, live):
    opened(tab, f"{live[1]}/m/tiny/concepts/1")
    before = pixels(tab, 'canvas[data-current="0"]')
    tab.locator("nav a", has_text="second.png").click()
    tab.wait_for_url("**picture=second**")
    after = pixels(tab, 'canvas[data-current="0"]')
    assert np.abs(before - after).max() > 20
    assert tab.locator("#current-title").inner_text() == "All concepts on second.png"


def test_the_class_page_leads_to_its_concepts_and_the_atlas(tab, address_of):
    base = address_of("concepts").replace("/concepts/1", "/class/1")
    opened(tab, base)
    tab.get_by_role("link", name="Its concepts at relu3").click()
    tab.locator(".concept").first.wait_for()
    assert tab.locator(".concept").count() == 3
    opened(tab, base)
    tab.get_by_role("link", name="The atlas of relu3").click()
    tab.locator("#atlas").wait_for()


def test_where_nothing_is_kept_the_line_can_be_copied(tab, live):
    opened(tab, f"{live[1]}/m/tiny/concepts/0")
    line = tab.locator(".line code", has_text="convscope concepts tiny PICTURES --target 0")
    assert line.is_visible()
    line.locator("xpath=ancestor::div[1]").locator("[data-copy]").click()
    tab.wait_for_function("() => document.getElementById('say').textContent !== ''")
