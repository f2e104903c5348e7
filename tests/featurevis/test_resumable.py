"""Layers drawn in parts: killed anywhere, taken up again, and the same bytes in the end."""

from __future__ import annotations

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


class Wide(nn.Module):
    """More units than a part holds; the spy notes each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.spy = Spy()
        self.narrow = nn.Conv2d(3, 4, 3)
        self.wide = nn.Conv2d(4, UNITS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.narrow(self.spy(x)).relu()).mean((2, 3))


def loaded(seed: int = 0) -> convscope.Model:
    model = convscope.load(randomized(Wide(), seed), preprocessing={"size": 16})
    passes(model)  # what `load` itself ran
    return model


def passes(model: convscope.Model) -> list[int]:
    """The batches that the network has seen; begun anew for whoever asks next."""
    spy = model.module.spy
    assert isinstance(spy, Spy)
    seen, spy.batches = spy.batches, []
    return seen


def same(found: Patterns, expected: Patterns) -> None:
    """Bit for bit, down to the notes and the settings."""
    assert found.arrays().keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        assert found.arrays()[name].dtype == array.dtype
        assert found.arrays()[name].tobytes() == array.tobytes(), name
    assert (found.notes, found.failed, found.parameters()) == (expected.notes, expected.failed, expected.parameters())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def drawn_parts(folder: Path) -> list[Path]:
    return sorted((folder / ".parts").glob("*.npz"))


def stopping(at: float) -> Callable[[float, int], None]:
    """A progress that is interrupted after so many parts."""

    def progress(done: float, total: int) -> None:
        if done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Patterns:
    """What nobody disturbed."""
    return run_resumable(loaded(), "wide", None, tmp_path_factory.mktemp("whole"), **OPTIONS)


# --- the same as in one go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [OPTIONS, {"recipe": "robust", "size": 16, "steps": 2, "frames": 2}, {"recipe": "maco", "size": 16, "steps": 2}],
    ids=["plain", "robust", "maco"],
)
def test_parts_are_what_patterns_draws_of_them(options: dict[str, Any], tmp_path: Path) -> None:
    model = loaded()
    found = run_resumable(model, "wide", None, tmp_path, **options)
    each = [convscope.patterns(model, "wide", part, **options) for part in PARTS]
    assert found.units.tolist() == list(range(UNITS))
    along = {"history": 1, "frames": 1}
    assert set(found.arrays()) == set(each[0].arrays())
    for name, array in found.arrays().items():
        expected = np.concatenate([part.arrays()[name] for part in each], axis=along.get(name, 0))
        assert array.tobytes() == expected.tobytes(), name
    assert found.notes == each[0].notes + each[1].notes + each[2].notes
    assert (found.steps, found.recipe, found.layer) == (options["steps"], options["recipe"], "wide")


def test_units_in_any_order_and_by_name(tmp_path: Path) -> None:
    model = convscope.load(randomized(Wide()), preprocessing={"size": 16}, classes=[f"kind {i}" for i in range(UNITS)])
    found = run_resumable(model, "logits", ["kind 69", 2, "kind 5"], tmp_path, **OPTIONS)
    assert found.units.tolist() == [69, 2, 5]
    assert found.images.tobytes() == convscope.patterns(model, "logits", [69, 2, 5], **OPTIONS).images.tobytes()


def test_progress_counts_parts_and_what_is_done_of_one(tmp_path: Path) -> None:
    told: list[tuple[float, int]] = []
    run_resumable(loaded(), "wide", None, tmp_path, progress=lambda done, total: told.append((done, total)), **OPTIONS)
    done = [d for d, _ in told]
    assert {total for _, total in told} == {3}
    assert done == sorted(done)
    assert [d for d in done if d == int(d)] == [1, 1, 2, 2, 3, 3]  # the last step of a part, and the part itself
    assert 0 < done[0] <= 0.25, "a quarter of the first part at most: it has four steps"


# --- killed, and taken up again --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "kept"), [(0.5, 0), (1, 0), (1.5, 1), (2.75, 2)])
def test_what_was_finished_is_not_drawn_again(at: float, kept: int, whole: Patterns, tmp_path: Path) -> None:
    """The very last step of part 1 comes before it is written, so an interruption there loses it."""
    model = loaded()
    with pytest.raises(KeyboardInterrupt):
        run_resumable(model, "wide", None, tmp_path, progress=stopping(at), **OPTIONS)
    assert len(drawn_parts(tmp_path)) == kept
    before = {p: p.stat().st_mtime_ns for p in drawn_parts(tmp_path)}
    passes(model)
    same(run_resumable(model, "wide", None, tmp_path, resume=True, **OPTIONS), whole)
    resumed = passes(model)
    for part in PARTS[kept:]:
        convscope.patterns(model, "wide", part, **OPTIONS)
    assert resumed == passes(model)
    assert len(resumed) >= (3 - kept) * 4
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert run_resumable(model, "wide", None, tmp_path, resume=True, **OPTIONS).scores.tolist() == whole.scores.tolist()
    assert passes(model) == [], "all parts are there: nothing runs"


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.featurevis.test_resumable import OPTIONS, loaded
from convscope.featurevis.resumable import run_resumable
def progress(done, total):
    if done >= 1.5:
        os.kill(os.getpid(), signal.SIGKILL)
torch.set_num_threads(int(sys.argv[2]))
run_resumable(loaded(), "wide", None, Path(sys.argv[1]), progress=progress, **OPTIONS)
"""


def test_a_process_that_was_killed(whole: Patterns, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second part: no handler, no clean-up."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(drawn_parts(tmp_path)) == 1
    model = loaded()
    same(run_resumable(model, "wide", None, tmp_path, resume=True, **OPTIONS), whole)
    expected = loaded()
    for part in PARTS[1:]:
        convscope.patterns(expected, "wide", part, **OPTIONS)
    assert passes(model) == passes(expected), "nothing of the first part runs"


def test_saved_files_are_the_same_bytes(whole: Patterns, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_resumable(loaded(), "wide", None, tmp_path / "b", progress=stopping(2.5), **OPTIONS)
    found = run_resumable(loaded(), "wide", None, tmp_path / "b", resume=True, **OPTIONS)
    found.save(tmp_path / "b")
    remove_parts(tmp_path / "b")
    whole.save(tmp_path / "a")
    one, other = files(tmp_path / "a"), files(tmp_path / "b")
    assert one.keys() == other.keys()
    assert len(one) == UNITS + 6  # a picture each; grid, sprites, units.csv, sprites.json, arrays.npz, manifest.json
    assert [name for name in one if one[name] != other[name]] == []


def test_without_resume_all_is_drawn_again(tmp_path: Path) -> None:
    model = loaded()
    run_resumable(model, "wide", None, tmp_path, **OPTIONS)
    first = passes(model)
    run_resumable(model, "wide", None, tmp_path, **OPTIONS)
    assert len(drawn_parts(tmp_path)) == 3
    assert passes(model) == first
    assert sum(first) > UNITS * 4


def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> int:
    """How many parts are drawn, in a folder that has all of them for OPTIONS, when something is changed."""
    calls: list[Any] = []
    true = resumable.patterns
    monkeypatch.setattr(resumable, "patterns", lambda *a, **k: calls.append(a[2]) or true(*a, **k))
    model = changed.pop("model", None) or loaded()
    options = {**OPTIONS, **changed}
    run_resumable(model, options.pop("layer", "wide"), options.pop("units", None), tmp_path, resume=True, **options)
    return len(calls)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    run_resumable(loaded(), "wide", None, tmp_path, **OPTIONS)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "drawn"),
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
        ({"units": range(69)}, 1),  # three parts of 23, of which two are there
    ],
    ids=str,
)
def test_other_settings_do_not_use_the_parts(
    changed: dict[str, Any], drawn: int, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counted(made, monkeypatch, **changed) == drawn


def test_other_weights_do_not_use_the_parts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted(made, monkeypatch, model=loaded(seed=1)) == 3
    net = loaded()
    with torch.no_grad():
        net.module.wide.bias[69] += 1e-3  # type: ignore[index, union-attr, operator]
    assert counted(made, monkeypatch, model=net) == 3
    other = convscope.load(randomized(Wide()), preprocessing={"size": 16, "mean": 0.5, "std": 0.5})
    assert counted(made, monkeypatch, model=other) == 3


def test_another_start_does_not_use_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers by what they are, files by what is in them, not by their names."""
    gray, model = np.full((12, 12, 3), 128.0), loaded()
    options = {"size": None, "units": [0, 1], "model": model}
    assert counted(tmp_path, monkeypatch, start=gray, **options) == 1
    assert counted(tmp_path, monkeypatch, start=gray.copy(), **options) == 0
    assert counted(tmp_path, monkeypatch, start=gray + 1, **options) == 1
    assert counted(tmp_path, monkeypatch, start=gray.reshape(6, 24, 3), **options) == 1, "the same numbers, not square"
    photo = torch.zeros((1, 3, 40, 40))
    assert counted(tmp_path, monkeypatch, start=photo, **options) == 1
    photo[0, 0, 20, 20] = 9  # in the middle, where a printed tensor shows nothing
    assert counted(tmp_path, monkeypatch, start=photo, **options) == 1
    file = tmp_path / "start.png"
    Image.new("RGB", (12, 12), (100, 90, 80)).save(file)
    assert counted(tmp_path, monkeypatch, start=str(file), **options) == 1
    assert counted(tmp_path, monkeypatch, start=str(file), **options) == 0
    Image.new("RGB", (12, 12), (100, 90, 81)).save(file)
    assert counted(tmp_path, monkeypatch, start=str(file), **options) == 1


def test_half_written_files_are_ignored(whole: Patterns, tmp_path: Path) -> None:
    """What a process that was killed while it wrote leaves behind: a temporary name and half the bytes."""
    model = loaded()
    run_resumable(model, "wide", None, tmp_path, **OPTIONS)
    victim = drawn_parts(tmp_path)[1]
    content = victim.read_bytes()
    victim.unlink()
    (victim.parent / f".{victim.name}.x8a7").write_bytes(content[: len(content) // 2])
    passes(model)
    same(run_resumable(model, "wide", None, tmp_path, resume=True, **OPTIONS), whole)
    resumed = passes(model)
    convscope.patterns(model, "wide", PARTS[1], **OPTIONS)
    assert resumed == passes(model), "one part is drawn"
    assert victim.stat().st_size == pytest.approx(len(content), abs=64)


def test_forget_removes_the_parts_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    run_resumable(loaded(), "wide", [0], tmp_path, **OPTIONS)
    assert len(drawn_parts(tmp_path)) == 1
    remove_parts(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    remove_parts(tmp_path / "never made")
    assert not (tmp_path / "never made").exists()


def test_a_part_that_a_power_cut_left_empty_is_drawn_again(tmp_path: Path) -> None:
    whole = run_resumable(loaded(), "wide", None, tmp_path, **OPTIONS)
    empty = drawn_parts(tmp_path)[1]
    content = empty.read_bytes()
    empty.write_bytes(b"")
    same(run_resumable(loaded(), "wide", None, tmp_path, resume=True, **OPTIONS), whole)
    assert empty.read_bytes() == content


def test_a_start_of_another_shape_is_another_start(tmp_path: Path) -> None:
    """The bytes of a picture 16 wide and 12 high and of one 12 wide and 16 high may be the same."""
    flat = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    options = {**OPTIONS, "recipe": "plain", "size": None}
    for start in (Image.fromarray(flat), Image.fromarray(flat.reshape(16, 12, 3))):
        found = run_resumable(loaded(), "wide", [0], tmp_path, resume=True, start=start, **options)
        fresh = convscope.patterns(loaded(), "wide", [0], start=start, **options)
        same(found, fresh)
        assert found.images.tobytes() == fresh.images.tobytes()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "units", "changed", "words"),
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
    layer: str, units: Any, changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConvscopeError) as refused:
        run_resumable(loaded(), layer, units, tmp_path / "out", **{**OPTIONS, **changed})
    assert words in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_as_a_whole_has_no_parts(tmp_path: Path) -> None:
    start = np.full((16, 16, 3), 100, np.uint8)
    with pytest.raises(ConvscopeError, match="recipe 'dream' is for layer 'wide' as a whole, which has no parts"):
        run_resumable(loaded(), "wide", None, tmp_path / "out", recipe="dream", start=start)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConvscopeError, match=r"cannot write into .*file: Not a directory"):
        run_resumable(loaded(), "wide", [0], tmp_path / "file", **OPTIONS)


# --- done before -----------------------------------------------------------------------------------------------------

ASKED: dict[str, Any] = {"recipe": "plain", "size": 12, "steps": 4, "seed": 3, "frames": 0, "start": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    convscope.patterns(loaded(), "wide", [1, 2], **OPTIONS).save(folder)
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
        ("wide", [1, 2], {"steps": None}, False),  # forty
        ("wide", [1, 2], {"size": 13}, False),
        ("wide", [1, 2], {"size": (12, 13)}, False),
        ("wide", [1, 2], {"size": None}, False),  # 150
        ("wide", [1, 2], {"frames": 4}, False),
    ],
    ids=str,
)
def test_is_done_only_for_the_same(layer: str, units: Any, changed: Any, expected: bool, saved: Path) -> None:
    assert is_done(saved, loaded(), layer, units, {**ASKED, **changed}) is expected


def test_is_done_for_defaults_that_were_saved_as_such(tmp_path: Path) -> None:
    model, asked = loaded(), {**ASKED, "size": None, "steps": None}
    convscope.patterns(model, "wide", [0], recipe="plain", seed=3).save(tmp_path)
    assert is_done(tmp_path, model, "wide", [0], asked) is True
    assert is_done(tmp_path, model, "wide", [0], {**asked, "size": 150, "steps": 40}) is True
    assert is_done(tmp_path, model, "wide", [0], {**asked, "size": 64}) is False


def test_is_done_tells_a_unit_from_the_whole_layer(tmp_path: Path) -> None:
    model, photo = loaded(), np.random.default_rng(0).uniform(0, 255, (16, 16, 3))
    asked = {**ASKED, "recipe": "dream", "size": None, "steps": 1, "start": photo}
    convscope.patterns(model, "wide", None, recipe="dream", steps=1, seed=3, start=photo).save(tmp_path)
    assert is_done(tmp_path, model, "wide", None, asked) is True
    assert is_done(tmp_path, model, "wide", [0], asked) is False


def test_is_done_not_for_another_network(saved: Path) -> None:
    assert is_done(saved, loaded(seed=1), "wide", [1, 2], ASKED) is False
    other = convscope.load(randomized(Wide()), preprocessing={"size": 16, "mean": 0.5, "std": 0.5})
    assert is_done(saved, other, "wide", [1, 2], ASKED) is False


def test_is_done_not_for_a_folder_that_was_not_finished(tmp_path: Path) -> None:
    model = loaded()
    assert is_done(tmp_path / "nothing", model, "wide", [1, 2], ASKED) is False
    convscope.patterns(model, "wide", [1, 2], **OPTIONS).save(tmp_path)
    assert is_done(tmp_path, model, "wide", [1, 2], ASKED) is True
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest[: len(manifest) // 2])
    assert is_done(tmp_path, model, "wide", [1, 2], ASKED) is False
    (tmp_path / "manifest.json").unlink()
    assert is_done(tmp_path, model, "wide", [1, 2], ASKED) is False
