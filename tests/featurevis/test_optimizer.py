"""Gradient ascent: update rules, warm-up, stopping and averaging, against hand-written loops."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from convscope import ConvscopeError
from convscope.featurevis.optimizer import (
    DEAD_AFTER_STEPS,
    Plateau,
    adam_step,
    consistency_weighted_adam,
    exponential_warmup,
    from_torch_optimizer,
    gradient_ascent,
    rms_step,
)
from convscope.featurevis.parameterization import PixelImage
from tests.featurevis.helpers import relative_error
from tests.oracles.nets import randomized


def initial_pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(0), dtype=torch.float64)


# --- update rules ----------------------------------------------------------------------------------------------------


def test_parameters_move_along_the_gradient() -> None:
    conv = randomized(nn.Conv2d(3, 2, 3, bias=False))
    canvas = PixelImage(torch.rand((2, 3, 3, 3), generator=Generator().manual_seed(0)))
    before = canvas.params.detach().clone()
    history = gradient_ascent(canvas.params, lambda _: conv(canvas.params)[[0, 1], [0, 1], 0, 0], rms_step(0.5), 1)
    w = conv.weight.detach()
    rms = w.double().pow(2).mean((1, 2, 3), keepdim=True).sqrt()
    change = canvas.params.detach() - before
    assert relative_error(change, 0.5 * w.double() / (rms + 1e-5)) < 1e-5  # a difference of float32 numbers
    assert relative_error(history[0], (w.double() * before).sum((1, 2, 3))) < 1e-6


def test_rms_step_by_hand() -> None:
    rng = np.random.default_rng(0)
    values, gradient = rng.normal(size=(2, 3, 2, 4, 5))
    gradient[1] *= 1e-7  # far below the epsilon of 1e-5
    actual = torch.from_numpy(values.copy())
    rms_step(0.7)(actual, torch.from_numpy(gradient.copy()))
    for n in range(3):
        rms = math.sqrt(sum(g * g for g in gradient[n].ravel()) / 40)
        assert relative_error(actual[n], values[n] + 0.7 * gradient[n] / (rms + 1e-5)) < 1e-12  # float64


def test_adam_step_by_hand() -> None:
    """Kingma and Ba, algorithm 1, on normalized gradients, with the damping as epsilon."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(2, 3, 4, 5))
    values = torch.from_numpy(start.copy()).requires_grad_()
    step = adam_step(values, 0.1, 2.0)
    expected, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t in range(1, 6):
        gradient = rng.normal(size=start.shape) * [[[[3.0]]], [[[1e-4]]]]
        with torch.no_grad():
            step(values, torch.from_numpy(gradient.copy()))
        unit_rms = gradient / np.sqrt((gradient**2).mean((1, 2, 3), keepdims=True))
        m = 0.9 * m + 0.1 * unit_rms
        v = 0.999 * v + 0.001 * unit_rms**2
        expected += 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 2.0)
        assert relative_error(values.detach(), expected) < 1e-12  # float64
    assert values.grad is None
    before = values.detach().clone()
    with torch.no_grad():
        adam_step(values, 0.1, 2.0)(values, torch.zeros_like(values))
    assert torch.equal(values.detach(), before)


def test_adam_step_does_not_depend_on_memory_formats() -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn((2, 3, 5, 7), generator=generator) for _ in range(2))
    ends = []
    for a, b in product([torch.contiguous_format, torch.channels_last], repeat=2):
        values = start.clone(memory_format=a)
        step = adam_step(values, 0.1, 2.0)
        for _ in range(3):
            step(values, gradient.clone(memory_format=b))
        ends.append(values)
    assert not torch.equal(ends[0], start)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)  # sums in another order


def test_consistency_weighted_adam_by_hand() -> None:
    """Adam's step times |m| / sqrt(v), at most 1, with the averages as explicit sums."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(2, 3, 4, 5))
    gradients = [rng.normal(size=start.shape) * [[[[3.0]]], [[[1e-4]]]] + 1e-4 for _ in range(6)]
    values = torch.from_numpy(start.copy()).requires_grad_()
    step = consistency_weighted_adam(values, 0.3, 0.1)
    scaled = [g / np.sqrt((g**2).mean((1, 2, 3), keepdims=True)) for g in gradients]
    expected = start.copy()
    for t in range(1, 7):
        with torch.no_grad():
            step(values, torch.from_numpy(gradients[t - 1].copy()))
        m = sum(0.9 ** (t - i) * 0.1 * scaled[i - 1] for i in range(1, t + 1)) / (1 - 0.9**t)
        root = np.sqrt(sum(0.999 ** (t - i) * 0.001 * scaled[i - 1] ** 2 for i in range(1, t + 1)) / (1 - 0.999**t))
        expected = expected + 0.3 * m / (root + 0.1) * np.minimum(1, np.abs(m) / root)
        assert relative_error(values.detach(), expected) < 1e-12  # float64
    before = values.detach().clone()
    with torch.no_grad():
        consistency_weighted_adam(values, 0.3, 0.1)(values, torch.zeros_like(values))
    assert torch.equal(values.detach(), before)


def test_inconsistent_gradients_are_suppressed() -> None:
    """A coordinate whose gradient alternates in sign hardly moves."""
    values = torch.zeros(1, 2, requires_grad=True)
    step = consistency_weighted_adam(values, 0.1, 0.1)
    for i in range(40):
        with torch.no_grad():
            step(values, torch.tensor([[1.0, (-1.0) ** i]]))
    consistent, alternating = values[0].tolist()
    assert consistent == pytest.approx(40 * 0.1 / 1.1, rel=1e-4)  # float32, 40 sums
    # Only the first of forty steps has full length; later averages are small.
    assert abs(alternating) < 1.5 * 0.1 / 1.1


# --- optimizers of torch ---------------------------------------------------------------------------------------------


def test_sgd_with_momentum_and_cosine_schedule_by_hand() -> None:
    """Maximise -(x - maximum)^2 / 2: the recursion of momentum and the closed form of the schedule, in float64."""
    first_active, maximum = initial_pixels(2, 1, 3, 4).numpy(), np.random.default_rng(1).normal(size=(2, 1, 3, 4))
    canvas, steps, rate, momentum = PixelImage(torch.from_numpy(first_active.copy()), 1), 9, 0.4, 0.9
    step = from_torch_optimizer(
        canvas.params,
        partial(torch.optim.SGD, lr=rate, momentum=momentum),
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )
    target = torch.from_numpy(maximum)
    history = gradient_ascent(
        canvas.params, lambda _: -(canvas.params - target).square().sum((1, 2, 3)) / 2, step, steps
    )
    x, velocity = first_active.copy(), np.zeros_like(first_active)
    for t in range(steps):
        assert history[t].tolist() == pytest.approx((-((x - maximum) ** 2).sum((1, 2, 3)) / 2).tolist(), rel=1e-12)
        velocity = momentum * velocity + (maximum - x)
        x = x + rate * (1 + math.cos(math.pi * t / steps)) / 2 * velocity
    assert np.abs(canvas.params.detach().numpy() - x).max() < 1e-12  # float64
    assert canvas.params.grad is None


def test_rate_is_constant_without_a_scheduler() -> None:
    canvas = PixelImage(initial_pixels(1, 1, 2, 2), 1)
    before = canvas.params.detach().clone()
    step = from_torch_optimizer(canvas.params, partial(torch.optim.SGD, lr=0.5))
    gradient_ascent(canvas.params, lambda _: 3 * canvas.params.sum((1, 2, 3)), step, 4)
    assert (canvas.params.detach() - before).flatten().tolist() == pytest.approx([4 * 0.5 * 3] * 4, rel=1e-12)


def test_exponential_warmup_by_hand() -> None:
    """The rates grow from 0.03 by 60 equal factors to 1; Adam takes steps of this length for a constant gradient."""
    rate = exponential_warmup(100, 0.5)
    lengths = np.array([rate(i) for i in range(100)])
    assert lengths[0] == pytest.approx(0.015)
    assert lengths[1:61] / lengths[:60] == pytest.approx(np.full(60, (1 / 0.03) ** (1 / 60)))
    assert lengths[60:] == pytest.approx(np.full(40, 0.5))
    params = torch.zeros(1, 4, requires_grad=True)
    step, positions = adam_step(params, rate, damping=2.0), []
    for _ in range(100):
        with torch.no_grad():
            step(params, torch.full((1, 4), 7.0))
        positions.append(float(params[0, 0].detach()))
    # The normalized gradient and both of Adam's averages are 1: each step is the rate divided by 1 + 2.
    assert positions == pytest.approx(np.cumsum(lengths) / 3, rel=1e-4)  # float32, 100 sums


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ConvscopeError, match="LBFGS searches along lines across all images at once"):
        from_torch_optimizer(initial_pixels(1, 1, 2, 2).requires_grad_(), torch.optim.LBFGS)


# --- plateau ---------------------------------------------------------------------------------------------------------


def reference_reached(history: np.ndarray, patience: int, min_gain: float) -> list[bool]:
    """Compare the best of the last `patience` values with the best before."""
    expected = []
    for values in history.T.tolist():
        if len(values) <= patience:
            expected.append(False)
            continue
        before, recent = max(values[:-patience]), max(values[-patience:])
        expected.append(values[-1] != 0 and recent - before <= min_gain * abs(before))
    return expected


@pytest.mark.parametrize(("patience", "min_gain"), [(1, 0.01), (3, 0.01), (3, 0.5), (4, 0.0)])
def test_plateau_by_hand(patience: int, min_gain: float) -> None:
    rng = np.random.default_rng(0)
    outcomes: set[bool] = set()
    for length in range(1, 9):
        values = rng.normal(size=(length, 40)).cumsum(0) * rng.choice([0.005, 0.1, 1], 40) + rng.choice([-1, 0, 1], 40)
        values[:, :5] = 0  # always 0: not finished
        values[-1, 5:8] = 0
        expected = reference_reached(values, patience, min_gain)
        assert Plateau(patience, min_gain).reached(list(torch.from_numpy(values))).tolist() == expected
        outcomes |= set(expected)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("values", "finished"),
    [
        ([1.0, 1.0, 1.0], True),
        ([1.0, 1.0], False),  # fewer values than the patience and one to compare with
        ([1.0, 1.0, 1.009], True),
        ([1.0, 1.0, 1.011], False),
        ([1.0, 2.0, 1.0], False),  # better in between
        ([5.0, 1.0, 2.0], True),  # the best value came before
        ([-1.0, -1.0, -0.995], True),
        ([-1.0, -1.0, -0.98], False),
        ([0.0, 0.0, 0.0], False),  # not active yet
        ([1.0, 0.5, 0.0], False),  # not active any more
    ],
)
def test_plateau_of_single_histories(values: list[float], finished: bool) -> None:
    history = [torch.tensor([value, 100.0 * i]) for i, value in enumerate(values)]
    assert Plateau(2).reached(history).tolist() == [finished, False]


def test_finished_image_is_frozen_while_the_other_continues() -> None:
    """Neither momentum nor gradients move it; the other image is not affected."""
    steps, patience = 12, 3

    def optimise(plateau: Plateau | None) -> tuple[list[Tensor], Tensor]:
        canvas = PixelImage(initial_pixels(2, 3, 4, 5).float(), 1)
        floor = torch.tensor([1000.0, 0.0])
        snapshots = [canvas.params.detach().clone()]
        history = gradient_ascent(
            canvas.params,
            # Not linear, so that the gradient changes with every step.
            lambda _: floor + canvas.params.square().sum((1, 2, 3)),
            adam_step(canvas.params, 0.1, 2.0),
            steps,
            plateau=plateau,
            on_step=lambda _: snapshots.append(canvas.params.detach().clone()),
        )
        return snapshots, history

    unlimited, unlimited_history = optimise(None)
    snapshots, history = optimise(Plateau(patience))
    assert len(snapshots) == steps + 1  # the other image takes all steps
    # Image 0 gains less than 1 % in three steps: it is finished with the fourth value, after three steps.
    for i in range(steps + 1):
        assert torch.equal(snapshots[i][0], unlimited[min(i, patience)][0])
        assert torch.equal(snapshots[i][1], unlimited[i][1])
    assert not torch.equal(unlimited[patience][0], unlimited[patience + 1][0])
    assert history.shape == (steps, 2)
    assert torch.equal(history[:, 1], unlimited_history[:, 1])
    assert torch.equal(history[: patience + 1, 0], unlimited_history[: patience + 1, 0])
    assert (history[patience:, 0] == history[patience, 0]).all()


def test_history_of_a_finished_image_is_constant() -> None:
    """Its value would change with the views; it stays constant, and its gradient is 0."""

    def optimise(floors: list[float]) -> tuple[Tensor, list[Tensor]]:
        canvas, gradients = PixelImage(initial_pixels(1, 3, 4, 5).float().expand(len(floors), -1, -1, -1), 1), []

        def objective(i: int) -> Tensor:
            image = canvas.images() * 1
            image.register_hook(lambda gradient: gradients.append(gradient.flatten(1).any(1)) or None)
            return torch.tensor(floors) + (1 + i % 3) * image.mean((1, 2, 3))

        return gradient_ascent(canvas.params, objective, rms_step(0.5), 10, plateau=Plateau(4)), gradients

    (single, _), (snapshot, gradients) = optimise([1000.0, 1000.0]), optimise([1000.0, 0.0])
    assert torch.equal(single[:, 0], snapshot[:, 0])
    assert snapshot[4:, 0].unique().numel() == 1
    assert snapshot[:, 1].unique().numel() == 10
    assert [mask.tolist() for mask in gradients] == [[True, True]] * 5 + [[False, True]] * 5


def test_loop_ends_when_all_images_are_finished() -> None:
    canvas = PixelImage(initial_pixels(2, 3, 4, 5).float(), 1)
    evaluated: list[int] = []
    steps_reported: list[int] = []

    def objective(i: int) -> Tensor:
        evaluated.append(i)
        return torch.tensor([1000.0, 500.0]) + canvas.params.mean((1, 2, 3))

    history = gradient_ascent(
        canvas.params, objective, rms_step(0.5), 50, plateau=Plateau(4), on_step=steps_reported.append
    )
    assert evaluated == [0, 1, 2, 3, 4]
    assert steps_reported == [0, 1, 2, 3]
    assert history.shape == (50, 2)
    assert (history[5:] == history[4]).all()
    assert (history[1:5] > history[:4]).all()
    # The last values are those of the final images.
    assert torch.equal(history[-1], torch.tensor([1000.0, 500.0]) + canvas.params.detach().mean((1, 2, 3)))


# --- inactive images -------------------------------------------------------------------------------------------------


class InactiveImages:
    """Images with value 0 until a given step, but always with a gradient."""

    def __init__(self, *first_active: int) -> None:
        self.canvas = PixelImage(initial_pixels(1, 3, 4, 5).float().expand(len(first_active), -1, -1, -1), 1)
        self.first_active, self.snapshots = first_active, [self.canvas.params.detach().clone()]

    def optimise(self, steps: int, redirect_steps: int) -> Tensor:
        def objective(i: int) -> Tensor:
            values = self.canvas.params.square().mean((1, 2, 3))
            return values - values.detach() * torch.tensor(
                [float(i < first_active) for first_active in self.first_active]
            )

        step = adam_step(self.canvas.params, 0.1, 2.0)

        def record(_: int) -> None:
            self.snapshots.append(self.canvas.params.detach().clone())

        return gradient_ascent(
            self.canvas.params, objective, step, steps, redirect_steps=redirect_steps, on_step=record
        )


NEVER = 1000


def test_inactive_image_is_frozen_while_the_others_continue() -> None:
    """Images that become active at the last possible step, or are active from the start, continue."""
    steps = DEAD_AFTER_STEPS + 8
    images = InactiveImages(NEVER, DEAD_AFTER_STEPS - 1, 0)
    history = images.optimise(steps, redirect_steps=4)
    for i in range(steps + 1):
        snapshot = images.snapshots[min(i, len(images.snapshots) - 1)]
        assert torch.equal(snapshot[0], images.snapshots[min(i, DEAD_AFTER_STEPS - 1)][0])
    assert not torch.equal(images.snapshots[DEAD_AFTER_STEPS - 2][0], images.snapshots[DEAD_AFTER_STEPS - 1][0])
    assert not history[:, 0].any()
    assert history[DEAD_AFTER_STEPS - 1 :, 1].all()
    for row, first_active in ((1, DEAD_AFTER_STEPS - 1), (2, 0)):
        single = InactiveImages(first_active)
        assert torch.equal(single.optimise(steps, redirect_steps=4)[:, 0], history[:, row])
        assert torch.equal(single.snapshots[-1][0], images.snapshots[-1][row])
    assert not torch.equal(images.snapshots[-2][1], images.snapshots[-1][1])


def test_loop_ends_when_all_images_are_inactive() -> None:
    inactive = InactiveImages(NEVER, NEVER)
    history = inactive.optimise(150, redirect_steps=4)
    assert len(inactive.snapshots) == DEAD_AFTER_STEPS  # the initial images, and one step after each value but the last
    assert history.shape == (150, 2)
    assert not history.any()


def test_inactive_images_run_all_steps_without_redirection() -> None:
    """The plain recipe runs all of its steps."""
    unredirected = InactiveImages(NEVER)
    unredirected.optimise(DEAD_AFTER_STEPS + 8, redirect_steps=0)
    assert len(unredirected.snapshots) == DEAD_AFTER_STEPS + 9


def test_average_of_the_last_steps() -> None:
    """Average over the last three of seven steps; a finished image stays as it is; the history does not change."""

    def optimise(steps: int, average_last: int, plateau: Plateau | None) -> tuple[list[Tensor], Tensor, Tensor]:
        canvas = PixelImage(initial_pixels(2, 3, 4, 5).float(), 1)
        snapshots: list[Tensor] = []

        def objective(i: int) -> Tensor:
            mean_squares = canvas.params.square().mean((1, 2, 3))
            value_offsets = torch.tensor([1.0, 1.0 + i])
            return mean_squares - mean_squares.detach() + value_offsets

        def record(_: int) -> None:
            snapshots.append(canvas.params.detach().clone())

        step = adam_step(canvas.params, 0.1, 2.0)
        history = gradient_ascent(
            canvas.params, objective, step, steps, average_last=average_last, plateau=plateau, on_step=record
        )
        return snapshots, canvas.params.detach(), history

    snapshots, final_params, history = optimise(7, 3, None)
    assert torch.allclose(final_params, (snapshots[4] + snapshots[5] + snapshots[6]) / 3, atol=1e-5)
    assert (final_params - snapshots[6]).abs().mean() > 0.01
    _, final, unaveraged_history = optimise(7, 0, None)
    assert torch.equal(final, snapshots[6])
    assert torch.equal(history, unaveraged_history)
    snapshots, final_params, _ = optimise(7, 3, Plateau(2))
    assert torch.equal(snapshots[2][0], snapshots[6][0])
    assert torch.allclose(final_params[0], snapshots[6][0], atol=1e-5)
    assert torch.allclose(final_params[1], (snapshots[4] + snapshots[5] + snapshots[6])[1] / 3, atol=1e-5)
    # An optimisation that ends before the averaged steps is not changed.
    snapshots, final_params, _ = optimise(40, 3, Plateau(2, min_gain=100.0))
    assert len(snapshots) < 30
    assert torch.equal(final_params, snapshots[-1])


def test_keep_best_restores_the_highest_value() -> None:
    """Of the values 0, 1, 2, 0.5, 0 the image with 2 is restored; an image that is never active keeps its last step."""
    values = torch.zeros(8, 2)
    values[2:5, 0] = torch.tensor([1.0, 2.0, 0.5])

    def optimise(keep_best: bool) -> list[Tensor]:
        canvas = PixelImage(initial_pixels(2, 3, 4, 5).float(), 1)
        snapshots = [canvas.params.detach().clone()]

        def objective(i: int) -> Tensor:
            mean_squares = canvas.params.square().mean((1, 2, 3))
            return mean_squares - mean_squares.detach() + values[i]

        def record(_: int) -> None:
            snapshots.append(canvas.params.detach().clone())

        history = gradient_ascent(
            canvas.params, objective, adam_step(canvas.params, 0.1, 2.0), 8, keep_best=keep_best, on_step=record
        )
        assert torch.equal(history, values)
        return [*snapshots, canvas.params.detach()]

    with_best, final_params = optimise(True), optimise(False)
    assert torch.equal(with_best[-1][0], with_best[3][0])
    assert torch.equal(with_best[-1][1], with_best[8][1])
    assert torch.equal(final_params[-1], final_params[8])
    assert torch.equal(torch.stack(with_best[:-1]), torch.stack(final_params[:-1]))
