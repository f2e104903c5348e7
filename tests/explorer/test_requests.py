"""Requests: limits per client, events of jobs that are cancelled."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from convscope.explorer.app import create_app
from convscope.explorer.service import compute
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.state import Explorer
from convscope.explorer.web import event_stream, requests, security
from tests.oracles.explorer import smooth_image


def run_in_thread(coroutine):
    """Run a coroutine in a new thread: browser tests have an event loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


@pytest.fixture
def explorer(tiny):
    explorer = Explorer({"tiny": tiny})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    yield explorer
    explorer.close()


def test_a_client_with_many_requests_leaves_threads_for_others(explorer, monkeypatch):
    release, faithfulness = threading.Event(), compute.faithfulness
    limit = requests.MAX_REQUESTS_PER_CLIENT

    def slow_faithfulness(*args):
        assert release.wait(20)
        return faithfulness(*args)

    monkeypatch.setattr(compute, "faithfulness", slow_faithfulness)
    path = "/api/models/tiny/images/first/faithfulness?target=0"

    async def run():
        transport = httpx.ASGITransport(app=create_app(explorer))

        def visitor(name):
            return httpx.AsyncClient(transport=transport, base_url="http://localhost", cookies={security.COOKIE: name})

        async with visitor("greedy") as greedy, visitor("other") as other:
            tasks = [asyncio.create_task(greedy.get(path)) for _ in range(2 * limit)]
            async with asyncio.timeout(10):
                while sum(task.done() for task in tasks) < limit:
                    await asyncio.sleep(0.01)
            page = await asyncio.wait_for(other.get("/glossary"), 10)
            release.set()
            return page, await asyncio.gather(*tasks), await greedy.get(path)

    page, responses, later = run_in_thread(run())
    assert page.status_code == 200
    assert sorted(response.status_code for response in responses) == [200] * limit + [503] * limit
    assert {response.json()["error"] for response in responses if response.status_code == 503} == {
        "32 of your own requests are under way; try again when one is done"
    }
    assert later.status_code == 200


def test_listeners_of_a_pending_job_learn_that_it_was_cancelled(explorer):
    release, started = threading.Event(), threading.Event()
    queue = explorer.background_queue
    running = queue.submit("blocker", lambda job: started.set() or release.wait(20), "first")
    assert started.wait(10)
    job = explorer.start_pattern("second", explorer.first, PatternSpec("relu2", 3), [])

    class ConnectedRequest:
        async def is_disconnected(self):
            return False

    async def collect_events():
        events = []
        async for event in event_stream.job_events(ConnectedRequest(), job, lambda record: record):
            events.append(event)
            if len(events) == 1:
                threading.Timer(0.1, queue.close).start()
                threading.Timer(0.5, release.set).start()
        return events

    events = run_in_thread(collect_events())
    assert events[0].startswith(b"event: progress")
    assert events[-1] == b'event: failed\ndata: {"error": "the job was cancelled"}\n\n'
    queue.release(running)
