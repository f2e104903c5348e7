"""Scans: the store equals plain loops, and nothing that happens on the way changes a byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.images.loading import ImageBatchLoader
from convscope.scanning import sharding
from convscope.scanning.plan import ScanPlan, choose_shard_size
from tests.oracles.tiny import LAYERS, NUM_IMAGES, SETTINGS, read_files, tiny, write_images

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model() -> convscope.Model:
    return tiny()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed scan."""
    out = tmp_path_factory.mktemp("reference") / "store"
    convscope.scan(tiny(), data, out, LAYERS, **SETTINGS)
    return out


# Values ---------------------------------------------------------------------------------------------------------------


def test_the_store_equals_plain_loops(model: convscope.Model, data: Path, reference: Path) -> None:
    paths = sorted(str(p) for p in data.rglob("*.png"))
    batches = list(ImageBatchLoader(paths, model.preprocessing).batches(8))
    usable = [index for batch in batches for index in batch.indices]
    x = torch.cat([batch.x for batch in batches])
    net = model.module
    with torch.no_grad():
        first = net.first(x)
        last = net.last(first.relu())
        logits = net.fc(last.relu().mean((2, 3)))
    store = convscope.open_store(reference)
    assert store.layers == [*LAYERS, "logits"]
    assert store.manifest["failed"] == 2
    rows = pq.read_table(reference / "topk.parquet").to_pylist()
    for name, maps in (("first", first), ("last", last), ("logits", logits[:, :, None, None])):
        units = [row for row in pq.read_table(reference / "units.parquet").to_pylist() if row["layer"] == name]
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
                order = sorted(range(len(usable)), key=lambda i: (-signed[i].max().item(), usable[i]))[:7]
                examples = [r for r in rows if (r["layer"], r["unit"], r["kind"]) == (name, unit, kind)]
                assert [r["image"] for r in examples] == [usable[i] for i in order]
                width = maps.shape[3]
                positions = [int(signed[i].argmax()) for i in order]
                assert [r["row"] * width + r["column"] for r in examples] == positions
                expected = [sign * signed[i].max().item() for i in order]
                assert [r["value"] for r in examples] == pytest.approx(expected, rel=1e-5)


def test_image_rows_equal_plain_loops(model: convscope.Model, data: Path, reference: Path) -> None:
    paths = sorted(str(p) for p in data.rglob("*.png"))
    batches = list(ImageBatchLoader(paths, model.preprocessing).batches(8))
    with torch.no_grad():
        logits = torch.cat([model.module(batch.x) for batch in batches])
    usable = [index for batch in batches for index in batch.indices]
    store, table = convscope.open_store(reference), pq.read_table(reference / "images.parquet").to_pylist()
    for image, probabilities in zip(usable, logits.softmax(1), strict=True):
        row = table[image]
        assert Path(row["name"]) == Path(paths[image])
        assert row["classes"] == probabilities.argsort(descending=True, stable=True).tolist()
        assert row["probabilities"] == pytest.approx(sorted(probabilities.tolist(), reverse=True), rel=1e-4)
        label = store.labels[row["label"]]
        assert label == Path(row["name"]).parent.name
        if label == "quince":  # not a class of the network
            assert row["loss"] is None
        else:
            target = model.classes.index(label)
            assert row["loss"] == pytest.approx(-probabilities[target].log().item(), rel=1e-4)
    failed = [row["image"] for row in table if row["failed"]]
    assert failed == sorted(paths.index(str(data / name)) for name in ("apple/060.png", "bread/100.png"))


def test_selectivity_equals_a_direct_computation(model: convscope.Model, data: Path, reference: Path) -> None:
    paths = sorted(str(p) for p in data.rglob("*.png"))
    net, batch_means, labels = model.module, [], []
    with torch.no_grad():
        for batch in ImageBatchLoader(paths, model.preprocessing).batches(8):
            batch_means.append(net.first(batch.x).double().mean((2, 3)))
            labels += [Path(paths[i]).parent.name for i in batch.indices]
    means, names = torch.cat(batch_means), np.array(labels)
    class_means = np.stack([means[names == name].mean(0) for name in ("apple", "bread", "quince")], 1)  # (U, K)
    np.testing.assert_allclose(np.load(reference / "class_means.npy")[:4], class_means, rtol=1e-5, atol=1e-6)
    units = [row for row in pq.read_table(reference / "units.parquet").to_pylist() if row["layer"] == "first"]
    num_checked = 0
    for row, unit_means in zip(units, class_means, strict=True):
        assert row["classes"] == np.argsort(-unit_means, kind="stable").tolist()
        if (unit_means >= 0).all():
            rest = (unit_means.sum() - unit_means.max()) / 2
            expected = (unit_means.max() - rest) / (unit_means.max() + rest)
            assert row["selectivity"] == pytest.approx(expected, rel=1e-4)
            num_checked += 1
        else:
            assert row["selectivity"] is None
    assert 0 < num_checked < len(units)


def test_another_batch_size_gives_the_same_up_to_rounding(data: Path, reference: Path, tmp_path: Path) -> None:
    other = convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **{**SETTINGS, "batch": 5})
    a, b = (pq.read_table(folder / "units.parquet").to_pandas() for folder in (reference, Path(other.address)))
    for column in ("mean", "variance", "maximum", "minimum"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_pass_gives_the_same_up_to_rounding(data: Path, reference: Path, tmp_path: Path) -> None:
    convscope.scan(tiny(), data, tmp_path / "store", "last", **SETTINGS, compiled=True)

    def read(folder: Path, table: str) -> pandas.DataFrame:
        return pq.read_table(folder / table, filters=[("layer", "in", ["last", "logits"])]).to_pandas()

    a, b = (read(folder, "units.parquet") for folder in (reference, tmp_path / "store"))
    for column in ("mean", "variance", "maximum", "minimum", "active"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-4, atol=1e-4)
    a, b = (read(folder, "topk.parquet") for folder in (reference, tmp_path / "store"))
    np.testing.assert_allclose(a["value"], b["value"], rtol=1e-4, atol=1e-5)


def test_an_image_with_activations_that_are_not_finite_costs_itself_only(tmp_path: Path) -> None:
    class InfiniteOnWhite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            y = torch.where(x.amin((1, 2, 3), keepdim=True) > 0.99, y * torch.inf, y)
            return self.fc(y.mean((2, 3)))

    net = convscope.load(InfiniteOnWhite(), preprocessing={"size": 8})
    generator = np.random.default_rng(1)
    images = list(generator.integers(0, 200, (20, 8, 8, 3), dtype=np.uint8))
    images[5] = np.full((8, 8, 3), 255, np.uint8)
    store = convscope.scan(net, images, tmp_path / "a", "conv", k=3, batch=4, workers=0)
    table = pq.read_table(tmp_path / "a" / "images.parquet").to_pylist()
    assert [row["image"] for row in table if row["failed"]] == [5]
    assert "range of finite numbers" in table[5]["failed"]
    assert store.manifest["failed"] == 1
    units = pq.read_table(tmp_path / "a" / "units.parquet").to_pandas()
    assert np.isfinite(units["mean"]).all()
    assert 5 not in pq.read_table(tmp_path / "a" / "topk.parquet")["image"].to_pylist()


# The same bytes, whatever happens -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_do_not_change_a_single_byte(data: Path, reference: Path, tmp_path: Path) -> None:
    convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **{**SETTINGS, "workers": 2})
    assert read_files(tmp_path / "store") == read_files(reference)


KILL_POINTS = (8, 72, 150)  # images done: before the first shard is written, after it, and before the merge
SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import pyarrow  # before forking, rather than in each child
    import convscope.scanning.api
    from tests.oracles.tiny import LAYERS, SETTINGS, tiny
    model = tiny()
    for until in {kill_points}:
        def progress(done, total):
            if done >= until:
                os.kill(os.getpid(), signal.SIGKILL)
        pid = os.fork()
        if not pid:
            convscope.scan(model, {data!r}, {out!r} + "/" + str(until), LAYERS, **SETTINGS, progress=progress)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of scans that were killed at each of the points."""
    out = tmp_path_factory.mktemp("killed")
    script = SCRIPT.format(root=str(ROOT), kill_points=KILL_POINTS, data=str(data), out=str(out))
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("until", KILL_POINTS)
def test_a_killed_scan_resumes_and_ends_in_the_same_bytes(
    until: int, killed: Path, data: Path, reference: Path
) -> None:
    out = killed / str(until)
    names = os.listdir(out / "shards") if (out / "shards").exists() else []
    assert len([name for name in names if name.endswith(".safetensors")]) == until // 64
    with pytest.raises(ConvscopeError, match=r"manifest"):
        convscope.open_store(out)
    steps: list[float] = []
    convscope.scan(tiny(), data, out, LAYERS, **SETTINGS, progress=lambda done, _: steps.append(done))
    assert steps[0] == 64 * (until // 64) + min(8, NUM_IMAGES - 64 * (until // 64))
    assert read_files(out) == read_files(reference)


def test_a_finished_scan_is_only_opened(data: Path, reference: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*.parquet")}

    def fail(done: float, total: int) -> None:
        raise AssertionError("nothing was to be done")

    convscope.scan(tiny(), data, reference, LAYERS, **SETTINGS, progress=fail)
    assert {p: p.stat().st_mtime_ns for p in reference.rglob("*.parquet")} == before


def test_a_store_of_another_scan_is_refused_with_the_differences(data: Path, reference: Path, tmp_path: Path) -> None:
    before = read_files(reference)
    other = tiny()
    with torch.no_grad():
        other.module.fc.bias += 1
    with pytest.raises(ConvscopeError, match=r"model\.weights_sha256"):
        convscope.scan(other, data, reference, LAYERS, **SETTINGS)
    with pytest.raises(ConvscopeError, match=r"plan\.k: 7 in the store, 8 requested"):
        convscope.scan(tiny(), data, reference, LAYERS, **{**SETTINGS, "k": 8})
    with pytest.raises(ConvscopeError, match="scanned_layers"):
        convscope.scan(tiny(), data, reference, ["first"], **SETTINGS)
    fewer = tmp_path / "fewer"
    shutil.copytree(data, fewer)
    (fewer / "apple" / "000.png").unlink()
    with pytest.raises(ConvscopeError, match=r"data\.fingerprint"):
        convscope.scan(tiny(), fewer, reference, LAYERS, **SETTINGS)
    assert read_files(reference) == before


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_store_of_an_older_format_is_refused(name: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"kind": "scan", "format": 1, "watched": LAYERS}))
    with pytest.raises(ConvscopeError, match=r"has store format 1, expected \d; rerun the scan with a new folder$"):
        convscope.scan(tiny(), data, tmp_path, LAYERS, **SETTINGS)


def test_a_second_scan_into_the_same_store_is_refused(data: Path, reference: Path, tmp_path: Path) -> None:
    messages: list[str] = []

    def scan_again(done: float, total: int) -> None:
        with pytest.raises(ConvscopeError) as caught:
            convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **SETTINGS)
        messages.append(str(caught.value))

    convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **SETTINGS, progress=scan_again)
    assert len(messages) == 19  # batches
    assert all("is being written by another process" in message for message in messages)
    assert read_files(tmp_path / "store") == read_files(reference)


def move_away_at(done_images: int, folder: Path, away: Path) -> Callable[[float, int], None]:
    def progress(done: float, total: int) -> None:
        if done >= done_images and folder.exists():
            folder.rename(away)

    return progress


def test_a_scan_whose_data_vanish_stops_and_can_be_resumed(data: Path, reference: Path, tmp_path: Path) -> None:
    folder, away, out = tmp_path / "data", tmp_path / "away", tmp_path / "store"
    shutil.copytree(data, folder)
    with pytest.raises(ConvscopeError, match="does not exist"):
        convscope.scan(tiny(), folder, out, LAYERS, **SETTINGS, progress=move_away_at(80, folder, away))
    assert [p.name for p in (out / "shards").iterdir()] == ["00000.safetensors"]
    away.rename(folder)
    convscope.scan(tiny(), folder, out, LAYERS, **SETTINGS)
    for name in ("units.parquet", "topk.parquet", "sample.npy"):
        assert (out / name).read_bytes() == (reference / name).read_bytes()


def test_a_scan_of_listed_files_that_vanish_stops_too(data: Path, tmp_path: Path) -> None:
    folder, away, out = tmp_path / "data", tmp_path / "away", tmp_path / "store"
    shutil.copytree(data, folder)
    paths = sorted(str(path) for path in folder.rglob("*.png"))
    with pytest.raises(ConvscopeError, match="has changed since the run began; rerun to resume"):
        convscope.scan(tiny(), paths, out, LAYERS, **SETTINGS, progress=move_away_at(80, folder, away))
    away.rename(folder)
    assert convscope.scan(tiny(), paths, out, LAYERS, **SETTINGS).manifest["failed"] == 2


def test_a_full_disk_is_reported_and_the_scan_can_be_resumed(
    data: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_to_full_disk(store: Path, result: sharding.ShardResult) -> None:
        if result.shard == 1:
            raise OSError(28, "No space left on device")
        write_shard(store, result)

    write_shard = sharding.write_shard
    monkeypatch.setattr(sharding, "write_shard", write_to_full_disk)
    with pytest.raises(ConvscopeError, match="No space left on device; rerun to resume"):
        convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **SETTINGS)
    monkeypatch.undo()
    convscope.scan(tiny(), data, tmp_path / "store", LAYERS, **SETTINGS)
    assert read_files(tmp_path / "store") == read_files(reference)


def test_an_interrupted_scan_restores_the_network(data: Path, tmp_path: Path) -> None:
    net = tiny()
    net.module.train()

    def interrupt(done: float, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.scan(net, data, tmp_path / "store", LAYERS, **SETTINGS, progress=interrupt)
    assert all(m.training for m in net.module.modules())
    assert all(p.requires_grad and p.grad is None for p in net.module.parameters())
    assert not any(m._forward_hooks for m in net.module.modules())


# Errors ---------------------------------------------------------------------------------------------------------------


def test_the_fixed_batch_size_of_a_network_is_not_overruled(data: Path, tmp_path: Path) -> None:
    batch_of_one = replace(tiny(), fixed_batch_size=1)
    with pytest.raises(ConvscopeError, match=r"batch is 8; .* takes batches of 1 only"):
        convscope.scan(batch_of_one, data, tmp_path / "store", LAYERS, batch=8)
    assert not (tmp_path / "store" / "plan.json").exists()


def test_data_without_a_usable_image_are_refused(model: convscope.Model, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"not an image")
    with pytest.raises(ConvscopeError, match="none of the 1 images"):
        convscope.scan(model, tmp_path / "data", tmp_path / "store", **SETTINGS)
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 0}, "k is 0"), ({"batch": 1.5}, "batch is 1.5"), ({"sample": -1}, "sample is -1"), ({"workers": -1}, "-1")],
)
def test_invalid_settings_are_refused(
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
def test_a_remote_store_is_refused(
    out: str | Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for a folder whose name is "s3:" either."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvscopeError, match=REMOTE_FOLDER):
        convscope.scan(tiny(), data, out, LAYERS, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


REMOTE_FOLDER = r"is a URL; .* local folder"


# The plan -------------------------------------------------------------------------------------------------------------


def test_shards_are_whole_batches_and_whole_thumbnail_sheets() -> None:
    for num_images, batch_size, requested in ((10, 7, None), (10**6, 16, None), (5000, 24, 100), (10**6, 32, 10**5)):
        size = choose_shard_size(num_images, batch_size, requested)
        assert size % batch_size == size % 64 == 0
        assert requested is None or requested <= size < requested + np.lcm(64, batch_size)


def test_the_plan_covers_every_image_once_and_the_sample_is_spread() -> None:
    plan = ScanPlan(1000, 16, 192, "squash", 10**8, 2, 5, 100, False)
    assert [image for batch in plan.batches(range(plan.num_shards)) for image in batch] == list(range(1000))
    sample = plan.sample_images()
    assert len(set(sample.tolist())) == 100
    assert 30 < (sample < 500).sum() < 70  # a fair coin leaves this range once in 50,000 times
    assert ScanPlan(50, 16, 64, "squash", 10**8, 2, 5, 100, False).sample_images().tolist() == list(range(50))


def test_the_manifest_contains_neither_time_nor_host(reference: Path) -> None:
    manifest = json.loads((reference / "manifest.json").read_text())
    assert not {"time", "date", "host", "seconds"} & set(manifest)
    assert manifest["classes"] == ["apple", "bread", "cheese"]
    assert manifest["labels"] == ["apple", "bread", "quince"]
