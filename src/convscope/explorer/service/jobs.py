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

    def __init__(self, client: str, seconds: float) -> None:
        self.client, self.gone = client, False
        self._seconds, self._until = seconds, time.monotonic() + seconds

    def wait(self, work: Job) -> Any:
        """The work's result, or what it raised. Raises GoneError once gone, and SlowError."""
        try:
            while not wait([work.future], timeout=0.1).done:
                if self.gone:
                    raise ClientDisconnected
                if time.monotonic() > self._until:
                    raise RequestTimeout(
                        f"no answer within {self._seconds:g} s; the explorer is busy, try again in a moment"
                    )
            return work.future.result()
        except CancelledError as error:
            raise ClientDisconnected from error
        finally:
            work.lane.leave(work)


class Job:
    """One computation. `run(work)` makes the result; it may `tell` how far it is and `show` what there is so far.

    `done` of `total` steps are done (total 0: not known); `shown` is the newest picture on the way, `frame` its number.
    """

    def __init__(self, key: Hashable, run: Callable[[Job], Any], client: str, lane: JobQueue) -> None:
        self.key, self.run, self.client, self.lane = key, run, client, lane
        self.future: Future[Any] = Future()
        self.waiting = 1
        self.begun = False
        self.done, self.total = 0.0, 0
        self.shown, self.frame = b"", 0

    def tell(self, done: float, total: int) -> None:
        """Note the progress. Raises GoneError if nobody waits: the work then ends where it is."""
        if self.waiting == 0:
            raise ClientDisconnected
        self.done, self.total = done, total

    def show(self, image: bytes) -> None:
        self.shown, self.frame = image, self.frame + 1


class JobQueue:
    """A thread that does one work after another, each client in turn. Results go to the cache.

    At most `limit` works wait in all, and `each` of one client.
    """

    def __init__(self, name: str, cache: Cache, *, limit: int, each: int) -> None:
        self.name, self._cache, self._limit, self._each = name, cache, limit, each
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._known: dict[Hashable, Job] = {}
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def ask(self, key: Hashable, run: Callable[[Job], Any], client: str) -> Job:
        """The work for `key`: kept, under way, or new. Who asked must `leave` in the end. Raises FullError."""
        with self._change:
            kept = self._cache.get(key)
            if kept is not None:
                work = Job(key, run, client, self)
                work.future.set_result(kept)
                return work
            known = self._known.get(key)
            if known is not None and known.waiting:
                known.waiting += 1
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

    def leave(self, work: Job) -> None:
        """One who waited has gone. Work that nobody waits for is dropped, or ends at its next step."""
        with self._change:
            work.waiting -= 1
            if work.waiting == 0 and not work.begun:
                queue = self._queues.get(work.client)
                if queue is not None and work in queue:
                    queue.remove(work)
                    if not queue:
                        del self._queues[work.client]
                    self._forget(work)
                    work.future.cancel()

    def position(self, work: Job) -> int:
        """How many works are done before this one, as things stand; 0 when it is under way or next."""
        with self._change:
            if work.begun or work.client not in self._queues:
                return 0
            position = self._queues[work.client].index(work) if work in self._queues[work.client] else 0
            clients = list(self._queues)
            turn = clients.index(work.client)
            return position + sum(
                min(len(queue), position + (clients.index(client) < turn))
                for client, queue in self._queues.items()
                if client != work.client
            )

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def close(self) -> None:
        """Take no more work, end what is under way at its next step, and wait for that."""
        with self._change:
            self._closed = True
            for work in list(self._known.values()):
                work.waiting = 0
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
            work.begun = True
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
