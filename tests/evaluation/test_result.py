"""Results of evaluations: values, notes, files, figures, invalid arguments; the model is unchanged."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.evaluation.registry import METRICS
from convscope.evaluation.result import suspicion_notes
from convscope.evaluation.statistics import bootstrap
from tests.oracles.nets import SmallConvNet, diff_snapshots, in_training, randomized, snapshot
from tests.oracles.synthetic_models import (
    random_images,
    random_maps,
    small_model,
)

FAST_METRICS = ("deletion", "insertion")


def test_bootstrap():
    np.testing.assert_array_equal(bootstrap(np.full(7, 0.3)), (pytest.approx(0.3), pytest.approx(0.3)))
    values = np.random.default_rng(5).normal(2, 1, 400)
    low, high = bootstrap(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert bootstrap(values) == bootstrap(values)
    curve_low, _ = bootstrap(np.stack([values, np.zeros(400)], 1))
    assert curve_low.tolist() == pytest.approx([low, 0], abs=1e-12)


def test_result(tmp_path):
    model = convscope.load(randomized(SmallConvNet()), preprocessing={"size": 24}, classes=["a", "b", "c", "d", "e"])
    x = random_images(3, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, [["a", "b"]] * 3, layer="conv3", method="layer-cam")
    evaluation = convscope.evaluate(model, x, heatmap, ["deletion", "sparseness"], steps=4, seed=5)
    assert isinstance(evaluation, convscope.Evaluation)
    assert evaluation.metrics == ["deletion", "sparseness"]
    assert evaluation["deletion"].shape == (3, 2)
    assert evaluation["deletion"].dtype == np.float32
    assert evaluation.curves["deletion"].shape == (3, 2, 5)
    assert (evaluation.method, evaluation.layer, evaluation.image_names) == (
        "layer-cam",
        "conv3",
        ("image 0", "image 1", "image 2"),
    )
    assert evaluation.targets.tolist() == [[0, 1]] * 3
    assert evaluation.names == [["a", "b"]] * 3
    assert evaluation.mean("deletion") == pytest.approx(evaluation["deletion"].mean())
    low, high = evaluation.interval("deletion")
    assert low <= evaluation.mean("deletion") <= high
    assert (low, high) == bootstrap(evaluation["deletion"].mean(1, dtype=np.float64)), (
        "the targets of an image are not independent"
    )
    rows = evaluation.rows()
    assert [row["metric"] for row in rows] == ["deletion", "sparseness"]
    assert [row["better"] for row in rows] == ["lower", "higher"]
    lines = str(evaluation).splitlines()
    assert lines[0] == "Evaluation: layer-cam at conv3, 3 images"
    assert lines[1].split()[:2] == ["metric", "mean"]
    assert lines[2].startswith(f"deletion    {evaluation.mean('deletion'):.4f}")
    parameters = json.loads(json.dumps(evaluation.parameters()))
    assert parameters["metrics"] == ["deletion", "sparseness"]
    assert parameters["options"] == {"deletion": {"steps": 4, "fill": "blur"}, "sparseness": {}}
    assert (parameters["seed"], parameters["method"], parameters["classes"]) == (5, "layer-cam", [["a", "b"]] * 3)
    folder = evaluation.save(tmp_path)
    assert {p.name for p in folder.iterdir()} == {"evaluation.png", "arrays.npz", "manifest.json"}
    with np.load(folder / "arrays.npz") as arrays:
        assert set(arrays.files) == {"deletion", "sparseness", "deletion_curve", "targets"}
        np.testing.assert_array_equal(arrays["deletion_curve"], evaluation.curves["deletion"])
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "evaluation"
    with pytest.raises(ConvscopeError, match="nearest: deletion"):
        evaluation["deltion"]
    with pytest.raises(ConvscopeError, match="was not evaluated"):
        evaluation["road"]


def test_figure_has_a_panel_per_metric():
    model = small_model()
    x = random_images(3, 24, channels=3)
    masks = np.zeros((3, 24, 24), bool)
    masks[:, 4:9] = True
    heatmap = convscope.heatmaps(model, x, 1)
    evaluation = convscope.evaluate(model, x, heatmap, list(METRICS), masks=masks, steps=3, samples=3)
    figure = evaluation.figure()
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title().partition(",")[0] for axes in panels] == list(METRICS)
    curve = panels[0].lines[0].get_ydata()
    np.testing.assert_allclose(curve, evaluation.curves["deletion"][:, 0].mean(0), rtol=1e-6)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in panels]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(a.overlaps(b) for a, b in pairs), "labels do not overlap"


def test_a_single_value_is_drawn_as_a_bar():
    model = small_model()
    x = random_images(1, 24, channels=3)
    evaluation = convscope.evaluate(model, x, convscope.heatmaps(model, x, 1), ["random-logit"])
    (axes,) = [axes for axes in evaluation.figure().axes if axes.axison]
    (bar,) = axes.patches
    assert bar.get_height() == pytest.approx(evaluation["random-logit"][0, 0])
    assert bar.get_width() > 0.1 * np.ptp(axes.get_xlim())


def test_suspicion_notes():
    bad = {"deletion": np.full((2, 1), 0.6), "insertion": np.full((2, 1), 0.5), "randomisation": np.full((2, 1), 0.9)}
    notes = suspicion_notes(bad, {})
    assert any("insertion is not above deletion" in note for note in notes)
    assert any(note.startswith("randomisation 0.90: the map hardly changes") for note in notes)
    good = {"deletion": np.full((2, 1), 0.1), "insertion": np.full((2, 1), 0.5), "randomisation": np.full((2, 1), 0.1)}
    assert suspicion_notes(good, {}) == []
    pointing = {"pointing": np.full((2, 1), 0.3)}
    assert suspicion_notes(pointing, {"pointing": np.full((2, 1), 0.2)}) == []
    assert suspicion_notes(pointing, {"pointing": np.full((2, 1), 0.4)})[0].startswith("pointing 0.30: the maximum")


def test_unreadable_images_are_listed_as_failed(tmp_path, photos):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    model = small_model()
    paths = [photos[0], str(bad), photos[1]]
    heatmap = convscope.heatmaps(model, paths, 1)
    for maps in (heatmap, np.concatenate([heatmap.values[:1], heatmap.values[:1] * 0, heatmap.values[1:]])):
        targets = None if maps is heatmap else 1
        evaluation = convscope.evaluate(model, paths, maps, "deletion", targets=targets, steps=3)
        assert evaluation.image_names == (photos[0], photos[1])
        assert [failure.name for failure in evaluation.failed] == [str(bad)]
        good = convscope.evaluate(model, [photos[0], photos[1]], heatmap.values, "deletion", targets=1, steps=3)
        np.testing.assert_allclose(evaluation["deletion"], good["deletion"], rtol=1e-5)


def test_fit_of_the_heatmaps_is_used(photos):
    model = small_model()
    heatmap = convscope.heatmaps(model, photos[:2], 1, fit="crop")
    from_heatmaps = convscope.evaluate(model, photos[:2], heatmap, "deletion", steps=3)
    from_array = convscope.evaluate(model, photos[:2], heatmap.values, "deletion", targets=1, fit="crop", steps=3)
    squashed = convscope.evaluate(model, photos[:2], heatmap.values, "deletion", targets=1, steps=3)
    np.testing.assert_array_equal(from_heatmaps["deletion"], from_array["deletion"])
    assert np.abs(from_heatmaps["deletion"] / squashed["deletion"] - 1).max() > 1e-3
    assert (from_heatmaps.fit, squashed.fit) == ("crop", "squash")


def test_progress():
    model = small_model()
    calls: list[tuple[float, int]] = []
    x, heatmap = random_images(5, 24, channels=3), random_maps(5, 6, 6)
    convscope.evaluate(
        model,
        x,
        heatmap,
        ["deletion", "road"],
        targets=1,
        steps=20,
        progress=lambda done, total: calls.append((done, total)),
    )
    done = [progress for progress, _ in calls]
    assert {count for _, count in calls} == {5}
    assert done == sorted(done)
    assert done[-1] == 5
    assert len({progress for progress in done if 0 < progress < 5}) > 2


# --- invalid arguments ---

X, HEATMAPS = random_images(2, 24, channels=3), random_maps(2, 6, 6)
INVALID_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"metrics": "deltion"}, "metric 'deltion' is not known; nearest: deletion"),
    ({"metrics": []}, "no metrics"),
    ({"metrics": ("deletion", "pointing")}, "pointing needs masks="),
    ({"metrics": "randomisation"}, "randomisation computes the maps again"),
    ({"metrics": "random-logit"}, "random-logit computes the maps again"),
    ({"metrics": "max-sensitivity"}, "max-sensitivity computes the maps again"),
    ({"fill": "blurr"}, "fill 'blurr' is not known; nearest: blur"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": 2.5}, "steps is 2.5"),
    ({"tolerance": 3}, "option 'tolerance' is known to none of deletion, insertion"),
    ({"heatmaps": HEATMAPS[:1]}, r"heatmaps of shape \(1, 6, 6\); expected Heatmaps, or an array \(2, h, w\)"),
    ({"heatmaps": random_maps(2, 3, 6, 6)}, r"or \(2, 1, h, w\)"),
    ({"heatmaps": np.full((2, 6, 6), np.nan)}, "NaN or infinity"),
    ({"heatmaps": "photo.jpg"}, "heatmaps is a str; expected what convscope.heatmaps returns"),
    ({"targets": 9}, "class 9 is out of range"),
    ({"fit": "stretch"}, "fit is 'stretch'"),
    ({"metrics": "iou", "masks": np.ones((1, 24, 24), bool)}, "1 masks for 2 images"),
    ({"metrics": "iou", "masks": np.zeros((2, 24, 24), bool)}, "mask 0 is empty"),
    (
        {"metrics": "iou", "masks": np.ones((2, 20, 24), bool)},
        "the mask of image 0 has 20 x 24 pixels, the image 24 x 24",
    ),
    ({"metrics": "iou", "masks": np.linspace(0, 1, 2 * 576).reshape(2, 24, 24)}, "more than two values"),
    ({"metrics": "iou", "masks": np.ones((2, 3, 24, 24), bool)}, "mask 0 has shape"),
    ({"metrics": "iou", "masks": "masks.npy"}, "str for 2 images"),
    ({"metrics": "pointing", "masks": np.ones((2, 24, 24)), "tolerance": -1}, "tolerance is -1"),
    ({"metrics": "mu-fidelity", "subset": 1.5}, "a fraction between 0 and 1"),
]


@pytest.mark.parametrize(
    ("options", "message"), INVALID_ARGUMENTS, ids=[message[:40] for _, message in INVALID_ARGUMENTS]
)
def test_invalid_arguments_raise(options, message):
    arguments = {"heatmaps": HEATMAPS, "targets": 1, "metrics": FAST_METRICS, **options}
    with pytest.raises(ConvscopeError, match=message) as error:
        convscope.evaluate(small_model(), X, **arguments)
    assert "\n" not in str(error.value)


def test_arguments_are_checked_before_the_model_runs():
    batch_sizes: list[int] = []

    class Counter(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            batch_sizes.append(len(x))
            return super().forward(x)

    model = convscope.load(randomized(Counter()), preprocessing={"size": 24})
    heatmap = convscope.heatmaps(model, X, 1)
    small = np.ones((2, 9, 9), bool)
    batch_sizes.clear()
    for options in (
        {"metrics": "energy"},
        {"metrics": "sparsenes"},
        {"metrics": "iou", "masks": small},
    ):
        with pytest.raises(ConvscopeError):
            convscope.evaluate(model, X, heatmap, **options)
    assert batch_sizes == []


def test_heatmaps_of_other_images_raise(photos):
    model = small_model()
    heatmap = convscope.heatmaps(model, X, 1)
    with pytest.raises(ConvscopeError, match="heatmaps of 2 images, but 3 images given"):
        convscope.evaluate(model, random_images(3, 24, channels=3), heatmap)
    with pytest.raises(ConvscopeError, match="image 1: the network's output differs from the one stored"):
        convscope.evaluate(model, torch.stack([X[0], 3 * X[1] + 1]), heatmap)
    with pytest.raises(ConvscopeError, match="targets= is for maps given as an array"):
        convscope.evaluate(model, X, heatmap, targets=2)
    with pytest.raises(ConvscopeError, match="leave it out"):
        convscope.evaluate(model, X, heatmap, fit="crop")
    with pytest.raises(ConvscopeError, match="expected the same ones"):
        convscope.evaluate(model, photos[1:3], convscope.heatmaps(model, photos[:2], 1))


def test_model_is_unchanged():
    net, handles = in_training(randomized(SmallConvNet()))
    model = convscope.load(net, preprocessing={"size": 24})
    before = snapshot(net)
    convscope.evaluate(model, X, HEATMAPS, ["deletion", "road", "mu-fidelity", "average-drop"], targets=1, steps=3)
    assert diff_snapshots(before, snapshot(net)) == []

    def stop(done: float, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.evaluate(model, X, HEATMAPS, targets=1, steps=3, progress=stop)
    assert diff_snapshots(before, snapshot(net)) == []
    assert handles


def test_fixed_batch_size(monkeypatch):
    model = small_model()
    import dataclasses

    class Strict(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 4
            return super().forward(x)

    strict: nn.Module = randomized(Strict())
    fixed = dataclasses.replace(model, module=strict, fixed_batch_size=4)
    x, heatmap = random_images(6, 24, channels=3), random_maps(6, 6, 6)
    names = ["deletion", "insertion", "road", "average-gain", "mu-fidelity"]
    evaluation, expected = (
        convscope.evaluate(m, x, heatmap, names, targets=2, steps=4, samples=7) for m in (fixed, model)
    )
    for name in names:
        np.testing.assert_allclose(evaluation[name], expected[name], rtol=1e-4, atol=1e-5)


def test_signals_and_volumes():
    for size in ((30,), (6, 8, 8)):
        conv = nn.Conv1d if len(size) == 1 else nn.Conv3d

        class Net(nn.Module):
            def __init__(self, conv: Any = conv) -> None:
                super().__init__()
                self.conv = conv(2, 4, 3)
                self.fc = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.conv(x).relu().flatten(2).mean(2))

        model = convscope.load(
            randomized(Net()), preprocessing={"size": size, "channels": 2, "channel_order": "channels"}
        )
        x = torch.randn(2, 2, *size)
        names = ["deletion", "insertion", "average-drop", "mu-fidelity", "sparseness"]
        evaluation = convscope.evaluate(model, x, random_maps(2, *size), names, targets=1, steps=4)
        with torch.no_grad():
            expected = model.module(x).softmax(1)[:, 1]
        np.testing.assert_allclose(evaluation.curves["deletion"][:, 0, 0], expected, atol=1e-6)
        np.testing.assert_allclose(evaluation.curves["insertion"][:, 0, -1], expected, atol=1e-6)
        with pytest.raises(ConvscopeError, match="road imputes pixels"):
            convscope.evaluate(model, x, random_maps(2, *size), "road", targets=1)
