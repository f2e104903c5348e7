"""Computations of the explorer agree with the library; its own statistics are checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope.explorer.service import compute
from convscope.explorer.service.compute import HeatmapOptions
from convscope.explorer.service.jobs import ClientDisconnected
from convscope.images.colormap import lookup_table
from convscope.plotting.activations import standardize
from tests.oracles.explorer import smooth_image


@pytest.fixture(scope="module")
def x(tiny):
    return compute.preprocess(tiny, smooth_image())


def test_predictions_agree_with_the_library(tiny, x):
    rows = compute.predictions(tiny, x, 3)
    expected = convscope.predict(tiny, [smooth_image()], top=3)
    assert [row["index"] for row in rows] == expected.indices[0].tolist()
    assert [row["probability"] for row in rows] == pytest.approx(expected.probabilities[0].tolist())
    assert [row["logit"] for row in rows] == pytest.approx(expected.logits[0][expected.indices[0]].tolist())


def test_heatmaps_agree_with_the_library_to_16_bits(tiny, x):
    options = {"layer": "relu2", "method": "layer-cam", "against": 1}
    records = compute.heatmap(tiny, x, [2, 0], HeatmapOptions(**options))
    expected = convscope.heatmaps(tiny, [smooth_image()], [[2, 0]], **options)
    for t, record in enumerate(records):
        error = np.abs(compute.unpack_map(record["map"]) - expected.values[0, t]).max()
        assert error <= np.abs(expected.values[0, t]).max() / 32767
        assert record["logit"] == pytest.approx(float(expected.logits[0, t]), rel=1e-5)
    assert [record["target"] for record in records] == [2, 0]


@pytest.mark.parametrize("classes", [["cat", "tiger cat", "cat: tiger"], None])
def test_notes_go_with_their_own_class(classes):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].bias.fill_(1.0)
        net[4].weight.fill_(0.5)
        net[4].weight[1] = -0.5
    model = convscope.load(net, preprocessing={"size": 32}, classes=classes)
    records = compute.heatmap(model, compute.preprocess(model, smooth_image()), [0, 1, 2], HeatmapOptions(layer="1"))
    assert [len(record["notes"]) for record in records] == [0, 1, 0]
    name = "tiger cat" if classes else "class 1"
    assert records[1]["notes"][0].startswith(f"{name}: the map is negative everywhere")


def test_packed_maps_are_unpacked_to_16_bits():
    values = np.array([[-2.0, 0, 1], [0.5, 2, -0.25]], np.float32)
    assert compute.unpack_map(compute.pack_map(values)) == pytest.approx(values, abs=2 / 32767)
    assert (compute.unpack_map(compute.pack_map(np.zeros((2, 3), np.float32))) == 0).all()


def test_relevance_of_the_last_layer_adds_up_to_the_logit_minus_its_bias(tiny, x):
    logit = convscope.predict(tiny, x).logits[0, 3]
    bias = float(tiny.module.fc.bias[3].detach())
    assert compute.relevance(tiny, x, "relu3", 3).sum() == pytest.approx(logit - bias, rel=1e-4)


def test_relevance_agrees_with_finite_differences(tiny, x):
    relevance = compute.relevance(tiny, x, "relu2", 1)
    module, step = tiny.module, 1e-3
    for unit in (0, 7):
        scale = torch.ones(1, len(relevance), 1, 1)

        def logit(factor, unit=unit, scale=scale):
            scale[0, unit] = factor
            hook = module.relu2.register_forward_hook(lambda module, args, output: output * scale)
            with torch.no_grad():
                value = float(module(x)[0, 1])
            hook.remove()
            return value

        slope = (logit(1 + step) - logit(1 - step)) / (2 * step)
        assert relevance[unit] == pytest.approx(slope, abs=2e-3)


def test_channel_statistics_and_layer_summary_by_hand():
    maps = np.zeros((10, 2, 2), np.float32)
    maps[0] = [[1, 2], [0, -1]]
    maps[1] = 3
    statistics = compute.channel_statistics(maps)
    assert statistics["mean"][:2] == [0.5, 3]
    assert statistics["max"][:2] == [2, 3]
    assert statistics["active"][:2] == [0.5, 1]
    assert statistics["dead"] == [False] + [True] * 9
    summary = compute.layer_summary(maps)
    assert summary["dead"] == pytest.approx(0.9)
    assert summary["sparsity"] == pytest.approx(1 - 6 / 40)
    assert summary["top_decile_share"] == pytest.approx(12 / 15)


def test_layer_summaries_do_not_depend_on_the_batch_size(tiny, x):
    names = [layer.name for layer in tiny.layers.unique_spatial()]
    summaries = compute.layer_summaries(tiny, x, names, lambda done, total: None, batch_size=2)
    assert list(summaries) == names
    for name in names:
        assert summaries[name] == pytest.approx(compute.layer_summary(compute.feature_maps(tiny, x, name)))


def test_sheet_shows_each_map_in_its_tile(tiny, x):
    maps = compute.feature_maps(tiny, x, "relu2")
    image, layout = compute.channel_sheet(maps)
    pixels = np.asarray(image.convert("RGB"))
    for unit in (0, 5, 11):
        top = unit // layout["columns"] * layout["height"]
        left = unit % layout["columns"] * layout["width"]
        tile = pixels[top : top + layout["height"], left : left + layout["width"]]
        assert (tile == lookup_table("viridis")[standardize(maps)[unit]]).all()


def test_large_maps_are_averaged_on_sheets():
    maps = np.arange(4 * 120 * 60, dtype=np.float32).reshape(4, 120, 60)
    image, layout = compute.channel_sheet(maps)
    assert (layout["height"], layout["width"]) == (40, 20)
    averaged = maps.reshape(4, 40, 3, 20, 3).mean((2, 4))
    assert (np.asarray(image)[:40, :20] == standardize(averaged)[0]).all()


def test_strongest_units_at_a_position_by_brute_force(tiny, x):
    maps = compute.feature_maps(tiny, x, "relu2")
    record = compute.units_at_position(tiny, maps, "relu2", 4, 9)
    expected = sorted(((float(m[4, 9]), -u) for u, m in enumerate(maps) if m[4, 9] > 0), reverse=True)
    assert [(unit["unit"], unit["value"]) for unit in record["units"]] == [(-u, v) for v, u in expected]


def test_receptive_field_box_bounds_the_gradients(tiny):
    top, left, bottom, right = compute.receptive_field_box(tiny, "relu3", 5, 7)
    module = tiny.module
    rows, columns = [], []
    for _ in range(40):  # a bound for all images: a single one may leave some ReLUs off
        noise = torch.randn(1, 3, 32, 32, requires_grad=True)
        y = module.pool(module.relu1(module.bn1(module.conv1(noise))))
        y = module.conv3(module.relu2(module.conv2(y)))
        (gradient,) = torch.autograd.grad(y[0, :, 5, 7].sum(), noise)
        _, r, c = gradient[0].nonzero().T.tolist()
        rows += r
        columns += c
    assert (min(rows) / 32, min(columns) / 32) == (top, left)
    assert ((max(rows) + 1) / 32, (max(columns) + 1) / 32) == (bottom, right)


def test_faithfulness_agrees_with_the_library(tiny, x):
    record = compute.faithfulness(tiny, x, 2)
    scores = convscope.evaluate(tiny, [smooth_image()], convscope.heatmaps(tiny, [smooth_image()], 2), steps=14)
    assert {row["metric"]: row["mean"] for row in record["rows"]} == pytest.approx(
        {name: scores.mean(name) for name in ("deletion", "insertion")}, rel=1e-4
    )
    assert [row["better"] for row in record["rows"]] == ["lower", "higher"]
    assert all(len(row["curve"]) == 15 for row in record["rows"])


def test_faithfulness_is_cancelled_while_the_heatmap_is_computed(tiny, x, monkeypatch):
    def disconnect(done, total):
        raise ClientDisconnected

    monkeypatch.setattr(compute, "evaluate", lambda *args, **kwargs: pytest.fail("was not cancelled"))
    with pytest.raises(ClientDisconnected):
        compute.faithfulness(tiny, x, 2, HeatmapOptions(method="rise"), disconnect)
