"""Decode images in worker processes ahead of the network, in a given order."""

from __future__ import annotations

import os
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
from convscope.images.decode_worker import (
    THUMBNAIL_SIDE,
    DecodeWorker,
    Measure,
    NetworkInputTask,
    Pixels,
    Reply,
    WorkerDied,
    WorkerTimeout,
)
from convscope.images.failures import one_line
from convscope.images.geometry import Geometry
from convscope.images.loading import DEFAULT_MAX_PIXELS
from convscope.images.preprocessing import Preprocessing

WORKER_DIED = "its decoding ended the worker process"
MIN_IMAGES_FOR_WORKERS = 128  # below this, starting processes takes longer than decoding


def default_workers(num_images: int) -> int:
    """Return the number of processes that decode `num_images` images if none is requested."""
    return max(0, (os.cpu_count() or 1) - 1) if num_images > MIN_IMAGES_FOR_WORKERS else 0


@dataclass(frozen=True, eq=False)
class DecodedBatch:
    """A batch of images ready for the network.

    Attributes
    ----------
    indices : tuple of int
        Ids of the images.
    x : float32 tensor of shape (B, C, H, W)
        Normalised, channels last. B is the full batch size; rows of failed images and rows beyond the last image are
        zero.
    failed : dict
        The reason for each image that failed.
    geometry : tuple
        The geometry of each image, None where it failed.
    thumbnails : uint8 array of shape (len(indices), 96, 96, 3)
        White where an image failed.
    measurements : float32 array of shape (len(indices), F), or None
        NaN where an image failed.
    """

    indices: tuple[int, ...]
    x: Tensor
    failed: dict[int, str]
    geometry: tuple[Geometry | None, ...]
    thumbnails: np.ndarray
    measurements: np.ndarray | None = None


class PrefetchingDecoder:
    """Decodes images of a catalogue, with worker processes ahead of the consumer.

    The network's input is that of `ImageBatchLoader`, bit for bit. An image that fails, ends its process or hangs costs
    itself only. As a context manager it ends all processes on exit.

    Parameters
    ----------
    catalogue : Catalogue
    preprocessing, fit, max_pixels
        As of `ImageBatchLoader`.
    workers : int
        Number of processes; 0 decodes in this process, when a batch is requested.
    timeout : float
        Seconds that an image may take in a worker.
    measure : callable, optional
        Measures each image at its own size, as of `NetworkInputTask`; the workers import it.

    Attributes
    ----------
    wait_time : float
        Seconds that the consumer has waited for images so far.

    Raises
    ------
    ConvscopeError
        For invalid options, and for a data set that cannot be pickled for the workers.
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
        measure: Measure | None = None,
    ) -> None:
        require_int("workers", workers, 0)
        require_number("timeout", timeout, above=0)
        self.wait_time = 0.0
        self.workers: list[DecodeWorker] = []
        self._catalogue, self._num_workers, self._timeout = catalogue, workers, timeout
        self._task = NetworkInputTask(catalogue.read, preprocessing, fit, max_pixels, measure)
        self._writer = _InputWriter(preprocessing)
        self._lock, self._closed = threading.Lock(), False
        self._idle: queue.SimpleQueue[DecodeWorker | None] = queue.SimpleQueue()  # None: a worker to be started
        for _ in range(workers):
            self._idle.put(None)
        if workers:
            content_only = NetworkInputTask(None, preprocessing, fit, max_pixels, measure)
            self._pickled_task = _pickle(content_only if catalogue.reader.in_memory else self._task)
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="convscope-decoder")

    def __enter__(self) -> PrefetchingDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; images that are being decoded are lost."""
        with self._lock:
            self._closed = True
            workers, self.workers = self.workers, []
        for worker in workers:
            worker.kill()
        if self._num_workers:
            self._threads.shutdown(cancel_futures=True)

    def batches(self, plan: Iterable[Sequence[int]], size: int) -> Iterator[DecodedBatch]:
        """Yield one batch for each sequence of image ids in `plan`, in order; `x` has `size` rows.

        At most 2 + workers batches are decoded ahead. Raises ConvscopeError for more than `size` ids at a time, and if
        processes cannot be started.
        """
        max_pending = 2 + self._num_workers if self._num_workers else 1
        parts, pending = iter(plan), deque[tuple[tuple[int, ...], list[Future[list[Reply]]]]]()
        try:
            while True:
                while len(pending) < max_pending and (part := next(parts, None)) is not None:
                    ids = self._check_ids(part, size)
                    pending.append((ids, self._submit(ids)))
                if not pending:
                    return
                ids, futures = pending.popleft()
                start = time.perf_counter()
                if self._num_workers:
                    replies = [reply for future in futures for reply in future.result()]
                else:
                    replies = [self._task.decode(index) for index in ids]
                self.wait_time += time.perf_counter() - start
                yield self._collate(ids, replies, size)
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def _check_ids(self, part: Sequence[int], size: int) -> tuple[int, ...]:
        ids = tuple(map(int, part))
        if self._closed:
            raise ConvscopeError("this decoder is closed; make a new one")
        if len(ids) > size:
            raise ConvscopeError(f"{len(ids)} images are planned for a batch of {size}; expected no more than {size}")
        return ids

    def _submit(self, ids: tuple[int, ...]) -> list[Future[list[Reply]]]:
        """Divide the images of a batch among the workers."""
        if not self._num_workers:
            return []
        count = -(-len(ids) // self._num_workers) or 1
        return [self._threads.submit(self._decode, ids[i : i + count]) for i in range(0, len(ids), count)]

    def _decode(self, ids: Sequence[int]) -> list[Reply]:
        """Decode images in any worker and return their replies; runs in a thread of the pool.

        If a worker dies, the image that it was at is tried once more, alone in a new worker: another image may be to
        blame.
        """
        replies: list[Reply] = []
        alone = False
        while len(replies) < len(ids):
            remaining = ids[len(replies) :]
            worker = self._idle.get()
            try:
                worker = worker or self._start_worker()
                for reply in self._replies(worker, remaining[:1] if alone else remaining):
                    replies.append(reply)
                    alone = False
            except WorkerTimeout:
                replies.append(f"took longer than {self._timeout:g} s")
                self._discard(worker)
                worker = None
            except WorkerDied:
                if alone:
                    replies.append(WORKER_DIED)
                alone = not alone
                self._discard(worker)
                worker = None
            finally:
                self._idle.put(worker)  # otherwise a thread would wait for it for ever
        return replies

    def _replies(self, worker: DecodeWorker, ids: Sequence[int]) -> Iterator[Reply]:
        if not self._catalogue.reader.in_memory:
            yield from worker.decode([(index, None) for index in ids], self._timeout)
            return
        for index in ids:  # one at a time, so that no more than one image waits in the pipe
            try:
                item = self._catalogue.read(index)
            except ConvscopeError as error:
                yield one_line(str(error))
                continue
            if isinstance(item, bytes):
                yield from worker.decode([(index, item)], self._timeout)
            else:  # decoded already; pickling a PIL image would lose a part of its tags
                yield self._task.decode(index)

    def _start_worker(self) -> DecodeWorker:
        with self._lock:
            if self._closed:
                raise ConvscopeError("this decoder is closed")
            worker = DecodeWorker(self._pickled_task)
            self.workers.append(worker)
        try:
            worker.wait_until_ready()
        except (WorkerDied, WorkerTimeout) as error:
            raise ConvscopeError(
                "a worker process that decodes images cannot be started; workers=0 decodes in this process"
            ) from error
        except ConvscopeError as error:
            raise ConvscopeError(
                f"the data set cannot be sent to worker processes ({error}); define it in a module that can be "
                "imported, or use workers=0"
            ) from error
        return worker

    def _discard(self, worker: DecodeWorker | None) -> None:
        """End a worker; a new one is started when it is needed."""
        if worker is not None:
            with self._lock:
                if worker in self.workers:
                    self.workers.remove(worker)
            worker.kill()

    def _collate(self, ids: tuple[int, ...], replies: Sequence[Reply], size: int) -> DecodedBatch:
        x = torch.empty(size, *self._writer.shape, dtype=torch.float32, memory_format=torch.channels_last)
        x[len(ids) :].zero_()
        thumbnails = np.full((len(ids), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), 255, np.uint8)
        geometry: list[Geometry | None] = [None] * len(ids)
        failed: dict[int, str] = {}
        for row, reply in enumerate(replies):
            if isinstance(reply, str):
                failed[ids[row]] = reply
                x[row].zero_()
            else:
                geometry[row] = reply.geometry
                if reply.thumbnail is not None:
                    thumbnails[row] = reply.thumbnail
                self._writer.write(reply.pixels, x[row])
        return DecodedBatch(ids, x, failed, tuple(geometry), thumbnails, _stack_measurements(replies))


def _stack_measurements(replies: Sequence[Reply]) -> np.ndarray | None:
    """Stack the measurements (n, F) of images, NaN where one failed; None if there are none."""
    rows = [None if isinstance(reply, str) else reply.measurements for reply in replies]
    width = max((len(row) for row in rows if row is not None), default=0)
    missing = np.full(width, np.nan, np.float32)
    return np.stack([missing if row is None else row for row in rows]) if width else None


class _InputWriter:
    """Writes pixels as network input in place: `unit_pixels` and `Preprocessing.normalize`, bit for bit.

    Mean and standard deviation are laid out like an image: with the channels innermost, broadcasting them over the
    pixels would take most of the time.
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
        """Write one image p (H, W, C), uint8 or floats in about [0, 1], into x (C, H, W).

        With p in [0, 1], x = (p (high - low) + low - mean) / std.
        """
        low, high = self._preprocessing.range
        values = torch.from_numpy(pixels).permute(2, 0, 1)
        x.copy_(values.flip(0) if self._preprocessing.channel_order == "BGR" else values)
        unit = x.div_(255) if pixels.dtype == np.uint8 else x.clamp_(0, 1)
        unit.mul_(high - low).add_(low).sub_(self._mean).div_(self._std)


def _pickle(task: NetworkInputTask) -> bytes:
    try:
        return pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises errors of many kinds
        raise ConvscopeError(
            f"the data set cannot be sent to worker processes ({type(error).__name__}: {error}); workers=0 decodes in "
            "this process"
        ) from error
