"""Effects of units: equal to edits, to closed forms, and to planted ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.editing.replacements import donors
from tests.editing.conftest import SIZE
from tests.oracles.nets import diff_snapshots, randomized, snapshot


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class PooledClassifier(nn.Module):
    """Features, a global mean, and a linear classifier: logits are affine in the features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU())
        self.classifier = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_effects_equal_those_of_edited_models(model, x, how):
    layer = model.layers.unique_spatial()[1]
    targets = [[0, 2], [1, 0], [2, 1], [0, 1]]
    effects = convscope.effects(model, x, layer, how=how, targets=targets)
    plain = np.take_along_axis(convscope.predict(model, x).logits, np.array(targets), 1)
    np.testing.assert_allclose(effects.baseline, plain, rtol=1e-5, atol=1e-6)
    value = 0.0 if how == "zero" else "mean"
    for position, unit in enumerate(effects.units.tolist()):
        edited = convscope.edit(model, {layer: {unit: value}}, reference=x)
        changed = np.take_along_axis(convscope.predict(edited, x).logits, np.array(targets), 1)
        np.testing.assert_allclose(effects.logits[position], changed - plain, rtol=1e-4, atol=1e-5)


def test_resampled_maps_are_those_of_the_drawn_images(model, x):
    layer = model.layers.unique_spatial()[1].name
    effects = convscope.effects(model, x, layer, units=[2], how="resample", targets=0, seed=5)
    drawn = donors(range(len(x)), len(x), 5, same_images=True)
    assert all(donor != n for n, donor in enumerate(drawn))
    assert donors([2], len(x), 5, same_images=True) == drawn[2:3]  # whatever the batch is
    maps = convscope.activations(model, x, layer)[layer]
    plain = convscope.predict(model, x).logits[:, 0]
    for n, donor in enumerate(drawn):

        def replace(values, donor=donor):
            values[:, 2] = torch.from_numpy(maps[donor, 2])
            return values

        edited = convscope.edit(model, {layer: replace})
        expected = convscope.predict(edited, x[n : n + 1]).logits[0, 0] - plain[n]
        assert effects.logits[0, n, 0] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_affine_networks_give_the_closed_form(x):
    net = randomized(PooledClassifier()).eval()
    model = convscope.load(net, preprocessing={"size": SIZE})
    effects = convscope.effects(model, x, "features", targets=[[0, 3]] * len(x))
    with torch.no_grad():
        means = net.features(x).mean((2, 3))  # (N, C)
    expected = -means.T[:, :, None] * net.classifier.weight.detach()[[0, 3]].T[:, None]
    np.testing.assert_allclose(effects.logits, expected.numpy(), rtol=1e-4, atol=1e-6)
    # Nothing follows but one pass with gradients: no pass per unit.
    calls = []
    handle = net.classifier.register_forward_hook(lambda *_: calls.append(1))
    convscope.effects(model, x, "features", targets=0)
    few = len(calls)
    convscope.effects(model, x, "features", units=[0], targets=0)
    handle.remove()
    assert len(calls) == 2 * few


def test_labels_give_the_accuracy_and_do_not_change_the_effects(x):
    net = randomized(PooledClassifier()).eval()
    model = convscope.load(net, preprocessing={"size": SIZE})
    labels = [0, 1, 2, 3]
    effects = convscope.effects(model, x, "features", targets=1, labels=labels)
    np.testing.assert_allclose(
        effects.logits, convscope.effects(model, x, "features", targets=1).logits, rtol=1e-4, atol=1e-5
    )
    before = convscope.predict(model, x, top=1).indices[:, 0] == labels
    assert effects.baseline_accuracy == pytest.approx(before.mean())
    for unit in range(6):
        after = convscope.predict(convscope.edit(model, {"features": {unit: 0.0}}), x, top=1).indices[:, 0] == labels
        assert effects.accuracy[unit] == pytest.approx(after.mean() - before.mean())
        np.testing.assert_allclose(effects.class_accuracy[unit], after.astype(float) - before)
    assert (effects.interval[:, 0] <= effects.accuracy).all()
    assert (effects.accuracy <= effects.interval[:, 1]).all()


def test_curves_are_those_of_edited_models(model, x):
    layer, labels = model.layers.unique_spatial()[1], [0, 1, 2, 3]
    effects = convscope.effects(model, x, layer, targets=1, labels=labels, curve=True)
    assert effects.curve_counts.tolist() == [0, 1, 2, 4, 8]
    order = effects.units[np.argsort(effects.mean, kind="stable")]
    for count, logits, accuracy in zip(effects.curve_counts, effects.curve, effects.curve_accuracy, strict=True):
        edits = {layer: dict.fromkeys(order[:count].tolist(), 0.0)}
        edited = convscope.edit(model, edits) if count else model
        expected = convscope.predict(edited, x, top=1)
        np.testing.assert_allclose(logits[:, 0], expected.logits[:, 1], rtol=1e-4, atol=1e-5)
        assert accuracy == pytest.approx((expected.indices[:, 0] == labels).mean())
    np.testing.assert_array_equal(effects.random_curve[[0, -1]], effects.curve[[0, -1]])
    np.testing.assert_array_equal(effects.random_curve_accuracy[[0, -1]], effects.curve_accuracy[[0, -1]])
    shuffled = np.random.default_rng(0).permutation(order)[:2].tolist()
    edited = convscope.edit(model, {layer: dict.fromkeys(shuffled, 0.0)})
    correct = convscope.predict(edited, x, top=1).indices[:, 0] == labels
    assert effects.random_curve_accuracy[2] == pytest.approx(correct.mean())
    assert (effects.curve_interval[:, 0] <= effects.curve_accuracy).all()
    one = effects[1]
    np.testing.assert_array_equal(one.curve, effects.curve[:, 1:2])
    assert one.curve_accuracy is None
    one.figure()


def test_removing_a_class_of_the_last_layer_changes_that_class_alone(x):
    net = randomized(PooledClassifier()).eval()
    model = convscope.load(net, preprocessing={"size": SIZE})
    effects = convscope.effects(model, x, "classifier", targets=[[0, 1, 2, 3]] * len(x))
    logits = convscope.predict(model, x).logits
    expected = np.zeros((4, len(x), 4), np.float32)
    for k in range(4):
        expected[k, :, k] = -logits[:, k]
    np.testing.assert_allclose(effects.logits, expected, atol=1e-6)


def test_a_planted_unit_has_the_planted_effect(x):
    """Class 1 is the mean brightness in unit 2, and nothing else matters to it."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
        net[0].bias.zero_()
        net[4].weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 4.0]]))
        net[4].bias.zero_()
    model = convscope.load(net, preprocessing={"size": SIZE})
    effects = convscope.effects(model, x, "0", targets=1)
    np.testing.assert_allclose(effects.logits[:2], 0, atol=1e-6)
    np.testing.assert_allclose(effects.logits[2, :, 0], -4 * x[:, 2].relu().mean((1, 2)), rtol=1e-4)
    assert effects.top(1) == [2]


def test_batches_and_units_are_independent(model, x):
    layer = model.layers.unique_spatial()[1].name
    together = convscope.effects(model, x, layer, targets=0)
    single = convscope.effects(model, x[1:2], layer, units=[3], targets=0)
    np.testing.assert_allclose(together.logits[3, 1], single.logits[0, 0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        convscope.effects(model, x, layer, targets=0, memory=1).logits, together.logits, rtol=1e-4, atol=1e-6
    )


def test_nothing_is_left_behind(net, model, x):
    before = snapshot(net)
    layer = model.layers.unique_spatial()[0].name

    def stop(done: float, total: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.effects(model, x, layer, progress=stop)
    with pytest.raises(ConvscopeError, match="how is 'half'"):
        convscope.effects(model, x, layer, how="half")
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": [99]}, "unit 99"),
        ({"units": []}, "units is empty"),
        ({"labels": [0, 1]}, "labels has 2 classes for 4 images"),
        ({"reference": [], "how": "zero"}, "reference= needs"),
    ],
)
def test_wrong_arguments_are_refused(model, x, options, message):
    with pytest.raises(ConvscopeError, match=message):
        convscope.effects(model, x, model.layers.unique_spatial()[0], **options)


def test_a_saved_result_is_opened_again(model, x, tmp_path):
    effects = convscope.effects(model, x, model.layers.unique_spatial()[0], labels=[0, 1, 2, 0])
    opened = convscope.open(effects.save(tmp_path))
    for name, array in effects.arrays().items():
        np.testing.assert_array_equal(getattr(opened, name), array)
    assert str(opened) == str(effects)
    assert len(effects[1:3]) == 2
    assert effects[1].accuracy is None
