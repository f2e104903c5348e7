"""Shuffled confidence of classes, and restarts of those with a low one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope.featurevis.defaults import constant_schedule
from convscope.featurevis.recipes import RECIPES, Recipe
from convscope.featurevis.retries import PatternBatch
from convscope.featurevis.scoring import MIN_CONFIDENCE
from tests.featurevis.helpers import load_model
from tests.oracles.nets import SmallConvNet, randomized

STEPS = 16
SHORT_RECIPE = replace(RECIPES["robust"], schedule=constant_schedule(STEPS, 0.8), max_restarts=4)


@pytest.fixture(scope="module")
def named_model() -> convscope.Model:
    model = load_model(randomized(SmallConvNet()), 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return replace(model, classes=("zero", "one", "two", "three", "four"))


def run(
    model: convscope.Model, classes: Sequence[int], recipe: Recipe = SHORT_RECIPE, **options: Any
) -> convscope.Patterns:
    return convscope.patterns(model, "logits", classes, recipe=recipe, size=32, **options)


def nearly_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether images agree up to amplified rounding; those of other starts differ by more than 30."""
    return bool(np.abs(a.astype(int) - b).mean() < 2)


class QuadrantBrightness(nn.Module):
    """Four classes: ten times the brightness of the upper left, upper right, lower left and lower right quadrant."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.pool(x.mean(1, keepdim=True)).flatten(1)


def test_shuffled_confidence_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quadrants exchanged by hand; classes with a low confidence are restarted and noted."""
    monkeypatch.setattr(sys.modules["convscope.featurevis.api"], "noise_baseline", lambda *_: torch.zeros(4))
    model = load_model(QuadrantBrightness(), 32)
    without_restarts = run(model, range(4), replace(SHORT_RECIPE, max_restarts=1))
    assert not without_restarts.notes
    result = run(model, range(4))
    brightness = result.images.reshape(4, 2, 16, 2, 16, 3).mean((2, 4, 5)) / 255
    shuffled = np.exp(10 * brightness[:, ::-1, ::-1].reshape(4, 4))
    expected = shuffled[range(4), range(4)] / shuffled.sum(1)
    assert expected.max() < MIN_CONFIDENCE  # the opposite quadrant is dark
    assert result.notes == tuple(
        f"class {u} has a probability of {p:.2f} after the quadrants of the image are shuffled. "
        "The pattern may transfer poorly to other models."
        for u, p in enumerate(expected)
    )
    assert not np.array_equal(result.images, without_restarts.images)


@pytest.fixture
def confidences(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[float]]]:
    """Replace the confidence by the next number from a queue of each class."""
    queues: dict[int, list[float]] = {}

    def confidence(self: PatternBatch, images: Tensor, rows: Sequence[int]) -> Tensor:
        assert len(images) == len(rows)
        return torch.tensor([queues[self.request.units[self.indices[i]]].pop(0) for i in rows])

    monkeypatch.setattr(PatternBatch, "confidence", confidence)
    yield queues
    assert not any(queues.values())  # each number was used


def test_retry_selects_the_run_with_the_highest_confidence(
    named_model: convscope.Model, confidences: dict[int, list[float]]
) -> None:
    """Each restart equals a run of the recipe without restarts, from that start."""
    confidences.update({0: [0.9], 1: [0.3, 0.2, 0.5, 0.4], 2: [0.1, 0.86], 3: [0.4, 0.4, 0.3, 0.2], 4: [0.85]})
    result = run(named_model, range(5), frames=2)

    def single_run(unit: int, start: int) -> convscope.Patterns:
        """Run one class from a start, without restarts."""
        without_restarts = replace(SHORT_RECIPE, max_restarts=1)
        if start == 0:
            return run(named_model, [unit], without_restarts, frames=2)
        with pytest.MonkeyPatch.context() as patch:
            request = sys.modules["convscope.featurevis.request"]
            generators = request.PatternRequest.generators
            patch.setattr(
                request.PatternRequest, "generators", lambda self, part, seed: generators(self, part, seed, start)
            )
            return run(named_model, [unit], without_restarts, frames=2)

    for unit, start in ((0, 0), (1, 2), (2, 1), (3, 0), (4, 0)):
        expected = single_run(unit, start)
        assert nearly_equal(result.images[unit], expected.images[0])
        assert nearly_equal(result.frames[:, unit], expected.frames[:, 0])
        assert not nearly_equal(result.images[unit], single_run(unit, start + 1).images[0])
        assert np.array_equal(result.frames[-1, unit], result.images[unit])
        np.testing.assert_allclose(result.history[:, unit], expected.history[:, 0], rtol=0.02)
        np.testing.assert_allclose(result.scores[unit], expected.scores[0], rtol=0.02)
    assert [note.split(" after")[0] for note in result.notes] == [
        "class 1 (one) has a probability of 0.50",
        "class 3 (three) has a probability of 0.40",
    ]


def test_retries_do_not_depend_on_the_batch(named_model: convscope.Model, confidences: dict[int, list[float]]) -> None:
    confidences.update({1: [0.1, 0.2, 0.1, 0.1], 2: [0.2, 0.3, 0.9]})
    pair = run(named_model, [1, 2])
    for position, unit in enumerate((1, 2)):
        confidences.update({1: [0.1, 0.2, 0.1, 0.1], 2: [0.2, 0.3, 0.9]})
        a = run(named_model, [unit])
        assert nearly_equal(pair.images[position], a.images[0])
        confidences[3 - unit].clear()


def test_short_runs_and_units_of_layers_are_not_retried(
    named_model: convscope.Model, confidences: dict[int, list[float]]
) -> None:
    """Fewer steps than the recipe's are for a quick preview; only classes have a confidence."""
    assert not run(named_model, [0, 1], steps=STEPS - 1).notes
    assert not [
        n
        for n in convscope.patterns(named_model, "relu2", [3], recipe=SHORT_RECIPE, size=32).notes
        if "probability" in n
    ]
    assert not confidences


def test_retries_follow_all_batches_with_the_same_batch_size(
    named_model: convscope.Model, confidences: dict[int, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    confidences.update({u: [0.1, 0.9] for u in range(5)})
    monkeypatch.setattr(sys.modules["convscope.featurevis.plan"], "batch_size", lambda *_: 4)
    batch_sizes = []

    def record_task(task: Any) -> Any:
        batch_sizes.append((len(task.generators), task.views))
        return SHORT_RECIPE.run(task)

    run(named_model, range(5), replace(SHORT_RECIPE, run=record_task))
    assert batch_sizes == [(2, 1), (3, 1), (2, 1), (3, 1)]


def test_retries_report_progress_and_can_be_cancelled(
    named_model: convscope.Model, confidences: dict[int, list[float]]
) -> None:
    """Progress is reported at every step; an exception raised there cancels the call."""
    confidences.update({0: [0.1, 0.9]})
    calls: list[tuple[int, int]] = []
    run(named_model, [0], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, STEPS) for i in range(1, STEPS + 1)] + [(STEPS, STEPS)] * STEPS

    def interrupt(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == STEPS + 3:
            raise KeyboardInterrupt

    calls.clear()
    confidences.update({0: [0.1]})
    with pytest.raises(KeyboardInterrupt):
        run(named_model, [0], progress=interrupt)
    assert len(calls) == STEPS + 3


def test_confidence_of_a_sigmoid_network() -> None:
    """The confidence is the probability that `predict` gives for the shuffled image, independently per class."""
    model = load_model(nn.Sequential(QuadrantBrightness(), nn.Sigmoid()), 32)
    assert model.final_activation == "sigmoid"
    result = run(model, range(4), replace(SHORT_RECIPE, max_restarts=2))
    shuffled = np.roll(result.images, (16, 16), (1, 2))
    probabilities = 1 / (1 + np.exp(-convscope.predict(model, shuffled).logits))
    doubtful = [
        u for u in range(4) if probabilities[u, u] < MIN_CONFIDENCE and result.scores[u] > result.noise_scores[u]
    ]
    assert [note.split(" after")[0] for note in result.notes if "quadrants" in note] == [
        f"class {u} has a probability of {probabilities[u, u]:.2f}" for u in doubtful
    ]
    assert doubtful or not result.notes
