"""The live explorer in a real browser."""

from __future__ import annotations

import base64
import http.server
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import convscope
from convscope.attribution.result import color_maximum, smooth_maps
from convscope.images.colormap import apply_colormap
from convscope.images.geometry import Geometry
from tests.oracles.explorer import encode_image, smooth_image

READ_PIXELS = """(canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  const text = Array.from({ length: canvas.height }, (_, row) =>
    String.fromCharCode(...data.subarray(4 * row * canvas.width, 4 * (row + 1) * canvas.width))).join("");
  return [canvas.width, canvas.height, btoa(text)];
}"""


def painted_pixels(tab, stage: str = "main") -> np.ndarray:
    """Return the colors and the opacity of a heatmap, (H, W, 4)."""
    width, height, data = tab.eval_on_selector(f'[data-stage="{stage}"] canvas', READ_PIXELS)
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4).astype(int)


def painted(tab, stage: str = "main") -> np.ndarray:
    """Return the colors of a heatmap, (H, W, 3)."""
    return painted_pixels(tab, stage)[..., :3]


def open_page(tab, address: str):
    tab.goto(address)
    tab.wait_for_load_state("load")
    return tab


def wait_for_heatmap(tab) -> None:
    tab.wait_for_function("() => !document.querySelector('.stage.waiting')")


def test_the_start_page_shows_predictions_and_a_heatmap(tab, live):
    explorer, address = live
    open_page(tab, address)
    predictions = convscope.predict(explorer.first.model, [smooth_image(0, 240, 360)])
    assert tab.locator("#classes a").count() == 5
    assert tab.locator("#classes a .name").first.inner_text() == predictions.names[0][0]
    assert painted(tab).std((0, 1)).max() > 10
    tab.wait_for_selector("#faithfulness strong")
    assert tab.evaluate("window.layoutShift") < 0.01


def test_the_heatmap_on_the_page_matches_the_library(tab, live):
    explorer, address = live
    open_page(tab, f"{address}/m/tiny/image/first/class/2?colormap=viridis")
    heatmaps = convscope.heatmaps(explorer.first.model, [smooth_image(0, 240, 360)], 2)
    values = np.maximum(heatmaps.resized()[0][0], 0)
    expected = apply_colormap(values / values.max(), "viridis").astype(int)
    shown = painted(tab)
    fractions = np.linspace(0.02, 0.98, 15)

    def sample(image: np.ndarray) -> np.ndarray:
        rows, columns = ((fractions * side).astype(int) for side in image.shape[:2])
        return image[np.ix_(rows, columns)]

    assert np.abs(sample(shown) - sample(expected)).max() <= 24


def test_a_click_selects_a_class_and_the_back_button_returns(tab, live):
    open_page(tab, f"{live[1]}/m/tiny/image/first")
    before, first_url = painted(tab), tab.url
    tab.locator("#classes a").nth(2).click()
    tab.wait_for_url(re.compile(r"/class/\d+$"))
    wait_for_heatmap(tab)
    after = painted(tab)
    assert np.abs(before - after).max() > 20
    selected = tab.locator('#classes a[aria-current="true"]')
    assert selected.count() == 1
    assert tab.locator("#target-name").inner_text() == selected.locator(".name").inner_text()
    tab.go_back()
    tab.wait_for_function("(url) => location.href === url", arg=first_url)
    tab.wait_for_function("() => document.querySelector('#classes a').getAttribute('aria-current') === 'true'")
    assert (painted(tab) == before).all()
    tab.keyboard.press("3")
    tab.wait_for_url(re.compile(r"/class/\d+$"))
    assert (painted(tab) == after).all()
    open_page(tab, tab.url)
    assert (painted(tab) == after).all()


def test_an_uploaded_image_finds_units(new_tab, live, tmp_path):
    tab = open_page(new_tab(390, allow_refused=True), f"{live[1]}/m/tiny/names")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "good.png").write_bytes(encode_image(smooth_image(7)))
    tab.set_input_files("#example", tmp_path / "bad.png")
    tab.wait_for_function("() => document.getElementById('status').textContent.startsWith('bad.png: is ')")
    assert tab.url.endswith("/m/tiny/names")
    tab.set_input_files("#example", tmp_path / "good.png")
    tab.wait_for_url(re.compile(r"/m/tiny/image/x[0-9a-f]{24}/units$"))
    assert tab.locator("h1").inner_text() == "Units that respond to good.png"
    assert tab.locator("#units tbody tr").count() > 10


def test_opacity_colormap_and_sign_change_without_a_request(tab, live):
    open_page(tab, f"{live[1]}/m/tiny/image/first")
    tab.wait_for_selector("#faithfulness strong")
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    before = painted(tab)
    tab.locator('[name="opacity"]').fill("20")
    assert tab.eval_on_selector('[data-stage="main"] canvas', "(c) => c.style.opacity") == "0.2"
    tab.locator('[name="colormap"]').select_option("inferno")
    inferno = painted(tab)
    assert np.abs(before - inferno).max() > 50
    tab.locator('[name="evidence"]').select_option("signed")
    assert np.abs(inferno - painted(tab)).max() > 20
    assert tab.locator("#scale-low").inner_text() == "against the class"
    assert [url for url in requests if "/static/" not in url] == []
    assert re.search("opacity=0.2&colormap=inferno&signed=true$", tab.locator("#get-png").get_attribute("href"))
    assert "opacity=20" in tab.url
    assert "evidence=signed" in tab.url


def test_evidence_against_is_shown_where_the_method_is_signed(tab, live):
    """As the overlays of the library: diverging colors on a gray image, the more opaque the stronger."""
    explorer, address = live
    open_page(tab, f"{address}/m/tiny/image/first/class/1?method=occlusion")
    wait_for_heatmap(tab)
    assert tab.locator("#scale-low").inner_text() == "against the class"
    assert tab.eval_on_selector('[data-stage="main"] img', "(i) => getComputedStyle(i).filter") == "grayscale(1)"
    image = smooth_image(0, 240, 360)
    heatmaps = convscope.heatmaps(explorer.first.model, [image], 1, method="occlusion")
    values = painted_pixels(tab)
    maps = Geometry.whole(values.shape[:2]).to_original(smooth_maps(torch.from_numpy(heatmaps.values[0]))).numpy()[0]
    fraction = np.clip(maps / color_maximum(maps, at_input=True, signed=True), -1, 1)
    np.testing.assert_allclose(values[..., 3], 255 * np.abs(fraction), atol=2)
    strong = np.abs(fraction) > 0.2
    colors = apply_colormap((fraction + 1) / 2, "RdBu_r").astype(int)
    assert (fraction[strong] < 0).any()
    assert (fraction[strong] > 0).any()
    assert np.abs(values[..., :3] - colors)[strong].max() <= 12  # of 32 colors, and of premultiplied pixels
    tab.locator('[name="evidence"]').select_option("positive")
    assert tab.locator("#scale-low").inner_text() == "no evidence"


def test_method_layer_and_contrast_class_change_the_heatmap(tab, live):
    explorer, address = live
    open_page(tab, f"{address}/m/tiny/image/first/class/1")
    for name, value, arguments in (
        ("method", "layer-cam", {"method": "layer-cam"}),
        ("layer", "relu2", {"method": "layer-cam", "layer": "relu2"}),
        ("against", "3", {"method": "layer-cam", "layer": "relu2", "against": 3}),
    ):
        with tab.expect_response(re.compile("/heatmap")):
            tab.locator(f'[name="{name}"]').select_option(value)
        wait_for_heatmap(tab)
        tab.wait_for_function("(v) => location.search.includes(v)", arg=value)
        heatmaps = convscope.heatmaps(explorer.first.model, [smooth_image(0, 240, 360)], 1, **arguments)
        caption = tab.locator('[data-stage="main"] .caption').inner_text()
        assert arguments["method"] in caption
        assert f"at {heatmaps.layer}" in caption
        assert f"method='{arguments['method']}'" in tab.locator('[data-language="python"]').text_content()
    assert "in contrast with" in tab.locator('[data-stage="main"] .caption').inner_text()


def test_two_classes_or_two_images_are_compared(tab, live):
    open_page(tab, f"{live[1]}/m/tiny/image/first/class/1?evidence=signed")
    comparison = tab.locator('[data-stage="comparison"]')
    assert comparison.is_hidden()
    tab.locator('[name="compare"]').select_option("class:3")
    comparison.wait_for(state="visible")
    wait_for_heatmap(tab)
    tab.wait_for_function("() => document.querySelector('[data-stage=\"comparison\"] .caption').textContent.length > 3")
    assert np.abs(painted(tab) - painted(tab, "comparison")).max() > 20
    tab.locator('[name="compare"]').select_option("image:second")
    tab.wait_for_function("() => document.querySelector('[data-stage=\"comparison\"] img').src.includes('second')")
    tab.wait_for_function(
        "() => new Set([...document.querySelectorAll('.stage .caption')].map((c) => c.textContent)).size === 1"
    )
    assert np.abs(painted(tab) - painted(tab, "comparison")).max() > 20


def test_a_class_is_found_by_name(tab, live):
    open_page(tab, f"{live[1]}/m/tiny/image/first")
    tab.locator("#class-query").fill("gray")
    tab.keyboard.press("Enter")
    tab.wait_for_url(re.compile("/class/4$"))
    assert tab.locator("#target-name").inner_text() == "gray"


def test_images_are_chosen_dropped_and_pasted(tab, live):
    open_page(tab, f"{live[1]}/m/tiny/image/first")
    files = [
        {"name": f"upload {n}.png", "mimeType": "image/png", "buffer": encode_image(smooth_image(20 + n))}
        for n in range(2)
    ]
    tab.set_input_files("#files", files)
    tab.wait_for_url(re.compile(r"/image/x[0-9a-f]{24}$"))
    assert tab.locator("[data-image]").count() == 2
    for event in ("drop", "paste"):
        before = tab.url
        content = list(encode_image(smooth_image(30 + len(event))))
        tab.evaluate(
            """([event, content]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(content)], event + ".png", { type: "image/png" }));
                const dispatched = event === "drop"
                    ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
                    : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
                document.body.dispatchEvent(dispatched);
            }""",
            [event, content],
        )
        tab.wait_for_function("(before) => location.href !== before", arg=before)
        tab.wait_for_load_state("load")
    assert tab.locator("[data-image]").count() == 4


def test_activation_maps_are_sorted_and_dead_units_are_marked(tab, live):
    explorer, address = live
    open_page(tab, f"{address}/m/tiny/layer/relu2")
    maps = convscope.activations(explorer.first.model, [smooth_image(0, 240, 360)], ["relu2"])
    order = lambda: tab.eval_on_selector_all("#grid li", "(all) => all.map((li) => Number(li.dataset.unit))")  # noqa: E731
    summary = maps.summary("relu2")
    assert order() == np.argsort(-summary["max"][0], kind="stable").tolist()
    tab.locator("#order").select_option("mean")
    assert order() == np.argsort(-summary["mean"][0], kind="stable").tolist()
    tab.locator("#order").select_option("unit")
    assert order() == list(range(12))
    assert tab.locator("#grid li.dead").count() == summary["dead"].sum()
    tab.locator("#contrast").check()
    assert "contrast" in tab.eval_on_selector("#grid svg", "(svg) => getComputedStyle(svg).filter")
    class_name = tab.locator("#target option:not([selected])").first.inner_text()
    with tab.expect_response(re.compile("/relevance")):
        tab.locator("#target").select_option(class_name)
    tab.wait_for_function("() => document.querySelector('#order').value === 'relevance'")
    assert f"is computed for the class {class_name}." in tab.locator(".maps").inner_text()


def test_a_click_on_a_position_lists_its_most_active_units(tab, live):
    explorer, address = live
    open_page(tab, f"{address}/m/tiny/layer/relu2")
    maps = convscope.activations(explorer.first.model, [smooth_image(0, 240, 360)], ["relu2"])["relu2"][0]
    box = tab.locator("#position").bounding_box()
    tab.mouse.click(box["x"] + box["width"] * (5.5 / 16), box["y"] + box["height"] * (2.5 / 16))
    tab.wait_for_selector("#position-units li")
    units = [u for u in np.argsort(-maps[:, 2, 5], kind="stable") if maps[u, 2, 5] > 0]
    shown = tab.locator("#position-units li a").all_inner_texts()
    assert shown == [f"unit {u}" for u in units]
    sides = [float(tab.locator("#field").get_attribute(name)) for name in ("x", "y", "width", "height")]
    layer = explorer.first.layer("relu2")
    left, top = (layer.origin[1] + 5 * layer.stride[1]) / 32, (layer.origin[0] + 2 * layer.stride[0]) / 32
    width, height = layer.receptive_field[1] / 32, layer.receptive_field[0] / 32
    assert sides == pytest.approx([100 * left, 100 * top, 100 * width, 100 * height])
    tab.keyboard.press("ArrowDown")
    tab.wait_for_function(
        "() => document.getElementById('position-units').textContent.startsWith('Row 4 of 16, column 6 ')"
    )


def test_a_pattern_is_generated_with_progress(tab, live):
    address = live[1]
    open_page(tab, f"{address}/m/tiny/unit/relu2/6")
    tab.locator("#generate").click()
    tab.wait_for_selector("#pattern img[src^='/image/pattern']")
    assert "Score" in tab.locator(".card").first.inner_text()
    open_page(tab, f"{address}/m/tiny/unit/relu2/6")  # from the cache
    assert tab.locator("#pattern img").count() == 1
    tab.locator('[name="variant"]').select_option("negative")
    tab.wait_for_url(re.compile("variant=negative"))
    tab.locator("#generate").wait_for()


def test_a_job_waits_for_others_and_can_be_cancelled(new_tab, live):
    explorer, address = live
    unblock = threading.Event()
    blocker = explorer.background_queue.submit("blocker", lambda job: unblock.wait(30) and 1, "other client")
    second = explorer.background_queue.submit("second", lambda job: 1, "other client")
    tab = open_page(new_tab(), f"{address}/m/tiny/unit/relu2/9")
    try:
        tab.locator("#generate").click()
        tab.wait_for_function("() => /Waiting for 1 other job/.test(document.getElementById('stage').textContent)")
        assert tab.evaluate("document.activeElement.id") == "cancel"
        other_tab = open_page(new_tab(), f"{address}/m/tiny/image/second")  # nothing else waits for it
        assert other_tab.locator("#classes a").count() == 5
        tab.locator("#cancel").click()
        assert tab.locator("#progress").is_hidden()
        other_tab.goto("about:blank")  # cancels its own faithfulness job
        for _ in range(60):
            if len(explorer.background_queue) == 1:
                break
            tab.wait_for_timeout(100)
        assert len(explorer.background_queue) == 1
    finally:
        unblock.set()
        blocker.queue.release(blocker)
        second.queue.release(second)
    tab.locator("#generate").click()
    tab.wait_for_selector("#pattern img[src^='/image/pattern']")


def test_an_image_of_the_data_set_is_analysed(tab, live):
    explorer, address = live
    open_page(tab, f"{address}/m/tiny/data/4")
    tab.get_by_role("button", name="Show predictions and heatmaps").click()
    tab.wait_for_url(re.compile(r"/m/tiny/image/x[0-9a-f]{24}$"))
    assert Path(explorer.first.store.image(4).name).name in tab.title()
    assert tab.locator("#classes a").count() == 5


def test_a_refused_job_reports_the_reason(new_tab, live):
    explorer, address = live
    tab = open_page(new_tab(allow_refused=True), f"{address}/m/tiny/unit/relu2/8")
    unblock = threading.Event()
    blocker = explorer.background_queue.submit("another blocker", lambda job: unblock.wait(30) and 1, "other client")
    while not blocker.started:
        assert not blocker.future.done()
        tab.wait_for_timeout(20)
    jobs = [explorer.background_queue.submit(("job", n), lambda job: 1, f"client {n}") for n in range(32)]
    try:
        tab.locator("#generate").click()
        tab.wait_for_function(
            "() => document.getElementById('status').textContent.startsWith('the queue is full (32 jobs)')"
        )
        assert tab.locator("#progress").is_hidden()
        assert tab.locator("#generate").count() == 1
    finally:
        unblock.set()
        for job in (blocker, *jobs):
            job.queue.release(job)


def test_the_graph_is_colored_by_a_measure(tab, live):
    open_page(tab, f"{live[1]}/m/tiny")
    tab.locator("#graph a").first.wait_for()
    count = len(live[0].first.layers)
    assert tab.locator("#graph a").count() == count
    assert tab.locator("#graph path").count() == len(live[0].first.edges) == count - 1  # a chain
    assert tab.locator("#layers tbody tr").count() == count
    fills = lambda: tab.eval_on_selector_all("#graph a rect", "(all) => all.map((r) => r.getAttribute('fill'))")  # noqa: E731
    before = fills()
    tab.locator("#measure").select_option("sparsity")
    tab.wait_for_function("() => document.getElementById('measure-description').textContent.includes('darkest')")
    assert fills() != before
    tab.locator("#graph a").nth(3).hover()
    assert live[0].first.layers[3].name in tab.locator("#details").inner_text()
    with tab.expect_download() as download:
        tab.locator("#csv").click()
    assert Path(download.value.path()).read_text().startswith('"name","kind","units"')


def test_code_is_copied_terms_are_defined_and_arrays_downloaded(new_tab, live):
    tab = new_tab(permissions=["clipboard-read", "clipboard-write"])
    open_page(tab, f"{live[1]}/m/tiny/image/first/class/1")
    tab.locator(".copy summary").click()
    tab.locator("[data-copy]").first.click()
    tab.wait_for_function("() => document.getElementById('status').textContent === 'Copied.'")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == "convscope.heatmaps(convscope.load('tiny'), 'first.png', 1).overlay()[0]"
    tab.locator(".term").first.click()
    assert "categories that the network distinguishes" in tab.locator("#tooltip").inner_text()
    tab.keyboard.press("Escape")
    assert tab.locator("#tooltip").count() == 0
    for link in ("#get-npz", "#get-png"):
        with tab.expect_download() as download:
            tab.locator(link).click()
        assert Path(download.value.path()).read_bytes()[:4] in (b"PK\x03\x04", b"\x89PNG")


def test_a_unit_page_is_reached_with_the_keyboard_alone(tab, live):
    open_page(tab, live[1])
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


def test_a_notebook_can_embed_the_explorer_in_a_frame(tab, tiny):
    explorer_frame = convscope.show(tiny, smooth_image(0, 240, 360))

    class Notebook(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><link rel=icon href=data:,>" + explorer_frame._repr_html_().encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notebook) as notebook:
        threading.Thread(target=notebook.serve_forever, daemon=True).start()
        try:
            open_page(tab, f"http://localhost:{notebook.server_port}/")
            frame = tab.frame_locator("iframe")
            frame.locator("#classes a").nth(1).click()
            frame.locator("#faithfulness strong").first.wait_for()
            assert frame.locator('#classes a[aria-current="true"]').count() == 1
        finally:
            notebook.shutdown()
            explorer_frame.close()
