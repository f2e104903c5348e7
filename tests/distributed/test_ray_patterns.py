"""`convscope patterns` into a store, and on Ray: the pictures that unit pages show, whatever is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
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

UNITS = {"first": 4, "last": 6, "logits": 3}
HOW: dict[str, Any] = {"recipe": "plain", "size": 24, "steps": 3, "seed": 2}
TOLD = ["--recipe", "plain", "--size", "24", "--steps", "3", "--seed", "2"]
PREPARED = ["--preprocessing", '{"size": 24, "mean": 0.5, "std": 0.25}']
TESTS = str(Path(__file__).parents[2])


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


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two units a part, so that layers have several."""
    monkeypatch.setattr(resumable, "UNITS_PER_PART", 2)


def draw(out: Path, *more: str, model: str = "tests.oracles.tiny:Tiny") -> Result:
    given = ["patterns", model, "--layers", "all", "--units", "all", "-o", str(out), "--resume", *TOLD, *PREPARED]
    return CliRunner().invoke(app, [*given, *more])


@pytest.fixture(scope="module")
def whole(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store with the patterns of an undisturbed run."""
    out = Path(shutil.copytree(scanned, tmp_path_factory.mktemp("whole") / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "UNITS_PER_PART", 2)
        assert draw(out).exit_code == 0
    return read_files(out)


def test_unit_pages_show_what_patterns_draws(scanned: Path, store: Path) -> None:
    """All layers are those of the store; what was scanned stays as it was."""
    assert convscope.open_store(store).unit("last", 0).pattern() is None
    result = draw(store)
    assert result.exit_code == 0, result.output
    opened = convscope.open_store(store)
    assert sorted(p.name for p in (store / "patterns").iterdir()) == sorted(UNITS)
    for layer, count in UNITS.items():
        for begin in range(0, count, 2):
            part = range(begin, min(begin + 2, count))
            if layer == "logits":
                part = [range(1), range(1, 3)][begin // 2]  # as three units are cut
            expected = convscope.patterns(tiny(), layer, part, **HOW).images
            for unit, picture in zip(part, expected, strict=True):
                shown = opened.unit(layer, unit).pattern()
                assert shown is not None
                assert np.asarray(shown).tobytes() == picture.tobytes(), (layer, unit)
    before, after = read_files(scanned), read_files(store)
    assert {name: after[name] for name in before} == before


def test_in_a_store_as_alone(whole: dict[str, bytes], tmp_path: Path) -> None:
    for layer in UNITS:
        given = ["--layers", layer, "--units", "all", "-o", str(tmp_path / layer), *TOLD, *PREPARED]
        assert CliRunner().invoke(app, ["patterns", "tests.oracles.tiny:Tiny", *given]).exit_code == 0
        alone = read_files(tmp_path / layer)
        assert len(alone) == UNITS[layer] + 6  # grid, sprites, their two tables, arrays, the manifest
        assert {name: whole[f"patterns/{layer}/{name}"] for name in alone} == alone


def test_patterns_of_a_store_at_an_address_are_shown(store: Path) -> None:
    assert draw(store).exit_code == 0
    memory = fsspec.filesystem("memory")
    for name, content in read_files(store).items():
        memory.pipe_file(f"/drawn/store/{name}", content)
    here, there = (convscope.open_store(where).unit("last", 3).pattern() for where in (store, "memory://drawn/store"))
    assert here is not None
    assert there is not None
    assert here.tobytes() == there.tobytes()


def test_what_is_done_is_not_drawn_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(store).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}

    def never(*given: Any, **options: Any) -> Any:
        raise AssertionError("nothing was to be drawn")

    monkeypatch.setattr(resumable, "patterns", never)
    again = draw(store)
    assert again.exit_code == 0, again.output
    assert [f"{layer}: done before" in again.output for layer in UNITS] == [True] * 3
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def other() -> torch.nn.Module:
    """The same network, a little further trained."""
    network = Tiny()
    with torch.no_grad():
        network.fc.bias += 1e-3
    return network


def test_a_store_of_other_weights_is_refused(scanned: Path) -> None:
    before = read_files(scanned)
    result = draw(scanned, model="test_scan_patterns:other")
    assert result.exit_code != 0
    assert "with other weights than this model" in f"{result.output}{result.exception}"
    assert read_files(scanned) == before


def test_a_store_that_is_not_finished_is_refused(store: Path) -> None:
    (store / "manifest.json").unlink()
    result = draw(store)
    assert result.exit_code != 0
    assert "no finished scan" in f"{result.output}{result.exception}"
    assert not (store / "patterns").exists()


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads({threads})
    import tests.distributed.test_ray_patterns as here
    from convscope.featurevis import resumable as unattended
    unattended.UNITS_PER_PART, plain, calls = 2, unattended.patterns, []
    def dying(model, layer, units, **options):
        calls.append(layer)
        if calls.count("last") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(model, layer, units, **options)
    unattended.patterns = dying
    from pathlib import Path
    here.draw(Path({out!r}))
"""


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    store: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 over the second of the second layer's three parts."""
    script = textwrap.dedent(KILLED.format(tests=TESTS, threads=torch.get_num_threads(), out=str(store)))
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert (store / "patterns" / "first" / "manifest.json").exists()
    assert len(list((store / "patterns" / "last" / ".parts").iterdir())) == 1
    assert convscope.open_store(store).unit("last", 0).pattern() is None
    drawn: list[tuple[str, list[int]]] = []
    plain = resumable.patterns

    def noted(model: Any, layer: str, units: Any, **options: Any) -> Any:
        drawn.append((layer, list(units)))
        return plain(model, layer, units, **options)

    monkeypatch.setattr(resumable, "patterns", noted)
    assert draw(store).exit_code == 0
    assert drawn == [("last", [2, 3]), ("last", [4, 5]), ("logits", [0]), ("logits", [1, 2])]
    assert read_files(store) == whole


# --- on Ray ----------------------------------------------------------------------------------------------------------


class Deadly(Tiny):
    """Kills the process that it runs in, once, if that is not the one that made it and a file lies where it looks."""

    def __init__(self) -> None:
        super().__init__()
        self.owner, self.flag = os.getpid(), os.environ.get("DEADLY", "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.owner and Path(self.flag).exists():
            Path(self.flag).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def test_actors_have_as_many_threads_as_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last bits depend on it, and a part of another number is none of these."""
    asked: list[tuple[int, int]] = []

    def here(make: Any, tasks: Any, *, address: str, cpus: int, gpus: int) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(before + 3)
        do = make()
        asked.append((cpus, torch.get_num_threads()))
        torch.set_num_threads(before)
        return [(task, do(task)) for task in tasks]

    monkeypatch.setattr(ray_pool, "map_unordered", here)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            resumable.run_resumable(tiny(), "first", [0], tmp_path, ray="local", resume=True, **HOW)
    finally:
        torch.set_num_threads(before)
    assert asked == [(1, 1), (2, 2)], "the third finds the first one's"


@pytest.mark.parametrize("model", ["tests.oracles.tiny:Tiny", "tests.distributed.test_ray_patterns:Deadly"])
def test_ray_draws_the_same_bytes(
    model: str, store: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a worker is killed in the middle: it is started again."""
    pytest.importorskip("ray", reason="the extra convscope[ray] is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    flag = tmp_path / "flag"
    flag.touch()
    monkeypatch.setenv("DEADLY", str(flag))
    result = draw(store, "--ray", "local", model=model)
    assert result.exit_code == 0, result.output
    assert flag.exists() == (model == "tests.oracles.tiny:Tiny")
    found = read_files(store)
    if model == "tests.distributed.test_ray_patterns:Deadly":  # another name in the manifests
        found, whole = ({k: v for k, v in one.items() if "manifest" not in k} for one in (found, whole))
    assert found == whole
