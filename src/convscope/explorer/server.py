"""Starts the explorer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.explorer.web import security

if TYPE_CHECKING:
    from convscope.store.store import Store


def require_packages() -> None:
    """Raises ConvscopeError where the packages that the explorer needs are not installed."""
    try:
        for needed in ("uvicorn", "convscope.explorer.app"):
            import_module(needed)
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
) -> Any:
    """The application, with the sample photographs or the pictures given. Raises ConvscopeError."""
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
    """A listening socket; port 0: any free one. Raises ConvscopeError if it cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConvscopeError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; try another --port"
        ) from error


def serve(app: Any, listening: socket.socket) -> None:
    """Serve until interrupted."""
    _server(app).run(sockets=[listening])


def serve_in_thread(app: Any, listening: socket.socket) -> Any:
    """Serve in a thread of this process. Returns the server; its `should_exit = True` ends it."""
    server = _server(app)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, daemon=True, name="convscope-explorer"
    )
    thread.start()
    return server


def _server(app: Any) -> Any:
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        limit_concurrency=256,
        h11_max_incomplete_event_size=64 << 10,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    return uvicorn.Server(settings)
