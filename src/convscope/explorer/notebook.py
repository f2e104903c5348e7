"""The explorer in a cell of a notebook."""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.explorer import server
from convscope.explorer.web import security
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing

NOTEBOOKS = ("http://localhost:*", "http://127.0.0.1:*", "vscode-webview:")


@dataclass(frozen=True)
class ExplorerFrame:
    """An explorer that runs in this process. A notebook shows it as a frame; `url` opens in any browser.

    `close()` ends it; so does the end of the process.
    """

    url: str
    height: int
    _server: Any

    def close(self) -> None:
        self._server.should_exit = True

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{escape(self.url)}" width="100%" height="{self.height}" title="convscope explorer" '
            'style="border:1px solid #8888; border-radius:6px"></iframe>'
        )


def show(model: Model, image: Any = None, *, height: int = 720, port: int = 0) -> ExplorerFrame:
    """Open the explorer for a model, and pictures in any form that `convscope` takes (default: the samples).

    The server listens on this machine only (127.0.0.1), at `port` (0: any free one). The notebook's browser has to be
    on the same machine, or to reach that port by a tunnel. A model in hand may be trained on meanwhile: pages that are
    opened later see its new weights; where parameters or layers are put in the place of others, show it anew. Raises
    ConvscopeError for pictures that cannot be read.
    """
    if not isinstance(model, Model):
        raise ConvscopeError(f"show takes a model that convscope.load made; {type(model).__name__} given")
    if height < 100:
        raise ConvscopeError(f"height is {height}; expected pixels, 100 or more")
    listening = server.bind_socket("127.0.0.1", port)
    try:
        app = _app(model, image)
    except BaseException:
        listening.close()
        raise
    running = server.serve_in_thread(app, listening)
    atexit.register(setattr, running, "should_exit", True)
    return ExplorerFrame(f"http://127.0.0.1:{listening.getsockname()[1]}/", height, running)


def _app(model: Model, image: Any) -> Any:
    server.require_packages()
    from convscope.explorer.app import create_app
    from convscope.explorer.service.state import Explorer

    explorer = Explorer({model.name: model})
    if image is None:
        explorer.add_samples()
    else:
        given = ImageBatchLoader(image, Preprocessing())
        for index, name in enumerate(given.names):
            pixels: np.ndarray = given.original(index)
            explorer.images.add_sample(pixels, name.rpartition("/")[2], name)
    return create_app(explorer, hosts=security.LOCAL_HOSTS, frame_ancestors=("'self'", *NOTEBOOKS))
