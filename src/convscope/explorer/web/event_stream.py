"""Progress of jobs as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import CancelledError
from typing import TypeVar

from fastapi import Request
from fastapi.sse import EventSourceResponse, format_sse_event

from convscope.errors import ConvscopeError
from convscope.explorer.service.jobs import ClientDisconnected, Job

T = TypeVar("T")
POLL_INTERVAL = 0.15  # seconds
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def stream_job(request: Request, job: Job[T], describe: Callable[[T], Mapping[str, object]]) -> EventSourceResponse:
    """Stream the events of a job: "progress" and "frame", then "done" or "failed". Releases the job in the end.

    Parameters
    ----------
    describe : callable
        Returns the data of the event "done" for the job's result.
    """
    return EventSourceResponse(job_events(request, job, describe), headers=HEADERS)


async def job_events(
    request: Request, job: Job[T], describe: Callable[[T], Mapping[str, object]]
) -> AsyncIterator[bytes]:
    """Yield the events of a job until it ends or the client disconnects."""
    last_state, last_preview = None, 0
    try:
        while not job.future.done():
            if await request.is_disconnected():
                return
            state = (job.started, job.queue.position(job), job.done, job.total)
            if state != last_state:
                last_state = state
                yield _event("progress", dict(zip(("started", "position", "done", "total"), state, strict=True)))
            if job.preview_index != last_preview:
                last_preview = job.preview_index
                yield _frame(job.preview)
            await asyncio.sleep(POLL_INTERVAL)
        if job.preview_index != last_preview:  # the job ended since the last check
            yield _frame(job.preview)
        try:
            yield _event("done", describe(job.future.result()))
        except (ConvscopeError, ClientDisconnected, CancelledError) as error:
            yield _event("failed", {"error": str(error) or "the job was cancelled"})
    finally:
        job.queue.release(job)


def _event(name: str, data: Mapping[str, object]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data))


def _frame(image: bytes) -> bytes:
    """Return an event whose data is the image's data URL."""
    return format_sse_event(event="frame", data_str=f"data:image/webp;base64,{base64.b64encode(image).decode()}")
