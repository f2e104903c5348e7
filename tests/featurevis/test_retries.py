"""Classes that the network does not know in pieces: told from the others by hand, and drawn again."""

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
from tests.featurevis.test_recipes import loaded
from tests.oracles.nets import SmallConvNet, randomized

STEPS = 16
BRIEF = replace(RECIPES["robust"], schedule=constant_schedule(STEPS, 0.8), max_restarts=4)


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    model = loaded(randomized(SmallConvNet()), 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return replace(model, classes=("zero", "one", "two", "three", "four"))


def drawn(model: convscope.Model, classes: Sequence[int], rule: Recipe = BRIEF, **more: Any) -> convscope.Patterns:
    return convscope.patterns(model, "logits", classes, recipe=rule, size=32, **more)


def like(one: np.ndarray, other: np.ndarray) -> bool:
    """But for what an ascent makes of the other rounding of passes of another size: pictures from other starts are
    apart by more than 30."""
    return bool(np.abs(one.astype(int) - other).mean() < 2)


class Quarters(nn.Module):
    """Four classes: ten times the brightness of the upper left quarter, of the upper right, lower left, lower right."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.pool(x.mean(1, keepdim=True)).flatten(1)


def test_what_the_network_knows_in_pieces_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished pictures cut by hand at their middle; what falls short is drawn again, and said to."""
    monkeypatch.setattr(sys.modules["convscope.featurevis.api"], "noise_baseline", lambda *_: torch.zeros(4))
    model = loaded(Quarters(), 32)
    once = drawn(model, range(4), replace(BRIEF, max_restarts=1))
    assert not once.notes
    found = drawn(model, range(4))
    bright = found.images.reshape(4, 2, 16, 2, 16, 3).mean((2, 4, 5)) / 255
    exchanged = np.exp(10 * bright[:, ::-1, ::-1].reshape(4, 4))
    sure = exchanged[range(4), range(4)] / exchanged.sum(1)
    assert sure.max() < MIN_CONFIDENCE  # a quarter that is bright where it was drawn is dark across
    assert found.notes == tuple(
        f"class {u} has a probability of {p:.2f} after the quadrants of the image are shuffled. "
        "The pattern may transfer poorly to other models."
        for u, p in enumerate(sure)
    )
    assert not np.array_equal(found.images, once.images)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[float]]]:
    """How well the network knows a class: not what it says, but the next number from the class's list."""
    lists: dict[int, list[float]] = {}

    def known(self: PatternBatch, pictures: Tensor, which: Sequence[int]) -> Tensor:
        assert len(pictures) == len(which)
        return torch.tensor([lists[self.request.units[self.indices[i]]].pop(0) for i in which])

    monkeypatch.setattr(PatternBatch, "confidence", known)
    yield lists
    assert not any(lists.values())  # each was asked for as often as was foreseen


def test_what_convinces_best_is_kept(usual: convscope.Model, told: dict[int, list[float]]) -> None:
    """Each try by itself is the recipe with one try, from that start."""
    told.update({0: [0.9], 1: [0.3, 0.2, 0.5, 0.4], 2: [0.1, 0.86], 3: [0.4, 0.4, 0.3, 0.2], 4: [0.85]})
    found = drawn(usual, range(5), frames=2)

    def alone(unit: int, start: int) -> convscope.Patterns:
        """From the same random numbers: a start adds 2^31 - 1 to them, as a seed adds 1,000,003."""
        once = replace(BRIEF, max_restarts=1)
        if start == 0:
            return drawn(usual, [unit], once, frames=2)
        with pytest.MonkeyPatch.context() as patch:
            plan = sys.modules["convscope.featurevis.request"]
            usually = plan.PatternRequest.generators
            patch.setattr(plan.PatternRequest, "generators", lambda self, part, seed: usually(self, part, seed, start))
            return drawn(usual, [unit], once, frames=2)

    for unit, start in ((0, 0), (1, 2), (2, 1), (3, 0), (4, 0)):
        expected = alone(unit, start)
        assert like(found.images[unit], expected.images[0])
        assert like(found.frames[:, unit], expected.frames[:, 0])
        assert not like(found.images[unit], alone(unit, start + 1).images[0])
        assert np.array_equal(found.frames[-1, unit], found.images[unit])
        np.testing.assert_allclose(found.history[:, unit], expected.history[:, 0], rtol=0.02)
        np.testing.assert_allclose(found.scores[unit], expected.scores[0], rtol=0.02)
    assert [note.split(" after")[0] for note in found.notes] == [
        "class 1 (one) has a probability of 0.50",
        "class 3 (three) has a probability of 0.40",
    ]


def test_neighbours_that_are_drawn_again_change_nothing(usual: convscope.Model, told: dict[int, list[float]]) -> None:
    told.update({1: [0.1, 0.2, 0.1, 0.1], 2: [0.2, 0.3, 0.9]})
    both = drawn(usual, [1, 2])
    for place, unit in enumerate((1, 2)):
        told.update({1: [0.1, 0.2, 0.1, 0.1], 2: [0.2, 0.3, 0.9]})
        one = drawn(usual, [unit])
        assert like(both.images[place], one.images[0])
        told[3 - unit].clear()


def test_few_steps_are_not_drawn_again(usual: convscope.Model, told: dict[int, list[float]]) -> None:
    """Who asks for less than the recipe's own number wants to see something soon; nor are layers' units judged."""
    assert not drawn(usual, [0, 1], steps=STEPS - 1).notes
    assert not [n for n in convscope.patterns(usual, "relu2", [3], recipe=BRIEF, size=32).notes if "probability" in n]
    assert not told


def test_what_is_drawn_again_waits_for_the_last_batch_and_keeps_its_size(
    usual: convscope.Model, told: dict[int, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told.update({u: [0.1, 0.9] for u in range(5)})
    monkeypatch.setattr(sys.modules["convscope.featurevis.plan"], "batch_size", lambda *_: 4)
    tasks = []

    def spied(task: Any) -> Any:
        tasks.append((len(task.generators), task.views))
        return BRIEF.run(task)

    drawn(usual, range(5), replace(BRIEF, run=spied))
    assert tasks == [(2, 1), (3, 1), (2, 1), (3, 1)]


def test_what_is_drawn_again_can_be_ended(usual: convscope.Model, told: dict[int, list[float]]) -> None:
    """Progress is told at every step, and what it raises ends the work."""
    told.update({0: [0.1, 0.9]})
    calls: list[tuple[int, int]] = []
    drawn(usual, [0], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, STEPS) for i in range(1, STEPS + 1)] + [(STEPS, STEPS)] * STEPS

    def enough(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == STEPS + 3:
            raise KeyboardInterrupt

    calls.clear()
    told.update({0: [0.1]})
    with pytest.raises(KeyboardInterrupt):
        drawn(usual, [0], progress=enough)
    assert len(calls) == STEPS + 3


def test_a_network_that_ends_in_a_sigmoid_is_judged_by_it() -> None:
    """Each class by itself: what the network says of the picture in pieces is what `predict` says of it."""
    model = loaded(nn.Sequential(Quarters(), nn.Sigmoid()), 32)
    assert model.final_activation == "sigmoid"
    found = drawn(model, range(4), replace(BRIEF, max_restarts=2))
    pieces = np.roll(found.images, (16, 16), (1, 2))
    said = 1 / (1 + np.exp(-convscope.predict(model, pieces).logits))
    doubted = [u for u in range(4) if said[u, u] < MIN_CONFIDENCE and found.scores[u] > found.noise_scores[u]]
    assert [note.split(" after")[0] for note in found.notes if "quadrants" in note] == [
        f"class {u} has a probability of {said[u, u]:.2f}" for u in doubted
    ]
    assert doubted or not found.notes
