"""Tasks on a Ray cluster of several nodes: all results, each once, always the same, whatever is killed on the way."""

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
import torch

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray", reason="the extra convscope[ray] is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

import convscope  # noqa: E402
from convscope import ConvscopeError  # noqa: E402
from convscope.diagnosis import recording  # noqa: E402
from convscope.distributed import ray_pool  # noqa: E402
from convscope.distributed.ray_pool import map_unordered  # noqa: E402
from tests.oracles.explorer import data_folder, tiny_model  # noqa: E402
from tests.oracles.tiny import LAYERS, NUM_IMAGES, SETTINGS, read_files, tiny, write_images  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = str(Path(__file__).parents[2])
CONNECTED = "the address is not used, because this process is connected"

Result = tuple[int, int]  # a task and the process that did it


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    """A head without processors and two nodes with one each, to which this process is connected."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The cluster with at least two nodes, also if an earlier test has removed one."""
    while len(shared_cluster.workers) < 2:
        shared_cluster.workers.append(shared_cluster.add_node(num_cpus=1))
    return shared_cluster


def sleeping(seconds: float) -> Callable[[], Callable[[int], Result]]:
    """Simulate work that takes time and no processor."""

    def make() -> Callable[[int], Result]:
        def run(task: int) -> Result:
            time.sleep(seconds)
            return task, os.getpid()

        return run

    return make


def meeting(folder: Path, processes: int, first: int = 0) -> Callable[[], Callable[[int], Result]]:
    """Make tasks, from the number `first` on, that wait until this many processes have begun one."""

    def make() -> Callable[[int], Result]:
        def run(task: int) -> Result:
            (folder / str(os.getpid())).touch()
            deadline = time.monotonic() + 100
            while task >= first and len(os.listdir(folder)) < processes and time.monotonic() < deadline:
                time.sleep(0.05)
            return task, os.getpid()

        return run

    return make


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_every_task_is_done_once_and_all_nodes_are_used(cluster: Cluster, tmp_path: Path) -> None:
    results = list(map_unordered(meeting(tmp_path, len(cluster.workers)), range(8), address=CONNECTED))
    assert sorted(task for task, _ in results) == list(range(8))
    assert all(task == result[0] for task, result in results)
    assert len(list(tmp_path.iterdir())) == len(cluster.workers)


def test_a_killed_worker_is_replaced(cluster: Cluster, tmp_path: Path) -> None:
    results: list[tuple[int, Result]] = []
    for task, result in map_unordered(
        meeting(tmp_path, len(cluster.workers) + 1, first=2), range(8), address=CONNECTED
    ):
        if not results:
            os.kill(result[1], signal.SIGKILL)
        results.append((task, result))
    assert sorted(task for task, _ in results) == list(range(8))
    assert len(list(tmp_path.iterdir())) > len(cluster.workers)


def test_a_node_that_joins_is_used(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "POLL_INTERVAL", 0.2)
    processes = len(cluster.workers) + 1
    tasks: list[int] = []
    for task, _ in map_unordered(meeting(tmp_path, processes, first=1), range(10), address=CONNECTED):
        if not tasks:
            cluster.workers.append(cluster.add_node(num_cpus=1))
        tasks.append(task)
    assert sorted(tasks) == list(range(10))
    assert len(list(tmp_path.iterdir())) == processes


def test_actors_do_not_wait_until_a_result_is_used(cluster: Cluster) -> None:
    """The caller takes as long over a result as a task takes, and meanwhile the next task is done."""
    times: list[float] = []
    for _ in map_unordered(sleeping(0.3), range(9), address=CONNECTED, workers=1):
        time.sleep(0.3)
        times.append(time.monotonic())
    assert float(np.median(np.diff(times))) < 0.5, "0.6 would be one after the other"


def test_two_nodes_are_nearly_twice_as_fast_as_one_where_work_takes_no_processor(cluster: Cluster) -> None:
    intervals = {}
    for workers in (1, 2):
        times, pids = [], set()
        for _, (_, pid) in map_unordered(sleeping(0.15), range(24), address=CONNECTED, workers=workers):
            pids.add(pid)
            if len(pids) == workers:  # all actors have started
                times.append(time.monotonic())
        intervals[workers] = np.diff(times).mean()
    assert intervals[2] < 0.7 * intervals[1]


def test_errors_of_tasks_are_reported(cluster: Cluster) -> None:
    def make() -> Callable[[int], Any]:
        def run(task: int) -> int:
            raise ConvscopeError(f"task {task} is impossible")

        return run

    with pytest.raises(ConvscopeError, match=r"a worker failed: task \d is impossible"):
        list(map_unordered(make, range(2), address=CONNECTED))


def test_actors_for_which_no_node_is_large_enough_are_refused(cluster: Cluster) -> None:
    """They would wait for ever."""
    with pytest.raises(ConvscopeError, match=r"a worker takes 2 processors, .* more than 1; set OMP_NUM_THREADS"):
        list(map_unordered(sleeping(0), range(2), address=CONNECTED, cpus=2))


# Scans ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread, as actors on nodes of one processor do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference(data: Path, tmp_path: Path) -> dict[str, bytes]:
    """The store of an undisturbed scan in this process."""
    convscope.scan(tiny(), data, tmp_path / "reference", LAYERS, **SETTINGS)
    return read_files(tmp_path / "reference")


def test_a_scan_whose_driver_is_killed_can_be_resumed(
    cluster: Cluster, data: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {ROOT!r})
        import torch
        torch.set_num_threads(1)
        import convscope
        from tests.oracles.tiny import LAYERS, SETTINGS, tiny
        def progress(done, total):
            os.kill(os.getpid(), signal.SIGKILL)
        settings = {{**SETTINGS, "workers": 1, "ray": {cluster.address!r}, "progress": progress}}
        convscope.scan(tiny(), {str(data)!r}, {str(tmp_path / "store")!r}, LAYERS, **settings)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert len(list((tmp_path / "store" / "shards").glob("*.safetensors"))) == 1
    convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **SETTINGS)
    assert read_files(tmp_path / "store") == reference


def test_a_scan_that_loses_a_node_is_the_same_to_the_byte(
    cluster: Cluster, data: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    steps: list[float] = []

    def lose_node(done: float, total: int) -> None:
        if not steps:
            cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
        steps.append(done)

    settings = {**SETTINGS, "workers": None, "ray": "auto", "progress": lose_node}
    convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **settings)
    assert read_files(tmp_path / "store") == reference
    assert steps[-1] == NUM_IMAGES


# Last, because Ray takes a while to notice a lost node.
def test_a_diagnosis_recorded_on_a_cluster_is_the_same_to_the_byte(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "choose_shard_size", lambda *_: 16)
    model, data, counts = tiny_model(), data_folder(tmp_path / "data", 40), []
    (data / "red" / "damaged.png").write_bytes(b"damaged")
    with pytest.warns(convscope.ConvscopeWarning, match="damaged"):
        local = convscope.diagnose(model, data, layer="relu3", out=tmp_path / "local", workers=0)
    with pytest.warns(convscope.ConvscopeWarning, match="damaged"):
        remote = convscope.diagnose(
            model,
            data,
            layer="relu3",
            out=tmp_path / "remote",
            ray=CONNECTED,
            progress=lambda done, total: counts.append((done, total)),
        )
    assert remote.rows() == local.rows()
    assert sorted(counts[:3]) == counts[:3]
    assert counts[2] == (41, 41)
    assert read_files(tmp_path / "remote" / "observations") == read_files(tmp_path / "local" / "observations")


def test_a_lost_node_delays_nothing(cluster: Cluster) -> None:
    tasks: list[int] = []
    for task, _ in map_unordered(sleeping(0.3), range(8), address=CONNECTED):
        if not tasks:
            cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
        tasks.append(task)
    assert sorted(tasks) == list(range(8))
