"""What the explorer holds: answers belong to the weights that gave them."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import nn

import convscope
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.state import WEIGHT_CHECK_INTERVAL, Explorer, Network
from tests.oracles.explorer import data_folder, smooth_image, tiny_model


def negated(module):
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(-1)


def exchanged(module):
    module.fc = nn.Linear(module.fc.in_features, module.fc.out_features)


def assigned(module):
    others = {name: -weight.detach() for name, weight in module.named_parameters()}
    module.load_state_dict(module.state_dict() | others, assign=True)


def pointed(module):
    for weight in module.parameters():
        weight.data = -weight.data


@pytest.mark.parametrize("change", [negated, exchanged, assigned, pointed])
def test_weights_that_the_user_changes_are_seen(change):
    model = tiny_model()
    explorer = Explorer({"tiny": model})
    shown, net, asker = explorer.images.add_sample(smooth_image(0), "a.png", "a.png"), explorer.first, Client("a", 60)
    before, version = explorer.predictions(asker, net, shown), net.version
    change(model.module)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert net.version != version
    known = convscope.predict(model, smooth_image(0))
    found = explorer.predictions(asker, net, shown)
    assert found != before
    assert [row["logit"] for row in found] == pytest.approx(known.logits[0, known.indices[0]].tolist(), rel=1e-4)
    explorer.close()


def test_long_work_sees_weights_that_are_trained_on():
    explorer = Explorer({"tiny": tiny_model()})
    shown, net, asker = explorer.images.add_sample(smooth_image(0), "a.png", "a.png"), explorer.first, Client("a", 60)
    before = explorer.layer_summaries(asker, net, shown)
    negated(net.model.module)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert explorer.layer_summaries(asker, net, shown) != before
    explorer.close()


def test_to_look_changes_nothing():
    explorer = Explorer({"tiny": tiny_model()})
    shown, net, asker = explorer.images.add_sample(smooth_image(0), "a.png", "a.png"), explorer.first, Client("a", 60)
    version = net.version
    for method in ("grad-cam", "lrp-zplus", "guided-backprop", "rise"):
        explorer.heatmap(asker, net, shown, [0], method=method)
    explorer.faithfulness(asker, net, shown, 0, None, "grad-cam", None)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert net.version == version
    explorer.close()


def test_weights_that_load_made_are_not_looked_at_again():
    net = Network("tiny", dataclasses.replace(tiny_model(), owned=True), "tiny")
    version = net.version
    negated(net.model.module)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert net.version == version


def test_what_a_store_holds_of_other_weights_is_not_shown(tmp_path):
    model = tiny_model()
    store = convscope.scan(model, data_folder(tmp_path / "data", 4), tmp_path / "store", layers=["relu3"], workers=0)
    net = Network("tiny", model, "tiny", store)
    assert net.store is store
    negated(model.module)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert net.store is None
    assert net.stored_patterns is None
