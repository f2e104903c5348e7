"""Tasks on a Ray cluster of several nodes, whatever is killed on the way: all results, each once, always the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray", reason="the extra convscope[ray] is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

import convscope  # noqa: E402
from convscope import ConvscopeError  # noqa: E402
from convscope.distributed.ray_pool import map_unordered  # noqa: E402
from tests.oracles.tiny import LAYERS, SETTINGS, read_files, tiny, write_images  # noqa: E402

TESTS = str(Path(__file__).parents[2])


def nodes(count: int) -> tuple[Cluster, list[Any]]:
    """A head without processors of its own, and so many nodes with one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    added = [cluster.add_node(num_cpus=1) for _ in range(count)]
    cluster.wait_for_nodes()
    return cluster, added


@pytest.fixture
def two() -> Iterator[Cluster]:
    cluster, added = nodes(2)
    cluster.added = added
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def sleeping(seconds: float) -> Callable[[], Callable[[int], Any]]:
    """Simulated work: what takes time and no processor."""

    def make() -> Callable[[int], Any]:
        def do(task: int) -> tuple[int, int]:
            time.sleep(seconds)
            return task, os.getpid()

        return do

    return make


def test_every_task_is_done_once_by_all_nodes(two: Cluster) -> None:
    found = dict(map_unordered(sleeping(0.2), range(12), address="unused"))
    assert sorted(found) == list(range(12))
    assert [found[task][0] for task in range(12)] == list(range(12))
    assert len({pid for _, pid in found.values()}) == 2


def test_a_killed_worker_is_replaced(two: Cluster) -> None:
    found, killed = {}, False
    # Long enough for a new process to start, on a machine that is busy with other tests, while one worker is left.
    for task, result in map_unordered(sleeping(1.5), range(10), address="unused"):
        assert task not in found
        found[task] = result
        if not killed:
            os.kill(result[1], signal.SIGKILL)
            killed = True
    assert sorted(found) == list(range(10))
    assert len({pid for _, pid in found.values()}) >= 3


def test_a_lost_node_holds_nothing_up(two: Cluster) -> None:
    found, lost = {}, False
    for task, result in map_unordered(sleeping(0.5), range(8), address="unused"):
        found[task] = result
        if not lost:
            two.remove_node(two.added[-1], allow_graceful=False)
            lost = True
    assert sorted(found) == list(range(8))


def test_actors_do_not_wait_for_what_is_made_of_a_result(two: Cluster) -> None:
    """Whoever asks takes as long over a result as a task takes, and the next one is done meanwhile."""
    times: list[float] = []
    for _ in map_unordered(sleeping(0.4), range(12), address="unused", workers=1):
        time.sleep(0.4)
        times.append(time.monotonic())
    assert float(np.median(np.diff(times))) < 0.7, "not 0.8, one after the other"


def test_a_node_that_joins_is_used(two: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from convscope.distributed import ray_pool

    monkeypatch.setattr(ray_pool, "LOOK_AGAIN", 0.2)
    pids, joined = set(), False
    for _, (_, pid) in map_unordered(sleeping(0.5), range(40), address="unused"):
        pids.add(pid)
        if not joined:
            two.add_node(num_cpus=1)
            joined = True
    assert len(pids) == 3


def test_what_a_task_raises_is_said(two: Cluster) -> None:
    def make() -> Callable[[int], Any]:
        def do(task: int) -> int:
            raise ConvscopeError(f"task {task} has no sense")

        return do

    with pytest.raises(ConvscopeError, match=r"a worker failed: task \d has no sense"):
        list(map_unordered(make, range(2), address="unused"))


def test_actors_that_no_node_has_room_for_are_refused(two: Cluster) -> None:
    """They would wait for ever."""
    with pytest.raises(ConvscopeError, match=r"a worker takes 2 processors, .* have 1 at most; set OMP_NUM_THREADS"):
        list(map_unordered(sleeping(0), range(2), address="unused", cpus=2))


def test_an_address_where_nobody_answers_is_refused() -> None:
    with pytest.raises(ConvscopeError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        list(map_unordered(sleeping(0), range(2), address="127.0.0.1:1"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of an undisturbed run in this process, on one thread as the actors have."""
    out = tmp_path_factory.mktemp("single") / "store"
    alone(lambda: convscope.scan(tiny(), data, out, LAYERS, **SETTINGS))
    return read_files(out)


def alone(work: Callable[[], Any]) -> Any:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def test_a_scan_on_a_cluster_that_loses_a_worker_and_a_node_is_the_same_to_the_byte(
    two: Cluster,
    data: Path,
    single: dict[str, bytes],
    tmp_path: Path,
) -> None:
    seen: list[float] = []

    def disturb(done: float, total: int) -> None:
        seen.append(done)
        if len(seen) == 1:
            two.remove_node(two.added[-1], allow_graceful=False)

    ray_settings = {**SETTINGS, "workers": None}
    alone(lambda: convscope.scan(tiny(), data, tmp_path / "s", LAYERS, **ray_settings, ray="auto", progress=disturb))
    assert read_files(tmp_path / "s") == single
    assert seen[-1] == 150


def test_a_killed_driver_goes_on_where_it_was(data: Path, single: dict[str, bytes], tmp_path: Path) -> None:
    script = f"""
        import os, signal, sys
        os.environ["RAY_AUTH_MODE"] = "disabled"
        sys.path.insert(0, {TESTS!r})
        import torch
        torch.set_num_threads(1)
        import convscope
        from tests.oracles.tiny import LAYERS, SETTINGS, tiny
        def progress(done, total):
            os.kill(os.getpid(), signal.SIGKILL)
        settings = {{**SETTINGS, "workers": None, "ray": "local", "progress": progress}}
        convscope.scan(tiny(), {str(data)!r}, {str(tmp_path / "s")!r}, LAYERS, **settings)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    kept = sorted(p.name for p in (tmp_path / "s" / "shards").glob("*.safetensors"))
    assert len(kept) == 1
    alone(lambda: convscope.scan(tiny(), data, tmp_path / "s", LAYERS, **SETTINGS))
    assert read_files(tmp_path / "s") == single


def test_speed_up_is_nearly_linear_where_work_takes_no_processor() -> None:
    """Not a benchmark: four nodes must not take as long as one. Figures are in the documentation."""
    took = {}
    for count in (1, 4):
        cluster, _ = nodes(count)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            begins: list[float] = []
            for _ in map_unordered(sleeping(0.3), range(28), address="unused"):
                begins.append(time.monotonic())
            took[count] = np.diff(begins)[8:].mean()  # between two results, once all actors are up
        finally:
            ray.shutdown()
            cluster.shutdown()
    assert took[4] < 0.5 * took[1]
