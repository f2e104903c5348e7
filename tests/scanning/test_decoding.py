"""Decoding ahead: the same bits as in this process, and whatever a picture does costs that picture alone."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convscope.datasets.catalogue import Catalogue, catalogue
from convscope.errors import ConvscopeError
from convscope.images import decode_worker
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing
from convscope.scanning.decoding import ENDED, Decoded, Decoder
from tests.oracles.poison import Poison, picture

ROOT = Path(__file__).parents[2]
LIKE = Preprocessing(size=(10, 14), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


OTHERS: set[int] = set()  # processes that were there before a test


@pytest.fixture(autouse=True)
def _others() -> None:
    OTHERS.clear()
    OTHERS.update(children())


def children() -> set[int]:
    """This process's own processes that are alive, without those that other tests have left."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found - OTHERS


@pytest.fixture(autouse=True)
def _nothing_left():
    """No test leaves a process or a thread behind."""
    before, threads = children(), set(threading.enumerate())
    yield
    assert children() <= before
    assert [thread for thread in threading.enumerate() if thread not in threads] == []


def ranges(count: int, size: int) -> list[range]:
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]


def decoded(found: Catalogue, plan: Sequence[Sequence[int]], size: int, **options: object) -> list[Decoded]:
    with Decoder(found, options.pop("like", LIKE), **options) as decoder:  # type: ignore[arg-type]
        return list(decoder.batches(plan, size))


def same(a: Sequence[Decoded], b: Sequence[Decoded]) -> bool:
    return len(a) == len(b) and all(
        one.indices == two.indices
        and torch.equal(one.x, two.x)
        and (one.failed, one.geometry) == (two.failed, two.geometry)
        and np.array_equal(one.thumbnails, two.thumbnails)
        for one, two in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of many kinds, some of which cannot be used."""
    folder = tmp_path_factory.mktemp("pictures")
    turned = Image.Exif()
    turned[0x0112] = 6
    grain = picture(1, (40, 30))
    Image.fromarray(picture(0, (30, 50))).save(folder / "0.jpg", exif=turned)
    Image.fromarray(grain[..., 0]).save(folder / "1.png")
    Image.fromarray(np.dstack([grain, grain[..., :1]])).save(folder / "2.png")  # with alpha
    Image.fromarray(grain[..., 0].astype(np.uint16) * 257).save(folder / "3.png")  # 16 bits: floats inside
    np.save(folder / "4.npy", grain / np.float32(255))
    Image.fromarray(picture(5)).save(folder / "5.webp", lossless=True)
    (folder / "6.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-300])
    (folder / "7.png").write_bytes(b"")
    Image.fromarray(picture(8, (300, 300))).save(folder / "8.png")  # more than max_pixels
    return sorted(folder.iterdir())


# The same bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("order", ["RGB", "BGR", "L"])
def test_x_is_what_pictures_give_bit_for_bit(files: list[Path], fit: str, order: str) -> None:
    mean = (0.45,) if order == "L" else (104.0, 116.7, 122.7)
    std = tuple(m / 7 for m in mean)
    like = Preprocessing((10, 14), "bicubic", range=(-3, 250), mean=mean, std=std, channel_order=order)
    pictures = ImageBatchLoader(files, like, fit=fit, max_pixels=50_000)
    theirs = list(pictures.batches(1))
    ours = decoded(catalogue(files), ranges(9, 4), 4, like=like, fit=fit, max_pixels=50_000)
    x, good = torch.cat([batch.x for batch in ours]), [batch.indices[0] for batch in theirs]
    assert good == [0, 1, 2, 3, 4, 5]
    assert torch.equal(x[good], torch.cat([batch.x for batch in theirs]))
    assert x.shape == (12, like.channels, 10, 14)
    assert not x[6:].any()
    assert all(batch.x.is_contiguous(memory_format=torch.channels_last) for batch in ours)
    assert [f"{files[i]}: {why}" for batch in ours for i, why in batch.failed.items()] == list(
        map(str, pictures.failed)
    )
    places = [place for batch in ours for place in batch.geometry]
    assert places == [*(batch.geometry[0] for batch in theirs), None, None, None]


def test_arrays_for_a_network_with_other_channels() -> None:
    like = Preprocessing(size=(6, 5), mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(2.0,) * 5, channel_order="channels")
    arrays = [np.random.default_rng(i).random((8, 8, 5)).astype(np.float32) for i in range(3)]
    (batch,) = decoded(catalogue(arrays), [range(3)], 3, like=like)
    assert torch.equal(batch.x, torch.cat([b.x for b in ImageBatchLoader(arrays, like).batches(3)]))


def test_processes_change_nothing_not_even_reasons_and_order_is_the_plans(files: list[Path]) -> None:
    hand = [
        Image.open(files[0]),
        picture(3),
        files[1].read_bytes(),
        files[6].read_bytes(),
        picture(4)[..., :2],
        Image.open(files[6]),
    ]
    tagged = files[0].parent.parent / "turned.tif"
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(picture(2, (9, 20))).save(tagged, exif=exif)
    hand.append(Image.open(tagged))
    plans: list[list[Sequence[int]]] = [[(8, 0, 5), (), (6,), (2, 1, 7, 4), (3,)], [(6, 5, 4, 3), (2, 1, 0)]]
    for workers, data, plan in zip((3, 1), (files, hand), plans, strict=True):
        found = catalogue(data)
        alone = decoded(found, plan, 4, max_pixels=50_000)
        assert [batch.indices for batch in alone] == [tuple(part) for part in plan]
        assert sum(len(batch.failed) for batch in alone) == 3
        assert same(decoded(found, plan, 4, max_pixels=50_000, workers=workers), alone)
    assert alone[0].geometry[0] == Geometry.whole((20, 9))  # turned upright: its tag was not lost on the way


def test_thumbnails_are_the_networks_input_squashed(files: list[Path]) -> None:
    (batch,) = decoded(catalogue([*files[:6], files[7], np.full((9, 9, 3), (200, 30, 7), np.uint8)]), [range(8)], 8)
    assert batch.thumbnails.shape == (8, 96, 96, 3)
    assert batch.thumbnails.dtype == np.uint8
    assert (batch.thumbnails[6] == 255).all()
    assert (batch.thumbnails[7] == (200, 30, 7)).all()
    seen = LIKE.denormalize(batch.x).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    for row in range(6):
        expected = Image.fromarray(seen[row]).resize((96, 96), Image.Resampling.BILINEAR)
        assert np.array_equal(batch.thumbnails[row], np.asarray(expected))


# What pictures do -----------------------------------------------------------------------------------------------------


def test_what_a_picture_does_costs_that_picture_alone(tmp_path: Path) -> None:
    acts = {2: "exit", 5: "segfault", 8: "hang", 9: "hang", 11: "raise", 13: "nothing"}
    found = catalogue(Poison(20, acts | {15: "once", 17: "print"}, tmp_path))
    began = time.monotonic()
    batches = decoded(found, ranges(20, 6), 6, workers=2, timeout=3)
    assert time.monotonic() - began < 100
    assert {i: why for batch in batches for i, why in batch.failed.items()} == {
        **dict.fromkeys((2, 5), ENDED),
        **dict.fromkeys((8, 9), "took longer than 3 s"),
        11: r"cannot be read (RuntimeError: no\nluck)",
        13: batches[2].failed[13],
    }
    assert "NoneType is no picture" in batches[2].failed[13]
    x = torch.cat([batch.x for batch in batches])
    good = [i for i in range(20) if i not in acts]
    assert torch.equal(
        x[good], torch.cat([b.x for b in ImageBatchLoader([picture(i) for i in good], LIKE).batches(50)])
    )


def test_bytes_in_hand_that_end_their_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "_PROGRAM", _KILLED_BY_A_FILE)
    png = (ROOT / "src/convscope/samples/cat.png").read_bytes()
    (batch,) = decoded(catalogue([png, b"poison", png]), [range(3)], 3, workers=1)
    assert batch.failed == {1: ENDED}
    assert torch.equal(batch.x[0], batch.x[2])


_KILLED_BY_A_FILE = """
import os, sys
sys.path[:] = {path!r}
from convscope.images import decode_worker as worker
usual = worker.Preparation.show
worker.Preparation.show = lambda self, index, item=None: os.abort() if item == b"poison" else usual(self, index, item)
worker.serve()
"""

# Ahead, but not far ---------------------------------------------------------------------------------------------------


def settled(count: Callable[[], int]) -> int:
    """A number once it has stopped growing."""
    before, quiet = -1, 0
    while quiet < 10:
        now = count()
        before, quiet = now, quiet + 1 if now == before and now else 0
        time.sleep(0.1)
    return before


def test_a_bounded_number_of_batches_is_decoded_ahead(tmp_path: Path) -> None:
    taken: list[int] = []
    plan = (taken.append(part.start) or part for part in ranges(60, 3))  # type: ignore[func-returns-value]
    with Decoder(catalogue(Poison(60, {}, tmp_path)), LIKE, workers=2) as decoder:
        batches = decoder.batches(plan, 3)
        next(batches)
        read = settled(lambda: len(list(tmp_path.iterdir())))
        assert len(taken) == 4
        assert read == 12
        waited = decoder.waited
        next(batches)
        assert decoder.waited - waited < 0.5  # it was there
        batches.close()


def test_waiting_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = catalogue([picture(0)])
    with Decoder(found, LIKE) as decoder:
        real = decoder._here.decode
        monkeypatch.setattr(decoder._here, "show", lambda index: (time.sleep(0.2), real(index))[1])
        for _ in decoder.batches([[0], [0]], 1):
            time.sleep(0.3)
    assert 0.4 <= decoder.waited < 0.6


# Ends -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_nothing_is_left_when_the_consumer_fails(error: type[BaseException]) -> None:
    started: set[int] = set()

    def consume(decoder: Decoder) -> None:
        with decoder:
            next(decoder.batches(ranges(40, 4), 4))
            started.update(children())
            raise error

    decoder = Decoder(catalogue(Poison(40, {9: "hang"})), LIKE, workers=2)
    with pytest.raises(error):
        consume(decoder)
    assert len(started) == 2
    with pytest.raises(ConvscopeError, match="is closed"):
        next(decoder.batches([[0]], 1))


def test_a_generator_that_is_left_can_be_followed_by_another() -> None:
    with Decoder(catalogue(Poison(40, {})), LIKE, workers=1) as decoder:
        first = decoder.batches(ranges(40, 4), 4)
        next(first)
        first.close()
        (batch,) = decoder.batches([[7]], 1)
        assert torch.equal(batch.x, next(ImageBatchLoader(picture(7), LIKE).batches(1)).x)
        assert len(children()) == 1


SCRIPT = """
import sys
from convscope.images.preprocessing import Preprocessing
from convscope.images import decode_worker as worker
from convscope.datasets.catalogue import catalogue
from convscope.scanning.decoding import Decoder
from tests.oracles.poison import Poison

with Decoder(catalogue(Poison(10 ** 6, {acts})), Preprocessing(size=(8, 8)), workers=1) as decoder:
    for batch in decoder.batches(([i] for i in range({count})), 1):
        worker = decoder._workers[0]._process.pid
        print(worker, flush=True)
print("end")
"""


def script(acts: str, count: int) -> subprocess.Popen[str]:
    """A program without an `if __name__ == "__main__"`, as users write them."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    call = [sys.executable, "-c", SCRIPT.format(acts=acts, count=count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(call, env={**os.environ, "PYTHONPATH": path}, start_new_session=True, **pipes)


def gone(pid: int) -> bool:
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_script_needs_no_guard_and_leaves_nothing() -> None:
    with script("{}", 3) as program:
        out, err = program.communicate(timeout=100)
    assert out.split()[3:] == ["end"]
    assert err == ""
    assert gone(int(out.split()[0]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(number: signal.Signals) -> None:
    with script("{}", 10**6) as program:
        assert program.stdout is not None
        child = int(program.stdout.readline())
        os.killpg(program.pid, number) if number == signal.SIGINT else os.kill(program.pid, number)
        _, err = program.communicate(timeout=100)
    assert gone(child)
    assert err.count("Traceback") == (number == signal.SIGINT)  # that of the program, none of the worker


# Refused --------------------------------------------------------------------------------------------------------------


def test_data_sets_that_cannot_leave_this_process() -> None:
    local = Poison(3, {})
    local.transform = lambda x: x  # type: ignore[attr-defined]
    with pytest.raises(ConvscopeError, match=r"cannot be handed to processes .*workers=0"):
        Decoder(catalogue(local), LIKE, workers=1)
    assert len(decoded(catalogue(local), [range(3)], 3)) == 1


def test_data_sets_of_classes_that_exist_only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("nowhere_else")
    module.Local = type("Local", (Poison,), {"__module__": "nowhere_else"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nowhere_else", module)
    found = catalogue(module.Local(3, {}))
    assert pickle.loads(pickle.dumps(found)).names == found.names
    with pytest.raises(ConvscopeError, match=r"cannot be handed .*ModuleNotFoundError.*workers=0"):
        decoded(found, [range(3)], 3, workers=2)


def test_processes_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "_PROGRAM", "raise SystemExit(1)")
    with pytest.raises(ConvscopeError, match="cannot be started; workers=0"):
        decoded(catalogue(Poison(30, {})), ranges(30, 5), 5, workers=2)


def test_what_makes_no_sense_is_refused() -> None:
    found = catalogue([picture(0), picture(1)])
    for options, words in (
        ({"workers": -1}, "workers is -1"),
        ({"workers": True}, "workers is True"),
        ({"timeout": 0}, "timeout is 0"),
        ({"fit": "stretch"}, "fit is 'stretch'"),
        ({"max_pixels": 0}, "max_pixels is 0"),
        ({"like": Preprocessing(size=(5,), mean=(0,), std=(1,), channel_order="channels")}, "floating tensors"),
    ):
        with pytest.raises(ConvscopeError, match=words):
            decoded(found, [[0]], 1, **options)
    with pytest.raises(ConvscopeError, match="2 pictures are planned for a batch of 1"):
        decoded(found, [[0, 1]], 1)
    (batch,) = decoded(found, [[0, 2]], 2)
    assert batch.failed == {2: "picture 2 is out of range: there are 2, from 0 on"}
