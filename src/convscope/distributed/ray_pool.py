"""Work on a Ray cluster: independent tasks, done by actors that keep what they need, whatever dies on the way."""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from convscope.errors import ConvscopeError, require_extra

Do = Callable[[int], Any]


class _Worker:
    """Lives on the cluster. `pickled` is a function that gives what does the tasks; `paths` where this process's
    modules are found, the network's own among them, which count where they exist."""

    def __init__(self, pickled: bytes, paths: Sequence[str]) -> None:
        from ray import cloudpickle

        sys.path += [path for path in paths if path not in sys.path]
        make: Callable[[], Do] = cloudpickle.loads(pickled)
        self._do = make()

    def do(self, task: int) -> Any:
        return self._do(task)


def map_unordered(
    make: Callable[[], Do],
    tasks: Sequence[int],
    *,
    address: str,
    cpus: int = 1,
    gpus: int = 0,
    workers: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """What `make()(task)` gives for each of the tasks, as they are done, each once.

    address: of a running cluster; "local" starts one on this machine, and ends it; where this process is connected
    already, that cluster is used. Each actor takes `cpus` and `gpus`; there are as many as the cluster has room for,
    also when it grows meanwhile, or `workers`, which an autoscaling cluster grows to.

    An actor that dies is started again by Ray, and what it was at is done again. Where there are no tasks left, idle
    actors repeat those that others are still at, and the first to end counts: a task must always give the same. So a
    node that is lost holds nothing up. Raises ConvscopeError if the cluster cannot be reached, if none of its nodes has
    `cpus` processors, or if a task raises.
    """
    ray = require_extra("ray", "ray")
    with connected(address):
        if workers is None:
            _require_position(ray.nodes(), cpus)
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(_Worker)
        shared = ray.put(ray.cloudpickle.dumps(make))
        todo, left = deque(tasks), set(tasks)
        actors: list[Any] = []
        running: dict[Any, tuple[int, Any]] = {}

        def hand_out() -> None:
            busy = [actor for _, actor in running.values()]
            for actor in [one for one in actors if left and one not in busy]:
                task = todo.popleft() if todo else _least_tried(left, running)
                running[actor.do.remote(task)] = task, actor

        while left:
            room = _room(ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}) if workers is None else workers
            while len(actors) < min(room, len(tasks)):
                actors.append(remote.remote(shared, sys.path))
            hand_out()
            ready, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_AGAIN)
            for reference in ready:
                task, _ = running.pop(reference)
                if task in left:
                    found = _got(ray, reference)
                    left.remove(task)
                    hand_out()  # the actor need not wait for what is made of this here
                    yield task, found


LOOK_AGAIN = 5.0  # seconds after which it is seen whether the cluster has grown


def _room(there: Mapping[str, float], each: Mapping[str, int]) -> int:
    """How many actors a cluster has room for, by what is there and what each takes; one at least."""
    return max(1, min(int(there.get(kind, 0) // count) for kind, count in each.items() if count))


def _require_position(nodes: Sequence[Mapping[str, Any]], cpus: int) -> None:
    """Raises ConvscopeError where actors would wait for ever. A cluster without any processor may yet get some."""
    most = max((node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]), default=0)
    if 0 < most < cpus:
        raise ConvscopeError(
            f"a worker takes {cpus} processors, one for each thread that this process computes with, and the nodes of "
            f"the cluster have {most:g} at most; set OMP_NUM_THREADS to so many or fewer"
        )


def _least_tried(left: set[int], running: dict[Any, tuple[int, Any]]) -> int:
    """Of the tasks that are not done, the one that the fewest are at; of these the first."""
    tries = [task for task, _ in running.values()]
    return min(left, key=lambda task: (tries.count(task), task))


def _got(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.as_instanceof_cause()
        raise ConvscopeError(f"a worker failed: {getattr(error, 'cause', None) or cause}") from error
    except ray.exceptions.RayError as error:
        raise ConvscopeError(f"the cluster failed: {str(error).splitlines()[0]}; the same call goes on") from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connected to the cluster for as long as the block lasts; a connection that was there before is left as it is.

    Raises ConvscopeError if the cluster cannot be reached.
    """
    ray = require_extra("ray", "ray")
    if ray.is_initialized():
        yield
        return
    try:
        _require_answer(address)
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConvscopeError(
            f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}; "
            "expected the address of a running one, auto, or local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raises OSError if nobody listens at an address with a port: Ray itself would go on asking for minutes."""
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()


PATIENCE = 10.0  # seconds
