"""The atlas and the concepts of a class in a real browser, live and published."""

from __future__ import annotations

import numpy as np
import pytest

from convscope.images.colormap import apply_colormap
from tests.explorer.browser.test_live import open_page

ATLAS, CONCEPTS = "/m/tiny/atlas/relu3", "/m/tiny/concepts/1"
CELL_WIDTH, CELL_HEIGHT = 100, 126


@pytest.fixture
def atlas(tab, url_of):
    open_page(tab, url_of(ATLAS))
    tab.locator("#atlas").scroll_into_view_if_needed()
    return tab


@pytest.fixture(scope="session")
def arrays(tiny_store):
    (result,) = tiny_store.atlases()
    return result.arrays()


def view_box(tab) -> np.ndarray:
    """Return left, top, width and height of the visible part of the map."""
    return np.array(tab.locator("#atlas").get_attribute("viewBox").split(), float)


def map_center(tab) -> tuple[float, float]:
    box = tab.locator("#atlas").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_the_whole_map_is_visible_at_first(atlas, arrays):
    left, top, width, height = view_box(atlas)
    rows, columns = (arrays["cells"].max(0) - arrays["cells"].min(0) + 1).tolist()
    assert left <= 0.01
    assert top <= 0.01
    assert left + width >= CELL_WIDTH * columns - 0.01
    assert top + height >= CELL_HEIGHT * rows - 0.01
    assert width == pytest.approx(CELL_WIDTH * columns, abs=0.01) or height == pytest.approx(
        CELL_HEIGHT * rows, abs=0.01
    )
    assert atlas.locator("#zoom-out").is_disabled()


def test_buttons_zoom(atlas):
    before = view_box(atlas)
    atlas.locator("#zoom-in").click()
    zoomed = view_box(atlas)
    assert zoomed[2:] == pytest.approx(before[2:] / 1.4, abs=0.02)
    assert zoomed[:2] + zoomed[2:] / 2 == pytest.approx(before[:2] + before[2:] / 2, abs=0.02)  # about the middle
    assert atlas.locator("#zoom").inner_text() == "1.4 ×"
    atlas.locator("#zoom-in").click()
    atlas.locator("#zoom-out").click()
    assert view_box(atlas) == pytest.approx(zoomed, abs=0.02)
    atlas.locator("#zoom-reset").click()
    assert view_box(atlas) == pytest.approx(before, abs=0.02)
    for _ in range(12):
        atlas.locator("#zoom-in").click(force=True)
    assert view_box(atlas)[2] == pytest.approx(before[2] / 16, abs=0.02)
    assert atlas.locator("#zoom-in").is_disabled()


def test_keys_zoom_and_move(atlas):
    atlas.locator("#view").focus()
    before = view_box(atlas)
    for _ in range(3):
        atlas.keyboard.press("+")
    zoomed = view_box(atlas)
    assert zoomed[2] == pytest.approx(before[2] / 1.4**3, rel=1e-3)
    for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowLeft", 0, -1), ("ArrowDown", 1, 1), ("ArrowUp", 1, -1)):
        start = view_box(atlas)
        atlas.keyboard.press(key)
        moved = view_box(atlas) - start
        assert sign * moved[axis] > 0, key
        assert np.delete(moved, axis) == pytest.approx([0, 0, 0], abs=0.02)
    for _ in range(40):
        atlas.keyboard.press("ArrowRight")
    end = view_box(atlas)
    atlas.keyboard.press("ArrowRight")
    assert (view_box(atlas) == end).all()  # the border of the map
    atlas.keyboard.press("-")
    assert view_box(atlas)[2] > zoomed[2]
    atlas.keyboard.press("0")
    assert view_box(atlas) == pytest.approx(before, abs=0.02)


def test_the_wheel_zooms_about_the_mouse(atlas):
    box, before = atlas.locator("#atlas").bounding_box(), view_box(atlas)
    fraction = np.array([0.3, 0.6])
    atlas.mouse.move(box["x"] + fraction[0] * box["width"], box["y"] + fraction[1] * box["height"])
    atlas.mouse.wheel(0, -500)
    atlas.wait_for_function("(v) => document.getElementById('atlas').getAttribute('viewBox') !== v", arg=" ".join(
        f"{v:.2f}" for v in before
    ))  # fmt: skip
    after = view_box(atlas)
    assert after[2] == pytest.approx(before[2] / np.e, rel=0.01)
    point = before[:2] + fraction * before[2:]
    distance = np.abs(after[:2] + fraction * after[2:] - point)
    inside = (after[:2] > 0.01) & (after[:2] + after[2:] < before[:2] + before[2:] - 0.01)
    assert inside.any()
    assert distance[inside] == pytest.approx(0, abs=before[2] / 300)


def test_a_drag_moves_the_map_and_selects_nothing(atlas):
    atlas.locator("#zoom-in").click(click_count=4)
    before = view_box(atlas)
    x, y = map_center(atlas)
    atlas.mouse.move(x, y)
    atlas.mouse.down()
    atlas.mouse.move(x - 60, y - 40, steps=5)
    atlas.mouse.up()
    units_per_pixel = before[2] / atlas.locator("#atlas").bounding_box()["width"]
    assert view_box(atlas)[:2] - before[:2] == pytest.approx([60 * units_per_pixel, 40 * units_per_pixel], abs=0.05)
    assert atlas.locator(".selected").count() == 0


PINCH = """([x, y]) => {
  const svg = document.getElementById("atlas");
  const send = (kind, pointerId, [clientX, clientY]) => svg.dispatchEvent(new PointerEvent(kind, {
    pointerId, pointerType: "touch", clientX, clientY, bubbles: true, button: kind === "pointermove" ? -1 : 0 }));
  send("pointerdown", 7, [x - 50, y]);
  send("pointerdown", 8, [x + 50, y]);
  send("pointermove", 7, [x - 100, y]);
  send("pointermove", 8, [x + 100, y]);
  send("pointerup", 7, [x - 100, y]);
  send("pointerup", 8, [x + 100, y]);
}"""


def test_two_fingers_zoom(atlas):
    atlas.locator("#zoom-in").click(click_count=4)
    before = view_box(atlas)
    atlas.evaluate(PINCH, map_center(atlas))
    after = view_box(atlas)
    assert after[2:] == pytest.approx(before[2:] / 2, rel=1e-3)
    assert after[:2] + after[2:] / 2 == pytest.approx(before[:2] + before[2:] / 2, abs=before[2] / 100)


def classes_of_cell(tab) -> tuple[list[str], list[float]]:
    """Return the names and effects of the classes in the details of the selected cell."""
    names = tab.locator("#cell .classes .name").all_inner_texts()
    effects = [float(t.replace("−", "-")) for t in tab.locator("#cell .classes .value").all_inner_texts()]
    return names, effects


def test_a_click_shows_the_details_of_a_cell(atlas, arrays, tiny):
    index = len(arrays["cells"]) // 2
    atlas.locator("a[data-cell] .room").nth(index).click()
    row, column = arrays["cells"][index]
    names, effects = classes_of_cell(atlas)
    assert names == [tiny.class_name(int(k)) for k in arrays["classes"][index]]
    assert effects == pytest.approx(arrays["effects"][index].tolist(), rel=6e-3)
    assert atlas.locator("#cell strong").inner_text() == f"{arrays['counts'][index]} vectors"
    assert atlas.url.endswith(f"#cell-{row}-{column}")
    images_of_cell = np.unique(arrays["sources"][arrays["cell_index"] == index, 0])
    assert atlas.locator("#cell .sources li").count() == min(6, len(images_of_cell))
    images = atlas.locator("#cell .sources img")
    images.first.wait_for()
    atlas.wait_for_function("() => [...document.querySelectorAll('.sources img')].every((i) => i.naturalWidth > 0)")
    images.first.click()
    atlas.wait_for_url("**/data/**")


def test_tab_steps_through_the_cells(atlas, arrays, tiny):
    atlas.locator("#view").focus()
    atlas.keyboard.press("+")
    atlas.keyboard.press("+")
    for index in range(len(arrays["cells"])):
        atlas.keyboard.press("Tab")
        assert classes_of_cell(atlas)[0] == [tiny.class_name(int(k)) for k in arrays["classes"][index]]
        left, top, width, height = view_box(atlas)
        row, column = (arrays["cells"][index] - arrays["cells"].min(0)).tolist()
        assert left <= CELL_WIDTH * (column + 0.5) <= left + width
        assert top <= CELL_HEIGHT * (row + 0.5) <= top + height


def test_a_cell_has_an_address(tab, url_of, arrays):
    row, column = arrays["cells"][-1]
    open_page(tab, f"{url_of(ATLAS)}#cell-{row}-{column}")
    assert tab.locator("#zoom").inner_text() == "3.0 ×"
    assert tab.locator(".selected").get_attribute("href") == f"#cell-{row}-{column}"
    assert tab.locator("#cell strong").inner_text() == f"{arrays['counts'][-1]} vectors"


def test_class_names_appear_when_zoomed_in(new_tab, url_of):
    tab = open_page(new_tab(390, 800), url_of(ATLAS))
    assert tab.locator("#atlas text").first.evaluate("(t) => getComputedStyle(t).visibility") == "visible"  # 3 x 3
    tab.evaluate("document.getElementById('view').style.width = '150px'")
    tab.wait_for_function("() => getComputedStyle(document.querySelector('#atlas text')).visibility === 'hidden'")
    tab.locator("#zoom-in").click(click_count=3)
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
    """Return the colors of a canvas at the centres of the cells of a grid."""
    return np.array(tab.locator(selector).first.evaluate(COLOURS, [rows, columns]))


def test_heatmaps_on_the_evaluated_images_match_the_library(tab, url_of, tiny_store):
    """Each concept has one color scale for all images; nothing is interpolated at the centre of a position."""
    open_page(tab, url_of(CONCEPTS))
    heatmaps = tiny_store.concepts()[0].arrays()["heatmaps"]

    def matches(image: int, concept: int) -> bool:
        expected = apply_colormap(heatmaps[image, concept] / heatmaps[:, concept].max(), "jet").astype(int)
        shown = pixels(tab, f'#evaluated canvas[data-image="{image}"]', *heatmaps.shape[2:])
        return bool(np.median(np.abs(shown - expected)) <= 12)

    assert all(matches(index, 0) for index in (0, 5, 11))
    tab.locator('[name="concept"]').select_option("2")
    assert all(matches(index, 2) for index in (0, 5, 11))
    assert not matches(0, 0)
    tab.locator('[name="concept"]').select_option("")
    assert tab.locator("#evaluated canvas:visible").count() == 0


def test_another_image_can_be_selected(tab, live):
    open_page(tab, f"{live[1]}/m/tiny/concepts/1")
    before = pixels(tab, 'canvas[data-image-concept="0"]')
    tab.locator("nav a", has_text="second.png").click()
    tab.wait_for_url("**image=second**")
    after = pixels(tab, 'canvas[data-image-concept="0"]')
    assert np.abs(before - after).max() > 20
    assert tab.locator("#image-title").inner_text() == "All concepts on second.png"


def test_the_class_page_links_to_concepts_and_atlas(tab, url_of):
    class_page = url_of("/m/tiny/class/1")
    open_page(tab, class_page)
    tab.get_by_role("link", name="Concepts at relu3").click()
    tab.locator(".concept").first.wait_for()
    assert tab.locator(".concept").count() == 3
    open_page(tab, class_page)
    tab.get_by_role("link", name="Atlas of relu3").click()
    tab.locator("#atlas").wait_for()


def test_code_that_computes_missing_concepts_can_be_copied(tab, live):
    open_page(tab, f"{live[1]}/m/tiny/concepts/0")
    line = tab.locator(".line code", has_text="convscope concepts tiny IMAGES --target 0")
    assert line.is_visible()
    line.locator("xpath=ancestor::div[1]").locator("[data-copy]").click()
    tab.wait_for_function("() => document.getElementById('status').textContent !== ''")
