"""Build the explorer's application, and serve it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.explorer.web import security

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from convscope.store.store import Store

SHUTDOWN_TIMEOUT = 5  # seconds that open connections get to finish


def require_packages() -> None:
    """Raise ConvscopeError unless the packages of the extra `serve` are installed."""
    try:
        for module in ("uvicorn", "convscope.explorer.app"):
            import_module(module)
    except ImportError as error:
        raise ConvscopeError(f"the explorer needs {error.name}; pip install 'convscope[serve]'") from error


def build_app(
    models: Mapping[str, Model],
    *,
    images: Sequence[str] = (),
    store: Store | None = None,
    cache_dir: Path | None = None,
    hosts: Sequence[str] = security.LOCAL_HOSTS,
    token: str | None = None,
    frame_ancestors: Sequence[str] = (),
) -> FastAPI:
    """Build the application, with images from files or, by default, the sample photographs.

    The other parameters are those of `Explorer` and `create_app`. Raises ConvscopeError.
    """
    require_packages()
    from convscope.explorer.app import create_app
    from convscope.explorer.service.state import Explorer

    explorer = Explorer(models, store=store, cache_dir=cache_dir)
    if images:
        explorer.images.add_samples(images)
    else:
        explorer.add_samples()
    return create_app(explorer, hosts=hosts, token=token, frame_ancestors=frame_ancestors)


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 stands for any free one. Raises ConvscopeError if it is not available."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConvscopeError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; try another --port"
        ) from error


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve until interrupted."""
    _server(app).run(sockets=[listening])


def serve_in_thread(app: FastAPI, listening: socket.socket) -> uvicorn.Server:
    """Serve in a thread, and return the server; ``server.should_exit = True`` ends it."""
    server = _server(app)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, daemon=True, name="convscope-explorer"
    )
    thread.start()
    return server


def _server(app: FastAPI) -> uvicorn.Server:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        limit_concurrency=256,
        h11_max_incomplete_event_size=64 << 10,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        lifespan="on",
    )
    return uvicorn.Server(config)
