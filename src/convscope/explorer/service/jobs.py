"""Work that takes a while: shared by all who ask for the same, in turn between clients, ended when nobody waits."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, wait
from typing import Any

from convscope.errors import ConvscopeError
from convscope.explorer.service.cache import Cache


class ClientDisconnected(Exception):
    """Nobody waits for this work any more."""


class QueueFull(ConvscopeError):
    """The queue takes no more work just now."""


class RequestTimeout(ConvscopeError):
    """The answer did not come in time."""


class Client:
    """Somebody who waits for answers, `seconds` at most in all; `gone` once they no longer do."""

    def __init__(self, client: str, timeout: float) -> None:
        self.id, self.disconnected = client, False
        self._seconds, self._until = timeout, time.monotonic() + timeout

    def wait(self, job: Job) -> Any:
        """The work's result, or what it raised. Raises GoneError once gone, and SlowError."""
        try:
            while not wait([job.future], timeout=0.1).done:
                if self.disconnected:
                    raise ClientDisconnected
                if time.monotonic() > self._until:
                    raise RequestTimeout(
                        f"no answer within {self._seconds:g} s; the explorer is busy, try again in a moment"
                    )
            return job.future.result()
        except CancelledError as error:
            raise ClientDisconnected from error
        finally:
            job.queue.release(job)


class Job:
    """One computation. `run(work)` makes the result; it may `tell` how far it is and `show` what there is so far.

    `done` of `total` steps are done (total 0: not known); `shown` is the newest picture on the way, `frame` its number.
    """

    def __init__(self, key: Hashable, run: Callable[[Job], Any], client: str, queue: JobQueue) -> None:
        self.key, self.run, self.client, self.queue = key, run, client, queue
        self.future: Future[Any] = Future()
        self.num_waiting = 1
        self.started = False
        self.done, self.total = 0.0, 0
        self.preview, self.preview_index = b"", 0

    def report_progress(self, done: float, total: int) -> None:
        """Note the progress. Raises GoneError if nobody waits: the work then ends where it is."""
        if self.num_waiting == 0:
            raise ClientDisconnected
        self.done, self.total = done, total

    def set_preview(self, image: bytes) -> None:
        self.preview, self.preview_index = image, self.preview_index + 1


class JobQueue:
    """A thread that does one work after another, each client in turn. Results go to the cache.

    At most `limit` works wait in all, and `each` of one client.
    """

    def __init__(self, name: str, cache: Cache, *, max_jobs: int, max_jobs_per_client: int) -> None:
        self.name, self._cache, self._limit, self._each = name, cache, max_jobs, max_jobs_per_client
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._known: dict[Hashable, Job] = {}
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, key: Hashable, run: Callable[[Job], Any], client: str) -> Job:
        """The work for `key`: kept, under way, or new. Who asked must `leave` in the end. Raises FullError."""
        with self._change:
            kept = self._cache.get(key)
            if kept is not None:
                work = Job(key, run, client, self)
                work.future.set_result(kept)
                return work
            known = self._known.get(key)
            if known is not None and known.num_waiting:
                known.num_waiting += 1
                return known
            self._require_room(client)
            work = self._known[key] = Job(key, run, client, self)
            self._queues.setdefault(client, deque()).append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"convscope-{self.name}", daemon=True)
                self._thread.start()
            self._change.notify()
            return work

    def _require_room(self, client: str) -> None:
        if self._closed:
            raise QueueFull("the explorer is closing")
        if len(self) >= self._limit:
            raise QueueFull(f"the queue is full: {len(self)} works wait; try again in a moment")
        if len(self._queues.get(client, ())) >= self._each:
            raise QueueFull(f"{self._each} of your own works wait already; try again when one is done")

    def release(self, job: Job) -> None:
        """One who waited has gone. Work that nobody waits for is dropped, or ends at its next step."""
        with self._change:
            job.num_waiting -= 1
            if job.num_waiting == 0 and not job.started:
                queue = self._queues.get(job.client)
                if queue is not None and job in queue:
                    queue.remove(job)
                    if not queue:
                        del self._queues[job.client]
                    self._forget(job)
                    job.future.cancel()

    def position(self, job: Job) -> int:
        """How many works are done before this one, as things stand; 0 when it is under way or next."""
        with self._change:
            if job.started or job.client not in self._queues:
                return 0
            position = self._queues[job.client].index(job) if job in self._queues[job.client] else 0
            clients = list(self._queues)
            turn = clients.index(job.client)
            return position + sum(
                min(len(queue), position + (clients.index(client) < turn))
                for client, queue in self._queues.items()
                if client != job.client
            )

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def close(self) -> None:
        """Take no more work, end what is under way at its next step, and wait for that."""
        with self._change:
            self._closed = True
            for work in list(self._known.values()):
                work.num_waiting = 0
                work.future.cancel()
            self._queues.clear()
            self._change.notify()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def _forget(self, work: Job) -> None:
        if self._known.get(work.key) is work:
            del self._known[work.key]

    def _next(self) -> Job | None:
        with self._change:
            while not self._queues and not self._closed:
                self._change.wait()
            if not self._queues:
                return None
            client, queue = self._queues.popitem(last=False)
            work = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind all others
            work.started = True
            return work

    def _work(self) -> None:
        while (work := self._next()) is not None:
            if not work.future.set_running_or_notify_cancel():
                continue
            try:
                result = work.run(work)
            except Exception as error:  # whoever waits for the work is told
                with self._change:
                    self._forget(work)
                work.future.set_exception(error)
            else:
                with self._change:
                    self._cache.put(work.key, result)
                    self._forget(work)
                work.future.set_result(result)
