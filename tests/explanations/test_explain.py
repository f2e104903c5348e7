"""Explanations: closed forms, planted units, and proofs that equal edits and hand-written hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.explanations.regions import position_name
from convscope.explanations.selection import matched_units, nested_sets, smallest_prefix
from tests.oracles.nets import SmallConvNet, diff_snapshots, randomized, snapshot

SIZE = 32


class PooledClassifier(nn.Module):
    """Features, a global mean, and a linear classifier: logits are affine in the features."""

    def __init__(self, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2), nn.ReLU())
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def affine() -> nn.Module:
    return randomized(PooledClassifier()).eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return randomized(SmallConvNet()).eval()


def load(net: nn.Module, **options: object) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": SIZE}, **options)


def test_shares_of_an_affine_network_are_those_of_its_weights(affine: nn.Module, x: Tensor) -> None:
    """The effect of a unit is its weight times its mean; all of them sum to the logit minus the bias."""
    with torch.no_grad():
        affine.classifier.weight.abs_()
    explanation = convscope.explain(load(affine), x, 2, layer="features", share=1.0, draws=0)
    with torch.no_grad():
        products = (affine.features(x).mean((2, 3)) * affine.classifier.weight[2]).numpy()
    bias = float(affine.classifier.bias[2].detach())
    np.testing.assert_allclose(explanation.base_logits, bias, rtol=1e-5)
    np.testing.assert_array_equal(explanation.units, np.argsort(-products, axis=1))
    np.testing.assert_allclose(explanation.effects, -np.sort(-products, axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(explanation.single_effects, explanation.effects, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(explanation.effects.sum(1), explanation.logits - bias, rtol=1e-5)
    np.testing.assert_allclose(explanation.shares.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(explanation.removed_logits, bias, rtol=1e-5)
    # A unit's map sums to its effect.
    np.testing.assert_allclose(explanation.maps.sum((2, 3)), explanation.effects, rtol=1e-4, atol=1e-6)


def test_the_selection_ends_when_the_share_is_reached(affine: nn.Module, x: Tensor) -> None:
    full = convscope.explain(load(affine), x, 2, layer="features", share=1.0, draws=0)
    some = convscope.explain(load(affine), x, 2, layer="features", share=0.6, draws=0)
    reached = np.cumsum(full.shares, axis=1)
    np.testing.assert_array_equal(some.counts, (reached < 0.6).sum(1) + 1)
    assert (some.joint_shares >= 0.6).all()
    at_most_two = convscope.explain(load(affine), x, 2, layer="features", features=2, share=1.0, draws=0)
    np.testing.assert_array_equal(at_most_two.units, full.units[:, :2])


def removed_by_hook(net: nn.Module, x: Tensor, layer: str, units: np.ndarray) -> np.ndarray:
    """Return the logits (K,) of an image when a forward hook sets units to 0."""

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, units] = 0
        return output

    handle = net.get_submodule(layer).register_forward_hook(hook)
    try:
        with torch.no_grad():
            return net(x)[0].numpy()
    finally:
        handle.remove()


def test_progress_never_goes_back_and_ends_at_the_number_of_images(affine: nn.Module, tmp_path: Path) -> None:
    """Also where images fail, and where batches are filled up to a fixed size."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{n}.png" for n in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    paths[0].write_bytes(b"no image")
    model = replace(load(affine), fixed_batch_size=4)
    reports: list[float] = []
    with pytest.warns(convscope.ConvscopeWarning, match=r"0\.png"):
        convscope.explain(
            model,
            [str(path) for path in paths],
            2,
            layer="features",
            draws=0,
            progress=lambda done, total: reports.append(done / total),
        )
    assert reports == sorted(reports)
    assert reports[-1] == 1


def test_the_proof_equals_hooks_and_edits(net: nn.Module, x: Tensor) -> None:
    """Behind more convolutions the network is not affine: effects in turn still sum to the joint effect."""
    model = load(net)
    explanation = convscope.explain(model, x, 0, layer="relu1", features=4, share=1.0, draws=3)
    assert (explanation.counts > 1).all()
    for n, one in enumerate(explanation):
        units, target = one.units[0][one.units[0] >= 0], int(one.targets[0])
        plain = removed_by_hook(net, x[n : n + 1], "relu1", np.array([], int))
        falls = [plain[target]]
        for k in range(1, len(units) + 1):
            falls.append(removed_by_hook(net, x[n : n + 1], "relu1", units[:k])[target])
            alone = plain[target] - removed_by_hook(net, x[n : n + 1], "relu1", units[k - 1 : k])[target]
            assert one.single_effects[0, k - 1] == pytest.approx(alone, rel=1e-3, abs=1e-5)
        np.testing.assert_allclose(one.effects[0, : len(units)], -np.diff(falls), rtol=1e-3, atol=1e-5)
        after = removed_by_hook(net, x[n : n + 1], "relu1", units)
        assert one.removed_logits[0] == pytest.approx(after[target], rel=1e-4, abs=1e-5)
        assert one.removed_classes[0] == after.argmax()
        edited = convscope.edit(model, {"relu1": dict.fromkeys(units.tolist(), 0.0)})
        logits = convscope.predict(edited, x[n : n + 1]).logits[0]
        assert one.removed_logits[0] == pytest.approx(logits[target], rel=1e-5, abs=1e-6)
        everything = removed_by_hook(net, x[n : n + 1], "relu1", np.arange(8))
        assert one.base_logits[0] == pytest.approx(everything[target], rel=1e-4, abs=1e-5)
    assert (np.diff(explanation.single_effects, axis=1)[explanation.units[:, 1:] >= 0] <= 1e-6).all()


def test_means_replace_units_where_they_are_asked_for(net: nn.Module, x: Tensor) -> None:
    model = load(net)
    explanation = convscope.explain(model, x[0], 1, layer="relu2", how="mean", reference=x, features=3, draws=0)
    units = explanation.units[0][explanation.units[0] >= 0]
    edited = convscope.edit(model, {"relu2": dict.fromkeys(units.tolist(), "mean")}, reference=x)
    expected = convscope.predict(edited, x[:1]).logits[0, 1]
    assert explanation.removed_logits[0] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_planted_unit_is_found_where_it_is() -> None:
    """Class 1 is the brightness of channel 2, which is not 0 in the lower right of the image alone."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
        net[0].bias.zero_()
        net[4].weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 4.0]]))
        net[4].bias.copy_(torch.tensor([0.0, 0.5]))
    model = load(net, classes=["other", "planted"])
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    image[:, 2] = 0
    image[:, 2, 24:30, 26:31] = 20.0
    explanation = convscope.explain(model, image, layer="1")
    assert explanation.targets.tolist() == [1]
    assert explanation.units.tolist() == [[2]]
    np.testing.assert_allclose(explanation.shares, 1, rtol=1e-5)
    np.testing.assert_allclose(explanation.boxes, [[[26, 24, 31, 30]]], atol=1e-4)
    assert explanation.positions == [["lower right"]]
    assert explanation.removed_logits[0] == pytest.approx(0.5)
    assert explanation.removed_classes.tolist() == [0]
    np.testing.assert_allclose(explanation.random_logits, explanation.logits[0])
    (sentence,) = explanation.sentences
    for part in (
        "gives planted the logit",
        "One of 3 units of 1",
        "100% of what the layer adds",
        "unit 2 (100%, lower",
    ):
        assert part in sentence
    assert "Without it the logit is 0.50, and the top class is other" in sentence


def test_images_are_independent_and_seeded(net: nn.Module, x: Tensor) -> None:
    model = load(net)
    together = convscope.explain(model, x, layer="relu2", features=3)
    again = convscope.explain(model, x, layer="relu2", features=3)
    for name, array in together.arrays().items():
        np.testing.assert_array_equal(array, getattr(again, name))
    first = convscope.explain(model, x[:1], layer="relu2", features=3)
    count = int(first.counts[0])
    np.testing.assert_array_equal(first.units[0, :count], together.units[0, :count])
    for name in ("effects", "single_effects", "removed_logits", "random_logits", "boxes"):
        expected = getattr(together, name)[0]
        expected = expected[:count] if name in ("effects", "single_effects", "boxes") else expected
        np.testing.assert_allclose(getattr(first, name)[0], expected, rtol=1e-3, atol=1e-5)


def test_other_units_are_drawn_among_those_of_similar_change() -> None:
    changes = np.array([1.0, 100, 1.1, 90, 0.9, 110, 0.0, 95])
    drawn = matched_units(changes, np.array([1, 0]), 50, np.random.default_rng(0))
    assert not np.isin(drawn, [0, 1, 6]).any()  # neither selected nor without a change
    assert all(len(set(row)) == 2 for row in drawn.tolist())
    many = np.concatenate([np.full(40, 1.0), np.full(40, 100.0)])
    drawn = matched_units(many, np.array([79, 0]), 20, np.random.default_rng(0))
    assert (drawn[:, 0] >= 40).all()
    assert (drawn[:, 1] < 40).all()
    assert matched_units(np.array([1.0, 0.0]), np.array([0]), 1, np.random.default_rng(0)).tolist() == [[-1]]


def test_pure_functions() -> None:
    sets = nested_sets(torch.tensor([[2, 0], [1, -1]]), 2, 3)
    assert sets.int().tolist() == [[[0, 0, 1], [0, 1, 0]], [[1, 0, 1], [0, 1, 0]]]
    assert smallest_prefix(np.array([0.2, 0.5, 0.7]), 0.5) == 2
    assert smallest_prefix(np.array([0.2, 0.4]), 0.5) == 2
    assert position_name(np.array([0, 0, 20, 20]), (100, 100)) == "upper left"
    assert position_name(np.array([70, 40, 90, 60]), (100, 100)) == "right"
    assert position_name(np.array([0, 0, 90, 90]), (100, 100)) == "all over the image"
    assert position_name(np.full(4, np.nan), (100, 100)) == ""


def test_a_layer_that_speaks_against_the_target(affine: nn.Module, x: Tensor) -> None:
    net = randomized(PooledClassifier()).eval()
    with torch.no_grad():
        net.classifier.weight.abs_().neg_()
    explanation = convscope.explain(load(net), x, 0, layer="features")
    assert explanation.units.shape == (3, 0)
    assert np.isnan(explanation.joint_shares).all()
    assert "No unit of features raises it" in explanation.sentences[0]
    explanation.figure()


def test_layers_without_positions_and_contrasts(net: nn.Module, x: Tensor) -> None:
    model = load(net)
    explanation = convscope.explain(model, x, 1, layer=model.layers[-2], against=0, features=2)
    assert explanation.maps.shape[2:] == (0, 0)
    assert explanation.positions[0][0] == ""
    logits = convscope.predict(model, x).logits
    np.testing.assert_allclose(explanation.logits, logits[:, 1] - logits[:, 0], rtol=1e-4, atol=1e-5)


def test_a_saved_explanation_is_opened_again(net: nn.Module, x: Tensor, tmp_path) -> None:
    explanation = convscope.explain(load(net), x, layer="relu2", features=3)
    opened = convscope.open(explanation.save(tmp_path))
    for name, array in explanation.arrays().items():
        np.testing.assert_array_equal(getattr(opened, name), array)
    assert str(opened) == str(explanation)
    assert len(opened[1:]) == 2
    assert len(explanation.rows()) == explanation.counts.sum()


def test_nothing_is_left_behind(net: nn.Module, x: Tensor) -> None:
    model, before = load(net), snapshot(net)

    def stop(done: float, total: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.explain(model, x, layer="relu1", progress=stop)
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features is 0"),
        ({"features": 65}, "1 to 64"),
        ({"share": 0.0}, "share is 0"),
        ({"how": "resample"}, "how is 'resample'"),
        ({"how": "mean"}, "give both or neither"),
        ({"targets": [[0, 1]] * 3}, "2 targets per image"),
        ({"layer": "relu9"}, "relu9"),
    ],
)
def test_wrong_arguments_are_refused(net: nn.Module, x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ConvscopeError, match=message):
        convscope.explain(load(net), x, **options)
