"""`diagnose`: what it refuses, and that it leaves nothing behind; planted errors are found from images on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import convscope
from convscope import ConvscopeError
from convscope.arguments import ArgumentError
from convscope.cli import app
from convscope.diagnosis import analyses
from convscope.diagnosis.flat import to_json
from convscope.diagnosis.forward import softmax_logits
from convscope.diagnosis.search import Search

CLASSES = ("red", "green", "blue", "gray")
COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (110, 110, 110))
SIZE = 16


@pytest.fixture(autouse=True, scope="module")
def _without_shortcuts():
    """Leave out the search for shortcuts, which has tests of its own and takes much longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyses, "find_shortcuts", lambda _: Search("shortcut", "", 0, "Nothing was tested."))
        yield


class ColorNet(nn.Module):
    """Scores of three colors, and of none."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, outputs)
        with torch.no_grad():
            weight = torch.full((4, 3), -0.5)
            weight[:3] += 1.5 * torch.eye(3)
            weight[3] = 0
            self.conv.weight.copy_(weight[:, :, None, None])
            self.conv.bias.copy_(torch.tensor([0, 0, 0, 0.2]))
            self.fc.weight.copy_(8 * torch.eye(4)[:outputs])
            self.fc.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def color_model(**options) -> convscope.Model:
    return convscope.load(ColorNet(), preprocessing={"size": SIZE}, classes=list(CLASSES), **options)


def draw(color: tuple[int, int, int], generator: np.random.Generator) -> Image.Image:
    noise = generator.normal(0, 25, (20, 24, 3))
    return Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in folders; every fifth of `green` shows red, one cannot be read, and two have no known class."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, color in zip(CLASSES, COLORS, strict=True):
        (folder / name).mkdir()
        for i in range(25):
            shown = COLORS[0] if name == "green" and i % 5 == 0 else color
            draw(shown, generator).save(folder / name / f"{i:02d}.png")
    (folder / "blue" / "99.png").write_bytes(b"broken")
    (folder / "purple").mkdir()
    for i in range(2):
        draw((160, 40, 160), generator).save(folder / "purple" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def diagnosis(data: Path):
    with pytest.warns(convscope.ConvscopeWarning, match=r"could not be used: .*99\.png"):
        return convscope.diagnose(color_model(), data, layer="conv")


def test_planted_wrong_labels(diagnosis) -> None:
    overview = diagnosis.overview
    assert (overview.num_images, overview.num_labelled) == (102, 100)
    assert overview.accuracy == 0.95
    planted = [i for i, name in enumerate(diagnosis.image_names) if "/green/" in name and int(name[-6:-4]) % 5 == 0]
    quality = np.where(np.isnan(diagnosis.label_quality), 1, diagnosis.label_quality)
    assert sorted(np.argsort(quality)[:5]) == planted
    assert np.isnan(diagnosis.label_quality).sum() == 2
    assert [failure.name.rpartition("/")[2] for failure in diagnosis.failed] == ["99.png"]
    assert any("2 images have labels that are no class of the network (purple)" in note for note in diagnosis.notes)
    kinds = [search.kind for search in diagnosis.searches]
    assert {"confusion", "calibration", "label-error", "duplicate"} <= set(kinds)
    assert all(search.findings or search.detectable for search in diagnosis.searches)


def test_the_same_seed_gives_the_same_findings(data: Path, diagnosis, tmp_path: Path) -> None:
    with pytest.warns(convscope.ConvscopeWarning):
        again = convscope.diagnose(color_model(), data, layer="conv", out=tmp_path / "out")
    assert again.findings == diagnosis.findings
    np.testing.assert_array_equal(again.label_quality, diagnosis.label_quality)
    with pytest.warns(convscope.ConvscopeWarning):  # opens what was recorded
        resumed = convscope.diagnose(color_model(), data, layer="conv", out=tmp_path / "out")
    assert resumed.findings == diagnosis.findings
    assert len(convscope.open(tmp_path / "out").findings) == len(diagnosis.findings)


def test_a_stopped_run_repeats_no_finished_search(
    data: Path, diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> Search:
        raise KeyboardInterrupt

    def diagnose(seed: int = 0) -> convscope.Diagnosis:
        with pytest.warns(convscope.ConvscopeWarning):
            return convscope.diagnose(color_model(), data, layer="conv", out=tmp_path, seed=seed)

    with monkeypatch.context() as patch:
        patch.setattr(analyses, "find_slices", stop)
        with pytest.raises(KeyboardInterrupt):
            convscope.diagnose(color_model(), data, layer="conv", out=tmp_path)
    finished = {path.stem for path in (tmp_path / "searches").glob("*.json")}
    assert finished == {"labels", "confusions", "calibration", "duplicates"}
    assert not (tmp_path / "manifest.json").exists()
    with monkeypatch.context() as patch:
        for name in ("find_label_errors", "find_confusions", "find_miscalibration", "find_near_duplicates"):
            patch.setattr(analyses, name, lambda *_, **__: pytest.fail("ran again"))
        with pytest.raises(pytest.fail.Exception, match="ran again"):  # the searches are of another seed
            convscope.diagnose(color_model(), data, layer="conv", out=tmp_path, seed=1)
        resumed = diagnose()
    assert [to_json(asdict(f)) for f in resumed.findings] == [to_json(asdict(f)) for f in diagnosis.findings]
    np.testing.assert_array_equal(resumed.label_quality, diagnosis.label_quality)
    assert not (tmp_path / "searches").exists()


def test_lists_with_labels(data: Path, tmp_path: Path) -> None:
    rows = [f"{p},{p.parent.name}" for p in sorted(data.glob("red/*.png"))[:3]]
    file = tmp_path / "list.csv"
    file.write_text("\n".join(["image,label", *rows, f"{data}/gray/00.png,"]) + "\n")
    overview = convscope.diagnose(color_model(), file, layer="conv").overview
    assert (overview.num_images, overview.num_labelled, overview.accuracy) == (4, 3, 1)


def test_a_single_output_for_two_classes(data: Path) -> None:
    model = convscope.load(ColorNet(outputs=1), preprocessing={"size": SIZE}, classes=["green", "red"], task="binary")
    files = sorted([*data.glob("green/*.png"), *data.glob("red/*.png")])
    lines = "\n".join(f"{file}\t{file.parent.name}" for file in files)
    listing = data.parent / "two.txt"
    listing.write_text(lines)
    diagnosis = convscope.diagnose(model, listing, layer="conv")
    predictions = convscope.predict(model, [str(file) for file in files], top=1)
    logits = np.asarray(diagnosis.observations.logits, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities.max(1), predictions.probabilities[:, 0], atol=1e-5)
    pair = torch.tensor([[-2.0, 2.0], [0.3, -0.3]])  # as changed images are scored
    assert torch.allclose(softmax_logits(model, pair).softmax(1), model.probabilities(pair))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "multilabel"},
            "is a network for multilabel; diagnose takes networks that choose one class per image",
        ),
        ({"task": "regression"}, "is a network for regression"),
    ],
)
def test_other_tasks_are_refused(data: Path, options, message) -> None:
    with pytest.raises(ConvscopeError, match=message):
        convscope.diagnose(color_model(**options), data)


def test_what_cannot_be_diagnosed_is_refused_before_work_starts(data: Path, tmp_path: Path) -> None:
    model = color_model()

    def refused(message: str, dataset: object = data, **options: object) -> None:
        with pytest.raises(ConvscopeError, match=message):
            convscope.diagnose(model, dataset, progress=lambda *_: pytest.fail("work has started"), **options)

    refused("has no labels; put the images into one folder per class", str(data / "red" / "*.png"))
    others = tmp_path / "others"
    (others / "cat").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(others / "cat" / "1.png")
    refused(r"the labels of .* \(cat\) are not among the 4 classes of .* \(red, green, blue, gray\)", others)
    refused("layer 'nothing' is not in this model", layer="nothing")
    refused("has output .* without spatial extent", layer="fc")
    refused("folds is 1; expected 2 or more", folds=1)
    refused("seed is -1", seed=-1)
    refused("is a URL", out="s3://bucket/report")
    with pytest.raises(ArgumentError, match="did you mean out="):
        convscope.diagnose(model, data, output="x")


def test_a_store_must_be_of_the_same_images_and_weights(data: Path, tmp_path: Path) -> None:
    model = color_model()
    with pytest.warns(convscope.ConvscopeWarning):
        store = convscope.scan(model, data, tmp_path / "store", "conv", k=2)
    with pytest.warns(convscope.ConvscopeWarning):
        diagnosis = convscope.diagnose(model, data, store=tmp_path / "store", layer="conv")
    assert diagnosis.store_address == store.address
    part = tmp_path / "part"
    (part / "red").mkdir(parents=True)
    (part / "red" / "1.png").write_bytes((data / "red" / "01.png").read_bytes())
    with pytest.raises(ConvscopeError, match=r"is a store of other images \(103 of .*\); the data set is .* with 1:"):
        convscope.diagnose(model, part, store=store)
    changed = ColorNet()
    nn.init.ones_(changed.fc.bias)
    other = convscope.load(changed, preprocessing={"size": SIZE}, classes=list(CLASSES))
    with pytest.raises(ConvscopeError, match="with other weights than this model"):
        convscope.diagnose(other, data, store=store)


def test_the_command_saves_the_report_in_the_store_too(data: Path, tmp_path: Path) -> None:
    with pytest.warns(convscope.ConvscopeWarning):
        store = convscope.scan(color_model(), data, tmp_path / "store", layers=["conv"], workers=0, progress=False)
    assert store.diagnoses() == []
    network = [
        "tests.diagnosis.test_api:ColorNet",
        data,
        "--classes",
        ",".join(CLASSES),
        "--preprocessing",
        '{"size": 16}',
    ]
    options = ["--layer", "conv", "--workers", "0", "--store", store.address, "-o", tmp_path / "report"]
    result = CliRunner().invoke(app, ["diagnose", *map(str, [*network, *options])])
    assert result.exit_code == 1, result.output  # one image cannot be read
    (saved,) = store.diagnoses()
    assert (saved.kind, saved.layer) == ("diagnosis", "conv")
    assert convscope.open(tmp_path / "report").rows() == convscope.open(tmp_path / "store/diagnosis/conv").rows()


def test_every_step_can_be_cancelled_and_is_resumed(data: Path, diagnosis, tmp_path: Path) -> None:
    class Cancelled(Exception):
        pass

    model, finished, limit = color_model(), [set[str]()], 0
    while len(finished) < 100:
        calls = iter(range(limit))

        def cancel(done: float, total: int, calls: Iterator[int] = calls) -> None:
            if next(calls, None) is None:
                raise Cancelled

        try:
            with warnings.catch_warnings(action="ignore"):
                resumed = convscope.diagnose(model, data, layer="conv", out=tmp_path, workers=0, progress=cancel)
            break
        except Cancelled:
            assert not (tmp_path / "manifest.json").exists()
            assert not any(module._forward_hooks for module in model.module.modules())
            finished.append({path.stem for path in (tmp_path / "searches").glob("*.json")})
            assert finished[-1] >= finished[-2]  # nothing is lost
            limit = 0 if finished[-1] > finished[-2] else limit + 1  # next time one call further, or into the next step
    sizes = {len(names) for names in finished}
    assert {0, 6} <= sizes  # stopped before the searches, and after them
    assert len(sizes) > 3  # and between them
    assert [to_json(asdict(f)) for f in resumed.findings] == [to_json(asdict(f)) for f in diagnosis.findings]
    np.testing.assert_array_equal(resumed.label_quality, diagnosis.label_quality)


def test_cancelling_leaves_nothing_behind(data: Path, tmp_path: Path) -> None:
    class Cancelled(Exception):
        pass

    def cancel(done: float, total: int) -> None:
        raise Cancelled

    model = color_model()
    with pytest.raises(Cancelled):
        convscope.diagnose(model, data, out=tmp_path / "out", progress=cancel)
    assert {p.name for p in (tmp_path / "out" / "observations").iterdir()} <= {".lock", "plan.json", "shards"}
    assert json.loads((tmp_path / "out" / "observations" / "plan.json").read_text())["format"] == 1
    assert not any(module._forward_hooks for module in model.module.modules())
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
