"""Served models: results belong to the weights that gave them."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import nn

import convscope
from convscope.explorer.service.compute import HeatmapOptions
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.networks import WEIGHT_CHECK_INTERVAL, Network, url_key
from convscope.explorer.service.state import Explorer
from tests.oracles.explorer import data_folder, smooth_image, tiny_model


@pytest.fixture
def explorer():
    explorer = Explorer({"tiny": tiny_model()})
    explorer.images.add_sample(smooth_image(0), "a.png", "a.png")
    yield explorer
    explorer.close()


def negate_in_place(module):
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(-1)


def replace_layer(module):
    module.fc = nn.Linear(module.fc.in_features, module.fc.out_features)


def assign_state_dict(module):
    negated = {name: -weight.detach() for name, weight in module.named_parameters()}
    module.load_state_dict(module.state_dict() | negated, assign=True)


def replace_data(module):
    for weight in module.parameters():
        weight.data = -weight.data


@pytest.mark.parametrize("change", [negate_in_place, replace_layer, assign_state_dict, replace_data])
def test_predictions_follow_weights_that_the_user_changes(explorer, change):
    (image,), net, client = explorer.images.samples, explorer.first, Client("a", 60)
    before, version = explorer.predictions(client, net, image), net.version
    change(net.model.module)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert net.version != version
    expected = convscope.predict(net.model, smooth_image(0))
    predictions = explorer.predictions(client, net, image)
    assert predictions != before
    logits = expected.logits[0, expected.indices[0]].tolist()
    assert [row["logit"] for row in predictions] == pytest.approx(logits, rel=1e-4)


def test_background_jobs_follow_weights_that_the_user_changes(explorer):
    (image,), net, client = explorer.images.samples, explorer.first, Client("a", 60)
    before = explorer.layer_summaries(client, net, image)
    negate_in_place(net.model.module)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert explorer.layer_summaries(client, net, image) != before


def test_computations_do_not_change_the_version(explorer):
    (image,), net, client = explorer.images.samples, explorer.first, Client("a", 60)
    version = net.version
    for method in ("grad-cam", "lrp-zplus", "guided-backprop", "rise"):
        explorer.heatmap(client, net, image, [0], HeatmapOptions(method=method))
    explorer.faithfulness(client, net, image, 0, HeatmapOptions())
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert net.version == version


def test_weights_of_models_that_load_made_are_not_checked():
    net = Network("tiny", dataclasses.replace(tiny_model(), loaded_by_convscope=True), "tiny")
    version = net.version
    negate_in_place(net.model.module)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert net.version == version


def test_store_is_ignored_once_the_weights_change(tmp_path):
    model = tiny_model()
    store = convscope.scan(model, data_folder(tmp_path / "data", 4), tmp_path / "store", layers=["relu3"], workers=0)
    net = Network("tiny", model, "tiny", store)
    assert net.store is store
    negate_in_place(model.module)
    time.sleep(WEIGHT_CHECK_INTERVAL)
    assert net.store is None
    assert net.stored_patterns is None


def test_url_keys_are_safe():
    names = ("lite0", "torchvision:vgg16", "/home/me/my net.keras", "..")
    assert [url_key(name) for name in names] == ["lite0", "torchvision-vgg16", "my-net.keras", "model"]


def test_models_of_the_same_file_name_get_different_keys():
    sources = ["runs/1/net.keras", "runs/2/net.keras", "net.keras-2"]
    explorer = Explorer({source: tiny_model() for source in sources})
    assert list(explorer.networks) == ["net.keras", "net.keras-2", "net.keras-2-2"]
    assert [net.source for net in explorer.networks.values()] == sources
