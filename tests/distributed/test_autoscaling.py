"""A scan on a cluster that begins with no node to work on: Ray's autoscaler adds them, and they are used."""

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
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

import convscope
from convscope.distributed import ray_pool
from tests.oracles.tiny import LAYERS, SETTINGS, read_files, tiny, write_images

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray", reason="the extra convscope[ray] is not installed")
FAKE = "ray.autoscaler._private.fake_multi_node.node_provider"
if importlib.util.find_spec(FAKE) is None:
    pytest.skip("this Ray cannot pretend to rent machines", allow_module_level=True)


def config(address: str) -> dict[str, object]:
    """What an autoscaler is told: up to two nodes of one processor each; they are started on this machine."""
    kinds = {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2},
    }
    provider = {"type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
             "rsync_filter")  # fmt: skip
    return {
        "cluster_name": "growing", "max_workers": 2, "provider": provider | {"launch_multiple": True},
        "available_node_types": {"ray.head.default": kinds["head"], "worker": kinds["worker"]},
        "head_node_type": "ray.head.default", "idle_timeout_minutes": 5, "upscaling_speed": 1.0,
        "auth": {"ssh_user": "nobody"}, "file_mounts": {}, "docker": {}, **{name: [] for name in lists},
    }  # fmt: skip


def late(signal: int, frame: object) -> None:
    raise TimeoutError("no node was added")


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head without processors. All its processes are of one group, and end with it."""
    monkeypatch.setattr(ray_pool, "LOOK_AGAIN", 0.5)
    folder = Path(mkdtemp(prefix="cs"))  # short: the names of sockets are made of it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "config.json").write_text(json.dumps(config(address)))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0",
               f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}", "--include-dashboard=false",
               f"--autoscaling-config={folder / 'config.json'}"]  # fmt: skip
    quick = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_worker_niceness": "0"}
    with (folder / "said").open("wb") as said:
        head = subprocess.Popen(
            command, env={**os.environ, **quick}, start_new_session=True, stdout=said, stderr=subprocess.STDOUT
        )
    try:
        signal.signal(signal.SIGALRM, late)
        signal.alarm(300)
        end = time.monotonic() + 120
        while b"Ray runtime started" not in (folder / "said").read_bytes():
            assert head.poll() is None, (folder / "said").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield address
    finally:
        signal.alarm(0)
        ray.shutdown()
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def waiting() -> Callable[[int], str]:
    """What does tasks: it takes a while, and tells on which node it was."""

    def do(task: int) -> str:
        time.sleep(0.5)
        return str(ray.get_runtime_context().get_node_id())

    return do


def test_nodes_are_added_while_a_scan_runs_and_are_used(growing: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_images(data)
    nodes: list[int] = []

    def look(done: float, total: int) -> None:
        nodes.append(sum(node["Alive"] for node in ray.nodes()))

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a node has
    try:
        convscope.scan(tiny(), data, tmp_path / "alone", LAYERS, **SETTINGS)
        given = {**SETTINGS, "workers": 2, "ray": growing, "progress": look}
        convscope.scan(tiny(), data, tmp_path / "grown", LAYERS, **given)
    finally:
        torch.set_num_threads(before)
    assert len(nodes) == 3  # shards
    assert nodes[0] >= 2, "the head alone has no processor"
    assert read_files(tmp_path / "grown") == read_files(tmp_path / "alone")
    assert len({node for _, node in ray_pool.map_unordered(waiting, range(60), address=growing, workers=2)}) == 2
