"""Randomised weights, other classes, noise: and the network comes back bit for bit, however the work ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution import registry
from convscope.attribution.context import MethodContext
from convscope.attribution.registry import ModelMethod
from convscope.evaluation.randomisation import cascade_order, randomize, temporary_parameters
from convscope.evaluation.registry import METRICS
from convscope.evaluation.sanity import _derived_generator, _layer_groups
from convscope.evaluation.statistics import spearman
from tests.oracles.judged import pictures, usual
from tests.oracles.nets import Twice, Usual, changes, filled, lived_in, snapshot

AGAIN = [name for name, metric in METRICS.items() if "heatmaps" in metric.needs]


def edges(question: MethodContext) -> Tensor:
    """An explainer that asks the network nothing: how far each pixel is from the one above."""
    grey = question.x.mean(1)
    return (grey - grey.roll(1, 1)).abs()[:, None].expand(-1, question.num_targets, -1, -1)


def slopes(question: MethodContext) -> Tensor:
    """The gradient of the score at each pixel."""
    return question.gradients(question.x)[0].mean(2).transpose(0, 1)


@pytest.fixture(autouse=True)
def explainers(monkeypatch):
    for explainer in (edges, slopes):
        monkeypatch.setitem(registry.METHODS, explainer.__name__, ModelMethod(explainer))


# --- does the map depend on the weights? -----------------------------------------------------------------------------


def test_an_explainer_that_ignores_the_network_fails():
    model, x = usual(), pictures(3, 24, channels=3)
    heat = convscope.heatmaps(model, x, [[0, 1]] * 3, method="edges")
    found = convscope.evaluate(model, x, heat, ["randomisation", "random-logit"])
    np.testing.assert_array_equal(found["randomisation"], 1)
    np.testing.assert_array_equal(found.curves["randomisation-absolute"], 1)
    np.testing.assert_array_equal(found["random-logit"], 1)
    assert any("shows edges of the image, not evidence" in note for note in found.notes)
    assert any("nearly the same for another class" in note for note in found.notes)


def test_the_gradient_of_the_network_passes():
    model, x = usual(), pictures(3, 24, channels=3)
    heat = convscope.heatmaps(model, x, [[0, 1]] * 3, method="slopes")
    found = convscope.evaluate(model, x, heat, "randomisation")
    assert np.abs(found["randomisation"]).max() < 0.3
    np.testing.assert_array_equal(found.curves["randomisation"][..., 0], 1)
    assert found.curves["randomisation"][..., 1].min() < 0.999, "the first stage has changed something"
    assert not any(note.startswith("randomisation") for note in found.notes)


def test_each_stage_is_the_map_of_a_network_with_those_weights_redrawn():
    """By hand: a copy of the network whose layers are redrawn in the same order, and its own heatmaps."""
    model, x = usual(), pictures(2, 24, channels=3)
    heat = convscope.heatmaps(model, x, 1, layer="conv2", method="hirescam")
    found = convscope.evaluate(model, x, heat, "randomisation", stages=3, seed=7)
    draw = _derived_generator(torch.Generator().manual_seed(7))
    copy = usual()
    order = ["fc", "bn3", "conv3", "conv2", "bn1", "conv1"]
    assert [name for name, _ in cascade_order(copy)] == order
    expected, absolute = [np.ones((2, 1))], [np.ones((2, 1))]
    for group in (["fc"], ["bn3", "conv3"], ["conv2", "bn1", "conv1"]):
        for name in group:
            for p in getattr(copy.module, name).parameters():
                p.data = randomize(p.data, draw)
        new = convscope.heatmaps(copy, x, 1, layer="conv2", method="hirescam").values
        pair = [torch.from_numpy(v).flatten(2) for v in (new, heat.values)]
        expected.append(spearman(*pair).numpy())
        absolute.append(spearman(*(v.abs() for v in pair)).numpy())
    np.testing.assert_allclose(found.curves["randomisation-absolute"], np.stack(absolute, 2), atol=1e-6)
    assert not np.allclose(expected, absolute)
    np.testing.assert_allclose(found.curves["randomisation"], np.stack(expected, 2), atol=1e-6)
    np.testing.assert_array_equal(found["randomisation"], found.curves["randomisation"][..., -1])


def test_weights_drawn_from_the_same_seed_are_drawn_anew():
    """The network's top layer holds the very numbers that follow `torch.manual_seed(0)`; the seed is 0."""
    model, x = usual(), pictures(3, 24, channels=3)
    with torch.no_grad():
        model.module.fc.weight.copy_(torch.randn(5, 10, generator=torch.Generator().manual_seed(0)))
    heat = convscope.heatmaps(model, x, 1)
    found = convscope.evaluate(model, x, heat, "randomisation", stages=6, seed=0)
    assert found.curves["randomisation"][..., 1].max() < 0.999


@pytest.mark.parametrize(("count", "stages"), [(1, 8), (2, 8), (6, 1), (6, 3), (9, 9), (50, 8)])
def test_stages_hold_every_layer_once(count, stages):
    groups = _layer_groups(count, stages)
    assert [i for group in groups for i in group] == list(range(count))
    assert len(groups) == min(count, stages)
    assert stages == 1 or len(groups[0]) == 1
    assert max(map(len, groups[1:]), default=0) - min(map(len, groups[1:]), default=0) <= 1


def test_redrawn_weights_keep_their_scale_and_nothing_else():
    draw = torch.Generator().manual_seed(1)
    kernel = (torch.randn(64, 32, 3, 3) * 0.3 + 0.1).to(memory_format=torch.channels_last)
    new = randomize(kernel, draw)
    assert float(new.square().mean().sqrt()) == pytest.approx(float(kernel.square().mean().sqrt()), rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([new.flatten(), kernel.flatten()]))[0, 1])) < 0.03
    assert new.stride() == kernel.stride()
    assert randomize(torch.ones(4, 4), draw).std() > 0, "also where all weights are the same"
    scale = torch.rand(50)
    assert not torch.equal(randomize(scale, draw), scale)
    assert torch.equal(randomize(scale, draw).sort().values, scale.sort().values)
    assert randomize(torch.ones(3, 3, dtype=torch.bfloat16), draw).dtype == torch.bfloat16
    count = torch.tensor([3, 4])
    assert randomize(count, draw) is count


def test_a_layer_that_runs_twice_is_redrawn_once():
    model = convscope.load(filled(Twice()), preprocessing={"size": 24})
    assert [name for name, _ in cascade_order(model)] == ["fc", "conv2", "conv1"]


def test_shared_weights_are_redrawn_once():
    net = filled(Usual())
    net.twin = nn.Conv2d(3, 8, 3, padding=1)
    net.twin.weight = net.conv1.weight
    found = cascade_order(convscope.load(net, preprocessing={"size": 24}))
    own = [id(p) for _, of in found for p in of]
    assert len(own) == len(set(own)) == len(list(net.parameters()))
    assert found[-1][0] == "the rest", "what did not run comes last"


# --- does it depend on the class, and not on noise? ------------------------------------------------------------------


def test_random_logit_is_the_map_for_a_class_further_on():
    model, x = usual(), pictures(3, 24, channels=3)
    heat = convscope.heatmaps(model, x, [[0, 3]] * 3, method="slopes")
    found = convscope.evaluate(model, x, heat, "random-logit", seed=2)["random-logit"]
    further = int(torch.randint(1, 5, (), generator=torch.Generator().manual_seed(2)))
    other = convscope.heatmaps(model, x, [[further, (3 + further) % 5]] * 3, method="slopes").values
    expected = spearman(*(torch.from_numpy(v).flatten(2) for v in (other, heat.values)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.max() < 0.99


def test_random_logit_needs_two_classes():
    model = convscope.load(filled(Usual(classes=1)), preprocessing={"size": 24})
    x = pictures(2, 24, channels=3)
    with pytest.raises(ConvscopeError, match="this network has one output"):
        convscope.evaluate(model, x, convscope.heatmaps(model, x, 0), "random-logit")
    model = usual()
    heat = convscope.heatmaps(model, x, lambda out: out[:, 0] - out[:, 1])
    with pytest.raises(ConvscopeError, match="random-logit needs classes"):
        convscope.evaluate(model, x, heat, "random-logit")
    assert np.isfinite(convscope.evaluate(model, x, heat, "randomisation")["randomisation"]).all()


def test_max_sensitivity_is_its_definition():
    model, x = usual(), pictures(2, 24, channels=3)
    heat = convscope.heatmaps(model, x, 1)
    found = convscope.evaluate(model, x, heat, "max-sensitivity", samples=4, radius=0.1, seed=3)["max-sensitivity"]
    draw = torch.Generator().manual_seed(3)
    noise = [2 * torch.rand(x.shape[1:], generator=draw) - 1 for _ in range(4)]
    for n in range(2):
        reach = 0.1 * (x[n].max() - x[n].min())
        changed = [convscope.heatmaps(model, (x[n] + reach * e)[None], 1).values[0, 0] for e in noise]
        then = heat.values[n, 0]
        expected = max(np.linalg.norm(now - then) / np.linalg.norm(then) for now in changed)
        assert found[n, 0] == pytest.approx(expected, rel=1e-3)
    assert found.min() > 0.001


def test_the_targets_stay_when_the_top_class_changes():
    """Noise this strong changes the top class; the maps are still those of the class at the start."""
    model, x = usual(), pictures(3, 24, channels=3)
    heat = convscope.heatmaps(model, x)
    again = convscope.heatmaps(model, x, heat.targets.tolist())
    one, other = (convscope.evaluate(model, x, h, AGAIN, samples=3, radius=3.0, stages=3) for h in (heat, again))
    for name in AGAIN:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"layer": ["conv2", "conv3"], "fuse": "max"},
        {"smooth": "flips"},
        {"scale": [1, 1.5]},
        {"against": 2},
        {"method": "eigen-cam", "layer": "conv2"},
        {"method": "slopes", "smooth": "noise", "seed": 3},
    ],
    ids=str,
)
def test_the_maps_are_made_again_as_they_were(how):
    """With no noise to speak of nothing changes: layer, method, contrast, smoothing and seed are the same again."""
    model, x = usual(), pictures(3, 24, channels=3)
    heat = convscope.heatmaps(model, x, [[0, 1]] * 3, **how)
    found = convscope.evaluate(model, x, heat, "max-sensitivity", samples=1, radius=1e-9)
    assert found["max-sensitivity"].max() < 1e-5


def test_batches_are_independent():
    model, x = usual(), pictures(4, 24, channels=3)
    heat = convscope.heatmaps(model, x, [0, 1, 2, 3])
    more = {"samples": 2, "stages": 3}
    whole = convscope.evaluate(model, x, heat, AGAIN, **more)
    for n in range(4):
        alone = convscope.evaluate(model, x[n : n + 1], convscope.heatmaps(model, x[n : n + 1], n), AGAIN, **more)
        for name in AGAIN:
            np.testing.assert_allclose(alone[name][0], whole[name][n], rtol=1e-3, atol=2e-3, err_msg=name)


# --- the network comes back ------------------------------------------------------------------------------------------


def ended(model: convscope.Model, x: Tensor, error: BaseException | None, at: int) -> None:
    """Randomisation that ends by `error` when the network runs, or progress is told, for the `at`-th time."""
    heat = convscope.heatmaps(model, x, 1)
    told: list[float] = []

    def progress(done: float, of: int) -> None:
        told.append(done)
        if error is not None and len(told) == at:
            raise error

    convscope.evaluate(model, x, heat, ["randomisation", "random-logit"], stages=4, progress=progress)


@pytest.mark.parametrize("error", [None, RuntimeError("full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_the_weights_come_back(error, at):
    net, handles = lived_in(filled(Usual()))
    model = convscope.load(net, preprocessing={"size": 24})
    x = pictures(3, 24, channels=3)
    before = snapshot(net)
    if error is None:
        ended(model, x, None, at)
    else:
        with pytest.raises(type(error)):
            ended(model, x, error, at)
    assert changes(before, snapshot(net)) == []
    assert handles


def test_the_weights_come_back_when_the_network_itself_fails():
    class Failing(Usual):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Failing.passes += 1
            if Failing.passes == limit:
                raise RuntimeError("out of memory")
            return super().forward(x)

    limit = -1
    net = filled(Failing())
    model = convscope.load(net, preprocessing={"size": 24})
    x = pictures(2, 24, channels=3)
    heat = convscope.heatmaps(model, x, 1)
    limit = Failing.passes + 4
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        convscope.evaluate(model, x, heat, "randomisation")
    assert changes(before, snapshot(net)) == []


def test_weights_that_become_infinite_are_said_and_put_back(monkeypatch):
    net = filled(Usual())
    model = convscope.load(net, preprocessing={"size": 24})
    x = pictures(2, 24, channels=3)
    heat = convscope.heatmaps(model, x, 1)
    before = snapshot(net)
    monkeypatch.setattr("convscope.evaluation.sanity.randomize", lambda values, draw: values * float("inf"))
    with pytest.raises(ConvscopeError, match="not finite"):
        convscope.evaluate(model, x, heat, "randomisation")
    assert changes(before, snapshot(net)) == []


def test_other_weights_are_seen_inside_and_views_of_the_own_are_not_written():
    net = filled(Usual())
    view = net.conv1.weight.detach()
    own = view.clone()
    net.conv1.weight.requires_grad_(False)
    with temporary_parameters(net.parameters()) as put:
        put(net.conv1.weight, torch.zeros_like(own))
        assert net.conv1.weight.abs().max() == 0
        assert torch.equal(view, own)
    assert torch.equal(net.conv1.weight, own)
    assert net.conv1.weight.data_ptr() == view.data_ptr()


def test_channels_last_weights_come_back_as_they_lay():
    net = filled(Usual()).to(memory_format=torch.channels_last)
    model = convscope.load(net, preprocessing={"size": 24})
    before = snapshot(net)
    ended(model, pictures(2, 24, channels=3), None, 0)
    assert changes(before, snapshot(net)) == []


def test_weights_made_under_inference_mode_come_back():
    with torch.inference_mode():
        net = Usual().eval()
    own = {name: p.clone() for name, p in net.named_parameters()}
    places = {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}
    with temporary_parameters(net.parameters()) as put:
        for p in net.parameters():
            put(p, torch.zeros(p.shape))
        assert all(p.detach().abs().max() == 0 for p in net.parameters())
    for name, p in net.named_parameters():
        assert torch.equal(p, own[name])
        assert (id(p), p.data_ptr()) == places[name]
        assert p.is_inference()


@pytest.fixture(scope="module")
def keras_model() -> Any:
    keras = pytest.importorskip("keras")
    layers: list[Callable[..., Any]] = [
        keras.layers.Input((24, 24, 3)),
        keras.layers.Conv2D(6, 3, activation="relu", name="first"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Conv2D(8, 3, activation="relu", name="second"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(4, activation="softmax", name="top"),
    ]
    return keras.Sequential(layers)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=repr)
def test_keras_weights_come_back(keras_model, error):
    model = convscope.load(keras_model)
    assert [name for name, _ in cascade_order(model)] == ["top", "second", "norm", "first"]
    x = pictures(2, 24, channels=3)
    variables = [v.value for v in keras_model.weights]

    def state() -> list[Any]:
        return [
            (id(p), p._version, p.data_ptr(), p.requires_grad, p.stride(), p.detach().numpy().tobytes())
            for p in variables
        ]

    before, flags = state(), [v.trainable for v in keras_model.weights]
    heat = convscope.heatmaps(model, x, 1, layer="second")
    if error is None:
        found = convscope.evaluate(model, x, heat, ["deletion", "randomisation", "max-sensitivity"], steps=3, samples=2)
        assert found.curves["randomisation"].shape == (2, 1, 5)
        assert np.abs(found.curves["randomisation"][..., 1:]).min() < 0.9
    else:
        with pytest.raises(KeyboardInterrupt):
            ended(model, x, error, 2)
    assert state() == before
    assert [v.trainable for v in keras_model.weights] == flags
    assert all(v.value is p for v, p in zip(keras_model.weights, variables, strict=True))


def test_a_network_that_load_made_is_judged_quicker_and_alike(lite0, photos):
    """Folded passes are for the weights at the start: redrawn ones are not judged by them, nor the other way round."""
    given = photos[:2]
    before = snapshot(lite0.module)
    heat = convscope.heatmaps(lite0, given)
    names = ["deletion", "randomisation", "insertion", "average-drop", "random-logit"]
    in_hand = dataclasses.replace(lite0, loaded_by_convscope=False)
    quick, plain = (
        convscope.evaluate(m, given, dataclasses.replace(heat, model=m), names, steps=4, stages=3)
        for m in (lite0, in_hand)
    )
    for name in ("deletion", "insertion", "average-drop"):
        np.testing.assert_allclose(quick[name], plain[name], rtol=1e-3, atol=1e-5)
    for name in ("randomisation", "random-logit"):
        np.testing.assert_allclose(quick[name], plain[name], atol=0.02)
    assert not np.array_equal(quick["deletion"], plain["deletion"]), "other kernels have been at work"
    assert changes(before, snapshot(lite0.module)) == []
