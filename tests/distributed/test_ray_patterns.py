"""`convscope patterns` into a store, in this process and on Ray: the same bytes, whatever is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import convscope
from convscope.cli import app
from convscope.distributed import ray_pool
from convscope.featurevis import resumable
from tests.oracles.tiny import LAYERS, SETTINGS, Tiny, read_files, tiny, write_images

NUM_UNITS = {"first": 4, "last": 6, "logits": 3}
KEYWORDS: dict[str, Any] = {"recipe": "plain", "size": 24, "steps": 3, "seed": 2}
OPTIONS = [
    *("--recipe", "plain", "--size", "24", "--steps", "3", "--seed", "2"),
    *("--preprocessing", '{"size": 24, "mean": 0.5, "std": 0.25}'),
]
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without patterns."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("scanned") / "store"
    write_images(data)
    convscope.scan(tiny(), data, out, LAYERS, **SETTINGS)
    return out


@pytest.fixture
def store(scanned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scanned, tmp_path / "store"))


@pytest.fixture(autouse=True, scope="module")
def _small_parts() -> Iterator[None]:
    """Two units a part, so that layers have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "UNITS_PER_PART", 2)
        yield


def run_patterns(out: Path, *arguments: str, model: str = "tests.oracles.tiny:Tiny") -> Result:
    command = ["patterns", model, "--layers", "all", "--units", "all", "-o", str(out), "--resume", *OPTIONS]
    return CliRunner().invoke(app, [*command, *arguments])


@pytest.fixture(scope="module")
def with_patterns(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store with the patterns of an undisturbed run."""
    out = Path(shutil.copytree(scanned, tmp_path_factory.mktemp("with_patterns") / "store"))
    result = run_patterns(out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def reference(with_patterns: Path) -> dict[str, bytes]:
    return read_files(with_patterns)


def test_unit_pages_have_the_patterns_of_the_python_call(scanned: Path, with_patterns: Path) -> None:
    """All layers are those of the store; the files of the scan stay as they were."""
    assert convscope.open_store(scanned).unit("last", 0).pattern() is None
    store = convscope.open_store(with_patterns)
    assert sorted(p.name for p in (with_patterns / "patterns").iterdir()) == sorted(NUM_UNITS)
    for layer, count in NUM_UNITS.items():
        parts = [range(1), range(1, 3)] if layer == "logits" else [range(i, i + 2) for i in range(0, count, 2)]
        for part in parts:
            expected = convscope.patterns(tiny(), layer, part, **KEYWORDS).images
            for unit, image in zip(part, expected, strict=True):
                pattern = store.unit(layer, unit).pattern()
                assert pattern is not None
                assert np.asarray(pattern).tobytes() == image.tobytes(), (layer, unit)
    before, after = read_files(scanned), read_files(with_patterns)
    assert {name: after[name] for name in before} == before


def test_patterns_in_a_store_are_saved_like_those_in_a_folder(reference: dict[str, bytes], tmp_path: Path) -> None:
    for layer in NUM_UNITS:
        arguments = ["--layers", layer, "--units", "all", "-o", str(tmp_path / layer), *OPTIONS]
        assert CliRunner().invoke(app, ["patterns", "tests.oracles.tiny:Tiny", *arguments]).exit_code == 0
        files = read_files(tmp_path / layer)
        assert len(files) == NUM_UNITS[layer] + 6  # grid, sheets, their two tables, arrays, the manifest
        assert {name: reference[f"patterns/{layer}/{name}"] for name in files} == files


def test_patterns_of_a_remote_store_can_be_read(with_patterns: Path, reference: dict[str, bytes]) -> None:
    memory = fsspec.filesystem("memory")
    for name, content in reference.items():
        memory.pipe_file(f"/with_patterns/store/{name}", content)
    locations = (with_patterns, "memory://with_patterns/store")
    local, remote = (convscope.open_store(location).unit("last", 3).pattern() for location in locations)
    assert local is not None
    assert remote is not None
    assert local.tobytes() == remote.tobytes()


def test_finished_patterns_are_not_computed_again(with_patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in with_patterns.rglob("*")}

    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("no pattern was to be computed")

    monkeypatch.setattr(resumable, "patterns", fail)
    result = run_patterns(with_patterns)
    assert result.exit_code == 0, result.output
    assert f"already done, skipped: {', '.join(NUM_UNITS)}" in result.output
    assert {path: path.stat().st_mtime_ns for path in with_patterns.rglob("*")} == before


def other_weights() -> torch.nn.Module:
    """Make the same network, trained a little further."""
    network = Tiny()
    with torch.no_grad():
        network.fc.bias += 1e-3
    return network


def test_a_store_of_other_weights_is_refused(scanned: Path) -> None:
    before = read_files(scanned)
    result = run_patterns(scanned, model="tests.distributed.test_ray_patterns:other_weights")
    assert result.exit_code != 0
    assert "with other weights than this model" in f"{result.output}{result.exception}"
    assert read_files(scanned) == before


def test_a_store_that_is_not_finished_is_refused(store: Path) -> None:
    (store / "manifest.json").unlink()
    result = run_patterns(store)
    assert result.exit_code != 0
    assert "the scan is not finished" in f"{result.output}{result.exception}"
    assert not (store / "patterns").exists()


SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    import torch
    torch.set_num_threads({threads})
    from convscope.featurevis import resumable
    from tests.distributed.test_ray_patterns import run_patterns
    resumable.UNITS_PER_PART, patterns, layers = 2, resumable.patterns, []
    def patterns_or_die(model, layer, units, **options):
        layers.append(layer)
        if layers.count("last") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return patterns(model, layer, units, **options)
    resumable.patterns = patterns_or_die
    run_patterns(Path({out!r}))
"""


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_in_the_same_bytes(
    store: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed during the second of the second layer's three parts."""
    script = textwrap.dedent(SCRIPT.format(root=ROOT, threads=torch.get_num_threads(), out=str(store)))
    process = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert (store / "patterns" / "first" / "manifest.json").exists()
    assert len(list((store / "patterns" / "last" / ".parts").iterdir())) == 1
    assert convscope.open_store(store).unit("last", 0).pattern() is None
    calls: list[tuple[str, list[int]]] = []
    patterns = resumable.patterns

    def record_call(model: Any, layer: str, units: Any, **options: Any) -> Any:
        calls.append((layer, list(units)))
        return patterns(model, layer, units, **options)

    monkeypatch.setattr(resumable, "patterns", record_call)
    assert run_patterns(store).exit_code == 0
    assert calls == [("last", [2, 3]), ("last", [4, 5]), ("logits", [0]), ("logits", [1, 2])]
    assert read_files(store) == reference


# On Ray ---------------------------------------------------------------------------------------------------------------


class KillsItsActor(Tiny):
    """Kills the process that it runs in, once, if that is not the one that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.owner, self.flag = os.getpid(), os.environ.get("CONVSCOPE_TEST_KILL", "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.owner and Path(self.flag).exists():
            Path(self.flag).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def test_actors_have_as_many_threads_as_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last bits depend on the number, so that parts of another number are not reused."""
    threads: list[tuple[int, int]] = []

    def map_in_this_process(make_task: Any, tasks: Any, *, address: str, cpus: int, gpus: int) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(before + 3)
        run = make_task()
        threads.append((cpus, torch.get_num_threads()))
        torch.set_num_threads(before)
        return [(task, run(task)) for task in tasks]

    monkeypatch.setattr(ray_pool, "map_unordered", map_in_this_process)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            resumable.run_resumable(tiny(), "first", [0], tmp_path, ray="local", resume=True, **KEYWORDS)
    finally:
        torch.set_num_threads(before)
    assert threads == [(1, 1), (2, 2)], "the third call reuses the part of the first"


@pytest.mark.slow
def test_a_local_cluster_that_loses_a_worker_gives_the_same_bytes(
    store: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra convscope[ray] is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    flag = tmp_path / "flag"
    flag.touch()
    monkeypatch.setenv("CONVSCOPE_TEST_KILL", str(flag))
    name = "tests.distributed.test_ray_patterns:KillsItsActor"
    result = run_patterns(store, "--ray", "local", model=name)
    assert result.exit_code == 0, result.output
    assert not flag.exists()
    assert not ray.is_initialized()
    files = read_files(store)
    as_tiny = {path: content.replace(name.encode(), b"tests.oracles.tiny:Tiny") for path, content in files.items()}
    assert as_tiny == reference
