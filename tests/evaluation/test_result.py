"""What an evaluation says, saves, draws and refuses; that nothing is left behind."""

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
from tests.oracles.judged import (
    pictures,
    random_maps,
    usual,
)
from tests.oracles.nets import Usual, changes, filled, lived_in, snapshot

CHEAP = ("deletion", "insertion")


def test_bootstrap():
    np.testing.assert_array_equal(bootstrap(np.full(7, 0.3)), (pytest.approx(0.3), pytest.approx(0.3)))
    values = np.random.default_rng(5).normal(2, 1, 400)
    low, high = bootstrap(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert bootstrap(values) == bootstrap(values)
    curve_low, _ = bootstrap(np.stack([values, np.zeros(400)], 1))
    assert curve_low.tolist() == pytest.approx([low, 0], abs=1e-12)


def test_the_result(tmp_path):
    model = convscope.load(filled(Usual()), preprocessing={"size": 24}, classes=["a", "b", "c", "d", "e"])
    x = pictures(3, 24, channels=3)
    heat = convscope.heatmaps(model, x, [["a", "b"]] * 3, layer="conv3", method="layer-cam")
    found = convscope.evaluate(model, x, heat, ["deletion", "sparseness"], steps=4, seed=5)
    assert isinstance(found, convscope.Evaluation)
    assert found.metrics == ["deletion", "sparseness"]
    assert found["deletion"].shape == (3, 2)
    assert found["deletion"].dtype == np.float32
    assert found.curves["deletion"].shape == (3, 2, 5)
    assert (found.method, found.layer, found.image_names) == ("layer-cam", "conv3", ("image 0", "image 1", "image 2"))
    assert found.targets.tolist() == [[0, 1]] * 3
    assert found.names == [["a", "b"]] * 3
    assert found.mean("deletion") == pytest.approx(found["deletion"].mean())
    low, high = found.interval("deletion")
    assert low <= found.mean("deletion") <= high
    assert (low, high) == bootstrap(found["deletion"].mean(1, dtype=np.float64)), "a picture's targets hang together"
    rows = found.rows()
    assert [row["metric"] for row in rows] == ["deletion", "sparseness"]
    assert [row["better"] for row in rows] == ["lower", "higher"]
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["metric", "mean"]
    assert lines[1].startswith(f"deletion    {found.mean('deletion'):.3f}")
    said = json.loads(json.dumps(found.parameters()))
    assert said["metrics"] == ["deletion", "sparseness"]
    assert said["options"] == {"deletion": {"steps": 4, "fill": "blur"}, "sparseness": {}}
    assert (said["seed"], said["method"], said["classes"]) == (5, "layer-cam", [["a", "b"]] * 3)
    where = found.save(tmp_path)
    assert {p.name for p in where.iterdir()} == {"evaluation.png", "arrays.npz", "manifest.json"}
    with np.load(where / "arrays.npz") as arrays:
        assert set(arrays.files) == {"deletion", "sparseness", "deletion_curve", "targets"}
        np.testing.assert_array_equal(arrays["deletion_curve"], found.curves["deletion"])
    assert json.loads((where / "manifest.json").read_text())["kind"] == "evaluation"
    with pytest.raises(ConvscopeError, match="nearest: deletion"):
        found["deltion"]
    with pytest.raises(ConvscopeError, match="was not evaluated"):
        found["road"]


def test_the_figure_holds_a_panel_for_each_metric():
    model = usual()
    x = pictures(3, 24, channels=3)
    masks = np.zeros((3, 24, 24), bool)
    masks[:, 4:9] = True
    heat = convscope.heatmaps(model, x, 1)
    found = convscope.evaluate(model, x, heat, list(METRICS), masks=masks, steps=3, samples=3)
    figure = found.figure()
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title().partition(",")[0] for axes in drawn] == list(METRICS)
    curve = drawn[0].lines[0].get_ydata()
    np.testing.assert_allclose(curve, found.curves["deletion"][:, 0].mean(0), rtol=1e-6)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in drawn]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(a.overlaps(b) for a, b in pairs), "no label on another"


def test_in_words():
    bad = {"deletion": np.full((2, 1), 0.6), "insertion": np.full((2, 1), 0.5), "randomisation": np.full((2, 1), 0.9)}
    said = suspicion_notes(bad, {})
    assert any("insertion is not above deletion" in note for note in said)
    assert any(note.startswith("randomisation 0.90: the map hardly changes") for note in said)
    good = {"deletion": np.full((2, 1), 0.1), "insertion": np.full((2, 1), 0.5), "randomisation": np.full((2, 1), 0.1)}
    assert suspicion_notes(good, {}) == []
    pointing = {"pointing": np.full((2, 1), 0.3)}
    assert suspicion_notes(pointing, {"pointing": np.full((2, 1), 0.2)}) == []
    assert suspicion_notes(pointing, {"pointing": np.full((2, 1), 0.4)})[0].startswith("pointing 0.30: the maximum")


def test_pictures_that_cannot_be_used_are_named(tmp_path, photos):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    model = usual()
    given = [photos[0], str(bad), photos[1]]
    heat = convscope.heatmaps(model, given, 1)
    for maps in (heat, np.concatenate([heat.values[:1], heat.values[:1] * 0, heat.values[1:]])):
        targets = None if maps is heat else 1
        found = convscope.evaluate(model, given, maps, "deletion", targets=targets, steps=3)
        assert found.image_names == (photos[0], photos[1])
        assert [failure.name for failure in found.failed] == [str(bad)]
        good = convscope.evaluate(model, [photos[0], photos[1]], heat.values, "deletion", targets=1, steps=3)
        np.testing.assert_allclose(found["deletion"], good["deletion"], rtol=1e-5)


def test_the_crop_is_that_of_the_heatmaps(photos):
    model = usual()
    heat = convscope.heatmaps(model, photos[:2], 1, fit="crop")
    one = convscope.evaluate(model, photos[:2], heat, "deletion", steps=3)
    other = convscope.evaluate(model, photos[:2], heat.values, "deletion", targets=1, fit="crop", steps=3)
    squashed = convscope.evaluate(model, photos[:2], heat.values, "deletion", targets=1, steps=3)
    np.testing.assert_array_equal(one["deletion"], other["deletion"])
    assert np.abs(one["deletion"] / squashed["deletion"] - 1).max() > 1e-3
    assert (one.fit, squashed.fit) == ("crop", "squash")


def test_progress():
    model = usual()
    told: list[tuple[float, int]] = []
    x, heat = pictures(5, 24, channels=3), random_maps(5, 6, 6)
    convscope.evaluate(
        model, x, heat, ["deletion", "road"], targets=1, steps=20, progress=lambda done, of: told.append((done, of))
    )
    done = [share for share, _ in told]
    assert {count for _, count in told} == {5}
    assert done == sorted(done)
    assert done[-1] == 5
    assert len({share for share in done if 0 < share < 5}) > 2


# --- refusals --------------------------------------------------------------------------------------------------------

X, HEAT = pictures(2, 24, channels=3), random_maps(2, 6, 6)
REFUSED: list[tuple[dict[str, Any], str]] = [
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
    ({"heatmaps": HEAT[:1]}, r"heatmaps of shape \(1, 6, 6\); expected Heatmaps, or an array \(2, h, w\)"),
    ({"heatmaps": random_maps(2, 3, 6, 6)}, r"or \(2, 1, h, w\)"),
    ({"heatmaps": np.full((2, 6, 6), np.nan)}, "NaN or infinity"),
    ({"heatmaps": "photo.jpg"}, "expected numbers"),
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


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refusals(given, message):
    arguments = {"heatmaps": HEAT, "targets": 1, "metrics": CHEAP, **given}
    with pytest.raises(ConvscopeError, match=message) as caught:
        convscope.evaluate(usual(), X, **arguments)
    assert "\n" not in str(caught.value)


def test_nothing_runs_before_a_refusal():
    ran: list[int] = []

    class Counting(Usual):
        def forward(self, x: Tensor) -> Tensor:
            ran.append(len(x))
            return super().forward(x)

    model = convscope.load(filled(Counting()), preprocessing={"size": 24})
    heat = convscope.heatmaps(model, X, 1)
    small = np.ones((2, 9, 9), bool)
    ran.clear()
    for given in (
        {"metrics": "energy"},
        {"metrics": "sparsenes"},
        {"metrics": "iou", "masks": small},
    ):
        with pytest.raises(ConvscopeError):
            convscope.evaluate(model, X, heat, **given)
    assert ran == []


def test_heatmaps_of_other_pictures_are_refused(photos):
    model = usual()
    heat = convscope.heatmaps(model, X, 1)
    with pytest.raises(ConvscopeError, match="heatmaps of 2 images, but 3 images given"):
        convscope.evaluate(model, pictures(3, 24, channels=3), heat)
    with pytest.raises(ConvscopeError, match="image 1: the network's output differs from the one stored"):
        convscope.evaluate(model, torch.stack([X[0], 3 * X[1] + 1]), heat)
    with pytest.raises(ConvscopeError, match="targets= goes with maps given as an array"):
        convscope.evaluate(model, X, heat, targets=2)
    with pytest.raises(ConvscopeError, match="leave it out"):
        convscope.evaluate(model, X, heat, fit="crop")
    with pytest.raises(ConvscopeError, match="expected the same ones"):
        convscope.evaluate(model, photos[1:3], convscope.heatmaps(model, photos[:2], 1))


def test_nothing_is_left_behind():
    net, handles = lived_in(filled(Usual()))
    model = convscope.load(net, preprocessing={"size": 24})
    before = snapshot(net)
    convscope.evaluate(model, X, HEAT, ["deletion", "road", "mu-fidelity", "average-drop"], targets=1, steps=3)
    assert changes(before, snapshot(net)) == []

    def stop(done: float, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.evaluate(model, X, HEAT, targets=1, steps=3, progress=stop)
    assert changes(before, snapshot(net)) == []
    assert handles


def test_a_network_with_a_fixed_batch(monkeypatch):
    model = usual()
    import dataclasses

    class Strict(Usual):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 4
            return super().forward(x)

    strict: nn.Module = filled(Strict())
    fixed = dataclasses.replace(model, module=strict, fixed_batch_size=4)
    x, heat = pictures(6, 24, channels=3), random_maps(6, 6, 6)
    names = ["deletion", "insertion", "road", "average-gain", "mu-fidelity"]
    found, expected = (convscope.evaluate(m, x, heat, names, targets=2, steps=4, samples=7) for m in (fixed, model))
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)


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

        model = convscope.load(filled(Net()), preprocessing={"size": size, "channels": 2, "channel_order": "channels"})
        x = torch.randn(2, 2, *size)
        names = ["deletion", "insertion", "average-drop", "mu-fidelity", "sparseness"]
        found = convscope.evaluate(model, x, random_maps(2, *size), names, targets=1, steps=4)
        with torch.no_grad():
            expected = model.module(x).softmax(1)[:, 1]
        np.testing.assert_allclose(found.curves["deletion"][:, 0, 0], expected, atol=1e-6)
        np.testing.assert_allclose(found.curves["insertion"][:, 0, -1], expected, atol=1e-6)
        with pytest.raises(ConvscopeError, match="road imputes pixels"):
            convscope.evaluate(model, x, random_maps(2, *size), "road", targets=1)
