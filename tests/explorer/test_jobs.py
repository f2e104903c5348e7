"""Job queues: shared jobs, turns, bounds, cancellation."""

from __future__ import annotations

import threading
import time

import pytest

from convscope.errors import ConvscopeError
from convscope.explorer.service.cache import Cache
from convscope.explorer.service.jobs import Client, ClientDisconnected, JobQueue, QueueFull, RequestTimeout


@pytest.fixture
def queue():
    queue = JobQueue("test", Cache(10_000), max_jobs=6, max_jobs_per_client=4)
    yield queue
    queue.close()


def submit_blocker(queue):
    """Submit a job that runs until the returned event is set."""
    release, started = threading.Event(), threading.Event()

    def run(job):
        started.set()
        assert release.wait(10)
        return "blocked"

    job = queue.submit("blocker", run, "first")
    assert started.wait(10)
    return job, release


def test_clients_share_the_job_of_a_key(queue):
    calls = []
    blocker, release = submit_blocker(queue)
    jobs = [queue.submit("same", lambda job: calls.append(1) or 42, f"client {i}") for i in range(3)]
    assert jobs[0] is jobs[1] is jobs[2]
    assert jobs[0].num_waiting == 3
    release.set()
    assert [Client("x", 10).wait(job) for job in jobs] == [42, 42, 42]
    assert calls == [1]
    queue.submit("same", lambda job: calls.append(2), "later")
    assert calls == [1]  # cached
    queue.release(blocker)


def test_clients_take_turns(queue):
    blocker, release = submit_blocker(queue)
    order = []
    jobs = [
        queue.submit((client, i), lambda job: order.append(job.key), client)
        for client, i in [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0)]
    ]
    assert [queue.position(job) for job in jobs] == [0, 3, 4, 1, 2]
    release.set()
    for job in jobs:
        job.future.result(10)
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("a", 2)]
    assert queue.position(blocker) == 0


def test_queue_is_bounded_in_total_and_per_client(queue):
    _, release = submit_blocker(queue)
    for i in range(4):
        queue.submit(i, lambda job: 0, "greedy")
    with pytest.raises(QueueFull, match="4 of your own"):
        queue.submit("more", lambda job: 0, "greedy")
    queue.submit(4, lambda job: 0, "other")
    queue.submit(5, lambda job: 0, "third")
    with pytest.raises(QueueFull, match=r"the queue is full \(6 jobs\)"):
        queue.submit("more", lambda job: 0, "fourth")
    release.set()


def test_pending_job_is_dropped_when_the_last_client_releases_it(queue):
    _, release = submit_blocker(queue)
    calls = []
    first = queue.submit("dropped", calls.append, "a")
    second = queue.submit("dropped", calls.append, "b")
    queue.release(first)
    assert len(queue) == 1
    queue.release(second)
    assert len(queue) == 0
    assert first.future.cancelled()
    release.set()
    queue.submit("after", lambda job: 1, "a").future.result(10)
    assert calls == []


def test_running_job_ends_at_its_next_step_when_no_client_waits(queue):
    steps = []
    started = threading.Event()

    def run(job):
        for i in range(1000):
            steps.append(i)
            started.set()
            time.sleep(0.002)
            job.report_progress(i, 1000)

    job = queue.submit("long", run, "a")
    assert started.wait(10)
    queue.release(job)
    assert isinstance(job.future.exception(10), ClientDisconnected)
    assert len(steps) < 500
    assert queue.submit("long", lambda job: "anew", "a").future.result(10) == "anew"


def test_exceptions_reach_the_client_and_are_not_cached(queue):
    def fail(job):
        raise ConvscopeError("no such thing")

    for _ in range(2):
        with pytest.raises(ConvscopeError, match="no such thing"):
            Client("a", 10).wait(queue.submit("wrong", fail, "a"))
    assert queue.submit("wrong", lambda job: "right", "a").future.result(10) == "right"


def test_client_releases_the_job_on_timeout_and_disconnect(queue):
    _, release = submit_blocker(queue)
    with pytest.raises(RequestTimeout, match=r"within 0\.2 s"):
        Client("a", 0.2).wait(queue.submit("slow", lambda job: 0, "a"))
    client = Client("a", 10)
    client.disconnected = True
    with pytest.raises(ClientDisconnected):
        client.wait(queue.submit("slow", lambda job: 0, "a"))
    assert len(queue) == 0
    release.set()


def test_closed_queue_has_no_thread_and_accepts_nothing():
    queue = JobQueue("closing", Cache(1000), max_jobs=5, max_jobs_per_client=5)
    queue.submit(1, lambda job: 1, "a").future.result(10)
    queue.close()
    assert not any(thread.name == "convscope-closing" for thread in threading.enumerate())
    with pytest.raises(QueueFull, match="shutting down"):
        queue.submit(2, lambda job: 2, "a")
