"""The web application of the explorer."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from convscope.explorer.service.state import Explorer
from convscope.explorer.service.uploads import UploadDecoder
from convscope.explorer.static_files import static_files
from convscope.explorer.urls import LiveUrls
from convscope.explorer.web import (
    routes_activations,
    routes_concepts,
    routes_heatmaps,
    routes_images,
    routes_jobs,
    routes_models,
    routes_pages,
    routes_removals,
    security,
)
from convscope.explorer.web.errors import add_exception_handlers
from convscope.explorer.web.middleware import SecurityMiddleware
from convscope.explorer.web.requests import RequestRunner


def create_app(
    explorer: Explorer,
    *,
    decoder: UploadDecoder | None = None,
    hosts: Sequence[str] = security.LOCAL_HOSTS,
    token: str | None = None,
    frame_ancestors: Sequence[str] = (),
    timeout: float = 120,
) -> FastAPI:
    """Create the application.

    Parameters
    ----------
    explorer : Explorer
        Closed when the application ends.
    decoder : UploadDecoder, optional
        Decodes uploads; closed when the application ends.
    hosts : sequence of str
        Host names that requests may address; "*" for any.
    token : str, optional
        Secret that clients have to send.
    frame_ancestors : sequence of str
        Origins of pages that may embed the explorer in a frame.
    timeout : float
        Seconds that a request may take.
    """
    decoder = decoder or UploadDecoder()
    app = FastAPI(
        title="convscope explorer",
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lambda _: _lifespan(explorer, decoder),
    )
    files = static_files()
    version = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()[:10]
    app.state.static_files = files
    app.state.runner = RequestRunner(explorer, decoder, LiveUrls(version), timeout)
    app.add_middleware(SecurityMiddleware, hosts=hosts, token=token, frame_ancestors=frame_ancestors)
    add_exception_handlers(app)
    for routes in (
        routes_pages,
        routes_images,
        routes_models,
        routes_activations,
        routes_heatmaps,
        routes_removals,
        routes_jobs,
        routes_concepts,
    ):
        app.include_router(routes.router)
    return app


@asynccontextmanager
async def _lifespan(explorer: Explorer, decoder: UploadDecoder) -> AsyncIterator[None]:
    """Start the decoder's process in the background; end it and all jobs on shutdown."""
    starting = threading.Thread(target=decoder.warm_up, name="convscope-decoder")
    starting.start()
    yield
    explorer.close()
    starting.join()  # so that the process does not start after the shutdown
    decoder.close()
