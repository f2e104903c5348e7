"""Decode uploaded images in a worker process with limits on bytes, pixels, memory and time."""

from __future__ import annotations

import pickle
import threading
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from convscope.errors import ConvscopeError
from convscope.images.decode_worker import DecodeWorker, FullSizeTask, WorkerDied, WorkerTimeout

MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
TIMEOUT = 20.0  # seconds
START_TIMEOUT = 120.0  # seconds
MEMORY_LIMIT = 2 << 30  # bytes that decoding one image may take


class UploadDecoder:
    """Decodes one encoded image at a time to uint8 pixels (H, W, 3).

    An image that exceeds the time or memory limit costs its worker process only; the next image gets a new one. A
    process takes seconds to start; `warm_up` starts one in advance.

    Parameters
    ----------
    max_bytes, max_pixels : int
        Limits on the encoded and on the decoded image.
    timeout : float
        Seconds that decoding may take.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, timeout: float = TIMEOUT) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self.worker: DecodeWorker | None = None
        self._task = pickle.dumps(FullSizeTask(max_pixels))
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Start a worker; a failure is left for the first image to report."""
        with self._lock, suppress(ConvscopeError):
            self._ready_worker()

    def decode(self, content: bytes) -> npt.NDArray[np.uint8]:
        """Decode the content of an image file.

        Raises ConvscopeError if it is empty, too large or not an image, or if decoding fails or takes too long.
        """
        if len(content) > self.max_bytes:
            raise ConvscopeError(f"{len(content):,} bytes; images of up to {self.max_bytes:,} bytes are accepted")
        if not content:
            raise ConvscopeError("is empty (0 bytes)")
        with self._lock:
            worker = self._ready_worker()
            try:
                (reply,) = worker.decode([(0, content)], self.timeout)
            except (WorkerDied, WorkerTimeout) as error:
                self._stop()
                raise _failure(error, self.timeout) from error
        if isinstance(reply, str):
            raise ConvscopeError(reply)
        return reply.pixels.astype(np.uint8, copy=False)

    def close(self) -> None:
        """End the worker process."""
        with self._lock:
            self._stop()

    def _ready_worker(self) -> DecodeWorker:
        if self.worker is None or not self.worker.is_alive:
            self._stop()
            self.worker = DecodeWorker(self._task, memory_limit=MEMORY_LIMIT, quiet=True)
            try:
                self.worker.wait_until_ready(START_TIMEOUT)
            except (WorkerDied, WorkerTimeout) as error:
                self._stop()
                raise _failure(error, START_TIMEOUT) from error
        return self.worker

    def _stop(self) -> None:
        if self.worker is not None:
            self.worker.kill()
        self.worker = None


def _failure(error: WorkerDied | WorkerTimeout, timeout: float) -> ConvscopeError:
    slow = isinstance(error, WorkerTimeout)
    reason = f"it took longer than {timeout:g} s" if slow else "its decoder process ended"
    return ConvscopeError(f"the image could not be decoded: {reason}")
