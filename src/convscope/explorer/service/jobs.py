"""Queues of jobs: shared by clients that request the same result, fair between clients, cancelled when abandoned."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, wait
from typing import Any, Generic, TypeVar

from convscope.errors import ConvscopeError
from convscope.explorer.service.cache import Cache

T = TypeVar("T")

SHUTDOWN_TIMEOUT = 30.0  # seconds that `JobQueue.close` waits for the running job


class ClientDisconnected(Exception):
    """No client waits for the job any more."""


class QueueFull(ConvscopeError):
    """The queue accepts no more jobs at present."""


class RequestTimeout(ConvscopeError):
    """The result was not ready in time."""


class Client:
    """A client that waits for results.

    Parameters
    ----------
    id : str
        Identifies the client for fair scheduling.
    timeout : float
        Seconds that the client waits in all, from now on.

    Attributes
    ----------
    disconnected : bool
        Set it to True to stop waiting.
    """

    def __init__(self, id: str, timeout: float) -> None:
        self.id, self.disconnected = id, False
        self._timeout, self._deadline = timeout, time.monotonic() + timeout

    def wait(self, job: Job[T]) -> T:
        """Wait for a job, release it, and return its result.

        Raises
        ------
        ClientDisconnected
            If the client disconnects first, or the job is cancelled.
        RequestTimeout
            If the timeout expires first.
        """
        try:
            while not wait([job.future], timeout=0.1).done:
                if self.disconnected:
                    raise ClientDisconnected
                if time.monotonic() > self._deadline:
                    raise RequestTimeout(
                        f"no result within {self._timeout:g} s; the explorer is busy, try again in a moment"
                    )
            return job.future.result()
        except CancelledError as error:
            raise ClientDisconnected from error
        finally:
            job.queue.release(job)


class Job(Generic[T]):
    """One computation in a queue.

    `run(job)` computes the result; meanwhile it may call `report_progress` and `set_preview`.

    Attributes
    ----------
    future : concurrent.futures.Future
        The result, or the exception that `run` raised.
    num_waiting : int
        Number of clients that wait for the result.
    started : bool
        Whether `run` has been called.
    done, total : float, int
        Progress in steps; `total` is 0 while it is unknown.
    preview, preview_index : bytes, int
        The latest intermediate image (WEBP), and how many there have been.
    """

    def __init__(self, key: Hashable, run: Callable[[Job[T]], T], client_id: str, queue: JobQueue) -> None:
        self.key, self.run, self.client_id, self.queue = key, run, client_id, queue
        self.future: Future[T] = Future()
        self.num_waiting = 1
        self.started = False
        self.done, self.total = 0.0, 0
        self.preview, self.preview_index = b"", 0

    def report_progress(self, done: float, total: int) -> None:
        """Record the progress. Raises ClientDisconnected, which ends the job, if no client waits."""
        if self.num_waiting == 0:
            raise ClientDisconnected
        self.done, self.total = done, total

    def set_preview(self, image: bytes) -> None:
        """Publish an intermediate image (WEBP)."""
        self.preview, self.preview_index = image, self.preview_index + 1


class JobQueue:
    """A worker thread that runs one job after another, clients in turn. Results go to the cache.

    Parameters
    ----------
    name : str
        Part of the thread's name.
    cache : Cache
        Holds the results, by the keys of their jobs.
    max_jobs, max_jobs_per_client : int
        Bounds on the number of queued jobs.
    """

    def __init__(self, name: str, cache: Cache, *, max_jobs: int, max_jobs_per_client: int) -> None:
        self.name, self._cache = name, cache
        self._max_jobs, self._max_jobs_per_client = max_jobs, max_jobs_per_client
        self._pending: OrderedDict[str, deque[Job[Any]]] = OrderedDict()  # by client, in the order of their turns
        self._jobs: dict[Hashable, Job[Any]] = {}  # pending and running
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, key: Hashable, run: Callable[[Job[T]], T], client_id: str) -> Job[T]:
        """Return the job for `key`: finished if the result is cached, the existing one if there is one, or a new one.

        The caller has to `release` the job in the end.

        Raises
        ------
        QueueFull
            If the queue, or the client's share of it, is full.
        """
        with self._condition:
            cached = self._cache.get(key)
            if cached is not None:
                job = Job(key, run, client_id, self)
                job.future.set_result(cached)
                return job
            existing = self._jobs.get(key)
            if existing is not None and existing.num_waiting:
                existing.num_waiting += 1
                return existing
            self._require_capacity(client_id)
            job = self._jobs[key] = Job(key, run, client_id, self)
            self._pending.setdefault(client_id, deque()).append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"convscope-{self.name}", daemon=True)
                self._thread.start()
            self._condition.notify()
            return job

    def release(self, job: Job[T]) -> None:
        """Count one client less for a job. Without clients a pending job is dropped, a running one ends soon."""
        with self._condition:
            job.num_waiting -= 1
            if job.num_waiting or job.started:
                return
            queue = self._pending.get(job.client_id)
            if queue is not None and job in queue:
                queue.remove(job)
                if not queue:
                    del self._pending[job.client_id]
                self._remove(job)
                job.future.cancel()

    def position(self, job: Job[T]) -> int:
        """Return the number of jobs that run before this one, as things stand; 0 if it runs or is next."""
        with self._condition:
            queue = self._pending.get(job.client_id)
            if job.started or queue is None:
                return 0
            index = queue.index(job) if job in queue else 0
            clients = list(self._pending)
            turn = clients.index(job.client_id)
            others = ((i, other) for i, other in enumerate(clients) if other != job.client_id)
            return index + sum(min(len(self._pending[other]), index + (i < turn)) for i, other in others)

    def __len__(self) -> int:
        return sum(map(len, self._pending.values()))

    def close(self) -> None:
        """Accept no more jobs, end the running one at its next progress report, and wait for that."""
        with self._condition:
            self._closed = True
            for job in list(self._jobs.values()):
                job.num_waiting = 0
                job.future.cancel()
            self._pending.clear()
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(timeout=SHUTDOWN_TIMEOUT)

    def _require_capacity(self, client_id: str) -> None:
        if self._closed:
            raise QueueFull("the explorer is shutting down")
        if len(self) >= self._max_jobs:
            raise QueueFull(f"the queue is full ({len(self)} jobs); try again in a moment")
        if len(self._pending.get(client_id, ())) >= self._max_jobs_per_client:
            raise QueueFull(f"{self._max_jobs_per_client} of your own jobs are queued; try again when one is done")

    def _remove(self, job: Job[Any]) -> None:
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]

    def _next(self) -> Job[Any] | None:
        """Wait for a pending job and take it; None once the queue is closed."""
        with self._condition:
            while not self._pending and not self._closed:
                self._condition.wait()
            if not self._pending:
                return None
            client_id, queue = self._pending.popitem(last=False)
            job = queue.popleft()
            if queue:
                self._pending[client_id] = queue  # the client's next turn comes after those of all others
            job.started = True
            return job

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                result = job.run(job)
            except Exception as error:  # noqa: BLE001 - raised again in the threads that wait for the job
                with self._condition:
                    self._remove(job)
                job.future.set_exception(error)
            else:
                with self._condition:
                    self._cache.put(job.key, result)
                    self._remove(job)
                job.future.set_result(result)
