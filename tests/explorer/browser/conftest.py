"""A real Chromium, a live explorer and a published site of a tiny network; one of each per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.explorer.browser.chromium import ARGUMENTS, find_chromium
from tests.explorer.conftest import IMAGE_NAMES
from tests.oracles.explorer import smooth_image

RECORD_LAYOUT_SHIFTS = """
window.layoutShift = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.layoutShift += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_chromium()
    if path is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def new_tab(chromium):
    """Open a tab in a profile of its own; the test fails if a page reports an error or a warning.

    With `allow_refused`, the browser may report requests that the server refused.
    """
    contexts, messages = [], []

    def open_tab(width=1280, height=900, allow_refused=False, **options):
        def on_console(message):
            allowed = allow_refused and message.text.startswith("Failed to load resource")
            if message.type in ("error", "warning") and not allowed:
                messages.append(message.text)

        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.add_init_script(RECORD_LAYOUT_SHIFTS)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", on_console)
        page.on("pageerror", lambda error: messages.append(str(error)))
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert messages == []


@pytest.fixture
def tab(new_tab):
    return new_tab()


@pytest.fixture(scope="session")
def live(tiny, tiny_store):
    """Yield the explorer behind the live server, and the server's address."""
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    from convscope.explorer import server
    from convscope.explorer.app import create_app
    from convscope.explorer.service.state import Explorer

    explorer = Explorer({"tiny": tiny}, store=tiny_store)
    for index, name in enumerate(IMAGE_NAMES):
        explorer.images.add_sample(smooth_image(index, 240, 360), name, name)
    listening = server.bind_socket("127.0.0.1", 0)
    running = server.serve_in_thread(create_app(explorer), listening)
    yield explorer, f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True


@pytest.fixture(scope="session")
def site(tiny_site):
    """Return the file: address of the published site."""
    return tiny_site.as_uri()


@pytest.fixture(params=["live", "published"])
def url_of(request, live, site):
    """Return a function from the path of a live page to its address, live or published."""
    if request.param == "live":
        return lambda path: live[1] + path
    return lambda path: f"{site}{path}.html"


@pytest.fixture(scope="session")
def axe():
    """Return the source of the accessibility checker."""
    path = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
    if not path.exists():
        pytest.skip("axe-core is not installed (npm install --prefix tests/explorer/browser)")
    return path.read_text(encoding="utf-8")
