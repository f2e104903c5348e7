"""Ctrl-C ends long calls within a second, and a scan that was interrupted resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convscope import samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals are sent to a group of processes"),
]

MAX_LATENCY = 2.0  # seconds: one, and what a loaded machine adds

CHILD = """
import json, sys, threading, time
import convscope
from convscope.scanning.plan import choose_shard_size

model = convscope.load("lite0")
photos = convscope.samples.photographs()
data, out = sys.argv[1:]
small, shard_size = {"shard": 16, "batch": 8}, choose_shard_size(384, 8, 16)
CALLS = {
    "activations": lambda p: convscope.activations(model, photos * 100, "blocks.4", progress=p),
    "predict": lambda p: convscope.predict(model, photos * 500, progress=p),
    "heatmaps": lambda p: convscope.heatmaps(model, photos * 200, progress=p),
    "rise": lambda p: convscope.heatmaps(model, photos[0], method="rise", samples=10**5, progress=p),
    "patterns": lambda p: convscope.patterns(model, "blocks.4", range(16), steps=10**5, progress=p),
    "story": lambda p: convscope.story(model, progress=p),
    "evaluate": lambda p: convscope.evaluate(model, photos[0], heatmap, steps=5000, progress=p),
    "compare": lambda p: convscope.compare(model, photos * 50, progress=p),
    "concepts": lambda p: convscope.concepts(model, photos * 20, 387, only_predicted=False, progress=p),
    "atlas": lambda p: convscope.atlas(
        model, photos, grid=2, positions_per_image=49, steps=10**5, reducer=lambda v: v[:, :2], progress=p
    ),
    "scan with workers": lambda p: convscope.scan(model, data, out, "blocks.0", workers=2, progress=p, **small),
    "scan": lambda p: convscope.scan(model, data, out, "blocks.0", workers=0, progress=p, **small),
}
heatmap = convscope.heatmaps(model, photos[0])

def ready(done, total):
    if not ready.told and done > (shard_size if name.startswith("scan") else 0):  # after the first shard
        ready.told = True
        print(json.dumps({"ready": name}), flush=True)

for name, call in CALLS.items():
    ready.told = False
    try:
        call(ready)
        print(json.dumps({"finished": name}), flush=True)
    except KeyboardInterrupt:
        now, threads = time.time(), [t.name for t in threading.enumerate() if t.name.startswith("convscope")]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
        print(json.dumps({"interrupted": name, "time": now, "threads": threads, "hooks": hooks}), flush=True)
"""


def read(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the process ended early"
    message: dict[str, Any] = json.loads(line)
    return message


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    """Interrupt every call as a terminal does; return how each ended, and the folder of the scan."""
    folder = tmp_path_factory.mktemp("interrupt")
    data, out = folder / "data", folder / "store"
    data.mkdir()
    for i in range(384):
        shutil.copy(samples.photographs()[0], data / f"{i}.png")
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(data), str(out)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    results: dict[str, dict[str, Any]] = {}
    try:
        while process.poll() is None and len(results) < CHILD.count("lambda p:"):
            name = read(process)["ready"]
            time.sleep(0.3)
            sent = time.time()
            os.killpg(process.pid, signal.SIGINT)
            result = read(process)
            results[name] = {**result, "latency": result.get("time", sent) - sent}
    finally:
        process.kill()
        process.wait()
    return results, out


def test_every_call_ends_soon_and_leaves_nothing_behind(outcomes: tuple[dict[str, dict[str, Any]], Path]) -> None:
    results, _ = outcomes
    assert len(results) == 12
    for name, result in results.items():
        assert result.get("interrupted") == name
        assert result["latency"] < MAX_LATENCY, name
        assert (result["threads"], result["hooks"]) == ([], 0), name


def test_the_shards_of_an_interrupted_scan_are_kept(outcomes: tuple[dict[str, dict[str, Any]], Path]) -> None:
    _, out = outcomes
    assert list((out / "shards").iterdir())
    assert not (out / "manifest.json").exists()
