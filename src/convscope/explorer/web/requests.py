"""Between the web and the explorer: who asks, how long they wait, and what happens when they go away."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import anyio
import numpy as np
from fastapi import Request
from fastapi.responses import StreamingResponse

from convscope.errors import ConvscopeError
from convscope.explorer.service.example_sheets import ExampleSheets
from convscope.explorer.service.images import RegisteredImage, UnknownResource
from convscope.explorer.service.jobs import Client, ClientDisconnected, Job, QueueFull
from convscope.explorer.service.state import Explorer, Network
from convscope.explorer.service.uploads import Decoder, plain_name
from convscope.explorer.urls import LiveUrls
from convscope.explorer.views.page import PageContext
from convscope.explorer.web import security

T = TypeVar("T")
POLL_INTERVAL = 0.15  # seconds between two looks at work under way
UPLOAD_TIMEOUT = 30.0  # seconds that an upload may take to arrive
MAX_UPLOADS = 8  # at once
MAX_REQUESTS_PER_CLIENT = 32  # requests of one visitor that are answered at once: half of the threads


class RequestRunner:
    """Takes requests to the explorer, each in a thread that ends when the client goes away or time is up."""

    def __init__(self, explorer: Explorer, decoder: Decoder, timeout: float) -> None:
        self.explorer, self.decoder, self.timeout = explorer, decoder, timeout
        self.sheets = {net.key: ExampleSheets(net.store) for net in explorer.networks.values() if net.store is not None}
        self._threads = anyio.CapacityLimiter(64)
        self._uploading = 0
        self._asking: Counter[str] = Counter()

    def client_id(self, request: Request) -> str:
        """Who asks, as far as it matters for taking turns."""
        return request.cookies.get(security.COOKIE) or (request.client.host if request.client else "unknown")

    def page_context(self, client: Client | None, urls: LiveUrls) -> PageContext:
        """Return what pages are built from; without a client they must not need the network."""
        return PageContext(self.explorer, client or Client("nobody", 0), urls)

    async def run(self, request: Request, make: Callable[[Client], T]) -> T:
        """What `make` gives, made in a thread. Work that only this client waits for ends when the client goes away.

        Raises FullError if the client waits for too many answers already.
        """
        asker = Client(self.client_id(request), self.timeout)
        if self._asking[asker.id] >= MAX_REQUESTS_PER_CLIENT:
            raise QueueFull(
                f"{MAX_REQUESTS_PER_CLIENT} of your own questions wait already; try again when one is answered"
            )

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(POLL_INTERVAL)
            asker.disconnected = True

        watching = asyncio.create_task(watch())
        self._asking[asker.id] += 1
        try:
            return await anyio.to_thread.run_sync(make, asker, limiter=self._threads)
        finally:
            asker.disconnected = True
            watching.cancel()
            self._asking[asker.id] -= 1
            self._asking += Counter()  # forgets who waits for nothing

    def find_image(self, net: Network, key: str | None) -> RegisteredImage | None:
        """The picture that an address names, if it names one. Raises MissingError."""
        return self.explorer.images.find(key) if key and net.takes_images else None

    async def upload(self, request: Request, name: str) -> RegisteredImage:
        """The picture in a request's body. Raises ConvscopeError if it is none, too large or too slow."""
        if self._uploading >= MAX_UPLOADS:
            raise QueueFull(f"{MAX_UPLOADS} pictures are being read already; try again in a moment")
        self._uploading += 1
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT):
                content = await self._body(request)
            pixels: np.ndarray = await anyio.to_thread.run_sync(self.decoder.decode, content, limiter=self._threads)
        except TimeoutError as error:
            raise ConvscopeError(f"the picture did not arrive within {UPLOAD_TIMEOUT:g} s") from error
        finally:
            self._uploading -= 1
        return self.explorer.images.add(pixels, plain_name(name))

    async def _body(self, request: Request) -> bytes:
        most, parts, size = self.decoder.most_bytes, [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise ConvscopeError(f"more than {most:,} bytes; smaller pictures are taken")
            parts.append(part)
        return b"".join(parts)

    def open_dataset_image(self, asker: Client, net: Network, number: int) -> str:
        """A picture of the data set, put on the shelf; its key."""
        if net.key not in self.sheets or net.store is None or not 0 <= number < net.store.num_images:
            raise UnknownResource(f"there is no picture {number} in the data set here")
        store = net.store
        view = self.sheets[net.key].view(number)
        return self.explorer.images.add(np.asarray(view.image), plain_name(store.image(number).name)).key

    def event_stream(self, request: Request, work: Job, result: Callable[[Any], dict[str, Any]]) -> StreamingResponse:
        """The progress of work, as server-sent events: progress, frame, then done or failed."""
        return StreamingResponse(
            self._events(request, work, result),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _events(self, request: Request, work: Job, result: Callable[[Any], dict[str, Any]]) -> AsyncIterator[str]:
        told, frame = None, 0
        try:
            while not work.future.done():
                if await request.is_disconnected():
                    return
                state = {
                    "begun": work.started,
                    "ahead": work.queue.position(work),
                    "done": work.done,
                    "total": work.total,
                }
                if state != told:
                    told = state
                    yield _event("progress", state)
                if work.preview_index != frame:
                    frame = work.preview_index
                    yield f"event: frame\ndata: {_data_url(work.preview)}\n\n"
                await asyncio.sleep(POLL_INTERVAL)
            if work.preview_index != frame:  # work that is done within a tick has been seen too
                yield f"event: frame\ndata: {_data_url(work.preview)}\n\n"
            try:
                yield _event("done", result(work.future.result()))
            except (ConvscopeError, ClientDisconnected, CancelledError) as error:
                yield _event("failed", {"error": str(error) or "the work was ended"})
        finally:
            work.queue.release(work)


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"


def _data_url(image: bytes) -> str:
    import base64

    return "data:image/webp;base64," + base64.b64encode(image).decode()
