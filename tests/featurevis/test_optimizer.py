"""Climbing with other optimisers, and to a plateau: every step and every end by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from convscope import ConvscopeError
from convscope.featurevis.optimizer import (
    DEAD_AFTER_STEPS,
    Plateau,
    adam_step,
    exponential_warmup,
    from_torch_optimizer,
    gradient_ascent,
    rms_step,
)
from convscope.featurevis.parameterization import PixelImage


def start(*shape: int) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(0), dtype=torch.float64)


# --- any optimiser ---------------------------------------------------------------------------------------------------


def test_sgd_with_momentum_and_a_cosine_by_hand() -> None:
    """Uphill on -(x - peak)^2 / 2: the textbook's recursion, and the schedule's closed form, in float64."""
    first, peak = start(2, 1, 3, 4).numpy(), np.random.default_rng(1).normal(size=(2, 1, 3, 4))
    canvas, steps, rate, momentum = PixelImage(torch.from_numpy(first.copy()), 1), 9, 0.4, 0.9
    step = from_torch_optimizer(
        canvas.params,
        partial(torch.optim.SGD, lr=rate, momentum=momentum),
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )
    target = torch.from_numpy(peak)
    history = gradient_ascent(
        canvas.params, lambda _: -(canvas.params - target).square().sum((1, 2, 3)) / 2, step, steps
    )
    x, velocity = first.copy(), np.zeros_like(first)
    for t in range(steps):
        assert history[t].tolist() == pytest.approx((-((x - peak) ** 2).sum((1, 2, 3)) / 2).tolist(), rel=1e-12)
        velocity = momentum * velocity + (peak - x)
        x = x + rate * (1 + math.cos(math.pi * t / steps)) / 2 * velocity
    assert np.abs(canvas.params.detach().numpy() - x).max() < 1e-12  # float64
    assert canvas.params.grad is None


def test_without_a_schedule_the_rate_stays() -> None:
    canvas = PixelImage(start(1, 1, 2, 2), 1)
    before = canvas.params.detach().clone()
    step = from_torch_optimizer(canvas.params, partial(torch.optim.SGD, lr=0.5))
    gradient_ascent(canvas.params, lambda _: 3 * canvas.params.sum((1, 2, 3)), step, 4)
    assert (canvas.params.detach() - before).flatten().tolist() == pytest.approx([4 * 0.5 * 3] * 4, rel=1e-12)


def test_steps_that_grow_by_the_same_factor() -> None:
    """0.03, then 60 equal factors to 1, then 1, times the size; each is what Adam takes with a gradient that stays."""
    rate = exponential_warmup(100, 0.5)
    lengths = np.array([rate(i) for i in range(100)])
    assert lengths[0] == pytest.approx(0.015)
    assert lengths[1:61] / lengths[:60] == pytest.approx(np.full(60, (1 / 0.03) ** (1 / 60)))
    assert lengths[60:] == pytest.approx(np.full(40, 0.5))
    values = torch.zeros(1, 4, requires_grad=True)
    step, path = adam_step(values, rate, damping=2.0), []
    for _ in range(100):
        with torch.no_grad():
            step(values, torch.full((1, 4), 7.0))
        path.append(float(values[0, 0].detach()))
    # The gradient over its RMS is 1, and so are both of Adam's means: each step is the length over 1 + 2.
    assert path == pytest.approx(np.cumsum(lengths) / 3, rel=1e-4)  # float32, a hundred sums


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ConvscopeError, match="LBFGS searches along lines across all images at once"):
        from_torch_optimizer(start(1, 1, 2, 2).requires_grad_(), torch.optim.LBFGS)


# --- the plateau -----------------------------------------------------------------------------------------------------


def reached_by_hand(values: np.ndarray, patience: int, share: float) -> list[bool]:
    """The best of the last `patience` values against the best of those before, in plain numbers."""
    found = []
    for path in values.T.tolist():
        if len(path) <= patience:
            found.append(False)
            continue
        before, since = max(path[:-patience]), max(path[-patience:])
        found.append(path[-1] != 0 and since - before <= share * abs(before))
    return found


@pytest.mark.parametrize(("patience", "share"), [(1, 0.01), (3, 0.01), (3, 0.5), (4, 0.0)])
def test_plateau_by_hand(patience: int, share: float) -> None:
    rng = np.random.default_rng(0)
    seen: set[bool] = set()
    for length in range(1, 9):
        values = rng.normal(size=(length, 40)).cumsum(0) * rng.choice([0.005, 0.1, 1], 40) + rng.choice([-1, 0, 1], 40)
        values[:, :5] = 0  # silent: not done
        values[-1, 5:8] = 0
        expected = reached_by_hand(values, patience, share)
        assert Plateau(patience, share).reached(list(torch.from_numpy(values))).tolist() == expected
        seen |= set(expected)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("path", "done"),
    [
        ([1.0, 1.0, 1.0], True),
        ([1.0, 1.0], False),  # not yet as many steps as the patience, and one to compare with
        ([1.0, 1.0, 1.009], True),
        ([1.0, 1.0, 1.011], False),
        ([1.0, 2.0, 1.0], False),  # it was better since, though it is not now
        ([5.0, 1.0, 2.0], True),  # the best of all is from before
        ([-1.0, -1.0, -0.995], True),
        ([-1.0, -1.0, -0.98], False),
        ([0.0, 0.0, 0.0], False),  # has yet to wake
        ([1.0, 0.5, 0.0], False),  # has fallen asleep
    ],
)
def test_one_path(path: list[float], done: bool) -> None:
    history = [torch.tensor([value, 100.0 * i]) for i, value in enumerate(path)]
    assert Plateau(2).reached(history).tolist() == [done, False]


def test_a_picture_that_is_done_stays_while_its_neighbour_climbs() -> None:
    """Momentum and gradient would carry it on; its bytes stay, and its neighbour's path is the one it has alone."""
    steps, patience = 12, 3

    def climbed(plateau: Plateau | None) -> tuple[list[Tensor], Tensor]:
        canvas = PixelImage(start(2, 3, 4, 5).float(), 1)
        floor = torch.tensor([1000.0, 0.0])
        seen = [canvas.params.detach().clone()]
        history = gradient_ascent(
            canvas.params,
            # Not a straight line: an objective whose gradient every step is of its own.
            lambda _: floor + canvas.params.square().sum((1, 2, 3)),
            adam_step(canvas.params, 0.1, 2.0),
            steps,
            plateau=plateau,
            on_step=lambda _: seen.append(canvas.params.detach().clone()),
        )
        return seen, history

    free, free_history = climbed(None)
    seen, history = climbed(Plateau(patience))
    assert len(seen) == steps + 1  # the neighbour's steps go on
    # Picture 0 moves by less than one per cent in three steps: done when the fourth value is there, after three steps.
    for i in range(steps + 1):
        assert torch.equal(seen[i][0], free[min(i, patience)][0])
        assert torch.equal(seen[i][1], free[i][1])
    assert not torch.equal(free[patience][0], free[patience + 1][0])
    assert history.shape == (steps, 2)
    assert torch.equal(history[:, 1], free_history[:, 1])
    assert torch.equal(history[: patience + 1, 0], free_history[: patience + 1, 0])
    assert (history[patience:, 0] == history[patience, 0]).all()


def test_what_is_done_has_the_history_that_it_has_alone() -> None:
    """Its value would go on changing with the views: it stays, and no gradient is asked for it."""

    def climbed(floors: list[float]) -> tuple[Tensor, list[Tensor]]:
        canvas, asked = PixelImage(start(1, 3, 4, 5).float().expand(len(floors), -1, -1, -1), 1), []

        def measure(i: int) -> Tensor:
            picture = canvas.images() * 1
            picture.register_hook(lambda gradient: asked.append(gradient.flatten(1).any(1)) or None)
            return torch.tensor(floors) + (1 + i % 3) * picture.mean((1, 2, 3))

        return gradient_ascent(canvas.params, measure, rms_step(0.5), 10, plateau=Plateau(4)), asked

    (alone, _), (beside, asked) = climbed([1000.0, 1000.0]), climbed([1000.0, 0.0])
    assert torch.equal(alone[:, 0], beside[:, 0])
    assert beside[4:, 0].unique().numel() == 1
    assert beside[:, 1].unique().numel() == 10
    assert [pictures.tolist() for pictures in asked] == [[True, True]] * 5 + [[False, True]] * 5


def test_when_all_are_done_the_climb_ends_and_the_history_keeps_its_length() -> None:
    canvas = PixelImage(start(2, 3, 4, 5).float(), 1)
    measured: list[int] = []
    stepped: list[int] = []

    def measure(i: int) -> Tensor:
        measured.append(i)
        return torch.tensor([1000.0, 500.0]) + canvas.params.mean((1, 2, 3))

    history = gradient_ascent(canvas.params, measure, rms_step(0.5), 50, plateau=Plateau(4), on_step=stepped.append)
    assert measured == [0, 1, 2, 3, 4]
    assert stepped == [0, 1, 2, 3]
    assert history.shape == (50, 2)
    assert (history[5:] == history[4]).all()
    assert (history[1:5] > history[:4]).all()
    # The last values are those of the pictures as they lie.
    assert torch.equal(history[-1], torch.tensor([1000.0, 500.0]) + canvas.params.detach().mean((1, 2, 3)))


# --- silence ---------------------------------------------------------------------------------------------------------


class Silence:
    """Pictures whose values are 0 before their first step, whatever they show; a gradient they always have."""

    def __init__(self, *first: int) -> None:
        self.canvas = PixelImage(start(1, 3, 4, 5).float().expand(len(first), -1, -1, -1), 1)
        self.first, self.seen = first, [self.canvas.params.detach().clone()]

    def climbed(self, steps: int, redirect_steps: int) -> Tensor:
        def measure(i: int) -> Tensor:
            values = self.canvas.params.square().mean((1, 2, 3))
            return values - values.detach() * torch.tensor([float(i < first) for first in self.first])

        step = adam_step(self.canvas.params, 0.1, 2.0)

        def note(_: int) -> None:
            self.seen.append(self.canvas.params.detach().clone())

        return gradient_ascent(self.canvas.params, measure, step, steps, redirect_steps=redirect_steps, on_step=note)


NEVER = 1000


def test_a_picture_that_is_silent_from_the_first_stays_and_its_neighbours_climb_on() -> None:
    """One that fires at the last of the steps that count is not given up, nor one that falls silent later."""
    steps = DEAD_AFTER_STEPS + 8
    late = Silence(NEVER, DEAD_AFTER_STEPS - 1, 0)
    history = late.climbed(steps, redirect_steps=4)
    for i in range(steps + 1):
        beside = late.seen[min(i, len(late.seen) - 1)]
        assert torch.equal(beside[0], late.seen[min(i, DEAD_AFTER_STEPS - 1)][0])
    assert not torch.equal(late.seen[DEAD_AFTER_STEPS - 2][0], late.seen[DEAD_AFTER_STEPS - 1][0])
    assert not history[:, 0].any()
    assert history[DEAD_AFTER_STEPS - 1 :, 1].all()
    for place, first in ((1, DEAD_AFTER_STEPS - 1), (2, 0)):
        alone = Silence(first)
        assert torch.equal(alone.climbed(steps, redirect_steps=4)[:, 0], history[:, place])
        assert torch.equal(alone.seen[-1][0], late.seen[-1][place])
    assert not torch.equal(late.seen[-2][1], late.seen[-1][1])


def test_when_all_are_silent_the_climb_ends() -> None:
    silent = Silence(NEVER, NEVER)
    history = silent.climbed(150, redirect_steps=4)
    assert len(silent.seen) == DEAD_AFTER_STEPS  # as they began, and a step behind each value but the last
    assert history.shape == (150, 2)
    assert not history.any()


def test_who_is_not_to_be_woken_is_not_given_up() -> None:
    """Without `revive` nothing was done about the silence: the textbook's recipe takes all of its steps."""
    plain = Silence(NEVER)
    plain.climbed(DEAD_AFTER_STEPS + 8, redirect_steps=0)
    assert len(plain.seen) == DEAD_AFTER_STEPS + 9


def test_pictures_end_as_the_mean_of_what_they_were_last() -> None:
    """Of seven steps the last three; a picture that is done sooner stays as it is. The history is of the steps."""

    def climbed(steps: int, mean: int, plateau: Plateau | None) -> tuple[list[Tensor], Tensor, Tensor]:
        canvas = PixelImage(start(2, 3, 4, 5).float(), 1)
        seen: list[Tensor] = []

        def measure(i: int) -> Tensor:
            own = canvas.params.square().mean((1, 2, 3))
            rising = torch.tensor([1.0, 1.0 + i])
            return own - own.detach() + rising

        def note(_: int) -> None:
            seen.append(canvas.params.detach().clone())

        step = adam_step(canvas.params, 0.1, 2.0)
        history = gradient_ascent(canvas.params, measure, step, steps, average_last=mean, plateau=plateau, on_step=note)
        return seen, canvas.params.detach(), history

    seen, last, history = climbed(7, 3, None)
    assert torch.allclose(last, (seen[4] + seen[5] + seen[6]) / 3, atol=1e-5)
    assert (last - seen[6]).abs().mean() > 0.01
    _, usual, the_same = climbed(7, 0, None)
    assert torch.equal(usual, seen[6])
    assert torch.equal(history, the_same)
    seen, last, _ = climbed(7, 3, Plateau(2))
    assert torch.equal(seen[2][0], seen[6][0])
    assert torch.allclose(last[0], seen[6][0], atol=1e-5)
    assert torch.allclose(last[1], (seen[4] + seen[5] + seen[6])[1] / 3, atol=1e-5)
    # One that all have ended before there were late steps is not touched.
    seen, last, _ = climbed(40, 3, Plateau(2, min_gain=100.0))
    assert len(seen) < 30
    assert torch.equal(last, seen[-1])


def test_what_is_frail_is_left_where_it_fired_most() -> None:
    """Of the values 0, 1, 2, 0.5 and 0 again the picture with 2 is kept; what never fires goes on to the end."""
    values = torch.zeros(8, 2)
    values[2:5, 0] = torch.tensor([1.0, 2.0, 0.5])

    def climbed(best: bool) -> list[Tensor]:
        canvas = PixelImage(start(2, 3, 4, 5).float(), 1)
        seen = [canvas.params.detach().clone()]

        def measure(i: int) -> Tensor:
            own = canvas.params.square().mean((1, 2, 3))
            return own - own.detach() + values[i]

        def note(_: int) -> None:
            seen.append(canvas.params.detach().clone())

        history = gradient_ascent(
            canvas.params, measure, adam_step(canvas.params, 0.1, 2.0), 8, keep_best=best, on_step=note
        )
        assert torch.equal(history, values)
        return [*seen, canvas.params.detach()]

    kept, last = climbed(True), climbed(False)
    assert torch.equal(kept[-1][0], kept[3][0])
    assert torch.equal(kept[-1][1], kept[8][1])
    assert torch.equal(last[-1], last[8])
    assert torch.equal(torch.stack(kept[:-1]), torch.stack(last[:-1]))
