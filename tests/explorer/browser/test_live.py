"""What a person can do on the live explorer, in a real browser."""

from __future__ import annotations

import http.server
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import convscope
from tests.oracles.explorer import encode_image, smooth_image

CANVAS = """(canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  return [canvas.width, canvas.height, Array.from(copy.getImageData(0, 0, canvas.width, canvas.height).data)];
}"""


def painted(tab, stage: str = "main") -> np.ndarray:
    """The heatmap's colours, (H, W, 3)."""
    width, height, values = tab.eval_on_selector(f'[data-stage="{stage}"] canvas', CANVAS)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3].astype(int)


def opened(tab, address: str):
    tab.goto(address)
    tab.wait_for_load_state("load")
    return tab


def settle(tab) -> None:
    tab.wait_for_function("() => !document.querySelector('.stage.waiting')")


def test_something_is_seen_at_once(tab, live):
    explorer, address = live
    opened(tab, address)
    said = convscope.predict(explorer.first.model, [smooth_image(0, 240, 360)])
    assert tab.locator("#classes a").count() == 5
    assert tab.locator("#classes a .name").first.inner_text() == said.names[0][0]
    assert painted(tab).std((0, 1)).max() > 10
    tab.wait_for_selector("#truth strong")
    assert tab.evaluate("window.shifts") < 0.01


def test_the_heatmap_on_the_page_is_the_librarys(tab, live):
    explorer, address = live
    opened(tab, f"{address}/m/tiny/picture/first/class/2?colours=viridis")
    found = convscope.heatmaps(explorer.first.model, [smooth_image(0, 240, 360)], 2)
    heat = np.maximum(found.resized()[0][0], 0)
    from convscope.images.colormap import apply_colormap

    known = apply_colormap(heat / heat.max(), "viridis").astype(int)
    shown = painted(tab)
    places = np.linspace(0.02, 0.98, 15)
    for y in places:
        for x in places:
            one = shown[int(y * shown.shape[0]), int(x * shown.shape[1])]
            other = known[int(y * known.shape[0]), int(x * known.shape[1])]
            assert np.abs(one - other).max() <= 24


def test_a_click_shows_another_class_and_back_returns(tab, live):
    opened(tab, f"{live[1]}/m/tiny/picture/first")
    before, first = painted(tab), tab.url
    tab.locator("#classes a").nth(2).click()
    tab.wait_for_url(re.compile(r"/class/\d+$"))
    settle(tab)
    after = painted(tab)
    assert np.abs(before - after).max() > 20
    chosen = tab.locator('#classes a[aria-current="true"]')
    assert chosen.count() == 1
    assert tab.locator("#target-name").inner_text() == chosen.locator(".name").inner_text()
    tab.go_back()
    tab.wait_for_function("(first) => location.href === first", arg=first)
    tab.wait_for_function("() => document.querySelector('#classes a').getAttribute('aria-current') === 'true'")
    assert (painted(tab) == before).all()
    tab.keyboard.press("3")
    tab.wait_for_url(re.compile(r"/class/\d+$"))
    assert (painted(tab) == after).all()
    again = opened(tab, tab.url)
    assert (painted(again) == after).all()


def test_opacity_colours_and_sign_answer_without_the_server(tab, live):
    opened(tab, f"{live[1]}/m/tiny/picture/first")
    tab.wait_for_selector("#truth strong")
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    before = painted(tab)
    tab.locator('[name="opacity"]').fill("20")
    assert tab.eval_on_selector('[data-stage="main"] canvas', "(c) => c.style.opacity") == "0.2"
    tab.locator('[name="colours"]').select_option("inferno")
    inferno = painted(tab)
    assert np.abs(before - inferno).max() > 50
    tab.locator('[name="sign"]').select_option("signed")
    assert np.abs(inferno - painted(tab)).max() > 20
    assert tab.locator("#scale-low").inner_text() == "against"
    assert [url for url in asked if "/static/" not in url] == []
    assert re.search("opacity=0.2&colours=inferno$", tab.locator("#get-png").get_attribute("href"))
    assert "opacity=20" in tab.url
    assert "sign=signed" in tab.url


def test_method_layer_and_contrast_ask_the_network(tab, live):
    explorer, address = live
    opened(tab, f"{address}/m/tiny/picture/first/class/1")
    for name, value, given in (
        ("method", "layer-cam", {"method": "layer-cam"}),
        ("layer", "relu2", {"method": "layer-cam", "layer": "relu2"}),
        ("against", "3", {"method": "layer-cam", "layer": "relu2", "against": 3}),
    ):
        with tab.expect_response(re.compile("/heatmap")):
            tab.locator(f'[name="{name}"]').select_option(value)
        settle(tab)
        tab.wait_for_function("(v) => location.search.includes(v)", arg=value)
        found = convscope.heatmaps(explorer.first.model, [smooth_image(0, 240, 360)], 1, **given)
        shown = tab.locator('[data-stage="main"] .caption').inner_text()
        assert given["method"] in shown
        assert f"at {found.layer}" in shown
        assert f"method='{given['method']}'" in tab.locator('[data-line="python"]').text_content()
    assert "rather than" in tab.locator('[data-stage="main"] .caption').inner_text()


def test_two_classes_and_two_pictures_side_by_side(tab, live):
    opened(tab, f"{live[1]}/m/tiny/picture/first/class/1?sign=signed")
    beside = tab.locator('[data-stage="beside"]')
    assert beside.is_hidden()
    tab.locator('[name="beside"]').select_option("class:3")
    beside.wait_for(state="visible")
    settle(tab)
    tab.wait_for_function("() => document.querySelector('[data-stage=\"beside\"] .caption').textContent.length > 3")
    assert np.abs(painted(tab) - painted(tab, "beside")).max() > 20
    tab.locator('[name="beside"]').select_option("picture:second")
    tab.wait_for_function("() => document.querySelector('[data-stage=\"beside\"] img').src.includes('second')")
    tab.wait_for_function(
        "() => new Set([...document.querySelectorAll('.stage .caption')].map((c) => c.textContent)).size === 1"
    )
    assert np.abs(painted(tab) - painted(tab, "beside")).max() > 20


def test_another_class_is_found_by_name(tab, live):
    opened(tab, f"{live[1]}/m/tiny/picture/first")
    tab.locator("#find-class").fill("gray")
    tab.keyboard.press("Enter")
    tab.wait_for_url(re.compile("/class/4$"))
    assert tab.locator("#target-name").inner_text() == "gray"


def test_pictures_are_chosen_dropped_and_pasted(tab, live):
    opened(tab, f"{live[1]}/m/tiny/picture/first")
    files = [
        {"name": f"mine {n}.png", "mimeType": "image/png", "buffer": encode_image(smooth_image(20 + n))}
        for n in range(2)
    ]
    tab.set_input_files("#files", files)
    tab.wait_for_url(re.compile(r"/picture/x[0-9a-f]{24}$"))
    assert tab.locator("[data-picture]").count() == 2
    for event in ("drop", "paste"):
        before = tab.url
        content = list(encode_image(smooth_image(30 + len(event))))
        tab.evaluate(
            """([event, content]) => {
                const carried = new DataTransfer();
                carried.items.add(new File([new Uint8Array(content)], event + ".png", { type: "image/png" }));
                const given = event === "drop"
                    ? new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true })
                    : new ClipboardEvent("paste", { clipboardData: carried, bubbles: true });
                document.body.dispatchEvent(given);
            }""",
            [event, content],
        )
        tab.wait_for_function("(before) => location.href !== before", arg=before)
        tab.wait_for_load_state("load")
    assert tab.locator("[data-picture]").count() == 4


def test_the_channels_of_a_layer_are_sorted_and_dead_ones_marked(tab, live):
    explorer, address = live
    opened(tab, f"{address}/m/tiny/layer/relu2")
    maps = convscope.activations(explorer.first.model, [smooth_image(0, 240, 360)], ["relu2"])
    order = lambda: tab.eval_on_selector_all("#grid li", "(all) => all.map((li) => Number(li.dataset.unit))")  # noqa: E731
    told = maps.summary("relu2")
    assert order() == np.argsort(-told["max"][0], kind="stable").tolist()
    tab.locator("#order").select_option("mean")
    assert order() == np.argsort(-told["mean"][0], kind="stable").tolist()
    tab.locator("#order").select_option("unit")
    assert order() == list(range(12))
    assert tab.locator("#grid li.dead").count() == told["dead"].sum()
    tab.locator("#boost").check()
    assert "contrast" in tab.eval_on_selector("#grid svg", "(svg) => getComputedStyle(svg).filter")
    chosen = tab.locator("#target option:not([selected])").first.inner_text()
    with tab.expect_response(re.compile("/relevance")):
        tab.locator("#target").select_option(chosen)
    tab.wait_for_function("() => document.querySelector('#order').value === 'relevance'")
    assert f"is for the class {chosen}." in tab.locator(".maps").inner_text()


def test_a_click_on_a_place_tells_who_speaks_there(tab, live):
    explorer, address = live
    opened(tab, f"{address}/m/tiny/layer/relu2")
    maps = convscope.activations(explorer.first.model, [smooth_image(0, 240, 360)], ["relu2"])["relu2"][0]
    box = tab.locator("#place").bounding_box()
    tab.mouse.click(box["x"] + box["width"] * (5.5 / 16), box["y"] + box["height"] * (2.5 / 16))
    tab.wait_for_selector("#there li")
    best = [u for u in np.argsort(-maps[:, 2, 5], kind="stable") if maps[u, 2, 5] > 0]
    shown = tab.locator("#there li a").all_inner_texts()
    assert shown == [f"unit {u}" for u in best]
    sides = [float(tab.locator("#field").get_attribute(name)) for name in ("x", "y", "width", "height")]
    row = explorer.first.layer("relu2")
    left, top = (row.origin[1] + 5 * row.stride[1]) / 32, (row.origin[0] + 2 * row.stride[0]) / 32
    width, height = row.receptive_field[1] / 32, row.receptive_field[0] / 32
    assert sides == pytest.approx([100 * left, 100 * top, 100 * width, 100 * height])
    tab.keyboard.press("ArrowDown")
    tab.wait_for_function("() => document.getElementById('there').textContent.startsWith('Place 4, 6')")


def test_a_pattern_is_drawn_while_one_looks_on(tab, live):
    address = live[1]
    opened(tab, f"{address}/m/tiny/unit/relu2/6")
    tab.locator("#draw").click()
    tab.wait_for_selector("#pattern img[src^='/image/pattern']")
    assert "Score" in tab.locator(".card").first.inner_text()
    opened(tab, f"{address}/m/tiny/unit/relu2/6")  # kept
    assert tab.locator("#pattern img").count() == 1
    tab.locator('[name="look"]').select_option("negative")
    tab.wait_for_url(re.compile("look=negative"))
    tab.locator("#draw").wait_for()


def test_long_work_waits_its_turn_and_can_be_cancelled(new_tab, live):
    explorer, address = live
    go = threading.Event()
    other = explorer.slow.ask("blocker", lambda work: go.wait(30) and 1, "somebody else")
    before = explorer.slow.ask("in front", lambda work: 1, "somebody else")
    tab = opened(new_tab(), f"{address}/m/tiny/unit/relu2/9")
    try:
        tab.locator("#draw").click()
        tab.wait_for_function("() => /waiting: 1 before this one/.test(document.getElementById('stage').textContent)")
        assert tab.evaluate("document.activeElement.id") == "cancel"
        quick = opened(new_tab(), f"{address}/m/tiny/picture/second")  # nothing else waits for it
        assert quick.locator("#classes a").count() == 5
        tab.locator("#cancel").click()
        assert tab.locator("#progress").is_hidden()
        quick.goto("about:blank")  # takes its own measuring with it
        for _ in range(60):
            if len(explorer.slow) == 1:
                break
            tab.wait_for_timeout(100)
        assert len(explorer.slow) == 1
    finally:
        go.set()
        other.lane.leave(other)
        before.lane.leave(before)
    tab.locator("#draw").click()
    tab.wait_for_selector("#pattern img[src^='/image/pattern']")


def test_a_picture_of_the_data_set_is_looked_at_with_the_network(tab, live):
    explorer, address = live
    opened(tab, f"{address}/m/tiny/data/4")
    tab.get_by_role("button", name="Look at it with the network").click()
    tab.wait_for_url(re.compile(r"/m/tiny/picture/x[0-9a-f]{24}$"))
    assert Path(explorer.first.store.picture(4).name).name in tab.title()
    assert tab.locator("#classes a").count() == 5


def test_what_is_refused_says_why(new_tab, live):
    explorer, address = live
    tab = opened(new_tab(refused=True), f"{address}/m/tiny/unit/relu2/8")
    go = threading.Event()
    other = explorer.slow.ask("another blocker", lambda work: go.wait(30) and 1, "somebody else")
    while not other.begun:
        assert not other.future.done()
        tab.wait_for_timeout(20)
    many = [explorer.slow.ask(("more", n), lambda work: 1, f"visitor {n}") for n in range(32)]
    try:
        tab.locator("#draw").click()
        tab.wait_for_function("() => document.getElementById('say').textContent.startsWith('the queue is full: 32')")
        assert tab.locator("#progress").is_hidden()
        assert tab.locator("#draw").count() == 1
    finally:
        go.set()
        for work in (other, *many):
            work.lane.leave(work)


def test_the_network_is_coloured_by_what_is_measured(tab, live):
    opened(tab, f"{live[1]}/m/tiny")
    tab.locator("#graph a").first.wait_for()
    count = len(live[0].first.layers)
    assert tab.locator("#graph a").count() == count
    assert tab.locator("#graph path").count() == len(live[0].first.edges) == count - 1  # a chain
    assert tab.locator("#layers tbody tr").count() == count
    fills = lambda: tab.eval_on_selector_all("#graph a rect", "(all) => all.map((r) => r.getAttribute('fill'))")  # noqa: E731
    before = fills()
    tab.locator("#quantity").select_option("sparsity")
    tab.wait_for_function("() => document.getElementById('quantity-says').textContent.includes('darkest')")
    assert fills() != before
    tab.locator("#graph a").nth(3).hover()
    assert live[0].first.layers[3].name in tab.locator("#read").inner_text()
    with tab.expect_download() as download:
        tab.locator("#csv").click()
    assert Path(download.value.path()).read_text().startswith('"name","kind","units"')


def test_lines_are_copied_words_explained_and_arrays_downloaded(new_tab, live):
    tab = new_tab(permissions=["clipboard-read", "clipboard-write"])
    opened(tab, f"{live[1]}/m/tiny/picture/first/class/1")
    tab.locator(".copy summary").click()
    tab.locator("[data-copy]").first.click()
    tab.wait_for_function("() => document.getElementById('say').textContent === 'Copied.'")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == "convscope.heatmaps(convscope.load('tiny'), 'first.png', 1).overlay()[0]"
    tab.locator(".term").first.click()
    assert "learned from many labelled pictures" in tab.locator("#tip").inner_text()
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").count() == 0
    for link in ("#get-npz", "#get-png"):
        with tab.expect_download() as download:
            tab.locator(link).click()
        assert Path(download.value.path()).read_bytes()[:4] in (b"PK\x03\x04", b"\x89PNG")


def test_a_unit_is_reached_from_the_first_page_with_the_keyboard_alone(tab, live):
    opened(tab, live[1])
    for _ in range(60):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.textContent") == "relu3":
            break
    tab.keyboard.press("Enter")
    tab.wait_for_url(re.compile("/layer/"))
    tab.locator("#grid a").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url(re.compile("/unit/relu3/"))
    unit = int(re.search(r"/(\d+)\?", tab.url)[1])
    tab.keyboard.press("[" if unit else "]")
    neighbour = unit - 1 if unit else 1
    tab.wait_for_url(re.compile(rf"/unit/relu3/{neighbour}$"))
    assert str(neighbour) in tab.locator("h1").inner_text()


def test_a_notebook_may_frame_what_show_serves(tab, model):
    shown = convscope.show(model, smooth_image(0, 240, 360))

    class Notebook(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><link rel=icon href=data:,>" + shown._repr_html_().encode())

        def log_message(self, *given):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notebook) as notebook:
        threading.Thread(target=notebook.serve_forever, daemon=True).start()
        try:
            opened(tab, f"http://localhost:{notebook.server_port}/")
            frame = tab.frame_locator("iframe")
            frame.locator("#classes a").nth(1).click()
            frame.locator("#truth strong").first.wait_for()
            assert frame.locator('#classes a[aria-current="true"]').count() == 1
        finally:
            notebook.shutdown()
            shown.close()
