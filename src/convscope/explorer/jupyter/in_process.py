"""Run an ASGI application inside this process, without a port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import unquote

from fastapi import FastAPI

from convscope.explorer.web import security

HOST = "localhost"
REQUEST_HEADERS = ("accept", "content-type")  # that a page may set; the others are this module's
START_TIMEOUT, STOP_TIMEOUT = 60.0, 5.0  # seconds

OnEvent: TypeAlias = Callable[[dict[str, Any], bytes], None]


@dataclass(frozen=True)
class AppRequest:
    """A request to the application; `target` is the path with the query, percent-encoded."""

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def scope(self, client: str) -> dict[str, Any]:
        """Return the ASGI scope. `client` identifies who asks, for fair scheduling."""
        path, _, query = self.target.partition("?")
        headers = {name: value for name, value in self.headers.items() if name.lower() in REQUEST_HEADERS}
        headers |= {"host": HOST, "cookie": f"{security.COOKIE}={client}", "content-length": str(len(self.body))}
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method.upper(),
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": "",
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
            "client": None,
            "server": (HOST, None),
        }


@dataclass(frozen=True)
class AppResponse:
    """A complete response."""

    status: int
    headers: dict[str, str]
    body: bytes


class InProcessServer:
    """Runs an application in a thread with an event loop of its own.

    Parameters
    ----------
    app : FastAPI
        It is started and shut down with the server.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._client = security.new_token()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True, name="convscope-channel")
        self._thread.start()
        self._started.result(START_TIMEOUT)

    def start(self, request: AppRequest, on_event: OnEvent) -> Callable[[], None]:
        """Begin a request, and return a function that disconnects the client.

        ``on_event`` is called in the server's thread: first with ``{"kind": "start", "status", "headers"}``, then with
        ``{"kind": "body", "more"}`` and parts of the content; if the request fails, ``{"kind": "error", "error"}``.
        """
        disconnected = asyncio.Event()

        def begin() -> None:
            task = self._loop.create_task(self._respond(request, on_event, disconnected))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)
        return lambda: self._call_if_running(disconnected.set)

    def fetch(self, request: AppRequest, timeout: float | None = None) -> AppResponse:
        """Make a request and wait for the whole response. Raises ConnectionError if it fails."""
        result: Future[AppResponse] = Future()
        start: dict[str, Any] = {}
        parts: list[bytes] = []

        def on_event(event: dict[str, Any], content: bytes) -> None:
            if event["kind"] == "error":
                result.set_exception(ConnectionError(event["error"]))
            elif event["kind"] == "start":
                start.update(event)
            else:
                parts.append(content)
                if not event["more"]:
                    result.set_result(AppResponse(start["status"], start["headers"], b"".join(parts)))

        disconnect = self.start(request, on_event)
        try:
            return result.result(timeout)
        finally:
            disconnect()

    def close(self) -> None:
        """Shut the application down and end the thread."""
        self._call_if_running(self._closing.set)
        self._thread.join(STOP_TIMEOUT)

    def _call_if_running(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _serve(self) -> None:
        try:
            async with self._app.router.lifespan_context(self._app):
                self._started.set_result(None)
                await self._closing.wait()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
        except Exception as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _respond(self, request: AppRequest, on_event: OnEvent, disconnected: asyncio.Event) -> None:
        body_sent = False

        async def receive() -> dict[str, Any]:
            nonlocal body_sent
            if not body_sent:
                body_sent = True
                return {"type": "http.request", "body": request.body, "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if disconnected.is_set():
                return
            if message["type"] == "http.response.start":
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
                headers.pop("set-cookie", None)
                on_event({"kind": "start", "status": message["status"], "headers": headers}, b"")
            elif message["type"] == "http.response.body":
                on_event({"kind": "body", "more": message.get("more_body", False)}, message.get("body", b""))

        try:
            await self._app(request.scope(self._client), receive, send)
        except Exception as error:  # noqa: BLE001 - as a server does: the request fails, the others go on
            on_event({"kind": "error", "error": f"{type(error).__name__}: {error}"}, b"")
