"""A pass over a data set: the store says what plain loops say, and nothing that happens on the way changes a byte."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.images.loading import ImageBatchLoader
from convscope.scanning import api
from convscope.scanning.plan import ScanPlan, shard_size
from tests.oracles.tiny import LAYERS, SETTINGS, files, tiny, write_pictures


@pytest.fixture
def model() -> convscope.Model:
    return tiny()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "store"
    convscope.scan(tiny(), data, out, LAYERS, **SETTINGS)
    return out


def test_the_store_says_what_plain_loops_say(model: convscope.Model, data: Path, whole: Path) -> None:
    pictures = sorted(str(p) for p in data.rglob("*.png"))
    ids = {name: i for i, name in enumerate(pictures)}
    given = ImageBatchLoader(pictures, model.preprocessing)
    good, inputs = [], []
    for batch in given.batches(8):
        good += batch.indices
        inputs.append(batch.x)
    x = torch.cat(inputs)
    net = model.module
    with torch.no_grad():
        first = net.first(x)
        last = net.last(first.relu())
        logits = net.fc(last.relu().mean((2, 3)))
    store = convscope.open_store(whole)
    assert store.layers == [*LAYERS, "logits"]
    assert store.manifest["failed"] == 2
    rows = pq.read_table(whole / "topk.parquet").to_pylist()
    for name, maps in (("first", first), ("last", last), ("logits", logits[:, :, None, None])):
        units = [row for row in pq.read_table(whole / "units.parquet").to_pylist() if row["layer"] == name]
        assert len(units) == maps.shape[1]
        for unit, row in enumerate(units):
            values = maps[:, unit].double()
            assert row["mean"] == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-6)
            assert row["variance"] == pytest.approx(values.var(correction=0).item(), rel=1e-4)
            assert row["maximum"] == pytest.approx(values.max().item(), rel=1e-5)
            assert row["minimum"] == pytest.approx(values.min().item(), rel=1e-5)
            assert row["active"] == pytest.approx((values > 0).double().mean().item(), abs=1e-4)
            for kind, sign in (("top", 1), ("bottom", -1)):
                signed = (sign * values).flatten(1)
                order = sorted(range(len(good)), key=lambda i: (-signed[i].max().item(), good[i]))[:7]
                found = [r for r in rows if (r["layer"], r["unit"], r["kind"]) == (name, unit, kind)]
                assert [r["image"] for r in found] == [good[i] for i in order]
                width = maps.shape[3]
                places = [int(signed[i].argmax()) for i in order]
                assert [r["row"] * width + r["column"] for r in found] == places
                expected = [sign * signed[i].max().item() for i in order]
                assert [r["value"] for r in found] == pytest.approx(expected, rel=1e-5)
    table = pq.read_table(whole / "images.parquet").to_pylist()
    shares = logits.softmax(1)
    for position, picture in enumerate(good):
        row = table[picture]
        assert Path(row["name"]) == Path(pictures[picture])
        assert row["classes"] == shares[position].argsort(descending=True, stable=True).tolist()
        assert row["probabilities"] == pytest.approx(sorted(shares[position].tolist(), reverse=True), rel=1e-4)
        label = store.labels[row["label"]]
        assert label == Path(row["name"]).parent.name
        if label == "quince":  # no class of the network
            assert row["loss"] is None
        else:
            target = model.classes.index(label)
            assert row["loss"] == pytest.approx(-shares[position, target].log().item(), rel=1e-4)
    failed = [row["image"] for row in table if row["failed"]]
    assert failed == sorted(ids[str(data / name)] for name in ("apple/060.png", "bread/100.png"))


def test_selectivity_agrees_with_a_direct_computation(model: convscope.Model, data: Path, whole: Path) -> None:
    pictures = sorted(str(p) for p in data.rglob("*.png"))
    given = ImageBatchLoader(pictures, model.preprocessing)
    net, means, labels = model.module, [], []
    with torch.no_grad():
        for batch in given.batches(8):
            means.append(net.first(batch.x).double().mean((2, 3)))
            labels += [Path(pictures[i]).parent.name for i in batch.indices]
    means, names = torch.cat(means), np.array(labels)
    by_class = np.stack([means[names == name].mean(0) for name in ("apple", "bread", "quince")], 1)  # (U, K)
    np.testing.assert_allclose(np.load(whole / "class_means.npy")[:4], by_class, rtol=1e-5, atol=1e-6)
    units = [row for row in pq.read_table(whole / "units.parquet").to_pylist() if row["layer"] == "first"]
    checked = 0
    for row, own in zip(units, by_class, strict=True):
        assert row["classes"] == np.argsort(-own, kind="stable").tolist()
        if (own >= 0).all():
            rest = (own.sum() - own.max()) / 2
            assert row["selectivity"] == pytest.approx((own.max() - rest) / (own.max() + rest), rel=1e-4)
            checked += 1
        else:
            assert row["selectivity"] is None
    assert 0 < checked < len(units)


def test_workers_have_no_influence_on_a_single_byte(data: Path, whole: Path, tmp_path: Path) -> None:
    convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **{**SETTINGS, "workers": 2})
    assert files(tmp_path / "store") == files(whole)


def test_another_batch_size_says_the_same_up_to_rounding(data: Path, whole: Path, tmp_path: Path) -> None:
    other = convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **{**SETTINGS, "batch": 5})
    a, b = (pq.read_table(where / "units.parquet").to_pandas() for where in (whole, Path(other.address)))
    for column in ("mean", "variance", "maximum", "minimum"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-5, atol=1e-6)


SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    import os, signal
    import convscope
    from tests.oracles.tiny import LAYERS, SETTINGS, tiny
    def progress(done, total):
        if done >= {until}:
            os.kill(os.getpid(), signal.SIGKILL)
    convscope.scan(tiny(), {data!r}, {out!r}, LAYERS, **SETTINGS, progress=progress)
"""


@pytest.mark.parametrize("until", [8, 72, 150])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(until: int, data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]), until=until, data=str(data), out=str(out))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    before = sorted(p.name for p in (out / "shards").iterdir()) if (out / "shards").exists() else []
    assert len([name for name in before if name.endswith(".safetensors")]) == until // 64
    with pytest.raises(ConvscopeError, match=r"manifest"):
        convscope.open_store(out)
    seen: list[float] = []
    convscope.scan(tiny(), data, out, LAYERS, **SETTINGS, progress=lambda done, _: seen.append(done))
    assert seen[0] == 64 * (until // 64) + min(8, 150 - 64 * (until // 64))
    assert files(out) == files(whole)


def test_a_finished_run_is_only_opened(data: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*.parquet")}

    def never(done: float, total: int) -> None:
        raise AssertionError("nothing was to be done")

    convscope.scan(tiny(), data, whole, LAYERS, **SETTINGS, progress=never)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*.parquet")} == before


def test_a_store_of_another_run_is_refused_with_what_differs(data: Path, whole: Path, tmp_path: Path) -> None:
    before = files(whole)
    other = tiny()
    with torch.no_grad():
        other.module.fc.bias += 1
    with pytest.raises(ConvscopeError, match=r"model\.weights_sha256"):
        convscope.scan(other, data, whole, LAYERS, **SETTINGS)
    with pytest.raises(ConvscopeError, match=r"plan\.k: there 7, here 8"):
        convscope.scan(tiny(), data, whole, LAYERS, **{**SETTINGS, "k": 8})
    with pytest.raises(ConvscopeError, match="watched"):
        convscope.scan(tiny(), data, whole, ["first"], **SETTINGS)
    fewer = tmp_path / "fewer"
    shutil.copytree(data, fewer)
    (fewer / "apple" / "000.png").unlink()
    with pytest.raises(ConvscopeError, match=r"data\.fingerprint"):
        convscope.scan(tiny(), fewer, whole, LAYERS, **SETTINGS)
    assert files(whole) == before


def test_a_second_run_on_the_same_store_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    script = """
        import sys, time
        sys.path.insert(0, {tests!r})
        import convscope
        from tests.oracles.tiny import LAYERS, SETTINGS, tiny
        def progress(done, total):
            open({flag!r}, "w").close()
            time.sleep(60)
        convscope.scan(tiny(), {data!r}, {out!r}, LAYERS, **SETTINGS, progress=progress)
    """.format(tests=str(Path(__file__).parents[2]), data=str(data), out=str(out), flag=str(tmp_path / "flag"))
    first = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "flag").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        with pytest.raises(ConvscopeError, match="being written by another process"):
            convscope.scan(tiny(), data, out, LAYERS, **SETTINGS)
    finally:
        first.kill()
        first.wait()
    convscope.scan(tiny(), data, out, LAYERS, **SETTINGS)  # the lock died with its owner


def test_data_that_vanish_end_the_run_and_can_be_gone_on_from(data: Path, whole: Path, tmp_path: Path) -> None:
    moving, away, out = tmp_path / "data", tmp_path / "away", tmp_path / "store"
    shutil.copytree(data, moving)

    def vanish(done: float, total: int) -> None:
        if done >= 80 and moving.exists():
            moving.rename(away)

    with pytest.raises(ConvscopeError, match="is not there"):
        convscope.scan(tiny(), moving, out, LAYERS, **SETTINGS, progress=vanish)
    assert [p.name for p in (out / "shards").iterdir()] == ["00000.safetensors"]
    away.rename(moving)
    convscope.scan(tiny(), moving, out, LAYERS, **SETTINGS)
    for name in ("units.parquet", "topk.parquet", "sample.npy"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_listed_data_that_vanish_end_the_run_too(data: Path, tmp_path: Path) -> None:
    moving, away, out = tmp_path / "data", tmp_path / "away", tmp_path / "store"
    shutil.copytree(data, moving)
    listed = sorted(str(path) for path in moving.rglob("*.png"))

    def vanish(done: float, total: int) -> None:
        if done >= 80 and moving.exists():
            moving.rename(away)

    with pytest.raises(ConvscopeError, match="is not what it was when the scan began"):
        convscope.scan(tiny(), listed, out, LAYERS, **SETTINGS, progress=vanish)
    away.rename(moving)
    assert convscope.scan(tiny(), listed, out, LAYERS, **SETTINGS).manifest["failed"] == 2


def test_what_a_network_takes_at_a_time_is_not_overruled(data: Path, tmp_path: Path) -> None:
    alone = replace(tiny(), fixed_batch=1)
    with pytest.raises(ConvscopeError, match=r"batch is 8, and .* takes 1 at a time"):
        convscope.scan(alone, data, tmp_path / "store", LAYERS, batch=8)
    assert not (tmp_path / "store" / "plan.json").exists()


def test_a_full_disk_is_said_and_can_be_gone_on_from(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: Path, found: api.ShardResult) -> None:
        if found.shard == 1:
            raise OSError(28, "No space left on device")
        original(store, found)

    original = api.write
    monkeypatch.setattr(api, "write", full)
    with pytest.raises(ConvscopeError, match="No space left on device; the same call goes on"):
        convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **SETTINGS)
    monkeypatch.undo()
    convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **SETTINGS)
    assert files(tmp_path / "store") == files(whole)


def test_a_picture_that_drives_the_network_out_of_range_costs_itself_only(tmp_path: Path) -> None:
    class Burst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            y = torch.where(x.amin((1, 2, 3), keepdim=True) > 0.99, y * torch.inf, y)
            return self.fc(y.mean((2, 3)))

    net = convscope.load(Burst(), preprocessing={"size": 8})
    random = np.random.default_rng(1)
    pictures = list(random.integers(0, 200, (20, 8, 8, 3), dtype=np.uint8))
    pictures[5] = np.full((8, 8, 3), 255, np.uint8)
    store = convscope.scan(net, pictures, tmp_path / "a", "conv", k=3, batch=4, workers=0)
    table = pq.read_table(tmp_path / "a" / "images.parquet").to_pylist()
    assert [row["image"] for row in table if row["failed"]] == [5]
    assert "range of finite numbers" in table[5]["failed"]
    assert store.manifest["failed"] == 1
    units = pq.read_table(tmp_path / "a" / "units.parquet").to_pandas()
    assert np.isfinite(units["mean"]).all()
    assert 5 not in pq.read_table(tmp_path / "a" / "topk.parquet")["image"].to_pylist()


def test_nothing_is_left_behind_in_the_network(data: Path, tmp_path: Path) -> None:
    net = tiny()
    net.module.train()

    def stop(done: float, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.scan(net, data, tmp_path / "store", LAYERS, **SETTINGS, progress=stop)
    assert all(m.training for m in net.module.modules())
    assert all(p.requires_grad and p.grad is None for p in net.module.parameters())
    assert not any(m._forward_hooks for m in net.module.modules())


def test_no_picture_at_all_is_an_error(model: convscope.Model, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"nothing")
    with pytest.raises(ConvscopeError, match="none of the 1 pictures"):
        convscope.scan(model, tmp_path / "data", tmp_path / "store", **SETTINGS)
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 0}, "k is 0"), ({"batch": 1.5}, "batch is 1.5"), ({"sample": -1}, "sample is -1"), ({"workers": -1}, "-1")],
)
def test_settings_that_make_no_sense_are_refused(
    change: dict, message: str, model: convscope.Model, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConvscopeError, match=message):
        convscope.scan(model, data, tmp_path / "store", LAYERS, **{**SETTINGS, **change})


def test_an_unknown_layer_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvscopeError, match="nearest: first"):
        convscope.scan(tiny(), data, tmp_path / "store", ["frist"])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "out", ["s3://bucket/store", "memory://store", "file:///stores/one", Path("gs://bucket/store")]
)
def test_a_store_is_written_to_a_disk_and_an_address_is_refused(
    out: str | Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken for a folder whose name is s3: either."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConvscopeError, match=r"is an address, .* a folder on a disk of this machine; give one, and copy"
    ):
        convscope.scan(tiny(), data, out, LAYERS, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_pass_says_the_same_up_to_rounding(data: Path, whole: Path, tmp_path: Path) -> None:
    convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **SETTINGS, compiled=True)
    a, b = (pq.read_table(where / "units.parquet").to_pandas() for where in (whole, tmp_path / "store"))
    for column in ("mean", "variance", "maximum", "minimum", "active"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-4, atol=1e-4)
    tops = [pq.read_table(where / "topk.parquet").to_pandas() for where in (whole, tmp_path / "store")]
    np.testing.assert_allclose(tops[0]["value"], tops[1]["value"], rtol=1e-4, atol=1e-5)


def test_shards_are_whole_batches_and_whole_sprites() -> None:
    for pictures, batch, asked in ((10, 7, None), (10**6, 16, None), (5000, 24, 100), (10**6, 32, 10**5)):
        size = shard_size(pictures, batch, asked)
        assert size % batch == size % 64 == 0
        assert asked is None or asked <= size < asked + np.lcm(64, batch)


def test_the_plan_covers_every_picture_once_and_the_sample_is_spread() -> None:
    plan = ScanPlan(1000, 16, 192, 5, 100, "squash", 10**8, 2, False)
    ids = [i for shard in range(plan.shards) for batch in plan.batches(shard) for i in batch]
    assert ids == list(range(1000))
    sample = plan.sampled()
    assert len(set(sample.tolist())) == 100
    halves = (sample < 500).sum()
    assert 30 < halves < 70  # a fair coin leaves this range once in 50,000 times
    assert ScanPlan(50, 16, 64, 5, 100, "squash", 10**8, 2, False).sampled().tolist() == list(range(50))


def test_the_manifest_tells_no_time_and_no_place(whole: Path) -> None:
    told = json.loads((whole / "manifest.json").read_text())
    assert not {"time", "date", "host", "seconds"} & set(told)
    assert told["classes"] == ["apple", "bread", "cheese"]
    assert told["labels"] == ["apple", "bread", "quince"]
