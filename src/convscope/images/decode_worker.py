"""A process that decodes pictures. What a picture does to it, it does to this process alone.

It is started as a program of its own rather than by `multiprocessing`: it never imports the user's script again, it
shares no thread and no lock with the process that asks, and it ends when that one does.
"""

from __future__ import annotations

import io
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convscope.errors import ConvscopeError
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader, one_line
from convscope.images.preprocessing import Preprocessing

if TYPE_CHECKING:
    from convscope.datasets.catalogue import Catalogue

THUMBNAIL = 96  # pixels of its side
_START = 300.0  # seconds that a process may take to import what it needs
_PIPE = 1 << 18  # bytes that may wait in a pipe: more than a picture, so that nobody waits for the other
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r}; "
    "from convscope.images.decode_worker import serve; serve()"
)

Pixels = npt.NDArray[Any]
Shown = tuple[Pixels, Geometry, Pixels]  # the network's input before normalisation (H, W, C), its place, a thumbnail
Reply = Shown | str  # or why the picture cannot be used


class DecodeTask:
    """How a catalogue's pictures become what a network sees: `Pictures` one at a time, and a thumbnail.

    catalogue: None where the pictures themselves are handed over. Raises ConvscopeError for options that do not fit.
    """

    def __init__(self, catalogue: Catalogue | None, preprocessing: Preprocessing, fit: str, max_pixels: int) -> None:
        self._catalogue, self._options = catalogue, (preprocessing, fit, max_pixels)
        self._images(b"")

    def _images(self, item: Any) -> ImageBatchLoader:
        preprocessing, fit, max_pixels = self._options
        item = io.BytesIO(item) if isinstance(item, bytes) else item
        return ImageBatchLoader([item], preprocessing, fit=fit, max_pixels=max_pixels)

    def decode(self, index: int, item: Any = None) -> Reply:
        """The picture with that id, or why it cannot be used, in one line."""
        try:
            item = item if self._catalogue is None else self._catalogue.read(index)
            pixels, position = self._images(item).pixels(0)
            return pixels, position, thumbnail(pixels)
        except ConvscopeError as error:
            return one_line(str(error))
        except Exception as error:  # such as too little memory: the picture's own failure, whatever it is
            return one_line(f"cannot be prepared ({type(error).__name__}: {error})")


def thumbnail(pixels: Pixels) -> Pixels:
    """The network's input (H, W, C), uint8 or floats in [0, 1], squashed to uint8 (96, 96, 3).

    Of a single channel or of two the first is shown in gray, of more than three the first three.
    """
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    if pixels.shape[2] != 3:
        pixels = pixels[..., :3] if pixels.shape[2] > 3 else pixels[..., :1].repeat(3, axis=2)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR))


def serve() -> None:
    """The process's whole life: a preparation and then lists of pictures come in, one reply for each goes out."""
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a data set prints must not come between replies
    with suppress(OSError):  # where memory runs out this process has to go, not the one with the network
        Path("/proc/self/oom_score_adj").write_text("500")

    def say(reply: object) -> None:
        pickle.dump(reply, out, pickle.HIGHEST_PROTOCOL)
        out.flush()

    try:
        preparation: DecodeTask = pickle.load(source)
    except Exception as error:  # a data set in hand may be of a class that exists only over there
        say(one_line(f"{type(error).__name__}: {error}"))
        return
    say(None)
    with suppress(EOFError):
        while True:
            for index, item in pickle.load(source):
                say(preparation.decode(index, item))


class WorkerDied(Exception):
    """A process ended, or never began."""


class WorkerTimeout(Exception):
    """A process gave no reply in time."""


class Worker:
    """A process that decodes, seen from here.

    preparation: what to do with pictures, as pickled bytes.
    """

    def __init__(self, preparation: bytes) -> None:
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        program = [sys.executable, "-c", _PROGRAM.format(path=sys.path)]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pipesize=_PIPE, env={**os.environ, **one}
        )
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._preparation = preparation
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Replies as they come, so that the process need not wait for anybody; EndedError as the last one."""
        assert self._process.stdout is not None
        with suppress(Exception), self._process.stdout as source:  # it may end in the middle of a reply
            while True:
                self._replies.put(pickle.load(source))
        self._replies.put(WorkerDied)

    def ready(self) -> None:
        """Waits until the process has begun. Raises ConvscopeError if it does not."""
        try:
            self._send(self._preparation)
            reply = self._next(_START)
        except (WorkerDied, WorkerTimeout) as error:
            raise ConvscopeError("a process that decodes pictures cannot be started; workers=0 does without") from error
        if reply is not None:
            advice = "define it in a module that can be imported, or decode without processes: workers=0"
            raise ConvscopeError(f"the data set cannot be handed to processes that decode ({reply}); {advice}")

    def show(self, images: Sequence[tuple[int, Any]], timeout: float) -> Iterator[Reply]:
        """A reply for each picture, given by its id and, where the process has no catalogue, itself.

        Raises EndedError or SlowError at the picture over which the process ended, or took longer than `timeout`.
        """
        self._send(pickle.dumps(images, pickle.HIGHEST_PROTOCOL))
        for _ in images:
            yield self._next(timeout)

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError: closed by `end`
            raise WorkerDied from error

    def _next(self, timeout: float) -> Any:
        try:
            reply = self._replies.get(timeout=timeout)
        except queue.Empty as error:
            raise WorkerTimeout from error
        if reply is WorkerDied:
            raise WorkerDied
        return reply

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._listener.join(timeout=5)  # what the process may have started itself could hold its pipe
        with suppress(OSError):  # closing writes what could not be written any more
            self._process.stdin.close()
