"""Decode images in a process of its own, which can be killed without harm to the process that uses them.

The worker is started as a program rather than by `multiprocessing`: it never imports the user's script again, shares no
thread and no lock with its parent, and ends with it. The parent pickles one task for it; from then on both sides send
JSON headers and plain bytes, so that neither unpickles anything that came out of an image.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from convscope.errors import ConvscopeError
from convscope.images.failures import one_line
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing

THUMBNAIL_SIDE = 96  # pixels
START_TIMEOUT = 300.0  # seconds that a worker may take to import what it needs
_PIPE_BYTES = 1 << 18  # that may wait in a pipe: more than an image for the network, so that neither side waits
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r}; "
    "from convscope.images.decode_worker import serve; serve()"
)

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
_Header = Mapping[str, object]


class DecodedImage(NamedTuple):
    """Pixels (H, W, C), uint8 or float32 in about [0, 1]; for a network's input also its geometry and a thumbnail.

    `measurements` (F,) float32 are those of the image at its own size, if any were requested.
    """

    pixels: Pixels
    geometry: Geometry | None = None
    thumbnail: npt.NDArray[np.uint8] | None = None
    measurements: npt.NDArray[np.float32] | None = None


Reply = DecodedImage | str  # a string says why the image cannot be used

Measure = Callable[[Sequence[Image.Image], bytes | None], npt.NDArray[np.float32]]
"""Takes a decoded image, as `ImageBatchLoader.decoded` returns it, and the content of its file, if it has one."""


class DecodeTask(Protocol):
    """How a worker decodes images. Picklable."""

    def decode(self, index: int, content: bytes | None = None) -> Reply:
        """Decode an encoded file, or read and decode the image with this index. Raises nothing."""


@dataclass(frozen=True)
class NetworkInputTask:
    """Decodes an image at the size of a network's input, with a thumbnail.

    Attributes
    ----------
    read : callable or None
        ``read(index)`` returns an image in any form that `ImageBatchLoader` takes, or the bytes of a file; None if the
        files' contents are sent with the requests.
    preprocessing, fit, max_pixels
        As of `ImageBatchLoader`. Raises ConvscopeError for options that do not fit together.
    measure : callable, optional
        Measures the image at its own size.
    """

    read: Callable[[int], object] | None
    preprocessing: Preprocessing
    fit: str
    max_pixels: int
    measure: Measure | None = None

    def __post_init__(self) -> None:
        self._loader(b"")

    def _loader(self, item: object) -> ImageBatchLoader:
        item = io.BytesIO(item) if isinstance(item, bytes) else item
        return ImageBatchLoader([item], self.preprocessing, fit=self.fit, max_pixels=self.max_pixels)

    def decode(self, index: int, content: bytes | None = None) -> Reply:
        """Decode one image; an error becomes the reason in one line."""
        try:
            item = content if self.read is None else self.read(index)
            loader = self._loader(item)
            channels = loader.decoded(0)
            pixels, geometry = loader.resized(channels)
            encoded = item if isinstance(item, bytes) else None
            measurements = None if self.measure is None else self.measure(channels, encoded)
            return DecodedImage(pixels, geometry, thumbnail(pixels), measurements)
        except Exception as error:  # noqa: BLE001 - any error is that of the image, such as too little memory
            return _reason(error)


@dataclass(frozen=True)
class FullSizeTask:
    """Decodes encoded files to uint8 pixels (H, W, 3), upright and at their own size."""

    max_pixels: int

    def decode(self, index: int, content: bytes | None = None) -> Reply:  # noqa: ARG002 - part of the protocol
        """Decode one file; an error becomes the reason in one line."""
        try:
            loader = ImageBatchLoader([io.BytesIO(content or b"")], Preprocessing(), max_pixels=self.max_pixels)
            return DecodedImage(loader.original(0))
        except Exception as error:  # noqa: BLE001 - any error is that of the image, such as too little memory
            return _reason(error).removeprefix("image 0: ")


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "takes too much memory"
    known = isinstance(error, ConvscopeError)
    return one_line(str(error) if known else f"cannot be prepared ({type(error).__name__}: {error})")


def thumbnail(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Squash a network's input (H, W, C), uint8 or floats in [0, 1], to uint8 (96, 96, 3).

    Of one or two channels the first is shown in gray, of more than three the first three in color.
    """
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    if pixels.shape[2] != 3:
        pixels = pixels[..., :3] if pixels.shape[2] > 3 else pixels[..., :1].repeat(3, axis=2)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR))


# --- the worker's side -----------------------------------------------------------------------------------------------


def serve() -> None:
    """Run the worker: read a task and then requests from standard input, and write one reply for each."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of a data set's own code must not mix with the replies
    with suppress(OSError):  # if memory runs out, the system should kill this process rather than its parent
        Path("/proc/self/oom_score_adj").write_text("500")
    header, content = _receive(requests)
    try:
        task: DecodeTask = pickle.loads(content)  # noqa: S301 - written by the parent process
    except Exception as error:  # noqa: BLE001 - the class of a data set may exist only in the parent's script
        _send(replies, {"error": one_line(f"{type(error).__name__}: {error}")})
        return
    if isinstance(limit := header["memory_limit"], int):
        limit_memory(limit)
    _send(replies, {})  # ready
    with suppress(EOFError):
        while True:
            header, content = _receive(requests)
            index = header["index"]
            assert isinstance(index, int)
            _send_reply(replies, task.decode(index, bytes(content) if header["has_content"] else None))


def limit_memory(limit: int) -> None:
    """Let this process allocate at most `limit` more bytes, on systems that can enforce it."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    total = pages * resource.getpagesize() + limit
    resource.setrlimit(resource.RLIMIT_AS, (total, total))


# --- messages --------------------------------------------------------------------------------------------------------


def _send(stream: IO[bytes], header: _Header, content: bytes = b"") -> None:
    """Write a message: a line of JSON, which holds the number of bytes that follow it, and these bytes."""
    stream.write(json.dumps({**header, "bytes": len(content)}).encode() + b"\n")
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, object], bytearray]:
    """Read the next message. Raises EOFError at the end of the stream."""
    line = stream.readline()
    if not line:
        raise EOFError
    header: dict[str, object] = json.loads(line)
    size = header["bytes"]
    assert isinstance(size, int)
    content = bytearray(size)
    if stream.readinto(content) < size:  # type: ignore[attr-defined] # a BufferedReader
        raise EOFError
    return header, content


def _send_reply(stream: IO[bytes], reply: Reply) -> None:
    if isinstance(reply, str):
        _send(stream, {"error": reply})
        return
    pixels, geometry, small, measurements = reply
    header: dict[str, object] = {"shape": pixels.shape, "dtype": str(pixels.dtype), "has_thumbnail": small is not None}
    if geometry is not None:
        header |= {"image_size": geometry.image_size, "box": geometry.box}
    if measurements is not None:
        header |= {"num_measurements": len(measurements)}
    parts = [part.tobytes() for part in (pixels, small, measurements) if part is not None]
    _send(stream, header, b"".join(parts))


def _receive_reply(stream: IO[bytes]) -> Reply | None:
    """Read a reply; None means that the worker is ready. Raises an error of any kind if the worker is broken."""
    header, content = _receive(stream)
    if "error" in header:
        return str(header["error"])
    if "shape" not in header:
        return None
    kind, shape = header["dtype"], header["shape"]
    if kind not in ("uint8", "float32") or not isinstance(shape, list):
        raise ValueError(f"the worker sent an array of {kind}")
    array = np.frombuffer(content, str(kind), count=int(np.prod(shape))).reshape(shape)
    end, small, measurements = array.nbytes, None, None
    if header["has_thumbnail"]:
        small = np.frombuffer(content, np.uint8, THUMBNAIL_SIDE**2 * 3, end)
        small, end = small.reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), end + small.nbytes
    if isinstance(count := header.get("num_measurements"), int):
        measurements = np.frombuffer(bytes(content[end:]), np.float32, count)
    geometry = None
    if isinstance(size := header.get("image_size"), list) and isinstance(box := header["box"], list):
        geometry = Geometry(tuple(size), tuple(box))
    return DecodedImage(array, geometry, small, measurements)


# --- the parent's side -----------------------------------------------------------------------------------------------


class WorkerDied(Exception):
    """The worker process ended, or never started."""


class WorkerTimeout(Exception):
    """The worker process did not reply in time."""


class DecodeWorker:
    """A process that decodes images.

    Parameters
    ----------
    task : bytes
        A pickled `DecodeTask`.
    memory_limit : int, optional
        Bytes that the process may allocate beyond what it has when it is ready.
    quiet : bool
        Whether to discard what the process writes to standard error.
    """

    def __init__(self, task: bytes, *, memory_limit: int | None = None, quiet: bool = False) -> None:
        single_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(  # noqa: S603 - runs this package's own code
            [sys.executable, "-c", _PROGRAM.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            pipesize=_PIPE_BYTES,
            env={**os.environ, **single_thread},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._task, self._memory_limit = task, memory_limit
        self._queue: queue.SimpleQueue[Reply | WorkerDied | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Send the task and wait for the process to load it.

        Raises WorkerDied or WorkerTimeout if it does not start, ConvscopeError if it cannot load the task.
        """
        with self._killed_after(timeout):
            _send(self._requests, {"memory_limit": self._memory_limit}, self._task)
        reply = self._next(timeout)
        if reply is not None:
            raise ConvscopeError(str(reply))

    def decode(self, requests: Sequence[tuple[int, bytes | None]], timeout: float) -> Iterator[Reply]:
        """Yield a reply for each request, which is an image's index and optionally the content of its file.

        Raises WorkerDied or WorkerTimeout at the image at which the process ended, or took longer than `timeout`
        seconds.
        """
        with self._killed_after(timeout):
            for index, content in requests:
                _send(self._requests, {"index": index, "has_content": content is not None}, content or b"")
        for _ in requests:
            reply = self._next(timeout)
            if reply is None:
                raise WorkerDied
            yield reply

    def kill(self) -> None:
        """End the process, whatever it is doing, and release its pipes."""
        self._process.kill()
        self._process.wait()
        self._listener.join(timeout=5)  # a process that the worker itself started could hold the pipe
        with suppress(OSError):  # closing flushes what could not be written
            self._requests.close()

    def _listen(self) -> None:
        """Queue replies as they come, so that the process never waits for a reader, and WorkerDied at the end."""
        with suppress(Exception), self._replies:  # the process may end in the middle of a reply
            while True:
                self._queue.put(_receive_reply(self._replies))
        self._queue.put(WorkerDied())

    def _next(self, timeout: float) -> Reply | None:
        try:
            reply = self._queue.get(timeout=timeout)
        except queue.Empty as error:
            raise WorkerTimeout from error
        if isinstance(reply, WorkerDied):
            raise reply
        return reply

    @contextmanager
    def _killed_after(self, seconds: float) -> Iterator[None]:
        """Kill the process if the block, which writes to it, takes longer.

        Raises WorkerTimeout then, and WorkerDied if writing fails for another reason.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        watchdog = threading.Timer(seconds, expire)
        watchdog.start()
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the pipe was closed by `kill`
            raise (WorkerTimeout if expired.is_set() else WorkerDied) from error
        finally:
            watchdog.cancel()
            watchdog.join()
        if expired.is_set():
            raise WorkerTimeout
