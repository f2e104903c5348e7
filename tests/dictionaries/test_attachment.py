"""Features as a layer: nothing changes until they are edited, and everything works on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convscope
from convscope import ConvscopeError
from convscope.editing.removal import RemovalRun
from convscope.explorer.service.model_copy import copy_model
from tests.dictionaries.conftest import LAYER
from tests.oracles.nets import SharedReluNet, diff_snapshots, randomized, snapshot

FEATURES = f"{LAYER}/dictionary"


def test_the_answers_are_the_same_bytes(net, model, attached, x):
    before = snapshot(net)
    for layers in (None, [FEATURES], [LAYER, "conv3"]):
        plain = [layer for layer in layers or () if layer != FEATURES]
        of_both = [convscope.activations(m, x, plain or LAYER) for m in (model, attached)]
        for layer in plain or [LAYER]:
            np.testing.assert_array_equal(of_both[0][layer], of_both[1][layer])
        if layers is not None:
            convscope.activations(attached, x, layers)
    np.testing.assert_array_equal(convscope.predict(attached, x).logits, convscope.predict(model, x).logits)
    for method in ("grad-cam", "saliency", "integrated-gradients"):
        maps = [convscope.heatmaps(m, x[:2], 1, method=method) for m in (model, attached)]
        assert maps[0].layer == maps[1].layer
        np.testing.assert_array_equal(maps[0].values, maps[1].values)
    assert diff_snapshots(before, snapshot(net)) == []


def test_activations_of_the_layer_are_the_encoded_features(model, attached, learned, x):
    features = convscope.activations(attached, x, FEATURES)[FEATURES]
    assert features.shape == (12, 24, 8, 8)
    np.testing.assert_allclose(features, learned.encode(model, x), rtol=1e-5, atol=1e-6)
    assert attached.layers[FEATURES].shape == (24, 8, 8)
    assert FEATURES not in model.layers
    assert [name for name in attached.layers.names if name != FEATURES] == model.layers.names


def test_effects_equal_their_closed_form_where_the_rest_is_affine(net, model, attached, learned, x):
    """After relu3 come mean and linear layer: removing f_i changes logit t by -mean(f_i) a_i . w_t."""
    effects = convscope.effects(attached, x, FEATURES, targets=2)
    features = learned.encode(model, x)
    expected = -features.mean((2, 3)).T * (learned.atoms @ net.fc.weight[2].detach().numpy())[:, None]
    np.testing.assert_allclose(effects.logits[:, :, 0], expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected).max() > 0.01


def test_features_that_are_0_on_an_image_take_no_pass(model, x, monkeypatch):
    """Their effects are exactly 0, as the network without them is the network itself; the others are those of edits."""
    sparse = convscope.dictionary(model, x, "relu2", features=24, active=1, steps=20)
    attached, layer = sparse.attach(model), "relu2/dictionary"
    active = sparse.encode(model, x[:3]).max((2, 3)) > 0  # (3, 24)
    rows = []
    run = RemovalRun._run

    def counted(self, resumed, images, *arguments):
        rows.extend(images.tolist())
        return run(self, resumed, images, *arguments)

    monkeypatch.setattr(RemovalRun, "_run", counted)
    effects = convscope.effects(attached, x[:3], layer, targets=2, labels=[0, 1, 2])
    assert 0 < active.sum() < active.size
    assert np.bincount(rows, minlength=3).tolist() == active.sum(1).tolist()
    assert (effects.logits[:, :, 0][~active.T] == 0).all()
    for feature in (int(active.any(0).argmax()), int(active.any(0).argmin())):
        edited = convscope.edit(attached, {layer: {feature: 0.0}})
        change = [convscope.predict(m, x[:3]).logits[:, 2] for m in (edited, model)]
        np.testing.assert_allclose(effects.logits[feature, :, 0], change[0] - change[1], atol=1e-5)


def test_edits_act_by_the_atoms(net, model, attached, learned, x):
    feature = int(learned.density.argmax())
    edited = convscope.edit(attached, {FEATURES: {feature: 0.5}})
    features = learned.encode(model, x)
    change = (0.5 - features[:, feature]).mean((1, 2))[:, None] * (
        net.fc.weight.detach().numpy() @ learned.atoms[feature]
    )
    logits = convscope.predict(edited, x).logits - convscope.predict(model, x).logits
    np.testing.assert_allclose(logits, change, rtol=1e-3, atol=1e-5)
    assert len({m.weights_hash() for m in (model, attached, edited)}) == 3


def test_heatmaps_patterns_and_scans_take_the_layer(attached, learned, x, tmp_path):
    feature = int(learned.density.argmax())
    maps = convscope.heatmaps(attached, x[:2], 1, layer=FEATURES)
    assert maps.values.shape == (2, 1, 8, 8)
    assert np.abs(maps.values).max() > 0
    patterns = convscope.patterns(attached, FEATURES, [feature], steps=24, size=16)
    assert patterns.scores[0] > patterns.noise_scores[0]
    images = [np.uint8(np.random.default_rng(n).integers(0, 255, (16, 16, 3))) for n in range(4)]
    store = convscope.scan(attached, images, tmp_path / "store", layers=[FEATURES], k=2)
    assert FEATURES in str(store.layers)


def test_resuming_before_at_and_after_the_features(model, attached, x):
    for layer in ("conv3", LAYER, FEATURES, "gap"):
        units = convscope.effects(attached, x[:2], layer, range(3), targets=1, labels=[0, 1])
        if layer != FEATURES:
            plain = convscope.effects(model, x[:2], layer, range(3), targets=1, labels=[0, 1])
            np.testing.assert_allclose(units.logits, plain.logits, rtol=1e-5, atol=1e-6)


def test_a_copy_has_modules_of_its_own(attached, x):
    copied = copy_model(attached)
    theirs, ours = (m.modules_and_parameters()[0][FEATURES] for m in (copied, attached))
    assert theirs is not ours
    edited = convscope.edit(copied, {FEATURES: {0: 1.0}})
    assert not np.array_equal(convscope.predict(edited, x).logits, convscope.predict(copied, x).logits)
    np.testing.assert_array_equal(convscope.predict(copied, x).logits, convscope.predict(attached, x).logits)


def test_a_second_call_of_a_layer_can_have_a_dictionary():
    model = convscope.load(randomized(SharedReluNet()), preprocessing={"size": 16})
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    layer = next(row.name for row in model.layers if row.name.endswith("#2"))
    attached = convscope.dictionary(model, x, layer, features=8, active=2, steps=5).attach(model)
    np.testing.assert_array_equal(convscope.predict(attached, x).logits, convscope.predict(model, x).logits)
    effects = convscope.effects(attached, x[:1], f"{layer}/dictionary", targets=0)
    assert np.isfinite(effects.logits).all()
    assert np.abs(effects.logits).max() > 0


def test_layers_that_do_not_fit_are_refused(model, attached, learned, x):
    with pytest.raises(ConvscopeError, match="has 8 units; the dictionary is of a layer with 10"):
        learned.attach(model, "relu1")
    with pytest.raises(ConvscopeError, match="has a dictionary already"):
        learned.attach(attached)
    with pytest.raises(ConvscopeError, match="active is 9; expected at most features, 8"):
        convscope.dictionary(model, x, LAYER, features=8, active=9)
    with pytest.raises(ConvscopeError, match="not known"):
        convscope.dictionary(model, x, LAYER, method="kmeans")
