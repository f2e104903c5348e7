"""Decoding ahead gives the same bits as in this process, and a harmful image costs itself only."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convscope.datasets.catalogue import Catalogue, build_catalogue
from convscope.errors import ConvscopeError
from convscope.images import decode_worker
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing
from convscope.scanning.decoding import WORKER_DIED, DecodedBatch, PrefetchingDecoder
from tests.oracles.poison import Poison, random_image

ROOT = Path(__file__).parents[2]
PREPROCESSING = Preprocessing(size=(10, 14), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))

_PREEXISTING: set[int] = set()  # child processes from before a test


def children() -> set[int]:
    """Living child processes that were started during the test."""
    pids = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            pids.add(int(stat.parent.name))
    return pids - _PREEXISTING


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """No test leaves a process or a thread behind."""
    _PREEXISTING.clear()
    _PREEXISTING.update(children())
    threads = set(threading.enumerate())
    yield
    assert children() == set()
    assert [thread for thread in threading.enumerate() if thread not in threads] == []


def ranges(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def decode(
    catalogue: Catalogue, plan: Sequence[Sequence[int]], size: int, preprocessing: Preprocessing = PREPROCESSING,
    **options: object,
) -> list[DecodedBatch]:  # fmt: skip
    with PrefetchingDecoder(catalogue, preprocessing, **options) as decoder:  # type: ignore[arg-type]
        return list(decoder.batches(plan, size))


def assert_same(a: Sequence[DecodedBatch], b: Sequence[DecodedBatch]) -> None:
    for one, two in zip(a, b, strict=True):
        assert one.indices == two.indices
        assert torch.equal(one.x, two.x)
        assert (one.failed, one.geometry) == (two.failed, two.geometry)
        assert np.array_equal(one.thumbnails, two.thumbnails)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of many kinds, some of which cannot be used."""
    folder = tmp_path_factory.mktemp("images")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    noise = random_image(1, (40, 30))
    Image.fromarray(random_image(0, (30, 50))).save(folder / "0.jpg", exif=rotated)
    Image.fromarray(noise[..., 0]).save(folder / "1.png")
    Image.fromarray(np.dstack([noise, noise[..., :1]])).save(folder / "2.png")  # with alpha
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "3.png")  # 16 bits, decoded to floats
    np.save(folder / "4.npy", noise / np.float32(255))
    Image.fromarray(random_image(5)).save(folder / "5.webp", lossless=True)
    (folder / "6.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-300])
    (folder / "7.png").write_bytes(b"")
    Image.fromarray(random_image(8, (300, 300))).save(folder / "8.png")  # more than max_pixels
    return sorted(folder.iterdir())


# The same bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("order", ["RGB", "BGR", "L"])
def test_x_equals_the_input_of_the_batch_loader_bit_for_bit(files: list[Path], fit: str, order: str) -> None:
    mean = (0.45,) if order == "L" else (104.0, 116.7, 122.7)
    std = tuple(m / 7 for m in mean)
    preprocessing = Preprocessing((10, 14), "bicubic", range=(-3, 250), mean=mean, std=std, channel_order=order)
    loader = ImageBatchLoader(files, preprocessing, fit=fit, max_pixels=50_000)
    expected = list(loader.batches(1))
    batches = decode(build_catalogue(files), ranges(9, 4), 4, preprocessing, fit=fit, max_pixels=50_000)
    x, usable = torch.cat([batch.x for batch in batches]), [batch.indices[0] for batch in expected]
    assert usable == [0, 1, 2, 3, 4, 5]
    assert torch.equal(x[usable], torch.cat([batch.x for batch in expected]))
    assert x.shape == (12, preprocessing.channels, 10, 14)
    assert not x[6:].any()
    assert all(batch.x.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    failures = [f"{files[i]}: {reason}" for batch in batches for i, reason in batch.failed.items()]
    assert failures == list(map(str, loader.failed))
    geometry = [geometry for batch in batches for geometry in batch.geometry]
    assert geometry == [*(batch.geometry[0] for batch in expected), None, None, None]


def test_arrays_for_a_network_with_other_channels() -> None:
    preprocessing = Preprocessing(size=(6, 5), mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(2.0,) * 5, channel_order="channels")
    arrays = [np.random.default_rng(i).random((8, 8, 5)).astype(np.float32) for i in range(3)]
    (batch,) = decode(build_catalogue(arrays), [range(3)], 3, preprocessing)
    assert torch.equal(batch.x, torch.cat([b.x for b in ImageBatchLoader(arrays, preprocessing).batches(3)]))


@pytest.mark.slow
def test_workers_change_neither_values_nor_reasons_nor_order(files: list[Path]) -> None:
    rotated = files[0].parent.parent / "rotated.tif"
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(random_image(2, (9, 20))).save(rotated, exif=exif)
    in_memory = [
        Image.open(files[0]),
        random_image(3),
        files[1].read_bytes(),
        files[6].read_bytes(),
        random_image(4)[..., :2],
        Image.open(files[6]),
        Image.open(rotated),
    ]
    plans: list[list[Sequence[int]]] = [[(8, 0, 5), (), (6,), (2, 1, 7, 4), (3,)], [(6, 5, 4, 3), (2, 1, 0)]]
    for workers, data, plan in zip((2, 1), (files, in_memory), plans, strict=True):
        catalogue = build_catalogue(data)
        expected = decode(catalogue, plan, 4, max_pixels=50_000)
        assert [batch.indices for batch in expected] == [tuple(part) for part in plan]
        assert sum(len(batch.failed) for batch in expected) == 3
        assert_same(decode(catalogue, plan, 4, max_pixels=50_000, workers=workers), expected)
    assert expected[0].geometry[0] == Geometry.whole((20, 9))  # upright: its tag was not lost on the way


def test_thumbnails_are_the_networks_input_squashed(files: list[Path]) -> None:
    data = [*files[:6], files[7], np.full((9, 9, 3), (200, 30, 7), np.uint8)]
    (batch,) = decode(build_catalogue(data), [range(8)], 8)
    assert batch.thumbnails.shape == (8, 96, 96, 3)
    assert batch.thumbnails.dtype == np.uint8
    assert (batch.thumbnails[6] == 255).all()
    assert (batch.thumbnails[7] == (200, 30, 7)).all()
    pixels = PREPROCESSING.denormalize(batch.x).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    for row in range(6):
        expected = Image.fromarray(pixels[row]).resize((96, 96), Image.Resampling.BILINEAR)
        assert np.array_equal(batch.thumbnails[row], np.asarray(expected))


# Harmful images -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_harmful_image_costs_itself_only(tmp_path: Path) -> None:
    acts = {2: "segfault", 8: "hang", 11: "raise", 13: "return None"}
    catalogue = build_catalogue(Poison(20, acts | {15: "exit once", 17: "print"}, tmp_path))
    start = time.monotonic()
    batches = decode(catalogue, ranges(20, 6), 6, workers=2, timeout=2)
    assert time.monotonic() - start < 100
    failed = {i: reason for batch in batches for i, reason in batch.failed.items()}
    assert "NoneType is no" in failed.pop(13)
    assert failed == {
        2: WORKER_DIED,
        8: "took longer than 2 s",
        11: r"cannot be read (RuntimeError: no\nluck)",
    }
    x = torch.cat([batch.x for batch in batches])
    usable = [i for i in range(20) if i not in acts]
    expected = ImageBatchLoader([random_image(i) for i in usable], PREPROCESSING).batches(50)
    assert torch.equal(x[usable], torch.cat([batch.x for batch in expected]))


@pytest.mark.slow
def test_a_file_in_memory_that_ends_its_worker_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "_PROGRAM", _ABORT_ON_POISON)
    png = (ROOT / "src/convscope/samples/cat.png").read_bytes()
    (batch,) = decode(build_catalogue([png, b"poison"]), [range(2)], 2, workers=1)
    assert batch.failed == {1: WORKER_DIED}
    assert torch.equal(
        batch.x[:1], next(ImageBatchLoader([ROOT / "src/convscope/samples/cat.png"], PREPROCESSING).batches(1)).x
    )


_ABORT_ON_POISON = """
import os, sys
sys.path[:] = {path!r}
from convscope.images import decode_worker
decode = decode_worker.NetworkInputTask.decode
def decode_or_abort(self, index, content=None):
    return os.abort() if content == b"poison" else decode(self, index, content)
decode_worker.NetworkInputTask.decode = decode_or_abort
decode_worker.serve()
"""


# Prefetching ----------------------------------------------------------------------------------------------------------


def wait_until_stable(count: Callable[[], int]) -> int:
    """Return a number once it has stopped growing."""
    before, quiet = -1, 0
    while quiet < 10:
        now = count()
        before, quiet = now, quiet + 1 if now == before and now else 0
        time.sleep(0.05)
    return before


@pytest.mark.slow
def test_a_bounded_number_of_batches_is_decoded_ahead_and_a_closed_generator_can_be_followed(tmp_path: Path) -> None:
    taken: list[int] = []
    plan = (taken.append(part.start) or part for part in ranges(60, 3))  # type: ignore[func-returns-value]
    with PrefetchingDecoder(build_catalogue(Poison(60, {}, tmp_path)), PREPROCESSING, workers=1) as decoder:
        batches = decoder.batches(plan, 3)
        next(batches)
        reads = wait_until_stable(lambda: len(list(tmp_path.iterdir())))
        assert len(taken) == 3
        assert reads == 9
        wait_time = decoder.wait_time
        next(batches)
        assert decoder.wait_time - wait_time < 0.5  # the batch was ready
        batches.close()
        (batch,) = decoder.batches([[7]], 1)
        assert torch.equal(batch.x, next(ImageBatchLoader(random_image(7), PREPROCESSING).batches(1)).x)
        assert len(children()) == 1


def test_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    decode_image = decode_worker.NetworkInputTask.decode

    def slow(task: decode_worker.NetworkInputTask, index: int) -> decode_worker.Reply:
        time.sleep(0.1)
        return decode_image(task, index)

    monkeypatch.setattr(decode_worker.NetworkInputTask, "decode", slow)
    with PrefetchingDecoder(build_catalogue([random_image(0)]), PREPROCESSING) as decoder:
        for _ in decoder.batches([[0], [0]], 1):
            time.sleep(0.2)
    assert 0.2 <= decoder.wait_time < 0.4


# Shutdown -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_process_is_left_if_the_consumer_fails() -> None:
    started: set[int] = set()

    def consume(decoder: PrefetchingDecoder) -> None:
        with decoder:
            next(decoder.batches(ranges(40, 4), 4))
            started.update(children())
            raise KeyboardInterrupt

    decoder = PrefetchingDecoder(build_catalogue(Poison(40, {9: "hang"})), PREPROCESSING, workers=1)
    with pytest.raises(KeyboardInterrupt):
        consume(decoder)
    assert len(started) == 1
    with pytest.raises(ConvscopeError, match="is closed"):
        next(decoder.batches([[0]], 1))


SCRIPT = """
import os, signal
from convscope.images.preprocessing import Preprocessing
from convscope.datasets.catalogue import build_catalogue
from convscope.scanning.decoding import PrefetchingDecoder
from tests.oracles.poison import Poison

try:
    with PrefetchingDecoder(build_catalogue(Poison(10 ** 6, {{}})), Preprocessing(size=(8, 8)), workers=1) as decoder:
        for batch in decoder.batches(([i] for i in range(10 ** 6)), 1):
            print(decoder.workers[0].pid, flush=True)
            if batch.indices[0] >= {interrupt_at}:
                os.killpg(0, signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def run_script(interrupt_at: int) -> subprocess.Popen[str]:
    """Start a program without an `if __name__ == "__main__"`, as users write them."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    command = [sys.executable, "-c", SCRIPT.format(interrupt_at=interrupt_at)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True, **pipes)


def has_ended(pid: int) -> bool:
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_workers_end_with_their_parent_and_scripts_need_no_guard() -> None:
    """One script interrupts its whole process group, as Ctrl-C does, and ends by itself; the other one is killed."""
    with run_script(interrupt_at=2) as interrupted, run_script(interrupt_at=10**6) as killed:
        assert killed.stdout is not None
        worker = int(killed.stdout.readline())
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate(timeout=100)
        assert has_ended(worker)
        out, err = interrupted.communicate(timeout=100)
    assert out.split()[-1] == "interrupted"
    assert err == ""  # no traceback of the worker
    assert has_ended(int(out.split()[0]))


# Errors ---------------------------------------------------------------------------------------------------------------


def test_data_sets_that_cannot_be_pickled_are_refused() -> None:
    data = Poison(3, {})
    data.transform = lambda x: x  # type: ignore[attr-defined]
    with pytest.raises(ConvscopeError, match=r"cannot be sent to worker processes .*workers=0"):
        PrefetchingDecoder(build_catalogue(data), PREPROCESSING, workers=1)
    assert len(decode(build_catalogue(data), [range(3)], 3)) == 1


@pytest.mark.slow
def test_data_sets_of_classes_that_workers_cannot_import_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("not_a_file")
    module.Local = type("Local", (Poison,), {"__module__": "not_a_file"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "not_a_file", module)
    catalogue = build_catalogue(module.Local(3, {}))
    assert pickle.loads(pickle.dumps(catalogue)).names == catalogue.names
    with pytest.raises(ConvscopeError, match=r"cannot be sent to worker .*ModuleNotFoundError.*workers=0"):
        decode(catalogue, [range(3)], 3, workers=1)


def test_workers_that_cannot_be_started_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "_PROGRAM", "raise SystemExit(1)")
    with pytest.raises(ConvscopeError, match="cannot be started; workers=0"):
        decode(build_catalogue(Poison(30, {})), ranges(30, 5), 5, workers=2)


def test_invalid_options_are_refused() -> None:
    catalogue = build_catalogue([random_image(0), random_image(1)])
    five_channels = Preprocessing(size=(5,), mean=(0,), std=(1,), channel_order="channels")
    for options, message in (
        ({"workers": -1}, "workers is -1"),
        ({"workers": True}, "workers is True"),
        ({"timeout": 0}, "timeout is 0"),
        ({"fit": "stretch"}, "fit is 'stretch'"),
        ({"max_pixels": 0}, "max_pixels is 0"),
        ({"preprocessing": five_channels}, "floating tensors"),
    ):
        with pytest.raises(ConvscopeError, match=message):
            decode(catalogue, [[0]], 1, **options)
    with pytest.raises(ConvscopeError, match="2 images are planned for a batch of 1"):
        decode(catalogue, [[0, 1]], 1)
    (batch,) = decode(catalogue, [[0, 2]], 2)
    assert batch.failed == {2: "image 2 is out of range: there are 2, from 0 on"}
