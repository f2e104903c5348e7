"""Run requests in threads: limits per client, timeouts, cancellation on disconnect, uploads."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import anyio
import numpy as np
from fastapi import Request

from convscope.errors import ConvscopeError
from convscope.explorer.service.display_names import display_name
from convscope.explorer.service.example_sheets import ExampleSheets
from convscope.explorer.service.images import RegisteredImage, UnknownResource
from convscope.explorer.service.jobs import Client, QueueFull
from convscope.explorer.service.networks import Network
from convscope.explorer.service.state import Explorer
from convscope.explorer.service.uploads import UploadDecoder
from convscope.explorer.urls import LiveUrls
from convscope.explorer.views.page import PageContext
from convscope.explorer.web import security

T = TypeVar("T")
NUM_THREADS = 64
MAX_REQUESTS_PER_CLIENT = NUM_THREADS // 2  # at once
MAX_UPLOADS = 8  # at once
UPLOAD_TIMEOUT = 30.0  # seconds
POLL_INTERVAL = 0.15  # seconds between two checks whether the client is still connected


class RequestRunner:
    """Runs requests of an application.

    Parameters
    ----------
    explorer : Explorer
    decoder : UploadDecoder
        Decodes uploads.
    urls : LiveUrls
    timeout : float
        Seconds that a request may take.
    """

    def __init__(self, explorer: Explorer, decoder: UploadDecoder, urls: LiveUrls, timeout: float) -> None:
        self.explorer, self.decoder, self.urls, self.timeout = explorer, decoder, urls, timeout
        self.sheets = {net.key: ExampleSheets(net.store) for net in explorer.networks.values() if net.store is not None}
        self._threads = anyio.CapacityLimiter(NUM_THREADS)
        self._num_uploads = 0
        self._num_requests: Counter[str] = Counter()

    def client_id(self, request: Request) -> str:
        """Return what identifies a client for fair scheduling."""
        return request.cookies.get(security.COOKIE) or (request.client.host if request.client else "unknown")

    def page_context(self, client: Client | None = None) -> PageContext:
        """Return what pages are built from; a page without a client must not run the model."""
        return PageContext(self.explorer, client or Client("nobody", 0), self.urls)

    async def run(self, request: Request, function: Callable[[Client], T]) -> T:
        """Call a function in a thread. When the client disconnects, the jobs that it waits for are released.

        Raises
        ------
        QueueFull
            If the client has too many requests under way.
        """
        client = Client(self.client_id(request), self.timeout)
        if self._num_requests[client.id] >= MAX_REQUESTS_PER_CLIENT:
            raise QueueFull(f"{MAX_REQUESTS_PER_CLIENT} of your own requests are under way; try again when one is done")
        watcher = asyncio.create_task(_watch_connection(request, client))
        self._num_requests[client.id] += 1
        try:
            return await anyio.to_thread.run_sync(function, client, limiter=self._threads)
        finally:
            client.disconnected = True
            watcher.cancel()
            self._num_requests[client.id] -= 1
            self._num_requests += Counter()  # drops clients without requests

    async def upload(self, request: Request, name: str) -> RegisteredImage:
        """Register the image in a request's body. Raises ConvscopeError if it is no image, too large or too slow."""
        if self._num_uploads >= MAX_UPLOADS:
            raise QueueFull(f"{MAX_UPLOADS} uploads are under way; try again in a moment")
        self._num_uploads += 1
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT):
                content = await self._body(request)
            pixels: np.ndarray = await anyio.to_thread.run_sync(self.decoder.decode, content, limiter=self._threads)
        except TimeoutError as error:
            raise ConvscopeError(f"the upload did not arrive within {UPLOAD_TIMEOUT:g} s") from error
        finally:
            self._num_uploads -= 1
        return self.explorer.images.add(pixels, display_name(name))

    async def _body(self, request: Request) -> bytes:
        max_bytes, parts, size = self.decoder.max_bytes, [], 0
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise ConvscopeError(f"the file is too large; the limit is {max_bytes:,} bytes")
            parts.append(part)
        return b"".join(parts)

    def open_dataset_image(self, net: Network, index: int) -> RegisteredImage:
        """Register an image of the store's data set, so that the model can be run on it. Raises UnknownResource."""
        store = net.store
        if net.key not in self.sheets or store is None or not 0 <= index < store.num_images:
            raise UnknownResource(f"the data set has no image {index}")
        view = self.sheets[net.key].view(index)
        return self.explorer.images.add(np.asarray(view.image), display_name(store.image(index).name))


async def _watch_connection(request: Request, client: Client) -> None:
    """Mark the client as disconnected once it is."""
    while not await request.is_disconnected():
        await asyncio.sleep(POLL_INTERVAL)
    client.disconnected = True
