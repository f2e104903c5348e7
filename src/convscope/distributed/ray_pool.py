"""Run independent tasks on a Ray cluster, with actors that keep their state, whatever dies on the way."""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Generic, TypeVar

from convscope.errors import ConvscopeError, require_extra

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

T = TypeVar("T")

POLL_INTERVAL = 5.0  # seconds after which the size of the cluster is checked again
CONNECT_TIMEOUT = 10.0  # seconds


class _Worker(Generic[T]):
    """An actor on the cluster.

    Parameters
    ----------
    pickled : bytes
        A function that returns the function that does tasks.
    paths : sequence of str
        Folders of modules in the calling process; those that exist on the actor's node are searched as well.
    """

    def __init__(self, pickled: bytes, paths: Sequence[str]) -> None:
        from ray import cloudpickle

        sys.path += [path for path in paths if path not in sys.path]
        make_task: Callable[[], Callable[[int], T]] = cloudpickle.loads(pickled)
        self._run = make_task()

    def run(self, task: int) -> T:
        return self._run(task)


def map_unordered(
    make_task: Callable[[], Callable[[int], T]],
    tasks: Sequence[int],
    *,
    address: str,
    cpus: int = 1,
    gpus: int = 0,
    workers: int | None = None,
) -> Iterator[tuple[int, T]]:
    """Yield each task with ``make_task()(task)``, in the order in which tasks finish.

    Ray restarts an actor that dies, and its task is done again. When no tasks are left to start, idle actors repeat
    those that others still work on, and the first result counts, so that a lost node delays nothing. A task must
    therefore always give the same result.

    Parameters
    ----------
    make_task : callable
        Called once in each actor; returns the function that does tasks.
    tasks : sequence of int
    address : str
        Address of a running cluster, or "local" to start one on this machine and stop it at the end. If this process is
        connected to a cluster already, that one is used.
    cpus, gpus : int
        What each actor occupies.
    workers : int, optional
        Number of actors, to which an autoscaling cluster grows; by default as many as the cluster has room for, also
        when it grows meanwhile.

    Raises
    ------
    ConvscopeError
        If the cluster cannot be reached, if none of its nodes has `cpus` processors, or if a task raises.
    """
    with connected(address) as ray:
        if workers is None:
            _require_large_enough_node(ray.nodes(), cpus)
        actor_class = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(_Worker)
        pickled = ray.put(ray.cloudpickle.dumps(make_task))
        scheduler: _Scheduler[T] = _Scheduler(ray, tasks)
        while scheduler.unfinished:
            capacity = _capacity(ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}) if workers is None else workers
            while len(scheduler.actors) < min(capacity, len(tasks)):
                scheduler.actors.append(actor_class.remote(pickled, sys.path))
            scheduler.start_tasks()
            yield from scheduler.collect(POLL_INTERVAL)


class _Scheduler(Generic[T]):
    """Assigns tasks to idle actors and collects the first result of each task."""

    def __init__(self, ray: ModuleType, tasks: Sequence[int]) -> None:
        self.actors: list[ActorHandle] = []
        self.unfinished = set(tasks)
        self._ray, self._queue = ray, deque(tasks)
        self._running: dict[ObjectRef, tuple[int, ActorHandle]] = {}

    def start_tasks(self) -> None:
        """Give every idle actor a task; repeat unfinished ones when none are left to start."""
        busy = [actor for _, actor in self._running.values()]
        for actor in [actor for actor in self.actors if self.unfinished and actor not in busy]:
            task = self._queue.popleft() if self._queue else self._least_running()
            self._running[actor.run.remote(task)] = task, actor

    def collect(self, timeout: float) -> Iterator[tuple[int, T]]:
        """Wait for a result and yield it, with its task, if it is the task's first one."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        for reference in ready:
            task, _ = self._running.pop(reference)
            if task in self.unfinished:
                result = self._get(reference)
                self.unfinished.remove(task)
                self.start_tasks()  # the actor need not wait until the caller has used the result
                yield task, result

    def _get(self, reference: ObjectRef) -> T:
        exceptions = self._ray.exceptions
        try:
            result: T = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise ConvscopeError(f"a worker failed: {getattr(error, 'cause', None) or cause}") from error
        except exceptions.RayError as error:
            raise ConvscopeError(f"the cluster failed: {str(error).splitlines()[0]}; rerun to resume") from error
        return result

    def _least_running(self) -> int:
        """Return the first of the unfinished tasks that the fewest actors work on."""
        running = [task for task, _ in self._running.values()]
        return min(self.unfinished, key=lambda task: (running.count(task), task))


def _capacity(resources: Mapping[str, float], required: Mapping[str, int]) -> int:
    """Return how many actors a cluster has room for; at least one."""
    return max(1, min(int(resources.get(kind, 0) // count) for kind, count in required.items() if count))


def _require_large_enough_node(nodes: Collection[Mapping[str, object]], cpus: int) -> None:
    """Raise ConvscopeError if no node can hold an actor. A cluster without any processor may get some later."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    max_cpus = max((each.get("CPU", 0) for each in resources if isinstance(each, Mapping)), default=0)
    if 0 < max_cpus < cpus:
        raise ConvscopeError(
            f"a worker takes {cpus} processors, one for each thread that this process computes with, and no node of "
            f"the cluster has more than {max_cpus:g}; set OMP_NUM_THREADS to that number or fewer"
        )


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connect to a cluster inside the block and provide the `ray` module; an existing connection is used and kept.

    Raises ConvscopeError if the cluster cannot be reached.
    """
    ray: ModuleType = require_extra("ray", "ray")
    if ray.is_initialized():
        yield ray
        return
    try:
        _require_listener(address)
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConvscopeError(
            f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}; "
            "expected the address of a running one, auto, or local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise OSError if nothing listens at an address with a port; Ray itself would retry for minutes."""
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
