"""Pictures decoded ahead of the network, by other processes, in the order that was asked for."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from convscope.datasets.catalogue import Catalogue
from convscope.errors import ConvscopeError, require_int, require_number
from convscope.images.decode_worker import THUMBNAIL, DecodeTask, Pixels, Reply, Worker, WorkerDied, WorkerTimeout
from convscope.images.geometry import Geometry
from convscope.images.loading import DEFAULT_MAX_PIXELS, one_line
from convscope.images.preprocessing import Preprocessing

ENDED = "its decoding ended the worker process"


@dataclass(frozen=True, eq=False)
class Decoded:
    """A batch of pictures ready for the network.

    indices: the pictures' ids. x: (B, C, H, W) float32, normalised, channels_last; B is the full size of a batch, rows
    of failed pictures and those beyond the last index are zeros. failed: picture id to reason. geometry: of each index,
    None where it failed. thumbnails: uint8 (len(indices), 96, 96, 3), white where it failed.
    """

    indices: tuple[int, ...]
    x: Tensor
    failed: dict[int, str]
    geometry: tuple[Geometry | None, ...]
    thumbnails: np.ndarray


class Decoder:
    """Decodes pictures of a catalogue, in processes of its own if there are `workers`, ahead of whoever consumes them.

    catalogue: the pictures. preprocessing, fit, max_pixels: as of `convscope.images.Pictures`, whose input this gives
    bit for bit. workers: processes; 0 decodes in this one, when asked. timeout: seconds that a picture may take in a
    process. A picture that fails, ends its process or hangs costs itself only. A context manager: on leaving it, all
    processes are ended. waited: seconds that the consumer has waited for pictures so far.
    Raises ConvscopeError for options that make no sense, and for a data set in hand that cannot leave this process.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        preprocessing: Preprocessing,
        *,
        fit: str = "squash",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        workers: int = 0,
        timeout: float = 60.0,
    ) -> None:
        require_int("workers", workers, 0)
        require_number("timeout", timeout, above=0)
        self.waited = 0.0
        self._catalogue, self._count, self._timeout = catalogue, workers, timeout
        self._here, self._input = DecodeTask(catalogue, preprocessing, fit, max_pixels), _Input(preprocessing)
        self._lock, self._closed = threading.Lock(), False
        self._workers: list[Worker] = []
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()  # None: one that has yet to be started
        for _ in range(workers):
            self._idle.put(None)
        if workers:
            held = catalogue.origin.held
            there = DecodeTask(None, preprocessing, fit, max_pixels) if held else self._here
            self._pickled = _pickled(there)
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="convscope-decoder")

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; what is still being decoded is lost."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.end()
        if self._count:
            self._threads.shutdown(cancel_futures=True)

    def batches(self, plan: Iterable[Sequence[int]], size: int) -> Iterator[Decoded]:
        """The pictures of each part of the plan, in its order; x has `size` rows.

        No more than 2 + workers batches are decoded ahead. Raises ConvscopeError for a part of more than `size`
        pictures, and if processes cannot be started.
        """
        ahead = 2 + self._count if self._count else 1
        parts, pending = iter(plan), deque[tuple[tuple[int, ...], list[Future[list[Reply]]]]]()
        try:
            while True:
                while len(pending) < ahead and (part := next(parts, None)) is not None:
                    ids = self._checked(part, size)
                    pending.append((ids, self._asked(ids)))
                if not pending:
                    return
                ids, asked = pending.popleft()
                began = time.perf_counter()
                replies = [reply for future in asked for reply in future.result()]
                if not self._count:
                    replies = [self._here.decode(index) for index in ids]
                self.waited += time.perf_counter() - began
                yield self._collated(ids, replies, size)
        finally:
            for _, asked in pending:
                for future in asked:
                    future.cancel()

    def _checked(self, part: Sequence[int], size: int) -> tuple[int, ...]:
        ids = tuple(map(int, part))
        if self._closed:
            raise ConvscopeError("this decoder is closed; make a new one")
        if len(ids) > size:
            raise ConvscopeError(f"{len(ids)} pictures are planned for a batch of {size}; expected no more than {size}")
        return ids

    def _asked(self, ids: tuple[int, ...]) -> list[Future[list[Reply]]]:
        """The pictures of a batch, shared out to the processes; nothing without any."""
        if not self._count:
            return []
        share = -(-len(ids) // self._count) or 1
        return [self._threads.submit(self._shown, ids[i : i + share]) for i in range(0, len(ids), share)]

    def _shown(self, ids: Sequence[int]) -> list[Reply]:
        """A reply for each picture, from any process. Runs in a thread of ours, one for each process.

        Where a process ends, the picture that it was at is tried once more, alone in a new one: it may not be to blame.
        """
        replies: list[Reply] = []
        alone = False
        while len(replies) < len(ids):
            rest = ids[len(replies) :]
            worker = self._idle.get()
            try:
                worker = worker or self._started()
                for reply in self._replies(worker, rest[:1] if alone else rest):
                    replies.append(reply)
                    alone = False
            except WorkerTimeout:
                replies.append(f"took longer than {self._timeout:g} s")
                self._without(worker)
                worker = None
            except WorkerDied:
                if alone:
                    replies.append(ENDED)
                alone = not alone
                self._without(worker)
                worker = None
            finally:
                self._idle.put(worker)  # or a thread would wait for it for ever
        return replies

    def _replies(self, worker: Worker, ids: Sequence[int]) -> Iterator[Reply]:
        if not self._catalogue.origin.held:
            yield from worker.show([(index, None) for index in ids], self._timeout)
            return
        for index in ids:  # one at a time: a process that hangs takes in no more than its pipe holds
            try:
                item = self._catalogue.read(index)
            except ConvscopeError as error:
                yield one_line(str(error))
                continue
            # Only bytes have yet to be decoded; and an image would lose a part of its tags on the way.
            yield from (
                worker.show([(index, item)], self._timeout) if isinstance(item, bytes) else [self._here.decode(index)]
            )

    def _started(self) -> Worker:
        with self._lock:
            if self._closed:
                raise ConvscopeError("this decoder is closed")
            worker = Worker(self._pickled)
            self._workers.append(worker)
        worker.ready()
        return worker

    def _without(self, worker: Worker | None) -> None:
        """Ends a process; the next who needs one starts a new one."""
        if worker is not None:
            with self._lock:
                if worker in self._workers:
                    self._workers.remove(worker)
            worker.end()

    def _collated(self, ids: tuple[int, ...], replies: Sequence[Reply], size: int) -> Decoded:
        x = torch.empty(size, *self._input.shape, dtype=torch.float32, memory_format=torch.channels_last)
        x[len(ids) :].zero_()
        thumbnails = np.full((len(ids), THUMBNAIL, THUMBNAIL, 3), 255, np.uint8)
        geometry: list[Geometry | None] = [None] * len(ids)
        failed: dict[int, str] = {}
        for row, reply in enumerate(replies):
            if isinstance(reply, str):
                failed[ids[row]] = reply
                x[row].zero_()
            else:
                pixels, geometry[row], thumbnails[row] = reply
                self._input.write(pixels, x[row])
        return Decoded(ids, x, failed, tuple(geometry), thumbnails)


class _Input:
    """Pixels as network input: `unit_pixels` and `Preprocessing.normalize` bit for bit, in place.

    Mean and standard deviation are laid out like a picture, pixel by pixel: with the channels innermost, spreading them
    over the places is what takes most of the time otherwise.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._preprocessing, self.shape = preprocessing, (preprocessing.channels, *preprocessing.image_size)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32)
            .view(1, -1, 1, 1)
            .expand(1, *self.shape)
            .contiguous(memory_format=torch.channels_last)[0]
            for values in (preprocessing.mean, preprocessing.std)
        )

    def write(self, pixels: Pixels, x: Tensor) -> None:
        """One picture p (H, W, C), uint8 or floats in about [0, 1], into x (C, H, W).

        With p in [0, 1], x = (p (high - low) + low - mean) / std.
        """
        low, high = self._preprocessing.range
        values = torch.from_numpy(pixels).permute(2, 0, 1)
        x.copy_(values.flip(0) if self._preprocessing.channel_order == "BGR" else values)
        unit = x.div_(255) if pixels.dtype == np.uint8 else x.clamp_(0, 1)
        unit.mul_(high - low).add_(low).sub_(self._mean).div_(self._std)


def _pickled(preparation: DecodeTask) -> bytes:
    try:
        return pickle.dumps(preparation, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises almost anything
        raise ConvscopeError(
            f"the data set cannot be handed to processes that decode ({type(error).__name__}: {error}); workers=0 "
            "decodes in this one"
        ) from error
