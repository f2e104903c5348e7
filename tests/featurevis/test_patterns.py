"""Patterns: the ascent by hand, rectifiers let through by hand, and every picture for itself."""

from __future__ import annotations

import math
import sys
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.engine.batching import gradient_bytes
from convscope.engine.capture import ForwardResult, LayerOutputs
from convscope.featurevis.defaults import plain_size, robust_size
from convscope.featurevis.objective import per_image_channels
from convscope.featurevis.optimizer import (
    DEAD_AFTER_STEPS,
    adam_step,
    consistency_weighted_adam,
    gradient_ascent,
    rms_step,
)
from convscope.featurevis.parameterization import COLOUR_AXES, FourierImage, PixelImage
from convscope.featurevis.recipes import REDIRECT_STEPS, deprocess_image
from convscope.featurevis.redirected_relu import RedirectedReLU
from convscope.featurevis.transforms import AugmentationConfig, random_affine, random_roll
from tests.oracles.nets import SharedReluNet, SmallConvNet, randomized

TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order


def loaded(net: nn.Module, size: Any = 24, **more: Any) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": size, **more})


def apart(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def textbook_picture(x: np.ndarray) -> np.ndarray:
    """`deprocess_image` of the notebook, for one picture (H, W, C), in float64; before it becomes whole numbers."""
    x = x.astype(np.float64)
    x = x - x.mean()
    x /= x.std() + 1e-5
    x *= 0.1
    x += 0.5
    return np.clip(np.clip(x, 0, 1) * 255, 0, 255)


def generators(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


# --- the plain recipe ------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """One convolution, no bias."""

    def __init__(self, units: int = 3, kernel: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, units, kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("space", ["input", "pixels"])
def test_linear_unit_wants_its_own_weight(space: str) -> None:
    """On a picture of one place the gradient is the weight: one step goes exactly there."""
    net = randomized(Linear())
    std, mean = np.array([0.2, 0.25, 0.5]), np.array([0.4, 0.5, 0.6])
    model = loaded(net, 5, mean=tuple(mean), std=tuple(std))
    start = np.random.default_rng(0).uniform(100, 150, (5, 5, 3))
    found = convscope.patterns(model, "conv", recipe="plain", space=space, start=start, steps=1, step_size=40)
    for u in range(3):
        w = net.conv.weight[u].detach().double().permute(1, 2, 0).numpy()
        gradient = w if space == "input" else w / std / 255
        seen = start if space == "input" else (start / 255 - mean) / std
        assert found.history[0, u] == pytest.approx((w * seen).sum(), rel=1e-5, abs=1e-4)
        moved = start + 40 * gradient / (np.sqrt((gradient**2).mean()) + 1e-5)
        picture = textbook_picture(moved)
        # Cut off to whole numbers; float32 may fall on the other side of one.
        assert np.abs(found.images[u] - np.floor(picture + 1e-3)).max() <= (np.abs(picture % 1 - 0.5) > 0.499).any()
        final = found.images[u].astype(np.float64)
        seen = final if space == "input" else (final / 255 - mean) / std
        assert found.scores[u] == pytest.approx((w * seen).sum(), rel=1e-5, abs=1e-4)
        # From a uniform gray, where nothing but the step is to be seen, the picture is the weight.
        gray = convscope.patterns(
            model, "conv", [u], recipe="plain", space=space, start=np.full((5, 5, 3), 128.0), steps=1
        )
        direction = np.corrcoef(gray.images[0].ravel(), gradient.ravel())[0, 1]
        assert direction > 0.995  # what is left is the clipping at three standard deviations and the 8 bits


def test_the_leaf_moves_along_the_weight() -> None:
    net = randomized(Linear(units=2, kernel=3))
    canvas = PixelImage(torch.rand((2, 3, 3, 3), generator=Generator().manual_seed(0)))
    before = canvas.params.detach().clone()
    history = gradient_ascent(canvas.params, lambda _: net.conv(canvas.params)[[0, 1], [0, 1], 0, 0], rms_step(0.5), 1)
    w = net.conv.weight.detach()
    rms = w.double().pow(2).mean((1, 2, 3), keepdim=True).sqrt()
    assert apart(canvas.params.detach() - before, 0.5 * w.double() / (rms + 1e-5)) < 1e-5  # a difference of floats
    assert apart(history[0], (w.double() * before).sum((1, 2, 3))) < TINY


def test_rms_step_by_hand() -> None:
    rng = np.random.default_rng(0)
    values, gradient = rng.normal(size=(2, 3, 2, 4, 5))
    gradient[1] *= 1e-7  # far below the 1e-5 that keeps a vanishing gradient from being blown up
    found = torch.from_numpy(values.copy())
    rms_step(0.7)(found, torch.from_numpy(gradient.copy()))
    for n in range(3):
        rms = math.sqrt(sum(g * g for g in gradient[n].ravel()) / 40)
        assert apart(found[n], values[n] + 0.7 * gradient[n] / (rms + 1e-5)) < 1e-12  # float64


def test_standardised_by_hand() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(100, [[[[1]]], [[[30]]], [[[4000]]]], (3, 3, 20, 30))
    pixels[0, :, 0, 0] = 1e4  # one spot that is clipped
    flat = np.full((1, 3, 20, 30), 17.0)
    everything = np.concatenate([pixels, flat])
    found = deprocess_image(torch.from_numpy(everything))
    assert found.dtype == torch.uint8
    for n, picture in enumerate(everything):
        assert np.array_equal(found[n].permute(1, 2, 0), textbook_picture(picture.transpose(1, 2, 0)).astype(np.uint8))
    assert (found[3] == 127).all()
    single = deprocess_image(torch.from_numpy(everything).float())
    assert (single.int() - found.int()).abs().max() <= 1  # float32 may fall on the other side of a whole number


def test_textbooks_loop_by_hand() -> None:
    """Forty steps through two convolutions and two rectifiers: the loop as the notebook has it, once more."""
    net = randomized(SharedReluNet())
    model = loaded(net, 24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    rng = np.random.default_rng(0)
    start = rng.random((24, 24, 3), np.float32) * 20 + 128
    chosen = [4, 0, 6]
    for space in ("input", "pixels"):
        found = convscope.patterns(model, "relu#2", chosen, recipe="plain", start=start, space=space)
        assert found.images.shape == (3, 24, 24, 3)
        assert found.history.shape == (40, 3)
        for position, u in enumerate(chosen):
            x = torch.from_numpy(start).permute(2, 0, 1)[None].clone()
            losses = []
            for _ in range(40):
                x.requires_grad_(True)
                shown = x if space == "input" else model.preprocessing.normalize(x / 255)
                loss = net.conv2(net.conv1(shown).relu()).relu()[:, u].mean()
                (grads,) = torch.autograd.grad(loss, x)
                grads = grads / (grads.pow(2).mean().sqrt() + 1e-5)
                losses.append(loss.item())
                x = (x + grads).detach()
            # Forty steps amplify rounding, as each begins where the last one ended.
            assert found.history[:, position] == pytest.approx(losses, rel=1e-3)
            picture = textbook_picture(x[0].permute(1, 2, 0).numpy())
            assert np.abs(found.images[position] - picture).max() < 3


# --- the steps of the robust recipe ----------------------------------------------------------------------------------


def test_adam_step_by_hand() -> None:
    """Kingma and Ba, algorithm 1, on gradients of RMS 1, uphill, with the damping for epsilon."""
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
        assert apart(values.detach(), expected) < 1e-12  # float64
    assert values.grad is None
    before = values.detach().clone()
    with torch.no_grad():
        adam_step(values, 0.1, 2.0)(values, torch.zeros_like(values))
    assert torch.equal(values.detach(), before)


def test_adam_step_however_values_and_gradients_lie() -> None:
    draw = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn((2, 3, 5, 7), generator=draw) for _ in range(2))
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


def test_agreed_step_by_hand() -> None:
    """Adam's step with each coordinate times |m| / sqrt(v), at most 1, from the sums that Adam's means stand for."""
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
        assert apart(values.detach(), expected) < 1e-12  # float64
    before = values.detach().clone()
    with torch.no_grad():
        consistency_weighted_adam(values, 0.3, 0.1)(values, torch.zeros_like(values))
    assert torch.equal(values.detach(), before)


def test_steps_go_where_gradients_agree() -> None:
    """Of two coordinates with gradients of one size, the one whose sign changes at every step hardly moves."""
    values = torch.zeros(1, 2, requires_grad=True)
    step = consistency_weighted_adam(values, 0.1, 0.1)
    for i in range(40):
        with torch.no_grad():
            step(values, torch.tensor([[1.0, (-1.0) ** i]]))
    steady, fickle = values[0].tolist()
    assert steady == pytest.approx(40 * 0.1 / 1.1, rel=1e-4)  # float32, forty sums
    # Only the first step, whose mean is its gradient, is a whole one, of forty; later means are small.
    assert abs(fickle) < 1.5 * 0.1 / 1.1


def rectified(x: Tensor, weight: Tensor, how: Any, mask: list[bool]) -> tuple[Tensor, Tensor]:
    """A rectifier's output, and the gradient of its weighed sum, with the pictures of the mask redirected."""
    leaf = x.clone().requires_grad_()
    with RedirectedReLU(torch.tensor(mask)):
        output = how(leaf * 1)
    (gradient,) = torch.autograd.grad((output * weight).sum(), leaf)
    return output.detach(), gradient


RECTIFIERS: dict[str, tuple[Any, float]] = {
    "module": (nn.ReLU(), math.inf),
    "module in place": (nn.ReLU(inplace=True), math.inf),
    "function": (F.relu, math.inf),
    "function in place": (lambda x: F.relu(x, inplace=True), math.inf),
    "method": (lambda x: x.relu(), math.inf),
    "method in place": (lambda x: x.relu_(), math.inf),
    "torch": (torch.relu, math.inf),
    "ReLU6": (nn.ReLU6(), 6.0),
    "ReLU6 in place": (nn.ReLU6(inplace=True), 6.0),
    "relu6": (F.relu6, 6.0),
    "Hardtanh": (nn.Hardtanh(0, 2), 2.0),
}


@pytest.mark.parametrize("name", RECTIFIERS)
def test_redirected_rectifier_by_hand(name: str) -> None:
    how, top = RECTIFIERS[name]
    x = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 1.5, -3.0], [7.0, 8.0, -9.0], [-1.0, -2.0, -3.0], [7.0, 6.5, 9.0]])
    weight = torch.tensor([[2.0, -1.0, 0.0], [2.0, 3.0, 4.0], [1.0, -1.0, 5.0], [2.0, -1.0, 3.0], [-1.0, 1.0, -2.0]])
    mask = [True, True, True, False, True]
    output, gradient = rectified(x, weight, how, mask)
    assert torch.equal(output, x.clamp(0, top))
    expected = torch.zeros_like(x)
    for n in range(5):
        usual = [w if 0 < v < top else 0.0 for v, w in zip(x[n].tolist(), weight[n].tolist(), strict=True)]
        inward = [
            w if (v <= 0 and w > 0) or (v >= top and w < 0) else 0.0
            for v, w in zip(x[n].tolist(), weight[n].tolist(), strict=True)
        ]
        expected[n] = torch.tensor(inward if mask[n] and not any(usual) else usual)
    assert torch.equal(gradient, expected)
    # What is off everywhere gets what would turn it on, unless it is not asked for; what is on somewhere, the usual.
    assert gradient[0].tolist() == [2, 0, 0]
    assert gradient[1].tolist() == [0, 3, 0]
    assert gradient[3].tolist() == [0, 0, 0]
    assert gradient[4].tolist() == ([-1, 1, -2] if top == math.inf else [-1, 0, -2])


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_picture_lives_wherever_its_gradient_is(row: int) -> None:
    """Where one pixel is on, what is off beside it stays off; where none is, all is let through."""
    x = torch.full((2, 1, 3, 2), -1.0)
    x[0, 0, row, 1] = 1
    _, gradient = rectified(x, torch.ones(2, 1, 3, 2), F.relu, [True, True])
    assert torch.equal(gradient[0], (x[0] > 0).float())
    assert torch.equal(gradient[1], torch.ones(1, 3, 2))


def test_redirected_rectifier_works_in_place_where_the_result_is_dropped() -> None:
    x = torch.tensor([[-1.0, 2.0]])

    def careless(t: Tensor) -> Tensor:
        F.relu(t, inplace=True)
        return t

    output, gradient = rectified(x, torch.tensor([[5.0, 3.0]]), careless, [True])
    assert output.tolist() == [[0, 2]]
    assert gradient.tolist() == [[0, 3]]


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3), (8, 2, 3)])
def test_redirected_rectifier_takes_any_shape(shape: tuple[int, ...]) -> None:
    """Also pictures cut into pieces that stand one after the other in the batch, and things without pictures."""
    x = -torch.ones(shape)
    x.view(4, -1)[1, 0] = 1
    _, gradient = rectified(x, torch.ones(shape), F.relu, [True, True, False, True])
    expected = torch.ones(shape).view(4, -1)
    expected[1], expected[2] = 0, 0
    expected[1, 0] = 1
    assert torch.equal(gradient.view(4, -1), expected)
    for other in (torch.tensor(-1.0), -torch.ones(3)):
        assert torch.equal(rectified(other, torch.ones_like(other), F.relu, [True, True])[1], torch.zeros_like(other))


def test_other_functions_are_left_alone() -> None:
    x = torch.linspace(-2, 2, 9).view(3, 3)
    for how in (F.gelu, F.leaky_relu, torch.tanh, nn.Hardtanh(-1, 1), F.softplus):
        plain = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(how(plain).sum(), plain)
        output, gradient = rectified(x, torch.ones_like(x), how, [True] * 3)
        assert torch.equal(output, how(x))
        assert torch.equal(gradient, expected)


# --- dead starts -----------------------------------------------------------------------------------------------------


class Shy(nn.Module):
    """Unit 0 fires on the start, unit 1 is off there but can be woken, unit 2 can never fire."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 3, 3)
        self.relu = nn.ReLU(inplace=True)
        randomized(self)
        with torch.no_grad():
            self.conv2.weight[1] = self.conv2.weight[1].abs()
            self.conv2.bias[0], self.conv2.bias[1] = 5, -11
            self.conv2.weight[2], self.conv2.bias[2] = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.conv1(x).relu())).mean((2, 3))


def test_dead_start_is_said_by_plain_and_answered_by_robust() -> None:
    model = loaded(Shy(), 32)
    plain = convscope.patterns(model, "relu", recipe="plain", size=32)
    assert plain.scores[0] > 0
    assert not plain.history[:, 1:].any()
    assert plain.scores[1] == plain.scores[2] == 0
    assert plain.notes == tuple(
        f"unit {u} looks dead: its ReLU is off everywhere and has no gradient. recipe='robust' redirects the gradient."
        for u in (1, 2)
    )
    robust = convscope.patterns(model, "relu", size=32, steps=64)
    assert robust.history[0, 1] == 0
    assert robust.scores[0] > 0
    assert robust.scores[1] > 0
    assert robust.notes == (
        "unit 2 looks dead: no activation on the sample images or from 8 starts. It has no pattern.",
    )
    assert robust.scores[2] == 0
    # In front of the rectifier the dead unit's value is its bias, whatever it is shown.
    before = convscope.patterns(model, "conv2", [2], size=32, steps=2)
    assert before.notes == (
        "unit 2 has a score of -1, not above the noise baseline (-1). The pattern does not show what it responds to.",
    )


def test_without_redirection_the_dead_start_stays_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive score above is the redirection's doing."""
    monkeypatch.setattr(sys.modules["convscope.featurevis.recipes"], "REDIRECT_STEPS", 0)
    monkeypatch.setattr(sys.modules["convscope.featurevis.recipes"], "RETRY_STEPS", 0)
    nothing = SimpleNamespace(values=torch.zeros(3))
    monkeypatch.setattr(
        sys.modules["convscope.featurevis.api"], "max_activations", lambda *_: nothing
    )  # nor in a photograph
    robust = convscope.patterns(loaded(Shy(), 32), "relu", [1], size=32, steps=64)
    assert robust.scores[0] == 0


def test_redirection_is_each_pictures_own() -> None:
    """A neighbour that stays dead keeps being revived; a living unit whose inner gate is off must not notice."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
            self.gate = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return (x + self.gate(x).relu()).relu()

    net = randomized(Gated())
    with torch.no_grad():
        net.gate.bias.fill_(-50)  # off everywhere, for every picture
        net.conv.bias.fill_(3)
        net.conv.weight[2], net.conv.bias[2], net.gate.weight[2] = 0, -1, 0  # unit 2 never fires
    model = convscope.load(nn.Sequential(net), preprocessing={"size": 32})
    steps = REDIRECT_STEPS + 16
    beside_dead = convscope.patterns(model, "0", [0, 2], size=32, steps=steps)
    beside_alive = convscope.patterns(model, "0", [0, 1], size=32, steps=steps)
    assert not beside_dead.history[:, 1].any()
    assert (beside_dead.history[:, 0] > 0).all()
    assert np.array_equal(beside_dead.history[:, 0], beside_alive.history[:, 0])
    assert np.array_equal(beside_dead.images[0], beside_alive.images[0])


def test_network_without_gradients_is_said() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.detach()).mean((2, 3))

    model = loaded(randomized(Steps()))
    for recipe in ("plain", "robust"):
        with pytest.raises(ConvscopeError, match="returns no gradient to the image"):
            convscope.patterns(model, "conv", [0], recipe=recipe, size=24, steps=1)


# --- every picture for itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["plain", "robust"])
@pytest.mark.parametrize("layer", ["conv1", "relu3", "logits"])
def test_neighbours_change_nothing(layer: str, recipe: str) -> None:
    """Same seed, same number of units: the same bytes, whatever is drawn beside a unit and in whatever order."""
    model = loaded(randomized(SmallConvNet()))

    def drawn(units: list[int], **more: Any) -> convscope.Patterns:
        return convscope.patterns(model, layer, units, recipe=recipe, size=32, steps=24, **more)

    one, other, again = drawn([3, 0, 1]), drawn([2, 4, 3]), drawn([3, 0, 1])
    for name in ("images", "scores", "history"):
        assert np.array_equal(one.arrays()[name], again.arrays()[name])
    assert np.array_equal(one.images[0], other.images[2])
    assert one.scores[0] == other.scores[2]
    assert np.array_equal(one.history[:, 0], other.history[:, 2])
    twins = drawn([1, 1])
    assert np.array_equal(twins.images[0], twins.images[1])
    # Other batch sizes: rounding, which an ascent amplifies.
    alone = drawn([3])
    assert alone.scores[0] == pytest.approx(one.scores[0], rel=0.01)
    reseeded = drawn([3, 0, 1], seed=1)
    assert all((a != b).mean() > 0.5 for a, b in zip(one.images, reseeded.images, strict=True))
    assert not np.array_equal(one.images[0], one.images[1])


def test_neighbours_change_nothing_in_a_real_network(lite0: convscope.Model) -> None:
    def drawn(units: list[int], **more: Any) -> convscope.Patterns:
        return convscope.patterns(lite0, "blocks.2.1.bn1", units, size=64, steps=24, **more)

    one, other = drawn([5, 77, 30]), drawn([30, 100, 5])
    assert np.array_equal(one.images[[0, 2]], other.images[[2, 0]])
    assert np.array_equal(one.scores[[0, 2]], other.scores[[2, 0]])
    assert one.scores == pytest.approx(drawn([5, 77, 30, 100, 101]).scores[:3], rel=0.01)
    assert (one.scores > one.history[0]).all()


def test_chunks_change_nothing_but_rounding() -> None:
    model = loaded(randomized(SmallConvNet()))
    each = gradient_bytes(model, "relu2", 32 * 32)
    ticks: list[tuple[int, int]] = []
    whole = convscope.patterns(model, "relu2", range(6), size=32, steps=10)
    parts = convscope.patterns(
        model, "relu2", range(6), size=32, steps=10, memory=int(3 * each), progress=lambda *t: ticks.append(t)
    )
    assert ticks == [(i, 20) for i in range(1, 21)]
    assert parts.scores == pytest.approx(whole.scores, rel=0.01)  # the engine's promise for patterns
    assert parts.history[0] == pytest.approx(whole.history[0], rel=1e-5)
    third = convscope.patterns(model, "relu2", range(3), size=32, steps=10)
    assert np.array_equal(parts.images[:3], third.images)
    starts = np.random.default_rng(0).uniform(0, 255, (6, 32, 32, 3))
    one, many = (
        convscope.patterns(model, "relu2", range(6), recipe="plain", start=starts, steps=2, memory=m)
        for m in (int(2 * each), 1 << 30)
    )
    assert one.scores == pytest.approx(many.scores, rel=0.01)


@pytest.mark.parametrize("recipe", ["plain", "robust"])
def test_no_steps_at_all(recipe: str) -> None:
    model = loaded(randomized(SmallConvNet()))
    told: list[Any] = []
    found = convscope.patterns(
        model, "conv1", [2, 5], recipe=recipe, steps=0, size=40, progress=lambda *t: told.append(t)
    )
    assert told == []
    assert found.history.shape == (0, 2)
    assert found.images.shape == (2, 40, 40, 3)
    assert found.scores == pytest.approx(scores_by_hand(model, "conv1", found), rel=1e-5)
    assert not np.array_equal(found.images[0], found.images[1])
    if recipe == "plain":
        start = np.random.default_rng(0).uniform(0, 255, (40, 40, 3))
        untouched = convscope.patterns(model, "conv1", [2], recipe="plain", steps=0, start=start)
        assert np.abs(untouched.images[0] - textbook_picture(start)).max() <= 1 + 1e-3  # cut off to whole numbers


def scores_by_hand(model: convscope.Model, layer: str, found: convscope.Patterns) -> list[float]:
    """Each unit's mean on its finished 8-bit picture, by a hook of the test's own."""
    x = model.preprocessing.normalize(torch.from_numpy(found.images).permute(0, 3, 1, 2) / 255)
    kept: list[Tensor] = []
    module = model.module if layer == "logits" else model.module.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    with torch.no_grad():
        model.module(x)
    handle.remove()
    return [float(kept[0][i, u].mean()) for i, u in enumerate(found.units)]


@pytest.mark.parametrize("recipe", ["plain", "robust"])
@pytest.mark.parametrize("layer", ["conv1", "relu2", "fc", "logits"])
def test_scores_are_of_the_finished_picture(layer: str, recipe: str) -> None:
    model = loaded(randomized(SmallConvNet()), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    found = convscope.patterns(model, layer, [0, 4], recipe=recipe, size=(32, 40), steps=20)
    assert found.images.dtype == np.uint8
    assert found.images.shape == (2, 32, 40, 3)
    # Rounding, in another memory layout.
    assert found.scores == pytest.approx(scores_by_hand(model, layer, found), rel=1e-4, abs=1e-5)
    assert (found.history[-1] > found.history[0]).all()


# --- canvas, views, objective ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (7, 4)])
def test_fourier_canvas_by_hand(size: tuple[int, int]) -> None:
    """The picture as a plain sum of cosines and sines, with amplitudes 1/f, in decorrelated colours."""
    height, width = size
    canvas = FourierImage(generators(1, 2), 3, size, torch.device("cpu"), std=0.5)
    spectrum = canvas.params.detach().double().numpy()
    spectrum = spectrum[..., 0] + 1j * spectrum[..., 1]
    down = np.fft.fftfreq(height)[:, None]
    across = np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.sqrt(down**2 + across**2), 1 / max(height, width))
    spectrum = spectrum * np.sqrt(height * width) / frequency
    plain = np.zeros((2, 3, height, width))
    for y in range(height):
        for x in range(width):
            wave = np.exp(2j * np.pi * (down * y + across * x))
            # Columns other than the first and, for even widths, the last stand for their mirror images, too.
            twice = np.full(across.shape[1], 2.0)
            twice[0] = 1
            if width % 2 == 0:
                twice[-1] = 1
            plain[:, :, y, x] = ((spectrum * wave).real * twice).sum((2, 3)) / (height * width) / 4
    axes = np.array(COLOUR_AXES)
    axes = axes / np.sqrt((axes**2).sum(0)).max()
    expected = 1 / (1 + np.exp(-np.einsum("rc,uchw->urhw", axes, plain)))
    assert apart(canvas.images().detach(), expected) < 1e-5  # a transform in float32
    assert canvas.params.is_leaf
    assert canvas.params.requires_grad


def test_draws_belong_to_the_picture() -> None:
    """Canvas and views of a picture are the same at any position and in any company."""
    pictures = torch.rand((3, 3, 20, 30), generator=Generator().manual_seed(9))
    device, looks = torch.device("cpu"), AugmentationConfig((0.4, 1), 10, (12, 18))
    for make in (lambda g: random_affine(looks, 4, g, device), lambda g: random_roll(4, g, device)):
        one, other = make(generators(1, 2, 3)), make(generators(3, 1, 1))
        for step in range(4):
            found = one(step, pictures)
            assert torch.equal(found[[2, 0]], other(step, pictures[[2, 0, 1]])[:2])
            assert not torch.equal(one(step, pictures), one((step + 1) % 4, pictures))
    canvases = [FourierImage(generators(*seeds), 3, (8, 8), device).params for seeds in ((1, 2, 3), (3, 1))]
    assert torch.equal(canvases[0][[2, 0]], canvases[1])


def test_zoomed_views_by_hand() -> None:
    """Without zoom and turn: the canvas or its mirror image. At half scale: a window that lies within."""
    pictures = torch.rand((40, 2, 16, 24), generator=Generator().manual_seed(0))
    whole = random_affine(AugmentationConfig((1, 1), 0, (16, 24)), 1, generators(*range(40)), torch.device("cpu"))(
        0, pictures
    )
    mirrored = [bool((v - p).abs().max() > 1e-3) for v, p in zip(whole, pictures, strict=True)]
    for view, picture, flipped in zip(whole, pictures, mirrored, strict=True):
        assert apart(view, picture.flip(2) if flipped else picture) < 1e-5  # float32 coordinates
    assert 8 <= sum(mirrored) <= 32  # half of 40, four standard deviations to either side
    down, across = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    ramps = torch.stack([down, across]).expand(40, 2, 32, 32)
    half = random_affine(AugmentationConfig((0.5, 0.5), 0, (16, 16)), 1, generators(*range(40)), torch.device("cpu"))(
        0, ramps
    )
    assert (half[:, 0].diff(dim=1) - 1).abs().max() < 1e-4  # one pixel of the view is one of the canvas
    assert (half[:, 1].diff(dim=2).abs() - 1).abs().max() < 1e-4
    assert half.min() >= 0
    assert half.max() <= 31
    corners = half[:, 0].amin((1, 2))
    assert corners.min() < 3  # over forty draws, both ends of the free 16 pixels are come near to
    assert corners.max() > 13
    turned = random_affine(AugmentationConfig((1, 1), 10, (32, 64)), 1, generators(*range(40)), torch.device("cpu"))
    down, across = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing="ij")
    slopes = turned(0, torch.stack([down, across]).expand(40, 2, 32, 64))[:, :, 14:18, 30:34]
    # In the middle, a turn by t moves (down, across) by (cos t, sin t) for each pixel downwards: lengths stay.
    steps = slopes.diff(dim=2)[:, :, 0, 0]
    sideways = slopes.diff(dim=3)[:, :, 0, 0]
    for lengths in (steps.norm(dim=1), sideways.norm(dim=1)):
        assert lengths.tolist() == pytest.approx([1] * 40, abs=1e-3)  # float32 differences of coordinates up to 64
    assert (steps * sideways).sum(1).tolist() == pytest.approx([0] * 40, abs=1e-3)  # still a right angle
    angles = torch.rad2deg(torch.atan2(steps[:, 1], steps[:, 0]))
    assert angles.abs().max() <= 10.1
    assert angles.min() < -5
    assert angles.max() > 5


def test_several_views_are_climbed_by_their_mean() -> None:
    """The first step's value, once more from the canvas and the views that the units' own numbers give."""
    net = randomized(SmallConvNet())
    model = loaded(net, 56)
    found = convscope.patterns(model, "logits", [3, 1], views=3, steps=2, seed=4)
    draws = [Generator().manual_seed((4 * 1_000_003 + u * 7919 + 1) % (1 << 63)) for u in (3, 1)]
    canvas = FourierImage(draws, 3, (56, 56), torch.device("cpu"))
    view = random_affine(AugmentationConfig((0.5, 1), 10, (32, 32)), 3, draws, torch.device("cpu"))
    with torch.no_grad():
        shown = canvas.images((32, 32))
        values = [net(model.preprocessing.normalize(view(k, shown)))[[0, 1], [3, 1]] for k in range(3)]
    assert apart(found.history[0], torch.stack(values).mean(0)) < 1e-5  # sums of floats in another layout
    assert found.parameters()["views"] == 3
    assert not np.array_equal(found.images, convscope.patterns(model, "logits", [3, 1], steps=2, seed=4).images)


def test_rolled_views_by_hand() -> None:
    pictures = torch.rand((5, 3, 6, 9), generator=Generator().manual_seed(0))
    view = random_roll(3, generators(*range(5)), torch.device("cpu"))
    for step in range(3):
        draws = [torch.rand((3, 2), generator=g)[step] for g in generators(*range(5))]
        for found, picture, draw in zip(view(step, pictures), pictures, draws, strict=True):
            down, across = int(draw[0] * 6), int(draw[1] * 9)
            assert torch.equal(found, picture.roll((-down, -across), (1, 2)))


def test_objective_is_the_mean_of_the_units_channel() -> None:
    maps = torch.rand((3, 4, 5, 6), generator=Generator().manual_seed(0))
    tokens, scores = maps.flatten(2).transpose(1, 2), maps.mean((2, 3))
    units = [2, 0, 3]
    expected = torch.stack([maps[i, u].mean() for i, u in enumerate(units)])
    for outputs in (maps, tokens, scores):
        assert apart(per_image_channels("layer", units)(LayerOutputs({"layer": outputs})), expected) < TINY
    assert torch.equal(per_image_channels("logits", units)(ForwardResult({}, scores)), scores[[0, 1, 2], [2, 0, 3]])


def test_sizes() -> None:
    assert plain_size(3, (224, 224), True) == (150, 150)
    assert plain_size(3, (28, 28), False) == (28, 28)
    assert robust_size(5, (224, 224), True) == (64, 64)
    assert robust_size(30, (224, 224), True) == (96, 96)  # 90, in steps of 8
    assert robust_size(200, (224, 192), True) == (224, 192)
    assert robust_size(None, (224, 192), True) == (224, 192)
    assert robust_size(5, (28, 28), True) == (28, 28)
    assert robust_size(5, (224, 224), False) == (224, 224)


@pytest.mark.parametrize(("size", "seen"), [(24, (24, 24, 24)), (40, (32, 32, 34)), (112, (40, 56, 96))])
def test_views_are_smaller_than_the_canvas_never_larger(size: int, seen: tuple[int, ...]) -> None:
    """5/14, 7/14, 12/14 of the canvas, but no fewer than 32 pixels, unless the canvas has fewer itself."""
    net = randomized(SmallConvNet())
    model = loaded(net, size)
    sides: list[tuple[int, ...]] = []
    net.conv1.register_forward_pre_hook(lambda _, args: sides.append(tuple(args[0].shape)))
    convscope.patterns(model, "logits", [0, 1], steps=3)
    # Three steps, the finished picture, and noise to compare it with.
    assert sides[-5:] == [(2, 3, side, side) for side in seen] + [(2, 3, size, size), (8, 3, size, size)]


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    return convscope.load(
        randomized(SmallConvNet()), preprocessing={"size": 24}, classes=["ant", "bee", "cow", "cow", "elk"]
    )


@pytest.mark.parametrize(
    ("layer", "units", "expected"),
    [
        ("relu2", 3, [3]),
        ("relu2", np.int64(3), [3]),
        ("relu2", [5, 1, 5], [5, 1, 5]),
        ("relu2", range(2), [0, 1]),
        ("relu2", np.array([4, 2]), [4, 2]),
        ("relu2", (u for u in (7, 8)), [7, 8]),
        ("relu2", None, list(range(12))),
        ("logits", None, list(range(5))),
        ("logits", "Ant", [0]),
        ("logits", ["elk", 1], [4, 1]),
        ("relu2#1", 0, [0]),
    ],
)
def test_units_taken(usual: convscope.Model, layer: str, units: Any, expected: list[int]) -> None:
    found = convscope.patterns(usual, layer, units, steps=0, size=24)
    assert found.units.tolist() == expected
    assert len(found.images) == len(expected)
    names = ["ant", "bee", "cow", "cow", "elk"] if layer == "logits" else [f"relu2 {u}" for u in range(12)]
    assert found.names == [names[u] for u in expected]


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("relu2", {"units": 12}, "unit 12 is not in layer 'relu2', which has 12 units, 0 to 11"),
        ("relu2", {"units": -1}, "unit -1 is not in layer"),
        ("relu2", {"units": 1.0}, None),
        ("relu2", {"units": [1.5]}, "unit 1.5 is not in layer"),
        ("relu2", {"units": [True]}, "unit True is not in layer"),
        ("relu2", {"units": "3"}, "unit '3' is not in layer"),
        ("relu2", {"units": []}, "no units were given"),
        ("logits", {"units": 5}, "class 5 is out of range"),
        ("logits", {"units": [1.5]}, "class 1.5 is neither an index nor a name"),
        ("logits", {"units": [True]}, "class True is neither an index nor a name"),
        ("logits", {"units": "cow"}, r"several classes: \[2, 3\]"),
        ("logits", {"units": "bees"}, "nearest: bee"),
        ("relu22", {}, "layer 'relu22' is not in this model; nearest: relu2"),
        ("relu2", {"recipe": "robustt"}, "recipe 'robustt' is not known; nearest: robust"),
        ("relu2", {"space": "output"}, "space 'output' is not known"),
        ("relu2", {"start": np.zeros((9, 9, 3))}, "recipe 'robust' takes no start image; leave out start="),
        ("relu2", {"space": "input"}, "space='input' is for recipe='plain'; the images of 'robust' need"),
        ("relu2", {"recipe": "dream"}, "recipe 'dream' needs a photograph; give one as start="),
        ("relu2", {"recipe": "plain", "views": 2}, "recipe 'plain' uses no random views; leave out views="),
        ("relu2", {"views": 0}, "views is 0; expected a whole number, 1 or more"),
        ("relu2", {"steps": -1}, "steps is -1; expected a whole number, 0 or more"),
        ("relu2", {"size": 0}, "size is 0 x 0"),
        ("relu2", {"size": (1, 1)}, r"does not run on images of 1 x 1 \(RuntimeError: .*\); its own size is 24 x 24"),
        ("relu2", {"recipe": "plain", "start": np.zeros((9, 9))}, r"start has shape \(9, 9\); expected \(H, W, 3\)"),
        ("relu2", {"recipe": "plain", "start": np.zeros((5, 9, 9, 3))}, r"start has shape \(5, 9, 9, 3\)"),
        ("relu2", {"recipe": "plain", "start": torch.zeros(1, 9, 9, 3)}, r"or a tensor \(12, 3, H, W\)"),
        ("relu2", {"recipe": "plain", "start": np.full((9, 9, 3), np.nan)}, "start contains NaN"),
    ],
)
def test_refused(usual: convscope.Model, layer: str, options: dict[str, Any], message: str | None) -> None:
    with pytest.raises(ConvscopeError if message else (ConvscopeError, TypeError), match=message):
        convscope.patterns(usual, layer, **options)


def test_start_in_all_its_forms(usual: convscope.Model) -> None:
    """One picture for all units, one for each, a tensor: the same pictures; and what was given stays as it was."""
    start = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    each = np.stack([start] * 2)
    tensor = torch.from_numpy(each).permute(0, 3, 1, 2).float()
    kept = tensor.clone()
    drawn = [
        convscope.patterns(usual, "conv2", [0, 1], recipe="plain", start=given, steps=3)
        for given in (start, each, start[None], tensor, tensor[:1], start.tolist())
    ]
    for found in drawn:
        assert found.images.shape == (2, 30, 20, 3)
        assert np.array_equal(found.images, drawn[0].images)
    assert torch.equal(tensor, kept)
    other = each.copy()
    other[1] = 255 - other[1]
    found = convscope.patterns(usual, "conv2", [0, 1], recipe="plain", start=other, steps=3)
    assert np.array_equal(found.images[0], drawn[0].images[0])
    assert not np.array_equal(found.images[1], drawn[0].images[1])
    assert found.seed == 0
    seeded = convscope.patterns(usual, "conv2", [0, 1], recipe="plain", start=start, steps=3, seed=5)
    assert np.array_equal(seeded.images, drawn[0].images)  # nothing is drawn where a start is given


class Frail(nn.Module):
    """Unit 0 fires only where a picture is dark on its left and bright on its right: not for long once it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 32, bias=True)
        with torch.no_grad():
            sides = torch.cat([-torch.ones(32, 16), torch.ones(32, 16)], dim=1)
            self.conv.weight.copy_(torch.stack([sides, torch.ones(32, 32)])[:, None] / 1024)
            self.conv.bias.copy_(torch.tensor([-0.3, 0.0]))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)).mean((2, 3))


def test_a_unit_that_no_view_wakes_is_woken_as_the_canvas_lies() -> None:
    """Mirrored half of the time, the unit never fires in a view; its neighbour is drawn as if it were not there."""
    model = loaded(Frail(), 32, channels=1)
    both = convscope.patterns(model, "relu", [0, 1], size=32, steps=48)
    assert both.scores[0] > 0
    assert not both.history[:, 0].any()
    assert "not on any shifted or scaled view" in both.notes[0]
    beside_itself = convscope.patterns(model, "relu", [1, 1], size=32, steps=48)
    np.testing.assert_array_equal(both.images[1], beside_itself.images[0])


def test_only_what_is_silent_is_run_to_wake_it() -> None:
    """Its neighbours are not shown to the network again; by itself it is shown twice, as no other batch is of one."""
    model, passes = loaded(Frail(), 32, channels=1), []
    handle = model.module.relu.register_forward_hook(lambda _, __, output: passes.append(len(output)))
    found = convscope.patterns(model, "relu", [1, 0, 1], size=32, steps=48)
    handle.remove()
    assert (found.scores > 0).all()
    assert passes.count(3) == 48 + 2  # each step, and the finished pictures before the waking and in the end
    assert passes.count(2) >= DEAD_AFTER_STEPS
    among_others = convscope.patterns(model, "relu", [1, 0, 0], size=32, steps=48)
    assert np.array_equal(among_others.images[1], found.images[1])


def test_size_and_start_together_are_refused() -> None:
    with pytest.raises(ConvscopeError, match="size= and start= were both given"):
        convscope.patterns(
            loaded(Frail(), 32, channels=1), "relu", [0], recipe="plain", size=32, start=np.zeros((32, 32, 1))
        )
