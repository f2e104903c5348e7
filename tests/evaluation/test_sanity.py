"""Randomised weights, other classes, noise; the weights are restored bit for bit, also after errors."""

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
from tests.oracles.nets import SharedReluNet, SmallConvNet, diff_snapshots, in_training, randomized, snapshot
from tests.oracles.synthetic_models import random_images, small_model

RECOMPUTING_METRICS = [name for name, metric in METRICS.items() if "heatmaps" in metric.needs]


def edges(context: MethodContext) -> Tensor:
    """A method that ignores the network: the absolute difference of each pixel to the one above."""
    gray = context.x.mean(1)
    return (gray - gray.roll(1, 1)).abs()[:, None].expand(-1, context.num_targets, -1, -1)


def slopes(context: MethodContext) -> Tensor:
    """The gradient of the score at each pixel."""
    return context.gradients(context.x)[0].mean(2).transpose(0, 1)


@pytest.fixture(autouse=True)
def explainers(monkeypatch):
    for explainer in (edges, slopes):
        monkeypatch.setitem(registry.METHODS, explainer.__name__, ModelMethod(explainer))


# --- dependence on the weights ---


def test_model_independent_maps_fail():
    model, x = small_model(), random_images(3, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, [[0, 1]] * 3, method="edges")
    result = convscope.evaluate(model, x, heatmap, ["randomisation", "random-logit"])
    np.testing.assert_array_equal(result["randomisation"], 1)
    np.testing.assert_array_equal(result.curves["randomisation-absolute"], 1)
    np.testing.assert_array_equal(result["random-logit"], 1)
    assert any("shows edges of the image, not evidence" in note for note in result.notes)
    assert any("nearly the same for another class" in note for note in result.notes)


def test_gradient_maps_pass():
    model, x = small_model(), random_images(3, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, [[0, 1]] * 3, method="slopes")
    result = convscope.evaluate(model, x, heatmap, "randomisation")
    assert np.abs(result["randomisation"]).max() < 0.3
    np.testing.assert_array_equal(result.curves["randomisation"][..., 0], 1)
    assert result.curves["randomisation"][..., 1].min() < 0.999, "the first stage changes the map"
    assert not any(note.startswith("randomisation") for note in result.notes)


def test_each_stage_equals_a_randomized_copy():
    """Randomise the layers of a copy in the same order and compute its heatmaps."""
    model, x = small_model(), random_images(2, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, 1, layer="conv2", method="hirescam")
    result = convscope.evaluate(model, x, heatmap, "randomisation", stages=3, seed=7)
    generator = _derived_generator(torch.Generator().manual_seed(7))
    copy = small_model()
    order = ["fc", "bn3", "conv3", "conv2", "bn1", "conv1"]
    assert [name for name, _ in cascade_order(copy)] == order
    expected, absolute = [np.ones((2, 1))], [np.ones((2, 1))]
    for group in (["fc"], ["bn3", "conv3"], ["conv2", "bn1", "conv1"]):
        for name in group:
            for p in getattr(copy.module, name).parameters():
                p.data = randomize(p.data, generator)
        new = convscope.heatmaps(copy, x, 1, layer="conv2", method="hirescam").values
        flat_maps = [torch.from_numpy(v).flatten(2) for v in (new, heatmap.values)]
        expected.append(spearman(*flat_maps).numpy())
        absolute.append(spearman(*(v.abs() for v in flat_maps)).numpy())
    np.testing.assert_allclose(result.curves["randomisation-absolute"], np.stack(absolute, 2), atol=1e-6)
    assert not np.allclose(expected, absolute)
    np.testing.assert_allclose(result.curves["randomisation"], np.stack(expected, 2), atol=1e-6)
    np.testing.assert_array_equal(result["randomisation"], result.curves["randomisation"][..., -1])


def test_weights_from_the_same_seed_are_randomized():
    """The top layer was initialised with the generator of seed 0, and the seed of the metric is 0 as well."""
    model, x = small_model(), random_images(3, 24, channels=3)
    with torch.no_grad():
        model.module.fc.weight.copy_(torch.randn(5, 10, generator=torch.Generator().manual_seed(0)))
    heatmap = convscope.heatmaps(model, x, 1)
    result = convscope.evaluate(model, x, heatmap, "randomisation", stages=6, seed=0)
    assert result.curves["randomisation"][..., 1].max() < 0.999


@pytest.mark.parametrize(("count", "stages"), [(1, 8), (2, 8), (6, 1), (6, 3), (9, 9), (50, 8)])
def test_stages_contain_every_layer_once(count, stages):
    groups = _layer_groups(count, stages)
    assert [i for group in groups for i in group] == list(range(count))
    assert len(groups) == min(count, stages)
    assert stages == 1 or len(groups[0]) == 1
    assert max(map(len, groups[1:]), default=0) - min(map(len, groups[1:]), default=0) <= 1


def test_randomized_weights_keep_only_their_scale():
    generator = torch.Generator().manual_seed(1)
    kernel = (torch.randn(64, 32, 3, 3) * 0.3 + 0.1).to(memory_format=torch.channels_last)
    new = randomize(kernel, generator)
    assert float(new.square().mean().sqrt()) == pytest.approx(float(kernel.square().mean().sqrt()), rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([new.flatten(), kernel.flatten()]))[0, 1])) < 0.03
    assert new.stride() == kernel.stride()
    assert randomize(torch.ones(4, 4), generator).std() > 0, "also if all weights are equal"
    scale = torch.rand(50)
    assert not torch.equal(randomize(scale, generator), scale)
    assert torch.equal(randomize(scale, generator).sort().values, scale.sort().values)
    assert randomize(torch.ones(3, 3, dtype=torch.bfloat16), generator).dtype == torch.bfloat16
    count = torch.tensor([3, 4])
    assert randomize(count, generator) is count


def test_layer_that_runs_twice_is_randomized_once():
    model = convscope.load(randomized(SharedReluNet()), preprocessing={"size": 24})
    assert [name for name, _ in cascade_order(model)] == ["fc", "conv2", "conv1"]


def test_shared_weights_are_randomized_once():
    net = randomized(SmallConvNet())
    net.twin = nn.Conv2d(3, 8, 3, padding=1)
    net.twin.weight = net.conv1.weight
    layers = cascade_order(convscope.load(net, preprocessing={"size": 24}))
    ids = [id(p) for _, parameters in layers for p in parameters]
    assert len(ids) == len(set(ids)) == len(list(net.parameters()))
    assert layers[-1][0] == "the rest", "layers that did not run come last"


# --- dependence on class and noise ---


def test_random_logit_uses_the_map_of_another_class():
    model, x = small_model(), random_images(3, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, [[0, 3]] * 3, method="slopes")
    result = convscope.evaluate(model, x, heatmap, "random-logit", seed=2)["random-logit"]
    offset = int(torch.randint(1, 5, (), generator=torch.Generator().manual_seed(2)))
    second = convscope.heatmaps(model, x, [[offset, (3 + offset) % 5]] * 3, method="slopes").values
    expected = spearman(*(torch.from_numpy(v).flatten(2) for v in (second, heatmap.values)))
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert result.max() < 0.99


def test_random_logit_needs_two_classes():
    model = convscope.load(randomized(SmallConvNet(classes=1)), preprocessing={"size": 24})
    x = random_images(2, 24, channels=3)
    with pytest.raises(ConvscopeError, match="this network has one output"):
        convscope.evaluate(model, x, convscope.heatmaps(model, x, 0), "random-logit")
    model = small_model()
    heatmap = convscope.heatmaps(model, x, lambda out: out[:, 0] - out[:, 1])
    with pytest.raises(ConvscopeError, match="random-logit needs classes"):
        convscope.evaluate(model, x, heatmap, "random-logit")
    assert np.isfinite(convscope.evaluate(model, x, heatmap, "randomisation")["randomisation"]).all()


def test_max_sensitivity_equals_its_definition():
    model, x = small_model(), random_images(2, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, 1)
    result = convscope.evaluate(model, x, heatmap, "max-sensitivity", samples=4, radius=0.1, seed=3)["max-sensitivity"]
    generator = torch.Generator().manual_seed(3)
    noise = [2 * torch.rand(x.shape[1:], generator=generator) - 1 for _ in range(4)]
    for n in range(2):
        amplitude = 0.1 * (x[n].max() - x[n].min())
        changed = [convscope.heatmaps(model, (x[n] + amplitude * e)[None], 1).values[0, 0] for e in noise]
        original_map = heatmap.values[n, 0]
        expected = max(
            np.linalg.norm(changed_map - original_map) / np.linalg.norm(original_map) for changed_map in changed
        )
        assert result[n, 0] == pytest.approx(expected, rel=1e-3)
    assert result.min() > 0.001


def test_targets_are_fixed_when_the_top_class_changes():
    """Strong noise changes the top class; the maps remain those of the original class."""
    model, x = small_model(), random_images(3, 24, channels=3)
    heatmap = convscope.heatmaps(model, x)
    repeated = convscope.heatmaps(model, x, heatmap.targets.tolist())
    first, second = (
        convscope.evaluate(model, x, h, RECOMPUTING_METRICS, samples=3, radius=3.0, stages=3)
        for h in (heatmap, repeated)
    )
    for name in RECOMPUTING_METRICS:
        np.testing.assert_allclose(first[name], second[name], atol=1e-6)


@pytest.mark.parametrize(
    "options",
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
def test_maps_are_recomputed_with_the_same_settings(options):
    """With negligible noise the maps do not change: layer, method, contrast, smoothing and seed are the same."""
    model, x = small_model(), random_images(3, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, [[0, 1]] * 3, **options)
    result = convscope.evaluate(model, x, heatmap, "max-sensitivity", samples=1, radius=1e-9)
    assert result["max-sensitivity"].max() < 1e-5


def test_batches_are_independent():
    model, x = small_model(), random_images(4, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, [0, 1, 2, 3])
    options = {"samples": 2, "stages": 3}
    batch = convscope.evaluate(model, x, heatmap, RECOMPUTING_METRICS, **options)
    for n in range(4):
        single = convscope.evaluate(
            model, x[n : n + 1], convscope.heatmaps(model, x[n : n + 1], n), RECOMPUTING_METRICS, **options
        )
        for name in RECOMPUTING_METRICS:
            np.testing.assert_allclose(single[name][0], batch[name][n], rtol=1e-3, atol=2e-3, err_msg=name)


# --- the weights are restored ---


def run_with_error(model: convscope.Model, x: Tensor, error: BaseException | None, at: int) -> None:
    """Run randomisation and raise `error` in the `at`-th call of the progress callback."""
    heatmap = convscope.heatmaps(model, x, 1)
    calls: list[float] = []

    def progress(done: float, total: int) -> None:
        calls.append(done)
        if error is not None and len(calls) == at:
            raise error

    convscope.evaluate(model, x, heatmap, ["randomisation", "random-logit"], stages=4, progress=progress)


@pytest.mark.parametrize("error", [None, RuntimeError("full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_weights_are_restored(error, at):
    net, handles = in_training(randomized(SmallConvNet()))
    model = convscope.load(net, preprocessing={"size": 24})
    x = random_images(3, 24, channels=3)
    before = snapshot(net)
    if error is None:
        run_with_error(model, x, None, at)
    else:
        with pytest.raises(type(error)):
            run_with_error(model, x, error, at)
    assert diff_snapshots(before, snapshot(net)) == []
    assert handles


def test_weights_are_restored_when_the_model_fails():
    class Failing(SmallConvNet):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Failing.passes += 1
            if Failing.passes == limit:
                raise RuntimeError("out of memory")
            return super().forward(x)

    limit = -1
    net = randomized(Failing())
    model = convscope.load(net, preprocessing={"size": 24})
    x = random_images(2, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, 1)
    limit = Failing.passes + 4
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        convscope.evaluate(model, x, heatmap, "randomisation")
    assert diff_snapshots(before, snapshot(net)) == []


def test_infinite_weights_raise_and_are_restored(monkeypatch):
    net = randomized(SmallConvNet())
    model = convscope.load(net, preprocessing={"size": 24})
    x = random_images(2, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, 1)
    before = snapshot(net)
    monkeypatch.setattr("convscope.evaluation.sanity.randomize", lambda values, generator: values * float("inf"))
    with pytest.raises(ConvscopeError, match="not finite"):
        convscope.evaluate(model, x, heatmap, "randomisation")
    assert diff_snapshots(before, snapshot(net)) == []


def test_temporary_parameters_do_not_write_into_views():
    net = randomized(SmallConvNet())
    view = net.conv1.weight.detach()
    original = view.clone()
    net.conv1.weight.requires_grad_(False)
    with temporary_parameters(net.parameters()) as set_parameter:
        set_parameter(net.conv1.weight, torch.zeros_like(original))
        assert net.conv1.weight.abs().max() == 0
        assert torch.equal(view, original)
    assert torch.equal(net.conv1.weight, original)
    assert net.conv1.weight.data_ptr() == view.data_ptr()


def test_channels_last_weights_keep_their_memory_format():
    net = randomized(SmallConvNet()).to(memory_format=torch.channels_last)
    model = convscope.load(net, preprocessing={"size": 24})
    before = snapshot(net)
    run_with_error(model, random_images(2, 24, channels=3), None, 0)
    assert diff_snapshots(before, snapshot(net)) == []


def test_inference_mode_weights_are_restored():
    with torch.inference_mode():
        net = SmallConvNet().eval()
    original = {name: p.clone() for name, p in net.named_parameters()}
    addresses = {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}
    with temporary_parameters(net.parameters()) as set_parameter:
        for p in net.parameters():
            set_parameter(p, torch.zeros(p.shape))
        assert all(p.detach().abs().max() == 0 for p in net.parameters())
    for name, p in net.named_parameters():
        assert torch.equal(p, original[name])
        assert (id(p), p.data_ptr()) == addresses[name]
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
def test_keras_weights_are_restored(keras_model, error):
    model = convscope.load(keras_model)
    assert [name for name, _ in cascade_order(model)] == ["top", "second", "norm", "first"]
    x = random_images(2, 24, channels=3)
    variables = [v.value for v in keras_model.weights]

    def state() -> list[Any]:
        return [
            (id(p), p._version, p.data_ptr(), p.requires_grad, p.stride(), p.detach().numpy().tobytes())
            for p in variables
        ]

    before, flags = state(), [v.trainable for v in keras_model.weights]
    heatmap = convscope.heatmaps(model, x, 1, layer="second")
    if error is None:
        result = convscope.evaluate(
            model, x, heatmap, ["deletion", "randomisation", "max-sensitivity"], steps=3, samples=2
        )
        assert result.curves["randomisation"].shape == (2, 1, 5)
        assert np.abs(result.curves["randomisation"][..., 1:]).min() < 0.9
    else:
        with pytest.raises(KeyboardInterrupt):
            run_with_error(model, x, error, 2)
    assert state() == before
    assert [v.trainable for v in keras_model.weights] == flags
    assert all(v.value is p for v, p in zip(keras_model.weights, variables, strict=True))


def test_fused_passes_give_the_same_results(lite0, photos):
    """Fused convolutions hold for the original weights only: randomised weights do not use them."""
    paths = photos[:2]
    before = snapshot(lite0.module)
    heatmap = convscope.heatmaps(lite0, paths)
    names = ["deletion", "randomisation", "insertion", "average-drop", "random-logit"]
    wrapped = dataclasses.replace(lite0, loaded_by_convscope=False)
    fused, plain = (
        convscope.evaluate(m, paths, dataclasses.replace(heatmap, model=m), names, steps=4, stages=3)
        for m in (lite0, wrapped)
    )
    for name in ("deletion", "insertion", "average-drop"):
        np.testing.assert_allclose(fused[name], plain[name], rtol=1e-3, atol=1e-5)
    for name in ("randomisation", "random-logit"):
        np.testing.assert_allclose(fused[name], plain[name], atol=0.02)
    assert not np.array_equal(fused["deletion"], plain["deletion"]), "fused convolutions were used"
    assert diff_snapshots(before, snapshot(lite0.module)) == []
