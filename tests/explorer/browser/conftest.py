"""A real Chromium, a live explorer and a published one, all of a tiny network."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import convscope
from tests.explorer.browser import browsers
from tests.oracles.explorer import data_folder, save_concepts_and_atlas, smooth_image, tiny_model

HERE = Path(__file__).parent

SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => {
  for (const e of list.getEntries()) if (!e.hadRecentInput) window.shifts += e.value;
}).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    where = browsers.chromium()
    if where is None:
        pytest.skip("there is no chromium on this machine (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=where, args=browsers.ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def new_tab(chromium):
    """Opens tabs, each of a visitor of its own. At the end no page may have complained; `refused`: but of answers."""
    contexts, complaints = [], []

    def open_tab(width=1280, height=900, refused=False, **options):
        def listen(message):
            expected = refused and message.text.startswith("Failed to load resource")
            if message.type in ("error", "warning") and not expected:
                complaints.append(message.text)

        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.add_init_script(SHIFTS)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def tab(new_tab):
    return new_tab()


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def store(model, tmp_path_factory):
    where = tmp_path_factory.mktemp("store")
    layers = ["relu1", "relu3"]
    made = convscope.scan(model, data_folder(where / "data"), where / "store", layers=layers, k=10, workers=0)
    save_concepts_and_atlas(model, made)
    return made


@pytest.fixture(scope="session")
def live(model, store):
    """The explorer behind the address, and the address."""
    pytest.importorskip("fastapi", reason="the explorer's extra is not installed")
    from convscope.explorer import server
    from convscope.explorer.app import create_app
    from convscope.explorer.service.state import Explorer

    explorer = Explorer({"tiny": model}, store=store)
    for number, name in enumerate(("first.png", "second.png")):
        explorer.images.add_sample(smooth_image(number, 240, 360), name, name)
    listening = server.bind_socket("127.0.0.1", 0)
    running = server.serve_in_thread(create_app(explorer), listening)
    yield explorer, f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True


@pytest.fixture(scope="session")
def site(model, store, tmp_path_factory):
    """The address of the published pages, on the disk."""
    from convscope.explorer.publish import publish

    where = tmp_path_factory.mktemp("published")
    files = []
    for number, name in enumerate(("first.png", "second.png")):
        files.append(str(where / name))
        Image.fromarray(smooth_image(number, 240, 360)).save(files[-1])
    publish({"tiny": model}, store, where / "site", images=files)
    return (where / "site").as_uri()


@pytest.fixture(scope="session")
def axe():
    """The accessibility checker's program."""
    file = HERE / "node_modules" / "axe-core" / "axe.min.js"
    if not file.exists():
        pytest.skip("axe-core is not installed (npm install --prefix tests/browser)")
    return file.read_text(encoding="utf-8")
