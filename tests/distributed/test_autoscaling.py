"""A scan on a cluster that begins without a node to work on: Ray's autoscaler adds nodes, and they are used."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

import convscope
from convscope.distributed import ray_pool
from tests.oracles.tiny import LAYERS, SETTINGS, read_files, tiny, write_images

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray", reason="the extra convscope[ray] is not installed")
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider"
if importlib.util.find_spec(PROVIDER) is None:
    pytest.skip("this version of Ray has no provider that simulates machines", allow_module_level=True)
pytestmark = pytest.mark.slow


def autoscaler_config(address: str) -> dict[str, object]:
    """Configure up to two nodes of one processor each, which are started on this machine."""
    node_types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2},
    }
    provider = {"type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True}
    empty_lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
                   "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
                   "rsync_filter")  # fmt: skip
    return {
        "cluster_name": "growing", "max_workers": 2, "provider": provider | {"launch_multiple": True},
        "available_node_types": node_types, "head_node_type": "ray.head.default", "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0, "auth": {"ssh_user": "nobody"}, "file_mounts": {}, "docker": {},
        **{name: [] for name in empty_lists},
    }  # fmt: skip


def raise_timeout(signal: int, frame: object) -> None:
    raise TimeoutError("no node was added")


@pytest.fixture
def growing_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head without processors. All its processes are in one group and end with it."""
    monkeypatch.setattr(ray_pool, "POLL_INTERVAL", 0.5)
    folder = Path(mkdtemp(prefix="cs"))  # short, because names of sockets contain it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "config.json").write_text(json.dumps(autoscaler_config(address)))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0",
               f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}", "--include-dashboard=false",
               f"--autoscaling-config={folder / 'config.json'}"]  # fmt: skip
    settings = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_worker_niceness": "0"}
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(
            command, env={**os.environ, **settings}, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        signal.signal(signal.SIGALRM, raise_timeout)
        signal.alarm(300)
        deadline = time.monotonic() + 120
        while b"Ray runtime started" not in (folder / "log").read_bytes():
            assert head.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        signal.alarm(0)
        ray.shutdown()
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def meet_on_two_nodes(folder: Path) -> Callable[[int], None]:
    """Make tasks that wait until two nodes have begun one."""

    def run(task: int) -> None:
        (folder / str(ray.get_runtime_context().get_node_id())).touch()
        deadline = time.monotonic() + 100
        while len(os.listdir(folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)

    return run


def test_nodes_are_added_during_a_scan_and_are_used(growing_cluster: str, tmp_path: Path) -> None:
    data, nodes = tmp_path / "data", tmp_path / "nodes"
    data.mkdir()
    nodes.mkdir()
    write_images(data)
    num_alive: list[int] = []

    def count_nodes(done: float, total: int) -> None:
        num_alive.append(sum(node["Alive"] for node in ray.nodes()))

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a node has processors
    try:
        convscope.scan(tiny(), data, tmp_path / "local", LAYERS, **SETTINGS)
        settings = {**SETTINGS, "workers": 2, "ray": growing_cluster, "progress": count_nodes}
        convscope.scan(tiny(), data, tmp_path / "cluster", LAYERS, **settings)
    finally:
        torch.set_num_threads(before)
    assert len(num_alive) == 3  # shards
    assert num_alive[0] >= 2, "the head alone has no processor"
    assert read_files(tmp_path / "cluster") == read_files(tmp_path / "local")
    make_task = partial(meet_on_two_nodes, nodes)
    assert len(list(ray_pool.map_unordered(make_task, range(4), address=growing_cluster, workers=2))) == 4
    assert len(list(nodes.iterdir())) == 2
