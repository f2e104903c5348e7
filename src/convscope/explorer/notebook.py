"""The explorer in a notebook."""

from __future__ import annotations

import atexit
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from convscope.arguments import check_arguments
from convscope.datasets.image_inputs import open_images
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.explorer import server
from convscope.explorer.web import security
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing
from convscope.progress import in_jupyter
from convscope.sources.coercion import ModelLike, as_model

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from convscope.explorer.jupyter.widget import ExplorerWidget

NOTEBOOK_ORIGINS = ("http://localhost:*", "http://127.0.0.1:*", "vscode-webview:")
MIN_HEIGHT = 100  # pixels


@dataclass(frozen=True)
class ExplorerFrame:
    """An explorer that runs in this process; notebooks show it in a frame.

    Attributes
    ----------
    url : str
        Opens the explorer in any browser on this machine.
    height : int
        Height of the frame in pixels.
    """

    url: str
    height: int
    _server: uvicorn.Server = field(repr=False)

    def close(self) -> None:
        """Stop the server. It also stops when the process ends."""
        self._server.should_exit = True

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{escape(self.url)}" width="100%" height="{self.height}" title="convscope explorer" '
            'style="border:1px solid #8888; border-radius:6px"></iframe>'
        )


@check_arguments
def show(
    model: ModelLike, image: object = None, *, height: int = 720, port: int | None = None
) -> ExplorerFrame | ExplorerWidget:
    """Open the explorer in a notebook.

    With anywidget (the extra ``jupyter``), its pages travel over the channel between the notebook and its kernel: this
    works wherever the notebook does, without a port. Otherwise a server listens on this machine (127.0.0.1), and the
    browser has to run on the same machine, or reach the port through a tunnel.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes. It may be trained further: pages that are opened later use its
        new weights. After parameters or layers are replaced by others, call `show` again.
    image : path, sequence of paths, PIL images, arrays or tensor, optional
        Images in any form that `convscope.predict` takes; the sample photographs if omitted.
    height : int
        Height of the frame in pixels, at least 100.
    port : int, optional
        Start a server on this port; 0 stands for any free one. By default one is started only outside of Jupyter, or
        without anywidget.

    Returns
    -------
    ExplorerFrame or ExplorerWidget
        What a notebook shows. ``url`` opens the explorer in a browser, if a server was started; ``close()`` stops it.

    Raises
    ------
    ConvscopeError
        If `model` cannot be loaded, an image cannot be read, the port is not available, or the packages of the extra
        ``serve`` are not installed.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> frame = convscope.show(model, height=500)
    >>> frame.url
    'http://127.0.0.1:...'
    >>> frame.close()
    """
    model = as_model(model)
    if height < MIN_HEIGHT:
        raise ConvscopeError(f"height is {height}; expected {MIN_HEIGHT} or more pixels")
    if port is None and in_jupyter() and find_spec("anywidget") is not None:
        return _make_widget(_build_app(model, image), height)
    listening = server.bind_socket("127.0.0.1", port or 0)
    try:
        app = _build_app(model, image)
    except BaseException:
        listening.close()
        raise
    running = server.serve_in_thread(app, listening)
    atexit.register(setattr, running, "should_exit", True)
    return ExplorerFrame(f"http://127.0.0.1:{listening.getsockname()[1]}/", height, running)


def _make_widget(app: FastAPI, height: int) -> ExplorerWidget:
    from convscope.explorer.jupyter.in_process import InProcessServer
    from convscope.explorer.jupyter.widget import ExplorerWidget, make_snapshot

    running = InProcessServer(app)
    atexit.register(running.close)
    return ExplorerWidget(running, height, make_snapshot(running))


def _build_app(model: Model, image: object) -> FastAPI:
    server.require_packages()
    from convscope.explorer.app import create_app
    from convscope.explorer.service.state import Explorer

    explorer = Explorer({model.name: model})
    if image is None:
        explorer.add_samples()
    else:
        loader = ImageBatchLoader(open_images(image), Preprocessing())
        for index, name in enumerate(loader.names):
            pixels: np.ndarray = loader.original(index)
            explorer.images.add_sample(pixels, name.rpartition("/")[2], name)
    return create_app(explorer, hosts=security.LOCAL_HOSTS, frame_ancestors=("'self'", *NOTEBOOK_ORIGINS))
