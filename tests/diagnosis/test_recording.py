"""Recording: the arrays equal plain loops, and an interrupted run resumes to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import convscope
from convscope import ConvscopeError
from convscope.datasets.catalogue import Catalogue, build_catalogue
from convscope.diagnosis import recording
from convscope.diagnosis.facts import measure_image
from convscope.diagnosis.recording import ARRAYS, FACT_NAMES, RecordingJob, record_observations
from convscope.images.loading import ImageBatchLoader
from convscope.scanning.plan import ShardPlan
from tests.oracles.tiny import NUM_IMAGES, read_files, tiny, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return tiny()


def job_of(model: convscope.Model, catalogue: Catalogue, layer: str = "last", workers: int = 0) -> RecordingJob:
    plan = ShardPlan(len(catalogue), 8, 64, "squash", 10**8, torch.get_num_threads())
    labels = np.arange(len(catalogue)) % 3
    return RecordingJob(model, model.layers.find(layer), catalogue, labels, model.classes or (), plan, workers)


def record(
    model: convscope.Model,
    data: Path,
    folder: Path | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
    **options,
):
    catalogue = build_catalogue(str(data))
    job = job_of(model, catalogue, **options)
    return record_observations(job, folder, partial(build_catalogue, str(data)), progress)


@pytest.fixture(scope="module")
def reference(model, data, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("reference") / "observations"
    record(model, data, folder)
    return folder


def test_the_arrays_equal_plain_loops(model, data) -> None:
    observations, failed = record(model, data)
    paths = sorted(str(p) for p in data.rglob("*.png"))
    loader = ImageBatchLoader(paths, model.preprocessing)
    batches = list(loader.batches(8))
    ids = [index for batch in batches for index in batch.indices]
    assert sorted(Path(failure.name).name for failure in failed) == ["060.png", "100.png"]
    assert len(observations) == NUM_IMAGES - 2
    assert observations.image_ids.tolist() == ids
    assert observations.image_names == tuple(paths[i] for i in ids)
    assert observations.labels.tolist() == [i % 3 for i in ids]
    net, x = model.module, torch.cat([batch.x for batch in batches])
    with torch.no_grad():
        maps = net.last(net.first(x).relu())
        logits = net.fc(maps.relu().mean((2, 3)))
    np.testing.assert_allclose(observations.logits, logits, atol=1e-5)
    np.testing.assert_allclose(observations.features, maps.mean((2, 3)), atol=1e-3)
    np.testing.assert_allclose(observations.peaks, maps.amax((2, 3)), atol=2e-3)
    heatmaps = convscope.heatmaps(model, [paths[i] for i in ids[:8]], layer="last")
    np.testing.assert_allclose(observations.evidence[:8], heatmaps.values[:, 0], atol=1e-3)
    images = [ImageBatchLoader([paths[i]], model.preprocessing).decoded(0) for i in ids[:8]]
    expected = [measure_image(image, Path(paths[i]).read_bytes()) for image, i in zip(images, ids, strict=False)]
    np.testing.assert_array_equal(observations.facts[:8, : len(expected[0])], expected)
    assert observations.facts.shape[1] == len(FACT_NAMES)
    assert observations.thumbnails.shape == (len(ids), 96, 96, 3)


def test_workers_and_interruptions_change_no_byte(model, data, reference, tmp_path, monkeypatch) -> None:
    def stop(done: float, total: int) -> None:
        assert total == NUM_IMAGES
        if done > 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, data, tmp_path / "out", stop)
    assert [p.name for p in (tmp_path / "out" / "shards").iterdir()] == ["00000.safetensors"]
    with pytest.raises(ConvscopeError, match="belongs to another diagnosis"):
        record(model, data, tmp_path / "out", layer="first")
    counts: list[float] = []
    observations, failed = record(model, data, tmp_path / "out", lambda done, total: counts.append(done), workers=1)
    assert counts[0] == 72
    assert read_files(tmp_path / "out") == read_files(reference)
    assert len(failed) == 2
    assert isinstance(observations.thumbnails, np.memmap)
    monkeypatch.setattr(recording, "observing_forward", None)  # the next run opens what is there
    again, _ = record(model, data, tmp_path / "out")
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(observations, name))


def test_nothing_is_left_behind(model, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    flags = [p.requires_grad for p in model.module.parameters()]
    record(model, data)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.module.state_dict().items())
    assert flags == [p.requires_grad for p in model.module.parameters()]
    assert not any(module._forward_hooks for module in model.module.modules())


def test_data_without_a_usable_image(model, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(ConvscopeError, match=r"none of the 1 images .* can be used: .*1\.png"):
        record(model, tmp_path)


def test_a_layer_without_influence(data) -> None:
    class Idle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            return self.used(x).mean((2, 3))

    with pytest.raises(ConvscopeError, match="'unused' has no influence on the predicted class"):
        record(convscope.load(Idle(), preprocessing={"size": 24}), data, layer="unused")


def test_values_beyond_half_precision_are_clipped(data) -> None:
    net = tiny().module
    with torch.no_grad():
        net.last.weight.mul_(1e6)
    observations, _ = record(convscope.load(net, preprocessing={"size": 24}), data)
    assert np.isfinite(observations.features).all()
    assert np.abs(observations.peaks).max() == pytest.approx(65504)
