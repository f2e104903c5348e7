"""What the explorer says of a picture is what the library says; its own measures by hand."""

from __future__ import annotations

import shlex
import threading

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope.engine import capture
from convscope.explorer.service import compute
from convscope.explorer.service.jobs import ClientDisconnected
from convscope.explorer.service.model_copy import copy_model
from convscope.explorer.service.patterns import VARIANTS, PatternSpec
from convscope.explorer.service.state import Explorer
from convscope.explorer.views import snippets
from convscope.images.colormap import lookup_table
from convscope.plotting.figures import standard
from tests.oracles.explorer import smooth_image, tiny_model
from tests.oracles.nets import Usual, filled


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def x(model):
    return compute.preprocess(model, smooth_image())


def test_predictions_are_the_librarys(model, x):
    said = compute.predictions(model, x, 3)
    known = convscope.predict(model, [smooth_image()], top=3)
    assert [row["index"] for row in said] == known.indices[0].tolist()
    assert [row["probability"] for row in said] == pytest.approx(known.probabilities[0].tolist())
    assert [row["logit"] for row in said] == pytest.approx(known.logits[0][known.indices[0]].tolist())


def test_heat_is_the_librarys_to_16_bits(model, x):
    found = compute.heatmap(model, x, [2, 0], layer="relu2", method="layer-cam", against=1)
    known = convscope.heatmaps(model, [smooth_image()], [[2, 0]], layer="relu2", method="layer-cam", against=1)
    for t, one in enumerate(found):
        values = compute.unpack_map(one["map"])
        assert np.abs(values - known.values[0, t]).max() <= np.abs(known.values[0, t]).max() / 32767
        assert one["logit"] == pytest.approx(float(known.logits[0, t]), rel=1e-5)
    assert [one["target"] for one in found] == [2, 0]


def test_notes_are_of_their_own_class():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].bias.fill_(1.0)
        net[4].weight.fill_(0.5)
        net[4].weight[1] = -0.5
    for names in (["cat", "tiger cat", "cat: tiger"], None):
        loaded = convscope.load(net, preprocessing={"size": 32}, classes=names)
        found = compute.heatmap(loaded, compute.preprocess(loaded, smooth_image()), [0, 1, 2], layer="1")
        said = "tiger cat" if names else "class 1"
        assert [len(one["notes"]) for one in found] == [0, 1, 0]
        assert found[1]["notes"][0].startswith(f"{said}: the map is negative everywhere")


def test_packed_maps_come_back():
    values = np.array([[-2.0, 0, 1], [0.5, 2, -0.25]], np.float32)
    assert compute.unpack_map(compute.pack_map(values)) == pytest.approx(values, abs=2 / 32767)
    assert (compute.unpack_map(compute.pack_map(np.zeros((2, 3), np.float32))) == 0).all()


def test_relevance_of_the_last_layer_adds_up_to_the_logit_less_its_bias(model, x):
    logit = convscope.predict(model, x).logits[0, 3]
    bias = float(model.module.fc.bias[3].detach())
    assert compute.relevance(model, x, "relu3", 3).sum() == pytest.approx(logit - bias, rel=1e-4)


def test_relevance_is_activation_times_slope_by_finite_differences(model, x):
    found = compute.relevance(model, x, "relu2", 1)
    own = compute.feature_maps(model, x, "relu2")
    module, step = model.module, 1e-3
    for unit in (0, 7):
        scale = torch.ones(1, len(own), 1, 1)

        def logit(factor, unit=unit, scale=scale):
            scale[0, unit] = factor
            hook = module.relu2.register_forward_hook(lambda m, i, o: o * scale)
            with torch.no_grad():
                value = float(module(x)[0, 1])
            hook.remove()
            return value

        slope = (logit(1 + step) - logit(1 - step)) / (2 * step)
        assert found[unit] == pytest.approx(slope, abs=2e-3)


def test_channel_table_and_layer_summary_by_hand():
    maps = np.zeros((10, 2, 2), np.float32)
    maps[0] = [[1, 2], [0, -1]]
    maps[1] = 3
    table = compute.channel_statistics(maps)
    assert table["mean"][:2] == [0.5, 3]
    assert table["max"][:2] == [2, 3]
    assert table["active"][:2] == [0.5, 1]
    assert table["dead"] == [False] + [True] * 9
    told = compute.layer_summary(maps)
    assert told["dead"] == pytest.approx(0.9)
    assert told["sparsity"] == pytest.approx(1 - 6 / 40)
    assert told["busiest tenth"] == pytest.approx(12 / 15)


def test_summaries_of_all_layers_are_those_of_each(model, x):
    names = [row.name for row in model.layers.distinct()]
    told = compute.layer_summaries(model, x, names, lambda done, total: None, batch_size=2)
    assert list(told) == names
    for name in names:
        assert told[name] == pytest.approx(compute.layer_summary(compute.feature_maps(model, x, name)))


def test_a_sheet_holds_each_map_in_its_cell(model, x):
    maps = compute.feature_maps(model, x, "relu2")
    image, measures = compute.channel_sheet(maps)
    shown = np.asarray(image.convert("RGB"))
    for unit in (0, 5, 11):
        y = unit // measures["columns"] * measures["height"]
        left = unit % measures["columns"] * measures["width"]
        cell = shown[y : y + measures["height"], left : left + measures["width"]]
        assert (cell == lookup_table("viridis")[standard(maps)[unit]]).all()


def test_large_maps_are_averaged_on_sheets():
    maps = np.arange(4 * 120 * 60, dtype=np.float32).reshape(4, 120, 60)
    image, measures = compute.channel_sheet(maps)
    assert (measures["height"], measures["width"]) == (40, 20)
    small = maps.reshape(4, 40, 3, 20, 3).mean((2, 4))
    assert (np.asarray(image)[:40, :20] == standard(small)[0]).all()


def test_the_strongest_units_at_a_place_by_brute_force(model, x):
    maps = compute.feature_maps(model, x, "relu2")
    told = compute.units_at_position(model, maps, "relu2", 4, 9)
    here = sorted(((float(m[4, 9]), -u) for u, m in enumerate(maps) if m[4, 9] > 0), reverse=True)
    assert [(u["unit"], u["value"]) for u in told["units"]] == [(-u, v) for v, u in here]


def test_what_a_place_sees_is_where_the_picture_matters(model):
    top, left, bottom, right = compute.receptive_field_box(model, "relu3", 5, 7)
    # Every weight counts, whatever the rectifiers do: the bound is for all pictures.
    rows, columns = [], []
    for _ in range(40):
        noise = torch.randn(1, 3, 32, 32, requires_grad=True)
        y = model.module.pool(model.module.relu1(model.module.bn1(model.module.conv1(noise))))
        y = model.module.conv3(model.module.relu2(model.module.conv2(y)))
        (slope,) = torch.autograd.grad(y[0, :, 5, 7].sum(), noise)
        _, r, c = slope[0].nonzero().T.tolist()
        rows += r
        columns += c
    assert (min(rows) / 32, min(columns) / 32) == (top, left)
    assert ((max(rows) + 1) / 32, (max(columns) + 1) / 32) == (bottom, right)


def test_a_twin_shares_the_weights_and_nothing_else(model, x):
    other = copy_model(model)
    assert other.module is not model.module
    for ours, theirs in zip(model.module.parameters(), other.module.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
        assert not theirs.requires_grad
    assert convscope.predict(other, x).logits == pytest.approx(convscope.predict(model, x).logits)
    net = filled(Usual())
    own = convscope.load(net, preprocessing={"size": 32})
    seen = copy_model(own)
    with torch.no_grad():
        net.fc.bias += 1
    assert all(p.requires_grad for p in net.parameters())
    assert convscope.predict(seen, x).logits == pytest.approx(convscope.predict(own, x).logits)


def test_work_beside_a_running_answer_has_hooks_of_its_own():
    explorer = Explorer({"tiny": tiny_model()})
    net = explorer.first
    with capture.capture_layers(net.model, ["relu2"]):
        assert net.model.module.relu2._forward_hooks
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.background_model.module.modules())


def test_two_threads_on_twins_do_not_disturb_each_other(model, x):
    other = copy_model(model)
    known = compute.heatmap(model, x, [1], layer="relu2")[0]["map"]
    found, ends = [], []

    def beside():
        while not ends:
            compute.relevance(other, x, "relu1", 2)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        found = [compute.heatmap(model, x, [1], layer="relu2")[0]["map"] for _ in range(30)]
    finally:
        ends.append(1)
        thread.join()
    assert all(one == known for one in found)


def test_faithfulness_is_the_librarys(model, x):
    told = compute.faithfulness(model, x, 2)
    scores = convscope.evaluate(model, [smooth_image()], convscope.heatmaps(model, [smooth_image()], 2), steps=14)
    assert {row["metric"]: row["mean"] for row in told["rows"]} == pytest.approx(
        {name: scores.mean(name) for name in ("deletion", "insertion")}, rel=1e-4
    )
    assert all(len(row["curve"]) == 15 for row in told["rows"])


def test_faithfulness_that_nobody_waits_for_ends_in_its_heatmap(model, x, monkeypatch):
    def gone(done, total):
        raise ClientDisconnected

    monkeypatch.setattr(compute, "evaluate", lambda *given, **more: pytest.fail("went on"))
    with pytest.raises(ClientDisconnected):
        compute.faithfulness(model, x, 2, method="rise", report_progress=gone)


def test_the_lines_are_programs_that_run(model):
    """Hostile names included: what is pasted means the file and nothing else."""
    told = snippets.heatmap("lite0", "it's; rm -rf $HOME.png", 3, None, "layer-cam", 7)
    assert shlex.split(told["shell"]) == [
        "convscope", "heatmap", "lite0", "it's; rm -rf $HOME.png",
        "--target", "3", "--method", "layer-cam", "--against", "7",
    ]  # fmt: skip
    seen = []

    class Fake:
        def load(self, name):
            return name

        def heatmaps(self, *given, **more):
            seen.append((given, more))
            return self

        def overlay(self):
            return [0]

        patterns = heatmaps

    exec(told["python"], {"convscope": Fake()})
    assert seen == [(("lite0", "it's; rm -rf $HOME.png", 3), {"method": "layer-cam", "against": 7})]
    assert shlex.split(snippets.activations("m", "-x.png", "a b")["shell"])[3] == "./-x.png"
    for look in VARIANTS:
        exec(
            snippets.pattern("lite0", PatternSpec("conv1", 3, look, "maco", 1), model)["python"], {"convscope": Fake()}
        )
    assert len(seen) == 4


@pytest.mark.parametrize("look", ["negative", "diverse"])
@pytest.mark.parametrize("layer", ["relu2", "logits"])
def test_the_lines_of_patterns_draw_what_the_page_draws(model, monkeypatch, layer, look):
    what = PatternSpec(layer, 3, look)
    found = []
    monkeypatch.setattr(convscope, "load", lambda name: model)
    draw = convscope.patterns
    monkeypatch.setattr(convscope, "patterns", lambda *given, **more: found.append(draw(*given, **more, steps=2)))
    exec(snippets.pattern("tiny", what, model)["python"], {"convscope": convscope})
    known = draw(model, what.objective(model), steps=2)
    assert (found[0].images == known.images).all()
