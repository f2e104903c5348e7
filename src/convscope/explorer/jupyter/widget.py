"""The widget that shows the explorer in a notebook."""

from __future__ import annotations

import base64
import io
import json
import re
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from importlib.resources import files
from typing import Any

import anywidget
import traitlets
from IPython.display import display
from PIL import Image

from convscope.explorer.jupyter.in_process import AppRequest, InProcessServer

SNAPSHOT_TIMEOUT = 30.0  # seconds
SNAPSHOT_SIZE = 560  # pixels of the longer side


class ExplorerWidget(anywidget.AnyWidget):
    """Shows the pages of an application that runs in the kernel.

    Messages from the notebook are ``{"id", "kind": "request", "method", "path", "headers"}`` with the body as a buffer,
    and ``{"id", "kind": "abort"}``; replies are the events of `InProcessServer.start` with the request's ``id``.

    Parameters
    ----------
    server : InProcessServer
        Closed with the widget.
    height : int
        Height in pixels.
    snapshot : str
        HTML that is shown while no kernel answers, such as in an exported notebook.
    """

    _esm = files("convscope.explorer.jupyter").joinpath("widget.js").read_text(encoding="utf-8")
    height = traitlets.Int(720).tag(sync=True)
    snapshot = traitlets.Unicode("").tag(sync=True)
    static_class = traitlets.Unicode("").tag(sync=True)

    def __init__(self, server: InProcessServer, height: int, snapshot: str) -> None:
        super().__init__(height=height, snapshot=snapshot, static_class=f"convscope-{uuid.uuid4().hex}")
        self._server = server
        self._disconnect: dict[str, Callable[[], None]] = {}
        self.on_msg(self._on_message)

    def __repr__(self) -> str:
        return f"ExplorerWidget(height={self.height})"

    @property
    def url(self) -> None:
        """None: the explorer has no address."""
        return

    def close(self) -> None:
        """Stop the application. It also stops when the process ends."""
        super().close()
        self._server.close()

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**options)
        if bundle is not None and self.snapshot:
            bundle[0]["text/html"] = self.snapshot
        return bundle

    def _ipython_display_(self, **options: Any) -> None:
        """Display the snapshot as an output of its own, which the widget hides where it runs, and then the widget.

        Exports of notebooks prefer the widget, of which they show nothing without a network.
        """
        static = {"text/html": f'<div class="{self.static_class}">{self.snapshot}</div>'}
        bundle = super()._repr_mimebundle_(**options)
        for data, metadata in [*([(static, {})] if self.snapshot else []), *([] if bundle is None else [bundle])]:
            display(data, metadata=metadata, raw=True)  # type: ignore[no-untyped-call]  # of IPython

    def _on_message(self, _: object, content: dict[str, Any], buffers: Sequence[memoryview]) -> None:
        number = str(content["id"])
        if content["kind"] == "abort":
            self._disconnect.pop(number, lambda: None)()
            return
        body = b"".join(bytes(buffer) for buffer in buffers)
        request = AppRequest(content["method"], content["path"], content.get("headers", {}), body)
        self._disconnect[number] = self._server.start(request, partial(self._reply, number))

    def _reply(self, number: str, event: dict[str, Any], content: bytes) -> None:
        if event["kind"] == "error" or event.get("more") is False:
            self._disconnect.pop(number, None)
        self.send({"id": number, **event}, [content] if content else [])


def make_snapshot(server: InProcessServer) -> str:
    """Return HTML that shows the first page's image with its heatmap and the top classes, without scripts.

    Networks that do not classify images have none: an empty string.
    """
    start = server.fetch(AppRequest("GET", "/"), SNAPSHOT_TIMEOUT)
    page = server.fetch(AppRequest("GET", start.headers.get("location", "/")), SNAPSHOT_TIMEOUT).body.decode()
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    data = json.loads(match[1]) if match else {}
    if data.get("kind") != "image":
        return ""
    overlay = server.fetch(AppRequest("GET", f"{data['api']}/heatmap.png?target={data['target']}"), SNAPSHOT_TIMEOUT)
    predictions = server.fetch(AppRequest("GET", f"{data['api']}/predictions"), SNAPSHOT_TIMEOUT)
    if overlay.status != 200 or predictions.status != 200:
        return ""
    name = data["heatmaps"][str(data["target"])]["name"]
    return _snapshot_html(data["model"], name, overlay.body, json.loads(predictions.body)["predictions"])


def _snapshot_html(model: str, name: str, overlay: bytes, predictions: Sequence[dict[str, Any]]) -> str:
    image = Image.open(io.BytesIO(overlay)).convert("RGB")
    image.thumbnail((SNAPSHOT_SIZE, SNAPSHOT_SIZE))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=85)
    source = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
    rows = "".join(f"<li>{escape(row['name'])} {row['probability']:.1%}</li>" for row in predictions)
    caption = f"{escape(model)}: evidence for {escape(name)}"
    return (
        f'<figure style="margin:0; padding:.5em; display:flex; gap:1em; flex-wrap:wrap">'
        f'<img src="{source}" alt="{caption}" style="max-width:100%">'
        f"<figcaption>{caption}<ol>{rows}</ol></figcaption></figure>"
    )
