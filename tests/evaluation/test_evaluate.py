"""Deletion and insertion against plain loops; images, targets and batches are independent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import convscope
from convscope import ConvscopeError
from convscope.evaluation import baselines
from convscope.evaluation.context import rank_pixels
from convscope.evaluation.registry import METRICS
from tests.oracles.nets import SmallConvNet, randomized
from tests.oracles.synthetic_models import (
    SIDE,
    Weighted,
    grayscale_model,
    perturbation_curve,
    pixel_detector,
    pixel_sum,
    probability,
    random_images,
    random_maps,
    small_model,
    trapezoid_area,
)


@pytest.mark.parametrize("steps", [1, 4, 9, 36])
def test_perfect_order_by_hand(steps):
    model = pixel_detector(2, 3)
    x = torch.ones(1, 1, SIDE, SIDE)
    heatmap = np.zeros((1, SIDE, SIDE), np.float32)
    heatmap[0, 2, 3] = 1
    result = convscope.evaluate(model, x, heatmap, targets=0, fill="zero", steps=steps)
    expected = [1.0] + [0.0] * steps
    np.testing.assert_allclose(result.curves["deletion"][0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(result.curves["insertion"][0, 0], [0.0] + [1.0] * steps, atol=1e-6)
    assert result["deletion"][0, 0] == pytest.approx(1 / (2 * steps), abs=1e-6)
    assert result["insertion"][0, 0] == pytest.approx(1 - 1 / (2 * steps), abs=1e-6)
    inverted = convscope.evaluate(model, x, -heatmap, targets=0, fill="zero", steps=steps)
    assert inverted["deletion"][0, 0] == pytest.approx(1 - 1 / (2 * steps), abs=1e-6)
    assert inverted["insertion"][0, 0] == pytest.approx(1 / (2 * steps), abs=1e-6)


def blurred(x: np.ndarray) -> np.ndarray:
    """Gaussian blur in plain loops, with the border repeated."""
    sigma = max(x.shape[1:]) / 20
    radius = max(1, int(np.ceil(3 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    out = np.zeros(x.shape)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            for a, weight_y in enumerate(kernel):
                for b, weight_x in enumerate(kernel):
                    row = min(max(i + a - radius, 0), x.shape[1] - 1)
                    column = min(max(j + b - radius, 0), x.shape[2] - 1)
                    out[:, i, j] += weight_y * weight_x * x[:, row, column]
    return out.astype(np.float32)


@pytest.mark.parametrize("fill", ["blur", "mean", "zero"])
def test_curves_equal_plain_loops(fill):
    model = small_model(16)
    x = random_images(2, 16, channels=3).numpy()
    heatmap = random_maps(2, 2, 16, 16)
    result = convscope.evaluate(model, torch.from_numpy(x), heatmap, targets=[[0, 3], [4, 1]], fill=fill, steps=7)
    fills = {
        "blur": blurred,
        "mean": lambda p: np.tile(p.mean((1, 2), keepdims=True), (1, 16, 16)),
        "zero": np.zeros_like,
    }
    for n in range(2):
        for t in range(2):
            target = int(result.targets[n, t])

            def score(image: np.ndarray, target: int = target) -> float:
                return probability(model, target, image)

            baseline = fills[fill](x[n])
            for name, ends in (("deletion", (x[n], baseline)), ("insertion", (baseline, x[n]))):
                expected = perturbation_curve(score, *ends, heatmap[n, t], 7)
                np.testing.assert_allclose(result.curves[name][n, t], expected, atol=2e-6)
                assert result[name][n, t] == pytest.approx(trapezoid_area(expected), abs=2e-6)


def test_coarse_maps_are_interpolated_bilinearly():
    model = small_model(24)
    x = random_images(1, 24, channels=3)
    coarse = random_maps(1, 5, 7)
    fine = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None], (24, 24), mode="bilinear")[0]
    first, second = (convscope.evaluate(model, x, maps, targets=1, steps=6) for maps in (coarse, fine.numpy()))
    np.testing.assert_allclose(first.curves["deletion"], second.curves["deletion"], atol=1e-5)


def test_ranks():
    heatmap = torch.tensor([[[[3.0, 1.0], [2.0, 5.0]]]])
    assert rank_pixels(heatmap, torch.Generator()).tolist() == [[[[1, 3], [2, 0]]]]
    constant = torch.zeros(2, 1, 9, 11)
    first, second = (rank_pixels(constant, torch.Generator().manual_seed(seed)) for seed in (0, 0))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1]), "the same order for every image"
    assert first[0].flatten().sort().values.tolist() == list(range(99))
    assert not torch.equal(first[0].flatten().long(), torch.arange(99)), "not in reading order"


def test_ties_do_not_favour_the_top_of_the_image():
    heatmap = torch.zeros(1, 1, 40, 40)
    heatmap[..., 10, 10] = 1
    ranks = rank_pixels(heatmap, torch.Generator().manual_seed(0))[0, 0]
    assert ranks[10, 10] == 0
    assert abs(float(ranks[:20].float().mean()) - 800) < 40


def test_each_step_removes_the_same_number_of_pixels(monkeypatch):
    inputs: list[Tensor] = []

    class Counter(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            inputs.extend(x[:, 0].clone())
            return super().forward(x)

    model = grayscale_model(Counter(torch.ones(2, SIDE, SIDE)))
    inputs.clear()
    convscope.evaluate(model, torch.ones(1, 1, SIDE, SIDE), random_maps(1, 6, 6), "deletion", fill="zero", steps=5)
    assert sorted({int(x.sum()) for x in inputs}) == [36 - 36 * i // 5 for i in range(5, -1, -1)]


def test_directions_and_targets_share_forward_passes():
    batch_sizes: list[int] = []

    class Counter(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            batch_sizes.append(len(x))
            return super().forward(x)

    model = convscope.load(randomized(Counter()), preprocessing={"size": 24})
    batch_sizes.clear()
    convscope.evaluate(
        model, random_images(4, 24, channels=3), random_maps(4, 3, 6, 6), targets=[[0, 1, 2]] * 4, steps=5
    )
    assert sum(batch_sizes) == 4 * (1 + 1 + 2 * 3 * (5 - 1))
    assert max(batch_sizes) <= 32


def test_batches_are_independent():
    model = small_model()
    x, heatmap = random_images(5, 24, channels=3), random_maps(5, 6, 6)
    classes = [0, 1, 2, 3, 4]
    names = ["deletion", "insertion", "road", "average-drop", "mu-fidelity", "infidelity", "sparseness"]
    batch = convscope.evaluate(model, x, heatmap, names, targets=classes, fill="noise", steps=5, samples=9)
    for n in range(5):
        single = convscope.evaluate(
            model, x[n : n + 1], heatmap[n : n + 1], names, targets=classes[n], fill="noise", steps=5, samples=9
        )
        for name in names:
            np.testing.assert_allclose(single[name][0], batch[name][n], rtol=1e-4, atol=1e-5, err_msg=name)


def test_several_targets_equal_separate_calls():
    model = small_model()
    x, heatmap = random_images(3, 24, channels=3), random_maps(3, 2, 6, 6)
    names = ["deletion", "insertion", "road", "average-drop", "average-gain", "mu-fidelity", "infidelity", "complexity"]
    multiple = convscope.evaluate(model, x, heatmap, names, targets=[[1, 2]] * 3, steps=5, samples=9)
    for t in range(2):
        single = convscope.evaluate(model, x, heatmap[:, t], names, targets=t + 1, steps=5, samples=9)
        for name in names:
            np.testing.assert_allclose(single[name][:, 0], multiple[name][:, t], rtol=1e-4, atol=1e-5, err_msg=name)


def test_memory_limit_does_not_change_results():
    model = small_model()
    x = random_images(5, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, [[0, 1]] * 5)
    names = [name for name in METRICS if METRICS[name].needs != ("masks",)]
    large, small = (
        convscope.evaluate(model, x, heatmap, names, steps=5, samples=4, memory=memory) for memory in (2 << 30, 1)
    )
    for name in names:
        np.testing.assert_allclose(large[name], small[name], rtol=1e-4, atol=2e-5, err_msg=name)
    for name, curve in large.curves.items():
        np.testing.assert_allclose(curve, small.curves[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_results_depend_on_the_seed_only():
    model = small_model()
    x, heatmap = random_images(3, 24, channels=3), random_maps(3, 6, 6)
    names = ["deletion", "road", "mu-fidelity"]
    first, repeated, second = (
        convscope.evaluate(model, x, heatmap, names, targets=1, fill="noise", steps=5, seed=seed) for seed in (3, 3, 4)
    )
    for name in names:
        assert np.array_equal(first[name], repeated[name])
        assert not np.array_equal(first[name], second[name])


@pytest.mark.parametrize("head", ["sigmoid", "single"])
def test_sigmoid_and_single_output_heads(head):
    class Headed(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid() if head == "sigmoid" else super().forward(x)

    net = randomized(Headed(classes=1 if head == "single" else 5))
    model = convscope.load(net, preprocessing={"size": 24})
    x = random_images(2, 24, channels=3)
    result = convscope.evaluate(model, x, random_maps(2, 6, 6), "deletion", targets=0, steps=3)
    with torch.no_grad():
        out = net(x)[:, 0]
    expected = out  # a probability, or the value of a regression
    np.testing.assert_allclose(result.curves["deletion"][:, 0, 0], expected, atol=1e-6)


def test_target_functions_are_scored_without_probability():
    model = pixel_sum()
    x = random_images(2)
    result = convscope.evaluate(
        model, x, random_maps(2, SIDE, SIDE), "deletion", targets=lambda out: 3 * out[:, 0], steps=3
    )
    np.testing.assert_allclose(result.curves["deletion"][:, 0, 0], 3 * x.sum((1, 2, 3)), rtol=1e-5)
    assert result.targets.tolist() == [[-1], [-1]]
    assert any("no probability" in note for note in result.notes)
    with pytest.raises(ConvscopeError, match="average-drop needs classes"):
        convscope.evaluate(model, x, random_maps(2, SIDE, SIDE), "average-drop", targets=lambda out: out[:, 0])


def test_contrastive_targets_are_scored_as_the_logit_difference():
    model = small_model()
    x = random_images(2, 24, channels=3)
    heatmap = convscope.heatmaps(model, x, 2, against=4)
    result = convscope.evaluate(model, x, heatmap, "deletion", steps=3)
    with torch.no_grad():
        logits = model.module(x)
    np.testing.assert_allclose(result.curves["deletion"][:, 0, 0], (logits[:, 2] - logits[:, 4]).sigmoid(), atol=1e-5)
    assert any("difference of their logits" in note for note in result.notes)


def test_fills():
    x = random_images(3, 20, channels=3, seed=5) * 2 + 1
    generator = torch.Generator().manual_seed(0)
    assert baselines.apply_fill(x, "zero", generator).abs().max() == 0
    np.testing.assert_allclose(baselines.apply_fill(x, "mean", generator)[1, 2], float(x[1, 2].mean()), rtol=1e-5)
    noise = baselines.apply_fill(x, "noise", generator)
    standardized = (noise - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
    np.testing.assert_allclose(standardized[0], standardized[2], atol=1e-4, err_msg="the same noise for every image")
    blur = baselines.apply_fill(x, "blur", generator)
    np.testing.assert_allclose(blur[0], blurred(x[0].numpy()), atol=1e-5)
    flat = torch.full((1, 3, 20, 20), 0.7)
    np.testing.assert_allclose(baselines.apply_fill(flat, "blur", generator), flat, rtol=1e-5)
    for name in baselines.FILLS:
        assert baselines.apply_fill(x, name, generator).is_contiguous(memory_format=torch.channels_last)
