"""The explorer in JupyterLab, in a real browser: without a port, and in exported notebooks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("anywidget", reason="the extra 'jupyter' is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed (pip install jupyterlab)")
nbformat = pytest.importorskip("nbformat")

SOURCE = """import os, sys
sys.path[:0] = {path!r}
from tests.oracles.explorer import smooth_image, tiny_model
import convscope
widget = convscope.show(tiny_model(), [smooth_image(0), smooth_image(1)], height=600)
widget"""
TIMEOUT = 60_000  # milliseconds


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Yield the address of a JupyterLab with a notebook, the notebook's path, and the server's process."""
    folder = tmp_path_factory.mktemp("lab")
    root = Path(__file__).parents[3]
    notebook = folder / "root" / "show.ipynb"
    notebook.parent.mkdir()
    cells = [nbformat.v4.new_code_cell(SOURCE.format(path=[str(root), str(root / "src")]))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebook)
    port = free_port()
    folders = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    settings = {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "work")}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"),
            *("--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token="),
            *(f"--ServerApp.root_dir={notebook.parent}", "--ServerApp.log_level=ERROR"),
        ],
        env={**os.environ, **folders, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                httpx.get(f"{address}/api", timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield address, notebook, process.pid
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def page(lab, chromium):
    """Yield the page of a notebook whose cell has run."""
    context = chromium.new_context(viewport={"width": 1300, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(f"{lab[0]}/lab/tree/show.ipynb?reset")
    page.get_by_text("| Idle").first.wait_for()
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    yield page
    context.close()


@pytest.fixture
def explorer(page):
    """Return the explorer's frame, at its first page."""
    page.locator(".jp-OutputArea-output iframe").evaluate("frame => { frame.dataset.old = 'true'; }")
    page.frame_locator(".jp-OutputArea-output iframe").locator("header nav a", has_text="Image").click()
    new = page.frame_locator(".jp-OutputArea-output iframe:not([data-old])")  # each page has a frame of its own
    new.locator("#classes a").first.wait_for()
    return page.frame_locator(".jp-OutputArea-output iframe")


def wait_for_text(locator, text: str) -> None:
    locator.filter(has_text=text).first.wait_for()


def test_a_class_is_selected(page, explorer):
    assert explorer.locator("#strip img").count() == 2
    canvas = explorer.locator('[data-stage="main"] canvas')
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    assert len(before) > 2000  # a heatmap is drawn
    second = explorer.locator("#classes a").nth(1)
    name = second.locator(".name").inner_text()
    assert explorer.locator("#target-name").inner_text() != name
    second.click()
    wait_for_text(explorer.locator("#target-name"), name)
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before


def test_the_notebook_keeps_the_page_as_it_stands(page, explorer):
    second = explorer.locator("#classes a").nth(1)
    name = second.locator(".name").inner_text()
    second.click()
    wait_for_text(explorer.locator("#target-name"), name)
    cell = page.locator(".jp-Notebook .jp-Cell .cm-content").last
    cell.click()
    page.keyboard.type("print('kept:', '<script' not in widget.snapshot, len(widget.snapshot) > 20000)")
    page.wait_for_timeout(3000)
    page.keyboard.press("Shift+Enter")
    printed = page.locator(".jp-OutputArea-output", has_text="kept:").first
    printed.wait_for()
    assert printed.inner_text().strip() == "kept: True True"


def test_the_output_for_exports_is_hidden_where_the_widget_runs(page, explorer):
    static = page.locator('.jp-OutputArea-output div[class^="convscope-"]')
    assert static.count() == 1
    assert static.is_hidden()


def test_images_are_shown(explorer):
    widths = explorer.locator("#strip img").evaluate_all(
        "images => Promise.all(images.map((image) => image.decode().then(() => image.naturalWidth)))"
    )
    assert min(widths) > 0


def test_links_forms_and_event_streams_work(page, explorer):
    explorer.locator("header nav a", has_text="Layers").click()
    explorer.locator("#measure").wait_for()
    explorer.locator("a[href$='/layer/relu3']").first.click()
    explorer.locator("#grid-controls").wait_for()
    assert explorer.locator("h1").inner_text().startswith("relu3")
    explorer.locator("a[href*='/unit/relu3/']").first.click()
    explorer.locator("#pattern-form").wait_for()
    explorer.locator("#generate").click()
    explorer.get_by_text("Download the pattern").wait_for()  # events of the job arrived, and the page was loaded again
    page.get_by_role("button", name="‹ Back").click()
    explorer.locator("#grid-controls").wait_for()


def test_the_page_reaches_no_network_and_nothing_of_jupyter(lab, page, explorer):
    address = lab[0]
    script = f"() => fetch('{address}/api', {{mode: 'no-cors'}}).then(() => 'reached', () => 'refused')"
    frame = next(frame for frame in page.frames if frame.parent_frame is not None)
    assert frame.evaluate(script) == "refused"
    assert frame.evaluate("() => { try { return String(parent.document) } catch { return 'refused' } }") == "refused"


def test_the_kernel_serves_no_http(lab, page, explorer):
    psutil = pytest.importorskip("psutil")
    children = psutil.Process(lab[2]).children(recursive=True)
    kernel = next(process for process in children if "ipykernel_launcher" in " ".join(process.cmdline()))
    listening = [c.laddr.port for c in kernel.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert listening  # the ports of the kernel's own protocol
    assert not [port for port in listening if answers_http(port)]


def answers_http(port: int) -> bool:
    """Whether an HTTP server listens on a port."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", timeout=2).status_code > 0
    except httpx.HTTPError:
        return False
