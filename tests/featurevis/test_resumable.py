"""Patterns in parts: interrupted anywhere, resumed, with the same bytes in the end."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.featurevis import resumable
from convscope.featurevis.result import Patterns
from convscope.featurevis.resumable import is_done, remove_parts, run_resumable
from tests.oracles.nets import Spy, randomized

UNITS = 70  # three parts: 23, 23 and 24
PARTS = [range(23), range(23, 46), range(46, 70)]
OPTIONS: dict[str, Any] = {"recipe": "plain", "size": 12, "steps": 4, "seed": 3}


class SpiedNet(nn.Module):
    """More units than fit into a part; the spy records the batch size of each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.spy = Spy()
        self.narrow = nn.Conv2d(3, 4, 3)
        self.wide = nn.Conv2d(4, UNITS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.narrow(self.spy(x)).relu()).mean((2, 3))


def load_model(seed: int = 0) -> convscope.Model:
    model = convscope.load(randomized(SpiedNet(), seed), preprocessing={"size": 16})
    passes(model)  # discard the passes of `load`
    return model


def passes(model: convscope.Model) -> list[int]:
    """Return the sizes of the batches since the last call."""
    spy = model.module.spy
    assert isinstance(spy, Spy)
    batches, spy.batches = spy.batches, []
    return batches


def assert_same(result: Patterns, expected: Patterns) -> None:
    """Assert identical arrays, notes, failures and settings."""
    assert result.arrays().keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        assert result.arrays()[name].dtype == array.dtype
        assert result.arrays()[name].tobytes() == array.tobytes(), name
    assert (result.notes, result.failed, result.parameters()) == (
        expected.notes,
        expected.failed,
        expected.parameters(),
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def saved_parts(folder: Path) -> list[Path]:
    return sorted((folder / ".parts").glob("*.npz"))


def interrupt_at(at: float) -> Callable[[float, int], None]:
    """Return a progress function that raises KeyboardInterrupt after `at` parts."""

    def progress(done: float, total: int) -> None:
        if done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Patterns:
    """Return the result of an uninterrupted run."""
    return run_resumable(load_model(), "wide", None, tmp_path_factory.mktemp("whole"), **OPTIONS)


# --- uninterrupted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [OPTIONS, {"recipe": "robust", "size": 16, "steps": 2, "frames": 2}, {"recipe": "maco", "size": 16, "steps": 2}],
    ids=["plain", "robust", "maco"],
)
def test_parts_equal_separate_calls(options: dict[str, Any], tmp_path: Path) -> None:
    model = load_model()
    result = run_resumable(model, "wide", None, tmp_path, **options)
    separate = [convscope.patterns(model, "wide", part, **options) for part in PARTS]
    assert result.units.tolist() == list(range(UNITS))
    unit_axes = {"history": 1, "frames": 1}
    assert set(result.arrays()) == set(separate[0].arrays())
    for name, array in result.arrays().items():
        expected = np.concatenate([part.arrays()[name] for part in separate], axis=unit_axes.get(name, 0))
        assert array.tobytes() == expected.tobytes(), name
    assert result.notes == separate[0].notes + separate[1].notes + separate[2].notes
    assert (result.steps, result.recipe, result.layer) == (options["steps"], options["recipe"], "wide")


def test_units_in_any_order_and_by_name(tmp_path: Path) -> None:
    model = convscope.load(
        randomized(SpiedNet()), preprocessing={"size": 16}, classes=[f"kind {i}" for i in range(UNITS)]
    )
    result = run_resumable(model, "logits", ["kind 69", 2, "kind 5"], tmp_path, **OPTIONS)
    assert result.units.tolist() == [69, 2, 5]
    assert result.images.tobytes() == convscope.patterns(model, "logits", [69, 2, 5], **OPTIONS).images.tobytes()


def test_progress_counts_parts_with_fractions(tmp_path: Path) -> None:
    progress_calls: list[tuple[float, int]] = []
    run_resumable(
        load_model(),
        "wide",
        None,
        tmp_path,
        progress=lambda done, total: progress_calls.append((done, total)),
        **OPTIONS,
    )
    done = [d for d, _ in progress_calls]
    assert {total for _, total in progress_calls} == {3}
    assert done == sorted(done)
    assert [d for d in done if d == int(d)] == [1, 1, 2, 2, 3, 3]  # the last step of a part, and the saved part
    assert 0 < done[0] <= 0.25, "a part has four steps"


# --- interrupted and resumed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "num_saved"), [(0.5, 0), (1, 0), (1.5, 1), (2.75, 2)])
def test_saved_parts_are_skipped(at: float, num_saved: int, uninterrupted: Patterns, tmp_path: Path) -> None:
    """The last step of a part comes before it is saved, so an interruption there loses the part."""
    model = load_model()
    with pytest.raises(KeyboardInterrupt):
        run_resumable(model, "wide", None, tmp_path, progress=interrupt_at(at), **OPTIONS)
    assert len(saved_parts(tmp_path)) == num_saved
    before = {p: p.stat().st_mtime_ns for p in saved_parts(tmp_path)}
    passes(model)
    assert_same(run_resumable(model, "wide", None, tmp_path, resume=True, **OPTIONS), uninterrupted)
    resumed = passes(model)
    for part in PARTS[num_saved:]:
        convscope.patterns(model, "wide", part, **OPTIONS)
    assert resumed == passes(model)
    assert len(resumed) >= (3 - num_saved) * 4
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (
        run_resumable(model, "wide", None, tmp_path, resume=True, **OPTIONS).scores.tolist()
        == uninterrupted.scores.tolist()
    )
    assert passes(model) == [], "all parts are saved: nothing runs"


KILLED_SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from tests.featurevis.test_resumable import OPTIONS, load_model
from convscope.featurevis.resumable import run_resumable
def progress(done, total):
    if done >= 1.5:
        os.kill(os.getpid(), signal.SIGKILL)
torch.set_num_threads(int(sys.argv[2]))
run_resumable(load_model(), "wide", None, Path(sys.argv[1]), progress=progress, **OPTIONS)
"""


@pytest.mark.slow
def test_resume_after_sigkill(uninterrupted: Patterns, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second part."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED_SCRIPT, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(saved_parts(tmp_path)) == 1
    model = load_model()
    assert_same(run_resumable(model, "wide", None, tmp_path, resume=True, **OPTIONS), uninterrupted)
    expected = load_model()
    for part in PARTS[1:]:
        convscope.patterns(expected, "wide", part, **OPTIONS)
    assert passes(model) == passes(expected), "nothing of the first part runs"


def test_saved_files_are_the_same_bytes(uninterrupted: Patterns, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_resumable(load_model(), "wide", None, tmp_path / "b", progress=interrupt_at(2.5), **OPTIONS)
    result = run_resumable(load_model(), "wide", None, tmp_path / "b", resume=True, **OPTIONS)
    result.save(tmp_path / "b")
    remove_parts(tmp_path / "b")
    uninterrupted.save(tmp_path / "a")
    files_a, files_b = files(tmp_path / "a"), files(tmp_path / "b")
    assert files_a.keys() == files_b.keys()
    assert len(files_a) == UNITS + 6  # images; grid, sprites, units.csv, sprites.json, arrays.npz, manifest.json
    assert [name for name in files_a if files_a[name] != files_b[name]] == []


def test_all_parts_run_without_resume(tmp_path: Path) -> None:
    model = load_model()
    run_resumable(model, "wide", None, tmp_path, **OPTIONS)
    first = passes(model)
    run_resumable(model, "wide", None, tmp_path, **OPTIONS)
    assert len(saved_parts(tmp_path)) == 3
    assert passes(model) == first
    assert sum(first) > UNITS * 4


def count_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> int:
    """Return how many parts run in a folder that has all parts for OPTIONS, with changed settings."""
    calls: list[Any] = []
    original = resumable.patterns
    monkeypatch.setattr(resumable, "patterns", lambda *a, **k: calls.append(a[2]) or original(*a, **k))
    model = changed.pop("model", None) or load_model()
    options = {**OPTIONS, **changed}
    run_resumable(model, options.pop("layer", "wide"), options.pop("units", None), tmp_path, resume=True, **options)
    return len(calls)


@pytest.fixture(scope="module")
def all_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all parts for OPTIONS; not to be changed."""
    folder = tmp_path_factory.mktemp("parts")
    run_resumable(load_model(), "wide", None, folder, **OPTIONS)
    return folder


@pytest.fixture
def complete_folder(all_parts: Path, tmp_path: Path) -> Path:
    """Return a copy of a folder with all parts for OPTIONS."""
    shutil.copytree(all_parts, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "num_run"),
    [
        ({}, 0),
        ({"seed": 4}, 3),
        ({"steps": 3}, 3),
        ({"size": 13}, 3),
        ({"recipe": "robust"}, 3),
        ({"step_size": 2.0}, 3),
        ({"space": "input"}, 3),
        ({"patience": 2}, 3),
        ({"frames": 1}, 3),
        ({"layer": "logits"}, 3),
        ({"units": range(23)}, 0),
        ({"units": range(22)}, 1),
        ({"units": range(69)}, 1),  # three parts of 23, two of which are saved
    ],
    ids=str,
)
def test_parts_of_other_settings_are_not_used(
    changed: dict[str, Any], num_run: int, complete_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count_runs(complete_folder, monkeypatch, **changed) == num_run


def test_parts_of_other_weights_are_not_used(complete_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_runs(complete_folder, monkeypatch, model=load_model(seed=1)) == 3
    changed_model = load_model()
    with torch.no_grad():
        changed_model.module.wide.bias[69] += 1e-3  # type: ignore[index, union-attr, operator]
    assert count_runs(complete_folder, monkeypatch, model=changed_model) == 3
    other_model = convscope.load(randomized(SpiedNet()), preprocessing={"size": 16, "mean": 0.5, "std": 0.5})
    assert count_runs(complete_folder, monkeypatch, model=other_model) == 3


def test_parts_of_another_start_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays and files are compared by their content."""
    gray, model = np.full((12, 12, 3), 128.0), load_model()
    options = {"size": None, "units": [0, 1], "model": model}
    assert count_runs(tmp_path, monkeypatch, start=gray, **options) == 1
    assert count_runs(tmp_path, monkeypatch, start=gray.copy(), **options) == 0
    assert count_runs(tmp_path, monkeypatch, start=gray + 1, **options) == 1
    assert count_runs(tmp_path, monkeypatch, start=gray.reshape(6, 24, 3), **options) == 1, (
        "the same numbers, another shape"
    )
    start_tensor = torch.zeros((1, 3, 40, 40))
    assert count_runs(tmp_path, monkeypatch, start=start_tensor, **options) == 1
    start_tensor[0, 0, 20, 20] = 9  # in the middle, which a tensor's repr omits
    assert count_runs(tmp_path, monkeypatch, start=start_tensor, **options) == 1
    file = tmp_path / "start.png"
    Image.new("RGB", (12, 12), (100, 90, 80)).save(file)
    assert count_runs(tmp_path, monkeypatch, start=str(file), **options) == 1
    assert count_runs(tmp_path, monkeypatch, start=str(file), **options) == 0
    Image.new("RGB", (12, 12), (100, 90, 81)).save(file)
    assert count_runs(tmp_path, monkeypatch, start=str(file), **options) == 1


def test_partially_written_files_are_ignored(uninterrupted: Patterns, tmp_path: Path) -> None:
    """A process that is killed while writing leaves a temporary file with part of the content."""
    model = load_model()
    run_resumable(model, "wide", None, tmp_path, **OPTIONS)
    removed = saved_parts(tmp_path)[1]
    content = removed.read_bytes()
    removed.unlink()
    (removed.parent / f".{removed.name}.x8a7").write_bytes(content[: len(content) // 2])
    passes(model)
    assert_same(run_resumable(model, "wide", None, tmp_path, resume=True, **OPTIONS), uninterrupted)
    resumed = passes(model)
    convscope.patterns(model, "wide", PARTS[1], **OPTIONS)
    assert resumed == passes(model), "one part runs"
    assert removed.stat().st_size == pytest.approx(len(content), abs=64)


def test_remove_parts_removes_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other")
    run_resumable(load_model(), "wide", [0], tmp_path, **OPTIONS)
    assert len(saved_parts(tmp_path)) == 1
    remove_parts(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["other.txt"]
    remove_parts(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_empty_part_is_replaced(tmp_path: Path) -> None:
    uninterrupted = run_resumable(load_model(), "wide", None, tmp_path, **OPTIONS)
    emptied = saved_parts(tmp_path)[1]
    content = emptied.read_bytes()
    emptied.write_bytes(b"")
    assert_same(run_resumable(load_model(), "wide", None, tmp_path, resume=True, **OPTIONS), uninterrupted)
    assert emptied.read_bytes() == content


def test_start_of_another_shape_with_the_same_bytes(tmp_path: Path) -> None:
    """Images of 16 x 12 and 12 x 16 pixels may have the same bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    options = {**OPTIONS, "recipe": "plain", "size": None}
    for start in (Image.fromarray(pixels), Image.fromarray(pixels.reshape(16, 12, 3))):
        result = run_resumable(load_model(), "wide", [0], tmp_path, resume=True, start=start, **options)
        direct = convscope.patterns(load_model(), "wide", [0], start=start, **options)
        assert_same(result, direct)
        assert result.images.tobytes() == direct.images.tobytes()


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "units", "changed", "message"),
    [
        ("wide", [0, 70], {}, "unit 70 is not in layer 'wide', which has 70 units, 0 to 69"),
        ("wider", None, {}, "layer 'wider' is not in this model; nearest: wide"),
        ("wide", [], {}, "no units were given"),
        ("wide", None, {"recipe": "robuste"}, "recipe 'robuste' is not known; nearest: robust"),
        ("wide", None, {"size": 2}, "the network does not run on images of 2 x 2"),
        ("wide", None, {"steps": -1}, "steps is -1; expected a whole number, 0 or more"),
    ],
)
def test_nothing_is_written_when_refused(
    layer: str, units: Any, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConvscopeError) as raised:
        run_resumable(load_model(), layer, units, tmp_path / "out", **{**OPTIONS, **changed})
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_layer_as_a_whole_is_refused(tmp_path: Path) -> None:
    start = np.full((16, 16, 3), 100, np.uint8)
    with pytest.raises(ConvscopeError, match="recipe 'dream' is for layer 'wide' as a whole, which has no parts"):
        run_resumable(load_model(), "wide", None, tmp_path / "out", recipe="dream", start=start)


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConvscopeError, match=r"cannot write into .*file: Not a directory"):
        run_resumable(load_model(), "wide", [0], tmp_path / "file", **OPTIONS)


# --- is_done ---------------------------------------------------------------------------------------------------------

IS_DONE_OPTIONS: dict[str, Any] = {"recipe": "plain", "size": 12, "steps": 4, "seed": 3, "frames": 0, "start": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    convscope.patterns(load_model(), "wide", [1, 2], **OPTIONS).save(folder)
    return folder


@pytest.mark.parametrize(
    ("layer", "units", "changed", "expected"),
    [
        ("wide", [1, 2], {}, True),
        ("wide", [1, 2], {"size": (12, 12)}, True),
        ("wide", [1], {}, False),
        ("wide", [2, 1], {}, False),
        ("wide", None, {}, False),
        ("narrow", [1, 2], {}, False),
        ("logits", [1, 2], {}, False),
        ("wide", [1, 2], {"recipe": "robust"}, False),
        ("wide", [1, 2], {"seed": 4}, False),
        ("wide", [1, 2], {"steps": 5}, False),
        ("wide", [1, 2], {"steps": None}, False),  # the default is 40
        ("wide", [1, 2], {"size": 13}, False),
        ("wide", [1, 2], {"size": (12, 13)}, False),
        ("wide", [1, 2], {"size": None}, False),  # the default is 150
        ("wide", [1, 2], {"frames": 4}, False),
    ],
    ids=str,
)
def test_is_done_compares_all_settings(layer: str, units: Any, changed: Any, expected: bool, saved: Path) -> None:
    assert is_done(saved, load_model(), layer, units, {**IS_DONE_OPTIONS, **changed}) is expected


def test_is_done_with_default_settings(tmp_path: Path) -> None:
    model, done_options = load_model(), {**IS_DONE_OPTIONS, "size": None, "steps": None}
    convscope.patterns(model, "narrow", [0], recipe="plain", seed=3).save(tmp_path)
    assert is_done(tmp_path, model, "narrow", [0], done_options) is True
    assert is_done(tmp_path, model, "narrow", [0], {**done_options, "size": 150, "steps": 40}) is True
    assert is_done(tmp_path, model, "narrow", [0], {**done_options, "size": 64}) is False


def test_is_done_distinguishes_a_unit_from_the_whole_layer(tmp_path: Path) -> None:
    model, start_tensor = load_model(), np.random.default_rng(0).uniform(0, 255, (16, 16, 3))
    options = {**IS_DONE_OPTIONS, "recipe": "dream", "size": None, "steps": 1, "start": start_tensor}
    convscope.patterns(model, "wide", None, recipe="dream", steps=1, seed=3, start=start_tensor).save(tmp_path)
    assert is_done(tmp_path, model, "wide", None, options) is True
    assert is_done(tmp_path, model, "wide", [0], options) is False


def test_is_done_is_false_for_another_model(saved: Path) -> None:
    assert is_done(saved, load_model(seed=1), "wide", [1, 2], IS_DONE_OPTIONS) is False
    other_model = convscope.load(randomized(SpiedNet()), preprocessing={"size": 16, "mean": 0.5, "std": 0.5})
    assert is_done(saved, other_model, "wide", [1, 2], IS_DONE_OPTIONS) is False


def test_is_done_is_false_for_an_incomplete_folder(tmp_path: Path) -> None:
    model = load_model()
    assert is_done(tmp_path / "nothing", model, "wide", [1, 2], IS_DONE_OPTIONS) is False
    convscope.patterns(model, "wide", [1, 2], **OPTIONS).save(tmp_path)
    assert is_done(tmp_path, model, "wide", [1, 2], IS_DONE_OPTIONS) is True
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest[: len(manifest) // 2])
    assert is_done(tmp_path, model, "wide", [1, 2], IS_DONE_OPTIONS) is False
    (tmp_path / "manifest.json").unlink()
    assert is_done(tmp_path, model, "wide", [1, 2], IS_DONE_OPTIONS) is False
