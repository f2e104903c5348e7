"""The explorer over the channel of a kernel: the same responses as over HTTP."""

from __future__ import annotations

import html
import json
import re
import threading
import time
from typing import Any

import httpx
import pytest

import convscope
from convscope.explorer import notebook, server
from tests.oracles.explorer import smooth_image

pytest.importorskip("anywidget", reason="the extra 'jupyter' is not installed")

from convscope.explorer.jupyter import widget as widget_module
from convscope.explorer.jupyter.in_process import AppRequest, InProcessServer
from convscope.explorer.jupyter.widget import ExplorerWidget, make_snapshot


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "convscope-channel"]


@pytest.fixture(scope="module")
def app(tiny):
    return notebook._build_app(tiny, smooth_image(0))


@pytest.fixture(scope="module")
def http(app):
    """Yield an HTTP client of the application; it never starts or stops the application."""
    listening = server.bind_socket("127.0.0.1", 0)
    running = server.serve_in_thread(app, listening)
    with httpx.Client(base_url=f"http://localhost:{listening.getsockname()[1]}") as client:
        yield client
    running.should_exit = True


@pytest.fixture(scope="module")
def in_process(tiny):
    running = InProcessServer(notebook._build_app(tiny, smooth_image(0)))
    yield running
    running.close()
    wait_until(lambda: thread_names() == [])


IMAGE = "/api/models/SmallConvNet/images/image-0"
PATHS = [
    "/",
    "/m/SmallConvNet/image/image-0",
    "/m/SmallConvNet",
    "/glossary",
    "/static/app.js",
    "/static/app.css",
    "/image/photo?image=image-0&max_size=160",
    f"{IMAGE}/predictions",
    f"{IMAGE}/heatmap?target=1",
    f"{IMAGE}/heatmap.png?target=1",
    f"{IMAGE}/predictions.csv",
    "/m/nothing",
    "/../../etc/passwd",
    "/%2e%2e/etc/passwd",
]


@pytest.mark.parametrize("path", PATHS)
def test_responses_equal_those_over_http(path, in_process, http):
    response = in_process.fetch(AppRequest("GET", path), 30)
    expected = http.get(httpx.URL(http.base_url).copy_with(raw_path=path.encode()))
    assert response.status == expected.status_code
    assert response.body == expected.content
    for name in ("content-type", "content-security-policy", "location", "etag", "content-disposition"):
        assert response.headers.get(name) == expected.headers.get(name)


def test_methods_and_bodies_are_passed_on(in_process):
    png = (convscope.samples.photographs()[0], "application/octet-stream")
    with open(png[0], "rb") as file:
        body = file.read()
    response = in_process.fetch(AppRequest("POST", "/api/images?name=cat", {"content-type": png[1]}, body), 60)
    assert response.status == 200
    key = json.loads(response.body)["key"]
    assert in_process.fetch(AppRequest("GET", f"/image/photo?image={key}&max_size=64"), 30).status == 200
    assert in_process.fetch(AppRequest("DELETE", "/api/images"), 30).status == 405


def test_a_page_cannot_choose_host_or_cookie(in_process):
    headers = {"Host": "evil.example", "Cookie": "convscope_client=other", "Origin": "http://evil.example"}
    scope = AppRequest("GET", "/", headers).scope("me")
    assert dict(scope["headers"]) == {
        b"host": b"localhost",
        b"cookie": b"convscope_client=me",
        b"content-length": b"0",
    }
    assert "set-cookie" not in in_process.fetch(AppRequest("GET", "/", headers), 30).headers


@pytest.mark.parametrize("path", ["http://localhost/glossary", "glossary", "file:///etc/passwd"])
def test_only_paths_of_the_application_are_served(in_process, path):
    assert in_process.fetch(AppRequest("GET", path), 30).status == 404


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("not within 30 s")


PATTERN = "/api/models/SmallConvNet/pattern/events?layer=relu3&unit={}"


def test_events_arrive_one_by_one(in_process):
    events: list[tuple[dict[str, Any], bytes]] = []
    in_process.start(AppRequest("GET", PATTERN.format(1)), lambda *event: events.append(event))
    wait_until(lambda: events and events[-1][0].get("more") is False)
    assert events[0][0]["status"] == 200
    assert events[0][0]["headers"]["content-type"].startswith("text/event-stream")
    parts = [content.decode() for _, content in events[1:] if content]
    assert len(parts) > 2
    assert all(part.endswith("\n\n") for part in parts)
    assert parts[-1].startswith("event: done")


def test_a_disconnected_client_cancels_its_job(tiny):
    app = notebook._build_app(tiny, smooth_image(0))
    running = InProcessServer(app)
    try:
        events: list[Any] = []
        disconnect = running.start(AppRequest("GET", PATTERN.format(2)), lambda *event: events.append(event))
        wait_until(lambda: len(events) > 1)
        disconnect()
        count = len(events)
        time.sleep(1)
        assert len(events) == count
        assert app.state.runner.explorer.background_queue._jobs == {}
    finally:
        running.close()


class Messages:
    """What a widget sends, and a way to send it messages as a notebook does."""

    def __init__(self, widget: ExplorerWidget, monkeypatch: pytest.MonkeyPatch) -> None:
        self._widget = widget
        self.sent: list[tuple[dict[str, Any], list[bytes]]] = []
        monkeypatch.setattr(widget, "send", lambda content, buffers=None: self.sent.append((content, buffers or [])))

    def receive(self, content: dict[str, Any], *buffers: bytes) -> None:
        self._widget._handle_custom_msg(content, [memoryview(buffer) for buffer in buffers])

    def reply(self, number: str) -> tuple[int, bytes]:
        """Wait for the whole reply to a request; return its status and content."""
        wait_until(lambda: any(c["id"] == number and c.get("more") is False for c, _ in self.sent))
        mine = [(content, buffers) for content, buffers in self.sent if content["id"] == number]
        return mine[0][0]["status"], b"".join(buffer for _, buffers in mine for buffer in buffers)


def test_the_widget_answers_requests_with_their_ids(in_process, http, monkeypatch):
    messages = Messages(ExplorerWidget(in_process, 500, ""), monkeypatch)
    messages.receive({"id": "a-1", "kind": "request", "method": "GET", "path": "/m/SmallConvNet"})
    messages.receive({"id": "b-1", "kind": "request", "method": "GET", "path": f"{IMAGE}/predictions"})
    assert messages.reply("b-1") == (200, http.get(f"{IMAGE}/predictions").content)
    assert messages.reply("a-1") == (200, http.get("/m/SmallConvNet").content)
    with open(convscope.samples.photographs()[0], "rb") as file:
        photo = file.read()
    headers = {"content-type": "application/octet-stream"}
    messages.receive(
        {"id": "a-2", "kind": "request", "method": "POST", "path": "/api/images?name=x", "headers": headers}, photo
    )
    assert messages.reply("a-2")[0] == 200


def test_an_aborted_request_sends_no_more(in_process, monkeypatch):
    messages = Messages(ExplorerWidget(in_process, 500, ""), monkeypatch)
    messages.receive({"id": "1", "kind": "request", "method": "GET", "path": PATTERN.format(3)})
    wait_until(lambda: len(messages.sent) > 1)
    messages.receive({"id": "1", "kind": "abort"})
    time.sleep(0.5)
    count = len(messages.sent)
    time.sleep(0.5)
    assert len(messages.sent) == count
    messages.receive({"id": "unknown", "kind": "abort"})


def test_exports_contain_the_picture_and_the_predictions(in_process):
    widget = ExplorerWidget(in_process, 500, make_snapshot(in_process))
    data, _ = widget._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    page = data["text/html"]
    assert page.count('src="data:image/webp;base64,') == 1
    assert "<script" not in page
    predictions = json.loads(in_process.fetch(AppRequest("GET", f"{IMAGE}/predictions"), 30).body)["predictions"]
    assert all(html.escape(row["name"]) in page for row in predictions)
    assert data["text/plain"] == "ExplorerWidget(height=500)"


def test_a_notebook_exported_to_html_contains_the_picture(in_process, monkeypatch):
    """Also where the state of widgets is saved, as `nbconvert --execute` does: the export prefers the widget."""
    nbconvert = pytest.importorskip("nbconvert")
    nbformat = pytest.importorskip("nbformat")
    outputs = []

    def record(data, metadata=None, raw=False):
        assert raw
        outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata or {}))

    monkeypatch.setattr(widget_module, "display", record)
    widget = ExplorerWidget(in_process, 500, make_snapshot(in_process))
    widget._ipython_display_()
    cell = nbformat.v4.new_code_cell("convscope.show(model)", execution_count=1, outputs=outputs)
    state = {"state": {widget.model_id: {"model_name": "AnyModel", "model_module": "anywidget", "state": {}}}}
    saved = {"application/vnd.jupyter.widget-state+json": {**state, "version_major": 2, "version_minor": 0}}
    for metadata in ({}, {"widgets": saved}):
        page, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell], metadata=metadata))
        classes = re.findall(r'<div class="([^"]*)">\s*<figure [^>]*>\s*<img [^>]*src="data:image/webp', page)
        assert classes == [widget.static_class]  # the widget's script hides it


def test_show_gives_a_widget_in_jupyter_and_a_frame_elsewhere(tiny, monkeypatch):
    before = thread_names()
    monkeypatch.setattr(notebook, "in_jupyter", lambda: True)
    widget = convscope.show(tiny, smooth_image(0), height=400)
    assert isinstance(widget, ExplorerWidget)
    assert widget.url is None
    widget.close()
    wait_until(lambda: thread_names() == before)
    frame = convscope.show(tiny, smooth_image(0), port=0)  # a port is asked for
    assert frame.url.startswith("http://127.0.0.1:")
    frame.close()
    monkeypatch.setattr(notebook, "find_spec", lambda name: None)  # anywidget is not installed
    frame = convscope.show(tiny, smooth_image(0))
    assert isinstance(frame, notebook.ExplorerFrame)
    frame.close()
