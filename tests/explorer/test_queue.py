"""Work in the explorer: shared, fair, bounded, ended when nobody waits; results kept as long as there is room."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from convscope.errors import ConvscopeError
from convscope.explorer.service.cache import Cache
from convscope.explorer.service.jobs import Client, ClientDisconnected, JobQueue, QueueFull, RequestTimeout


@pytest.fixture
def lane():
    made = JobQueue("test", Cache(10_000), max_jobs=6, max_jobs_per_client=4)
    yield made
    made.close()


def blocked(lane, client="first"):
    """A work that is under way until the event is set."""
    go, begun = threading.Event(), threading.Event()

    def run(work):
        begun.set()
        assert go.wait(10)
        return "blocked"

    work = lane.ask("blocker", run, client)
    assert begun.wait(10)
    return work, go


def test_the_same_question_is_worked_on_once(lane):
    calls = []
    blocker, go = blocked(lane)
    asked = [lane.ask("same", lambda work: calls.append(1) or 42, f"client {i}") for i in range(3)]
    assert asked[0] is asked[1] is asked[2]
    assert asked[0].waiting == 3
    go.set()
    assert [Client("x", 10).wait(work) for work in asked] == [42, 42, 42]
    assert calls == [1]
    lane.ask("same", lambda work: calls.append(2), "later")
    assert calls == [1]  # kept
    lane.leave(blocker)


def test_clients_take_turns(lane):
    blocker, go = blocked(lane)
    order = []
    works = [lane.ask((client, i), lambda work: order.append(work.key), client) for client, i in
             [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0)]]  # fmt: skip
    assert [lane.ahead(work) for work in works] == [0, 3, 4, 1, 2]
    go.set()
    for work in works:
        work.future.result(10)
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("a", 2)]
    assert lane.ahead(blocker) == 0


def test_the_queue_is_bounded_in_all_and_for_each(lane):
    _, go = blocked(lane)
    for i in range(4):
        lane.ask(i, lambda work: 0, "greedy")
    with pytest.raises(QueueFull, match="4 of your own"):
        lane.ask("more", lambda work: 0, "greedy")
    lane.ask(4, lambda work: 0, "other")
    lane.ask(5, lambda work: 0, "third")
    with pytest.raises(QueueFull, match="the queue is full: 6 works wait"):
        lane.ask("more", lambda work: 0, "fourth")
    go.set()


def test_work_that_nobody_waits_for_is_dropped_before_it_begins(lane):
    _, go = blocked(lane)
    begun = []
    work = lane.ask("dropped", begun.append, "a")
    again = lane.ask("dropped", begun.append, "b")
    lane.leave(work)
    assert len(lane) == 1
    lane.leave(again)
    assert len(lane) == 0
    assert work.future.cancelled()
    go.set()
    lane.ask("after", lambda work: 1, "a").future.result(10)
    assert begun == []


def test_work_under_way_ends_at_its_next_step_once_nobody_waits(lane):
    steps = []
    first = threading.Event()

    def run(work):
        for i in range(1000):
            steps.append(i)
            first.set()
            time.sleep(0.002)
            work.tell(i, 1000)

    work = lane.ask("long", run, "a")
    assert first.wait(10)
    lane.leave(work)
    assert isinstance(work.future.exception(10), ClientDisconnected)
    assert len(steps) < 500
    assert lane.ask("long", lambda work: "anew", "a").future.result(10) == "anew"


def test_errors_reach_who_asked_and_are_not_kept(lane):
    def wrong(work):
        raise ConvscopeError("no such thing")

    for _ in range(2):
        with pytest.raises(ConvscopeError, match="no such thing"):
            Client("a", 10).wait(lane.ask("wrong", wrong, "a"))
    assert lane.ask("wrong", lambda work: "right", "a").future.result(10) == "right"


def test_who_waits_too_long_or_goes_away_leaves_the_work(lane):
    _, go = blocked(lane)
    with pytest.raises(RequestTimeout, match=r"within 0\.2 s"):
        Client("a", 0.2).wait(lane.ask("slow", lambda work: 0, "a"))
    gone = Client("a", 10)
    gone.disconnected = True
    with pytest.raises(ClientDisconnected):
        gone.wait(lane.ask("slow", lambda work: 0, "a"))
    assert len(lane) == 0
    go.set()


def test_a_closed_lane_has_no_thread_and_takes_nothing():
    lane = JobQueue("closing", Cache(1000), max_jobs=5, max_jobs_per_client=5)
    lane.submit(1, lambda work: 1, "a").future.result(10)
    lane.close()
    assert not any(thread.name == "convscope-closing" for thread in threading.enumerate())
    with pytest.raises(QueueFull, match="closing"):
        lane.submit(2, lambda work: 2, "a")


def test_the_cache_forgets_what_was_not_used_for_longest():
    cache = Cache(1000)
    for name in "abc":
        cache.put(name, np.zeros(75, np.float32))  # 300 bytes
    cache.get("a")
    cache.put("d", np.zeros(75, np.float32))
    assert cache.get("b") is None
    assert all(cache.get(name) is not None for name in "acd")
    assert cache.bytes == 900
    cache.put("large", np.zeros(5000, np.uint8))
    assert (cache.bytes, len(cache)) == (0, 0)


def test_the_cache_is_bounded_in_number():
    cache = Cache(10**9, max_entries=3)
    for i in range(10):
        cache.put(i, b"x")
    assert [cache.get(i) is not None for i in range(10)] == [False] * 7 + [True] * 3
