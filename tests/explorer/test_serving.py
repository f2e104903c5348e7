"""Between the web and the explorer: what one visitor may ask at once; what is said of work that is ended."""

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
from convscope.explorer.web import requests, security
from tests.oracles.explorer import smooth_image, tiny_model


def alone(work):
    """Runs to its end in a thread of its own: a browser under test has a loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


@pytest.fixture
def explorer():
    made = Explorer({"tiny": tiny_model()})
    made.images.add_sample(smooth_image(0), "first.png", "first.png")
    yield made
    made.close()


def test_a_visitor_who_asks_a_lot_leaves_room_for_others(explorer, monkeypatch):
    go, own = threading.Event(), compute.faithfulness

    def slow(*given, **more):
        assert go.wait(20)
        return own(*given, **more)

    monkeypatch.setattr(compute, "faithfulness", slow)
    path = "/api/models/tiny/pictures/first/faithfulness?target=0"

    async def run():
        app = httpx.ASGITransport(app=create_app(explorer))

        def visitor(name):
            return httpx.AsyncClient(transport=app, base_url="http://localhost", cookies={security.COOKIE: name})

        async with visitor("greedy") as greedy, visitor("other") as other:
            many = [asyncio.create_task(greedy.get(path)) for _ in range(2 * requests.MAX_REQUESTS_PER_CLIENT)]
            async with asyncio.timeout(10):
                while sum(task.done() for task in many) < requests.MAX_REQUESTS_PER_CLIENT:
                    await asyncio.sleep(0.01)
            page = await asyncio.wait_for(other.get("/glossary"), 10)
            go.set()
            return page, await asyncio.gather(*many), await greedy.get(path)

    page, many, later = alone(run())
    assert page.status_code == 200
    assert (
        sorted(answer.status_code for answer in many)
        == [200] * requests.MAX_REQUESTS_PER_CLIENT + [503] * requests.MAX_REQUESTS_PER_CLIENT
    )
    assert {answer.json()["error"] for answer in many if answer.status_code == 503} == {
        "32 of your own questions wait already; try again when one is answered"
    }
    assert later.status_code == 200


def test_listeners_of_work_that_never_began_are_told_of_its_end(explorer):
    go, begun = threading.Event(), threading.Event()
    running = explorer.slow.ask("blocker", lambda work: begun.set() or go.wait(20), "first")
    assert begun.wait(10)
    work = explorer.begin_drawing("second", explorer.first, PatternSpec("relu2", 3), [])

    class Listening:
        async def is_disconnected(self):
            return False

    async def heard():
        desk = requests.RequestRunner(explorer, None, 10)
        said = []
        async for event in desk.event_stream(Listening(), work, lambda made: made).body_iterator:
            said.append(event)
            if len(said) == 1:
                threading.Timer(0.1, explorer.slow.close).start()
                threading.Timer(0.5, go.set).start()
        return said

    said = alone(heard())
    assert said[0].startswith("event: progress")
    assert said[-1] == 'event: failed\ndata: {"error": "the work was ended"}\n\n'
    explorer.slow.leave(running)
