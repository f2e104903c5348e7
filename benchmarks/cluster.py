"""Speed-up over the nodes of a Ray cluster, with simulated work: tasks that take time but no CPU.

python benchmarks/cluster.py [--nodes 1 2 4] [--seconds 0.5] [--each 40]

Every node is a process group on this machine (ray.cluster_utils.Cluster) with room for one actor. The time is measured
from when all actors have returned a result to when no tasks are left: neither the start nor the tail is included.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
from ray.cluster_utils import Cluster

from convscope.distributed.ray_pool import map_unordered


def sleeping(seconds: float) -> Callable[[], Callable[[int], int]]:
    """Return tasks that sleep and return the number of the process."""

    def make() -> Callable[[int], int]:
        def do(task: int) -> int:
            time.sleep(seconds)
            return os.getpid()

        return do

    return make


def steady(nodes: int, tasks: int, seconds: float) -> float:
    """Return the results per second of so many nodes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        actors, times = set[int](), list[float]()
        for _, actor in map_unordered(sleeping(seconds), range(tasks), address=cluster.address):
            actors.add(actor)
            if len(actors) == nodes:
                times.append(time.perf_counter())
    finally:
        ray.shutdown()
        cluster.shutdown()
    counted = times[: len(times) - nodes]
    return (len(counted) - 1) / (counted[-1] - counted[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=0.5, help="what a task takes")
    parser.add_argument("--each", type=int, default=40, help="tasks for each node")
    given = parser.parse_args()
    write = sys.stdout.write
    write("| nodes | results a second | to one node | of what they could give |\n| --- | --- | --- | --- |\n")
    first = None
    for nodes in given.nodes:
        rate = steady(nodes, given.each * nodes, given.seconds)
        first = rate / nodes if first is None else first
        write(f"| {nodes} | {rate:.2f} | {rate / first:.2f} | {rate * given.seconds / nodes:.0%} |\n")


if __name__ == "__main__":
    main()
