"""How much one call of a tool may compute, and stop it when it takes too long or is cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from convscope.errors import ConvscopeError

NOTIFY_SECONDS = 0.5  # between two reports of progress to the client


@dataclass(frozen=True)
class Limits:
    """Bounds of one call.

    Attributes
    ----------
    seconds : float
        Time after which a call is stopped, at its next report of progress.
    image_size : int
        Longer side of the images that are returned, in pixels.
    image_bytes : int
        Size of a returned image as a PNG file; larger ones are reduced.
    images : int
        Images that one call reads.
    returned_images : int
        Images that one call returns.
    units : int
        Units of patterns.
    steps : int
        Steps of gradient ascent.
    rows : int
        Rows of a table that are returned.
    scanned_images : int
        Images of a scan.
    """

    seconds: float = 300
    image_size: int = 768
    image_bytes: int = 1_000_000
    images: int = 32
    returned_images: int = 8
    units: int = 64
    steps: int = 512
    rows: int = 100
    scanned_images: int = 10_000

    def check(self, name: str, value: int, maximum: int) -> int:
        """Return a number of things; raise ConvscopeError if it is above the maximum."""
        if value > maximum:
            raise ConvscopeError(f"{name} is {value}; this server allows at most {maximum} in one call")
        return value


class Task:
    """The progress callback of one call, which stops it at its deadline, or when its client cancels it.

    Parameters
    ----------
    seconds : float
        Time that the call may take.
    notify : callable
        Called with the amount done and the total, at most twice a second.
    """

    def __init__(self, seconds: float, notify: Callable[[float, int], None]) -> None:
        self._seconds, self._notify = seconds, notify
        self._deadline = time.monotonic() + seconds
        self._next_report = 0.0
        self._cancelled = False

    def cancel(self) -> None:
        """Stop the call at its next report of progress."""
        self._cancelled = True

    def __call__(self, done: float, total: int) -> None:
        """Report progress; raise ConvscopeError if the call has to stop."""
        self.check(done, total)
        now = time.monotonic()
        if now >= self._next_report:
            self._next_report = now + NOTIFY_SECONDS
            self._notify(done, total)

    def check(self, done: float = 0, total: int = 1) -> None:
        """Raise ConvscopeError if the call has to stop."""
        if self._cancelled:
            raise ConvscopeError("cancelled by the client")
        if time.monotonic() > self._deadline:
            raise ConvscopeError(
                f"stopped after {self._seconds:g} seconds, at {done:g} of {total}; ask for fewer images, units or "
                "steps, or restart the server with a larger --time-limit"
            )
