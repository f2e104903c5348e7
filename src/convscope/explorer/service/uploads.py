"""Pictures from strangers, decoded in a process that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

import numpy as np

from convscope.errors import ConvscopeError

MOST_BYTES = 20_000_000
MOST_PIXELS = 25_000_000
SECONDS = 20.0
STARTING = 120.0  # seconds


class Decoder:
    """Turns a file's bytes into pixels, uint8 (H, W, 3), one at a time, in a process of its own.

    A picture that takes longer than `seconds`, or more memory than there is for it, costs that process and nothing
    else: the next picture gets a new one. A process takes seconds to start; `warm` has one ready beforehand.
    """

    def __init__(
        self, *, most_bytes: int = MOST_BYTES, most_pixels: int = MOST_PIXELS, seconds: float = SECONDS
    ) -> None:
        self.most_bytes, self._pixels, self._seconds = most_bytes, most_pixels, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def warm(self) -> None:
        with self._lock, suppress(ConvscopeError):  # what hinders it, the first picture tells
            self._started()

    def decode(self, content: bytes) -> np.ndarray:
        """The picture's pixels. Raises ConvscopeError if it is none, or too large, or takes too long."""
        if len(content) > self.most_bytes:
            raise ConvscopeError(f"{len(content):,} bytes; pictures of up to {self.most_bytes:,} are taken")
        if not content:
            raise ConvscopeError("is empty (0 bytes)")
        with self._lock:
            process = self._started()
            told, pixels = self._exchange(
                process, {"bytes": len(content), "pixels": self._pixels}, content, self._seconds
            )
        if "error" in told:
            raise ConvscopeError(str(told["error"]))
        return np.frombuffer(pixels, np.uint8).reshape(told["shape"])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "convscope.explorer.service.unpacking"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            self._exchange(self._process, {"bytes": 0}, b"", STARTING)
        return self._process

    def _exchange(
        self, process: subprocess.Popen[bytes], head: dict[str, Any], content: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Send one message, take the answer. A process that does not answer in time is ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(seconds, process.kill)
        late.start()
        try:
            send(process.stdin, head, content)
            return receive(process.stdout)
        except (OSError, EOFError) as error:
            slow = not late.is_alive()
            self._stop()
            reason = f"it took longer than {seconds:g} s" if slow else "it ended the process that tried"
            raise ConvscopeError(f"the picture could not be decoded: {reason}") from error
        finally:
            late.cancel()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


def send(stream: IO[bytes], head: dict[str, Any], content: bytes = b"") -> None:
    """One message: a line of JSON, which tells how many bytes follow it."""
    stream.write(json.dumps({**head, "bytes": len(content)}).encode() + b"\n")
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """The next message. Raises EOFError where the stream ends."""
    line = stream.readline()
    if not line:
        raise EOFError
    head: dict[str, Any] = json.loads(line)
    content = stream.read(head["bytes"])
    if len(content) < head["bytes"]:
        raise EOFError
    return head, content
