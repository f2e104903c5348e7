"""The decode worker: its limits, and messages that cannot harm its parent."""

from __future__ import annotations

import io
import json
import pickle
import signal
import sys

import pytest

from convscope.images import decode_worker
from convscope.images.decode_worker import DecodedImage, DecodeWorker, FullSizeTask, WorkerDied, WorkerTimeout
from convscope.images.geometry import Geometry
from tests.oracles.poison import Allocate, random_image


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory limits are enforced on Linux only")
def test_an_image_that_needs_too_much_memory_costs_itself_only() -> None:
    worker = DecodeWorker(pickle.dumps(Allocate()), memory_limit=512 << 20)
    try:
        worker.wait_until_ready()
        large, small = worker.decode([(1024, None), (16, None)], timeout=60)
        assert large == "takes too much memory"
        assert isinstance(small, DecodedImage)
    finally:
        worker.kill()


@pytest.mark.slow
def test_a_worker_that_does_not_read_its_requests_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "_PROGRAM", "import time; time.sleep(600)")
    worker = DecodeWorker(pickle.dumps(FullSizeTask(10**6)))
    try:
        with pytest.raises(WorkerTimeout):
            next(worker.decode([(0, b"0" * 10_000_000)], timeout=0.5))
        assert worker._process.wait(timeout=60) == -signal.SIGKILL
    finally:
        worker.kill()


def replies_of(*messages: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(b"".join(messages)))


def test_replies_survive_the_pipe() -> None:
    pixels, thumbnail = random_image(0, (5, 7)), random_image(1, (96, 96))
    for reply in (
        "too large",
        DecodedImage(pixels),
        DecodedImage(pixels.astype("float32") / 255, Geometry((40, 50), (0.5, 1, 39.25, 50)), thumbnail),
    ):
        stream = io.BytesIO()
        decode_worker._send_reply(stream, reply)
        received = decode_worker._receive_reply(replies_of(stream.getvalue()))
        if isinstance(reply, str):
            assert received == reply
        else:
            assert isinstance(received, DecodedImage)
            assert received.pixels.dtype == reply.pixels.dtype
            assert received.pixels.tobytes() == reply.pixels.tobytes()
            assert received.geometry == reply.geometry
            assert (received.thumbnail is None) == (reply.thumbnail is None)
            assert received.pixels.flags.writeable


def test_replies_are_never_unpickled() -> None:
    """A worker that an image has taken over can send no more than arrays of numbers."""
    harmful = pickle.dumps(print)
    header = {"shape": [len(harmful)], "dtype": "object", "has_thumbnail": False, "bytes": len(harmful)}
    with pytest.raises(ValueError, match="array of object"):
        decode_worker._receive_reply(replies_of(json.dumps(header).encode() + b"\n", harmful))
    with pytest.raises(ValueError):
        decode_worker._receive_reply(replies_of(harmful))


@pytest.mark.slow
def test_a_worker_that_sends_nonsense_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "_PROGRAM", "print('nonsense', flush=True); import time; time.sleep(600)")
    worker = DecodeWorker(pickle.dumps(FullSizeTask(10**6)))
    try:
        with pytest.raises(WorkerDied):
            worker.wait_until_ready(timeout=60)
    finally:
        worker.kill()
