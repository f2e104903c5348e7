"""Deletion and insertion against plain loops: what the curves hold, and that no picture depends on another."""

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
from tests.oracles.judged import (
    SIDE,
    Weighted,
    area,
    gray,
    pictures,
    probability,
    random_maps,
    seeing,
    summing,
    traded,
    usual,
)
from tests.oracles.nets import Usual, filled


@pytest.mark.parametrize("steps", [1, 4, 9, 36])
def test_the_perfect_order_is_known_by_hand(steps):
    model = seeing(2, 3)
    x = torch.ones(1, 1, SIDE, SIDE)
    heat = np.zeros((1, SIDE, SIDE), np.float32)
    heat[0, 2, 3] = 1
    found = convscope.evaluate(model, x, heat, targets=0, fill="zero", steps=steps)
    expected = [1.0] + [0.0] * steps
    np.testing.assert_allclose(found.curves["deletion"][0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(found.curves["insertion"][0, 0], [0.0] + [1.0] * steps, atol=1e-6)
    assert found["deletion"][0, 0] == pytest.approx(1 / (2 * steps), abs=1e-6)
    assert found["insertion"][0, 0] == pytest.approx(1 - 1 / (2 * steps), abs=1e-6)
    worst = convscope.evaluate(model, x, -heat, targets=0, fill="zero", steps=steps)
    assert worst["deletion"][0, 0] == pytest.approx(1 - 1 / (2 * steps), abs=1e-6)
    assert worst["insertion"][0, 0] == pytest.approx(1 / (2 * steps), abs=1e-6)


def blurred(x: np.ndarray) -> np.ndarray:
    """A Gaussian in plain loops, the border repeated."""
    sigma = max(x.shape[1:]) / 20
    reach = max(1, int(np.ceil(3 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    out = np.zeros(x.shape)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            for a, down in enumerate(kernel):
                for b, across in enumerate(kernel):
                    row = min(max(i + a - reach, 0), x.shape[1] - 1)
                    column = min(max(j + b - reach, 0), x.shape[2] - 1)
                    out[:, i, j] += down * across * x[:, row, column]
    return out.astype(np.float32)


@pytest.mark.parametrize("fill", ["blur", "mean", "zero"])
def test_curves_are_those_of_plain_loops(fill):
    model = usual(16)
    x = pictures(2, 16, channels=3).numpy()
    heat = random_maps(2, 2, 16, 16)
    found = convscope.evaluate(model, torch.from_numpy(x), heat, targets=[[0, 3], [4, 1]], fill=fill, steps=7)
    other = {
        "blur": blurred,
        "mean": lambda p: np.tile(p.mean((1, 2), keepdims=True), (1, 16, 16)),
        "zero": np.zeros_like,
    }
    for n in range(2):
        for t in range(2):
            target = int(found.targets[n, t])

            def score(picture: np.ndarray, target: int = target) -> float:
                return probability(model, target, picture)

            gone = other[fill](x[n])
            for name, ends in (("deletion", (x[n], gone)), ("insertion", (gone, x[n]))):
                expected = traded(score, *ends, heat[n, t], 7)
                np.testing.assert_allclose(found.curves[name][n, t], expected, atol=2e-6)
                assert found[name][n, t] == pytest.approx(area(expected), abs=2e-6)


def test_a_coarse_map_is_laid_over_the_input_between_its_centres():
    model = usual(24)
    x = pictures(1, 24, channels=3)
    coarse = random_maps(1, 5, 7)
    fine = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None], (24, 24), mode="bilinear")[0]
    one, other = (convscope.evaluate(model, x, maps, targets=1, steps=6) for maps in (coarse, fine.numpy()))
    np.testing.assert_allclose(one.curves["deletion"], other.curves["deletion"], atol=1e-5)


def test_ranks():
    heat = torch.tensor([[[[3.0, 1.0], [2.0, 5.0]]]])
    assert rank_pixels(heat, torch.Generator()).tolist() == [[[[1, 3], [2, 0]]]]
    even = torch.zeros(2, 1, 9, 11)
    one, two = (rank_pixels(even, torch.Generator().manual_seed(seed)) for seed in (0, 0))
    assert torch.equal(one, two)
    assert torch.equal(one[0], one[1]), "the same order for every picture"
    assert one[0].flatten().sort().values.tolist() == list(range(99))
    assert not torch.equal(one[0].flatten().long(), torch.arange(99)), "not in reading order"


def test_equal_heat_does_not_favour_the_top_of_the_picture():
    heat = torch.zeros(1, 1, 40, 40)
    heat[..., 10, 10] = 1
    ranks = rank_pixels(heat, torch.Generator().manual_seed(0))[0, 0]
    assert ranks[10, 10] == 0
    assert abs(float(ranks[:20].float().mean()) - 800) < 40


def test_each_step_takes_as_many_pixels(monkeypatch):
    seen: list[Tensor] = []

    class Counting(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend(x[:, 0].clone())
            return super().forward(x)

    model = gray(Counting(torch.ones(2, SIDE, SIDE)))
    seen.clear()
    convscope.evaluate(model, torch.ones(1, 1, SIDE, SIDE), random_maps(1, 6, 6), "deletion", fill="zero", steps=5)
    assert sorted({int(x.sum()) for x in seen}) == [36 - 36 * i // 5 for i in range(5, -1, -1)]


def test_both_directions_and_all_targets_share_what_they_can():
    passed: list[int] = []

    class Counting(Usual):
        def forward(self, x: Tensor) -> Tensor:
            passed.append(len(x))
            return super().forward(x)

    model = convscope.load(filled(Counting()), preprocessing={"size": 24})
    passed.clear()
    convscope.evaluate(model, pictures(4, 24, channels=3), random_maps(4, 3, 6, 6), targets=[[0, 1, 2]] * 4, steps=5)
    assert sum(passed) == 4 * (1 + 1 + 2 * 3 * (5 - 1))
    assert max(passed) <= 32


def test_batches_are_independent():
    model = usual()
    x, heat = pictures(5, 24, channels=3), random_maps(5, 6, 6)
    classes = [0, 1, 2, 3, 4]
    names = ["deletion", "insertion", "road", "average-drop", "mu-fidelity", "infidelity", "sparseness"]
    whole = convscope.evaluate(model, x, heat, names, targets=classes, fill="noise", steps=5, samples=9)
    for n in range(5):
        alone = convscope.evaluate(
            model, x[n : n + 1], heat[n : n + 1], names, targets=classes[n], fill="noise", steps=5, samples=9
        )
        for name in names:
            np.testing.assert_allclose(alone[name][0], whole[name][n], rtol=1e-4, atol=1e-5, err_msg=name)


def test_several_targets_are_as_many_calls():
    model = usual()
    x, heat = pictures(3, 24, channels=3), random_maps(3, 2, 6, 6)
    names = ["deletion", "insertion", "road", "average-drop", "average-gain", "mu-fidelity", "infidelity", "complexity"]
    both = convscope.evaluate(model, x, heat, names, targets=[[1, 2]] * 3, steps=5, samples=9)
    for t in range(2):
        single = convscope.evaluate(model, x, heat[:, t], names, targets=t + 1, steps=5, samples=9)
        for name in names:
            np.testing.assert_allclose(single[name][:, 0], both[name][:, t], rtol=1e-4, atol=1e-5, err_msg=name)


def test_little_memory_changes_nothing_but_rounding():
    model = usual()
    x = pictures(5, 24, channels=3)
    heat = convscope.heatmaps(model, x, [[0, 1]] * 5)
    names = [name for name in METRICS if METRICS[name].needs != ("masks",)]
    much, little = (
        convscope.evaluate(model, x, heat, names, steps=5, samples=4, memory=memory) for memory in (2 << 30, 1)
    )
    for name in names:
        np.testing.assert_allclose(much[name], little[name], rtol=1e-4, atol=2e-5, err_msg=name)
    for name, curve in much.curves.items():
        np.testing.assert_allclose(curve, little.curves[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_the_same_call_gives_the_same_bytes_and_another_seed_others():
    model = usual()
    x, heat = pictures(3, 24, channels=3), random_maps(3, 6, 6)
    names = ["deletion", "road", "mu-fidelity"]
    one, same, other = (
        convscope.evaluate(model, x, heat, names, targets=1, fill="noise", steps=5, seed=seed) for seed in (3, 3, 4)
    )
    for name in names:
        assert np.array_equal(one[name], same[name])
        assert not np.array_equal(one[name], other[name])


@pytest.mark.parametrize("head", ["sigmoid", "single"])
def test_probabilities_of_their_own(head):
    class Headed(Usual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid() if head == "sigmoid" else super().forward(x)

    net = filled(Headed(classes=1 if head == "single" else 5))
    model = convscope.load(net, preprocessing={"size": 24})
    x = pictures(2, 24, channels=3)
    found = convscope.evaluate(model, x, random_maps(2, 6, 6), "deletion", targets=0, steps=3)
    with torch.no_grad():
        out = net(x)[:, 0]
    expected = out if head == "sigmoid" else out.sigmoid()
    np.testing.assert_allclose(found.curves["deletion"][:, 0, 0], expected, atol=1e-6)


def test_functions_have_no_probability_and_it_is_said():
    model = summing()
    x = pictures(2)
    found = convscope.evaluate(
        model, x, random_maps(2, SIDE, SIDE), "deletion", targets=lambda out: 3 * out[:, 0], steps=3
    )
    np.testing.assert_allclose(found.curves["deletion"][:, 0, 0], 3 * x.sum((1, 2, 3)), rtol=1e-5)
    assert found.targets.tolist() == [[-1], [-1]]
    assert any("no probability" in note for note in found.notes)
    with pytest.raises(ConvscopeError, match="average-drop needs classes"):
        convscope.evaluate(model, x, random_maps(2, SIDE, SIDE), "average-drop", targets=lambda out: out[:, 0])


def test_a_class_against_another_is_scored_as_the_difference():
    model = usual()
    x = pictures(2, 24, channels=3)
    heat = convscope.heatmaps(model, x, 2, against=4)
    found = convscope.evaluate(model, x, heat, "deletion", steps=3)
    with torch.no_grad():
        logits = model.module(x)
    np.testing.assert_allclose(found.curves["deletion"][:, 0, 0], (logits[:, 2] - logits[:, 4]).sigmoid(), atol=1e-5)
    assert any("difference of their logits" in note for note in found.notes)


def test_fills():
    x = pictures(3, 20, channels=3, seed=5) * 2 + 1
    draw = torch.Generator().manual_seed(0)
    assert baselines.apply_fill(x, "zero", draw).abs().max() == 0
    np.testing.assert_allclose(baselines.apply_fill(x, "mean", draw)[1, 2], float(x[1, 2].mean()), rtol=1e-5)
    noise = baselines.apply_fill(x, "noise", draw)
    unit = (noise - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
    np.testing.assert_allclose(unit[0], unit[2], atol=1e-4, err_msg="the same draws for every picture")
    blur = baselines.apply_fill(x, "blur", draw)
    np.testing.assert_allclose(blur[0], blurred(x[0].numpy()), atol=1e-5)
    flat = torch.full((1, 3, 20, 20), 0.7)
    np.testing.assert_allclose(baselines.apply_fill(flat, "blur", draw), flat, rtol=1e-5)
    for name in baselines.FILLS:
        assert baselines.apply_fill(x, name, draw).is_contiguous(memory_format=torch.channels_last)
