"""Gradient methods at the input, against closed forms and captum."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from tests.attribution.helpers import SIZE, load_module, random_images, random_resnet, relative_error
from tests.oracles.nets import (
    FrozenStemNet,
    SharedReluNet,
    SmallConvNet,
    diff_snapshots,
    in_training,
    randomized,
    snapshot,
)

TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order
SUMS = 1e-5  # sums over whole networks and images
METHODS: dict[str, dict[str, Any]] = {
    "saliency": {},
    "input-x-gradient": {},
    "smooth-grad": {"samples": 5},
    "var-grad": {"samples": 5},
    "integrated-gradients": {"steps": 7},
    "guided-backprop": {},
    "deconvnet": {},
    "guided-grad-cam": {"layer": "conv3"},
    "full-grad": {},
}


RESNET = (3, 32, 32)
TARGETS = [[3, 7], [386, 999]]


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, convscope.Model, Tensor]:
    """Return a network in double precision, where rounding does not switch ReLUs, with its model and inputs."""
    net = random_resnet(blocks=1).double()
    return net, load_module(net, RESNET[1:]), random_images(2, RESNET).double()


def by_target(attribute: Callable[[list[int]], Tensor]) -> Tensor:
    """Stack the results (N, T, ...) of a function that takes one target per image."""
    return torch.stack([attribute([row[t] for row in TARGETS]).detach() for t in range(2)], 1)


# --- captum ----------------------------------------------------------------------------------------------------------

CAPTUM: dict[
    str, tuple[Callable[[nn.Module, Tensor, list[int]], Tensor], Callable[[Tensor], Tensor], dict[str, Any]]
] = {
    "saliency": (lambda n, x, t: captum.attr.Saliency(n).attribute(x, t), lambda m: m.amax(2), {}),
    "input-x-gradient": (lambda n, x, t: captum.attr.InputXGradient(n).attribute(x, t), lambda m: m.sum(2), {}),
    "integrated-gradients": (
        lambda n, x, t: captum.attr.IntegratedGradients(n).attribute(x, -0.3, t, n_steps=7, method="gausslegendre"),
        lambda m: m.sum(2),
        {"steps": 7, "baseline": -0.3},
    ),
    "guided-backprop": (lambda n, x, t: captum.attr.GuidedBackprop(n).attribute(x, t), lambda m: m.sum(2), {}),
    "deconvnet": (lambda n, x, t: captum.attr.Deconvolution(n).attribute(x, t), lambda m: m.sum(2), {}),
    "guided-grad-cam": (
        lambda n, x, t: captum.attr.GuidedGradCam(n, n.layer3).attribute(x, t, interpolate_mode="bilinear"),
        lambda m: m.sum(2),
        {"layer": "layer3"},
    ),
}


@pytest.mark.filterwarnings("ignore:Setting backward hooks", "ignore:Input Tensor")
@pytest.mark.parametrize("method", CAPTUM)
def test_agrees_with_captum(resnet: Any, method: str) -> None:
    net, model, x = resnet
    attribute, reduced, options = CAPTUM[method]
    expected = reduced(by_target(lambda targets: attribute(net, x.clone(), targets)))
    actual = convscope.heatmaps(model, x, TARGETS, method=method, **options)
    assert actual.values.dtype == np.float32
    assert actual.layer == options.get("layer", "input")
    assert relative_error(actual.values, expected) < TINY


@pytest.mark.filterwarnings("ignore:Input Tensor")
@pytest.mark.parametrize(("method", "kind"), [("smooth-grad", "smoothgrad"), ("var-grad", "vargrad")])
def test_agrees_with_captum_on_the_same_noise(
    resnet: Any, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, model, x = resnet
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(RESNET, generator=generator) for _ in range(4)])
    spread = x.amax((1, 2, 3)) - x.amin((1, 2, 3))
    shapes: list[tuple[int, ...]] = []

    def normal(_: float, deviation: Tensor) -> Tensor:
        shapes.append(tuple(deviation.shape))
        return torch.cat([0.2 * s * noise for s in spread])  # captum puts the copies of an image next to each other

    monkeypatch.setattr(torch, "normal", normal)
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(net))
    reference = by_target(
        lambda t: tunnel.attribute(x.clone(), nt_type=kind, nt_samples=4, stdevs=0.2, target=t, abs=False)
    )
    monkeypatch.undo()
    assert shapes == [(8, *RESNET)] * 2
    expected = reference.abs().amax(2) if kind == "smoothgrad" else reference.sum(2)
    actual = convscope.heatmaps(model, x, TARGETS, method=method, samples=4, noise=0.2, seed=5)
    assert relative_error(actual.values, expected) < TINY
    other = convscope.heatmaps(model, x, TARGETS, method=method, samples=4, noise=0.2, seed=6)
    assert relative_error(other.values, expected) > 0.01


def test_lite0_agrees_with_captum(lite0: convscope.Model, photos: list[str]) -> None:
    """In single precision, with trained weights."""
    actual = convscope.heatmaps(lite0, photos[:2], [[281, 3], [118, 3]], method="input-x-gradient")
    x = torch.cat([lite0.preprocessing.normalize(torch.from_numpy(p)) for p in prepared(photos[:2])])
    for position, targets in enumerate(([281, 118], [3, 3])):
        reference = captum.attr.InputXGradient(lite0.module).attribute(x.requires_grad_(), targets)
        assert relative_error(actual.values[:, position], reference.detach().sum(1)) < 1e-4


def prepared(photos: list[str]) -> list[np.ndarray]:
    """Squash photographs to 224 x 224 as the model does, in [0, 1]."""
    from PIL import Image

    opened = [Image.open(p).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for p in photos]
    return [np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255 for image in opened]


# --- closed forms ----------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Scores are w x + b."""

    def __init__(self, size: tuple[int, ...] = (3, 5, 4), classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(int(np.prod(size)), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_maps_of_a_linear_network() -> None:
    net = randomized(Linear())
    model, x = load_module(net, (5, 4)), random_images(2, (3, 5, 4))
    w = net.fc.weight.detach().reshape(1, 3, 3, 5, 4)[:, [2, 0]]
    targets = [[2, 0]] * 2

    def attribute(method: str, **options: Any) -> convscope.Heatmaps:
        return convscope.heatmaps(model, x, targets, method=method, **options)

    strongest = w.abs().amax(2).expand(2, -1, -1, -1)
    product = (w * x[:, None]).sum(2)
    assert relative_error(attribute("saliency").values, strongest) < TINY
    assert relative_error(attribute("smooth-grad").values, strongest) < TINY
    assert np.abs(attribute("var-grad").values).max() < TINY
    assert relative_error(attribute("input-x-gradient").values, product) < TINY
    for steps in (1, 2, 9):
        actual = attribute("integrated-gradients", steps=steps)
        assert relative_error(actual.values, product) < TINY
        assert np.abs(actual.extras["completeness_error"]).max() < SUMS
    from_ones = attribute("integrated-gradients", baseline=1.0)
    assert relative_error(from_ones.values, (w * (x[:, None] - 1)).sum(2)) < TINY
    full = attribute("full-grad")
    term = (w * x[:, None]).abs()
    low, high = term.amin((2, 3, 4), keepdim=True), term.amax((2, 3, 4), keepdim=True)
    assert relative_error(full.values, ((term - low) / (high - low)).sum(2)) < TINY
    assert np.abs(full.extras["completeness_error"]).max() < SUMS


def test_moments_of_the_gradient_of_a_square() -> None:
    """S = sum a x^2 has the gradient 2 a x: over copies x + e its variance is 4 a^2 Var e."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.linspace(0.5, 2, 60).reshape(1, 3, 5, 4))
            self.out = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.a * x * x).sum((1, 2, 3))[:, None])

    net = Square()
    x = random_images(2, (3, 5, 4))
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn((3, 5, 4), generator=generator) for _ in range(11)]).double()
    spread = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).double()
    a = net.a.detach().double()
    model = load_module(net, (5, 4))
    variance = noise.var(0, correction=0) * (0.3 * spread.view(2, 1, 1, 1)) ** 2
    actual = convscope.heatmaps(model, x, 0, method="var-grad", samples=11, noise=0.3)
    assert relative_error(actual.values[:, 0], (4 * a**2 * variance).sum(1)) < SUMS
    smooth = convscope.heatmaps(model, x, 0, method="smooth-grad", samples=11, noise=0.3)
    mean = 2 * a * (x + 0.3 * spread.view(2, 1, 1, 1) * noise.mean(0))
    assert relative_error(smooth.values[:, 0], mean.abs().amax(1)) < SUMS
    # A constant offset costs no precision: it cancels before anything is squared.
    assert convscope.heatmaps(model, x + 1000, 0, method="var-grad", samples=11, noise=0.3).values.min() > 0


# --- integrated gradients --------------------------------------------------------------------------------------------


def test_integrated_gradients_are_complete() -> None:
    net, x, targets = randomized(SmallConvNet()).double(), random_images().double(), [[0, 3], [1, 2], [4, 0]]
    errors = []
    for steps in (4, 128):
        actual = convscope.heatmaps(load_module(net), x, targets, method="integrated-gradients", steps=steps)
        with torch.no_grad():
            gain = (net(x) - net(x * 0)).gather(1, torch.tensor(targets))
        by_hand = actual.values.astype(np.float64).sum((2, 3)) - gain.numpy()
        assert np.abs(actual.extras["completeness_error"] - by_hand).max() < SUMS
        errors.append(np.abs(by_hand).max())
    assert errors[1] < 0.2 * errors[0]
    assert actual.arrays()["completeness_error"].shape == (3, 2)


def test_integrated_gradients_baselines() -> None:
    x = random_images(1).double()
    model = load_module(randomized(SmallConvNet()).double(), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    black = -np.array([0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]

    def attribute(baseline: Any) -> np.ndarray:
        return convscope.heatmaps(model, x, 3, method="integrated-gradients", steps=3, baseline=baseline).values

    assert relative_error(attribute("black"), attribute(black.reshape(3, 1, 1))) < TINY
    assert relative_error(attribute(torch.full((3, SIZE, SIZE), 0.5)), attribute(0.5)) < TINY
    assert relative_error(attribute(0.5), attribute(0.0)) > 0.01
    for bad, message in (
        ("white", "baseline is 'white'; expected 'black', a number or an array"),
        (np.zeros(3), r"baseline has shape \(3,\), which does not broadcast to an image \(3, 24, 24\)"),
        (np.zeros((2, 3, 24, 24)), "does not broadcast"),
    ):
        with pytest.raises(ConvscopeError, match=message):
            attribute(bad)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("smooth-grad", {"samples": 0}, "samples is 0; expected a whole number, 1 or more"),
    ("var-grad", {"samples": 2.5}, "samples is 2.5"),
    ("smooth-grad", {"samples": True}, "samples is True"),
    ("smooth-grad", {"noise": 0.0}, "noise is 0.0; expected a number above 0"),
    ("var-grad", {"noise": float("nan")}, "noise is nan"),
    ("integrated-gradients", {"steps": -1}, "steps is -1"),
    ("integrated-gradients", {"step": 3}, "has no option 'step'; its options: steps, baseline"),
    ("saliency", {"layer": "conv1"}, "saliency works at the input"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_invalid_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    net, _ = in_training(randomized(SmallConvNet()))
    model = load_module(net)
    before = snapshot(net)
    with pytest.raises(ConvscopeError, match=message):
        convscope.heatmaps(model, random_images(), method=method, **options)
    assert diff_snapshots(before, snapshot(net)) == []


# --- ReLU rules ------------------------------------------------------------------------------------------------------


def backprop_by_hand(net: SharedReluNet, x: np.ndarray, target: int, rule: str, top: float) -> np.ndarray:
    """Backpropagate by hand: two 3 x 3 convolutions, each clamped to [0, top], a global average, a linear layer."""
    weights = {name: p.detach().double().numpy() for name, p in net.named_parameters()}

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        w, (height, width) = weights[f"{name}.weight"], (x.shape[1] - 2, x.shape[2] - 2)
        out = np.zeros((len(w), height, width)) + weights[f"{name}.bias"][:, None, None]
        for i in range(3):
            for j in range(3):
                out += np.einsum("chw,kc->khw", x[:, i : i + height, j : j + width], w[..., i, j])
        return out

    def back(g: np.ndarray, name: str) -> np.ndarray:
        w = weights[f"{name}.weight"]
        out = np.zeros((w.shape[1], g.shape[1] + 2, g.shape[2] + 2))
        for i in range(3):
            for j in range(3):
                out[:, i : i + g.shape[1], j : j + g.shape[2]] += np.einsum("khw,kc->chw", g, w[..., i, j])
        return out

    def relu_backward(g: np.ndarray, z: np.ndarray) -> np.ndarray:
        passes = (z > 0) & (z < top)
        return {"gradient": g * passes, "guided": np.maximum(g, 0) * passes, "deconvnet": np.maximum(g, 0)}[rule]

    first = conv(x, "conv1")
    second = conv(np.clip(first, 0, top), "conv2")
    g = np.ones_like(second) * (weights["fc.weight"][target] / second[0].size)[:, None, None]
    return back(relu_backward(back(relu_backward(g, second), "conv2"), first), "conv1").sum(0)


RELUS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "module": (nn.ReLU(), np.inf),
    "module in place": (nn.ReLU(inplace=True), np.inf),
    "function": (F.relu, np.inf),
    "function in place": (lambda x: F.relu(x, inplace=True), np.inf),
    "underscore": (F.relu_, np.inf),
    "torch": (torch.relu, np.inf),
    "method": (lambda x: x.relu(), np.inf),
    "in-place method, return value ignored": (lambda x: [x.relu_(), x][1], np.inf),
    "keyword argument": (lambda x: F.relu(input=x), np.inf),
    "clamp": (lambda x: x.clamp(min=0), np.inf),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), np.inf),
    "threshold": (nn.Threshold(0, 0), np.inf),
    "overload": (torch.ops.aten.relu.default, np.inf),
    "relu6": (nn.ReLU6(), 6),
    "relu6 in place": (nn.ReLU6(inplace=True), 6),
    "relu6 as a function": (F.relu6, 6),
    "hardtanh": (nn.Hardtanh(0, 6), 6),
    "clamp twice": (lambda x: torch.clamp(x, 0.0, 6.0), 6),
    "clip by tensors": (lambda x: torch.clip(x, torch.tensor(0.0), torch.tensor(6.0)), 6),
}


@pytest.mark.parametrize(("method", "rule"), [("guided-backprop", "guided"), ("deconvnet", "deconvnet")])
@pytest.mark.parametrize("variant", RELUS)
def test_relu_rules_by_hand(variant: str, method: str, rule: str) -> None:
    net = randomized(SharedReluNet())
    with torch.no_grad():
        net.conv1.weight *= 3  # so that 6 is reached
    activation, top = RELUS[variant]
    net.relu = activation if isinstance(activation, nn.Module) else Calling(activation)
    x = random_images(2, (3, 9, 8))
    expected = np.stack([[backprop_by_hand(net, p.double().numpy(), t, rule, top) for t in (0, 3)] for p in x])
    plain = np.stack([[backprop_by_hand(net, p.double().numpy(), t, "gradient", top) for t in (0, 3)] for p in x])
    model = load_module(net, (9, 8))
    before = snapshot(net)
    actual = convscope.heatmaps(model, x, [[0, 3]] * 2, method=method)
    assert relative_error(actual.values, expected) < SUMS
    assert relative_error(plain, expected) > 0.1
    assert diff_snapshots(before, snapshot(net)) == []
    unchanged = convscope.heatmaps(model, x, [[0, 3]] * 2, method="input-x-gradient")
    (gradient,) = torch.autograd.grad(net(y := x.clone().requires_grad_())[:, 0].sum(), y)
    assert relative_error(unchanged.values[:, 0], (gradient * x).sum(1)) < SUMS


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_networks_without_relus_are_refused() -> None:
    for activation, name in ((nn.SiLU(), "silu"), (nn.LeakyReLU(), "leaky_relu"), (nn.Hardtanh(), None)):
        net = randomized(SharedReluNet())
        net.relu = activation
        for method in ("guided-backprop", "deconvnet"):
            activations = f"its activations are {name}" if name else "it has no other activations either"
            with pytest.raises(ConvscopeError, match=rf"{method} changes how ReLUs .* no ReLU or ReLU6; {activations}"):
                convscope.heatmaps(load_module(net), random_images(), 0, method=method)
        with pytest.raises(ConvscopeError, match="no ReLU or ReLU6"):
            convscope.heatmaps(load_module(net), random_images(), 0, method="guided-grad-cam")
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.SiLU(), nn.Flatten(), nn.LazyLinear(2))
    mixed(random_images())
    assert convscope.heatmaps(load_module(randomized(mixed)), random_images(), 0, method="guided-backprop").values.any()


def test_clamps_elsewhere_keep_their_gradient() -> None:
    net = nn.Sequential(Calling(lambda x: (-F.relu(x) - x.clamp(min=-1) - x.clamp(max=1)).mean((2, 3))))
    x = random_images(2)
    actual = convscope.heatmaps(load_module(net), x, 1, method="guided-backprop").values[:, 0]
    expected = -((x[:, 1] >= -1).float() + (x[:, 1] <= 1).float()) / SIZE**2  # the ReLU gets negative gradients
    assert relative_error(actual, expected) < TINY


# --- the full gradient -----------------------------------------------------------------------------------------------


def authors_map(net: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Compute map and completeness error as in the authors' program (idiap/fullgrad-saliency): hooks on layers."""
    terms: list[tuple[nn.Module, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda m, _, output: terms.append((m, output)) or output.clone())
        for m in net.modules()
        if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    ]
    x = x.clone().requires_grad_()
    score = net(x)[:, target]
    for handle in handles:
        handle.remove()
    (gradient, *gradients) = torch.autograd.grad(score.sum(), [x, *(output for _, output in terms)])

    def scaled(term: Tensor) -> Tensor:
        term = term.abs()
        low = term.flatten(1).amin(1).view(-1, 1, 1, 1)
        high = (term - low).flatten(1).amax(1).view(-1, 1, 1, 1)
        return (term - low) / high

    saliency = scaled(gradient * x).sum(1)
    total = (gradient * x).flatten(1).sum(1)
    for (m, output), g in zip(terms, gradients, strict=True):
        if isinstance(m, nn.BatchNorm2d):
            bias = m.bias - m.running_mean * m.weight / torch.sqrt(m.running_var + m.eps)
        elif m.bias is None:
            continue
        else:
            bias = m.bias
        term = g * bias.view(1, -1, *[1] * (output.ndim - 2))
        total = total + term.flatten(1).sum(1)
        if output.ndim == 4:
            saliency += F.interpolate(scaled(term), x.shape[2:], mode="bilinear", align_corners=True).sum(1)
    return saliency.detach(), (score - total).detach()


def test_full_grad_agrees_with_the_authors_program(resnet: Any) -> None:
    """Equation 9, with the implicit biases of batch normalisation, which equation 2 needs.

    pytorch-grad-cam's FullGrad scales over the batch and each channel separately, scales again at the end, and leaves
    the linear layer out, so it agrees on no image. Completeness, proposition 1 of the paper, decides.
    """
    net, model, x = resnet
    actual = convscope.heatmaps(model, x, [[3, 7]] * 2, method="full-grad")
    for position, target in enumerate((3, 7)):
        expected, missing = authors_map(net, x, target)
        assert missing.abs().max() < 1e-10  # the reference itself is complete, in float64
        assert relative_error(actual.values[:, position], expected) < TINY
    assert np.abs(actual.extras["completeness_error"]).max() < SUMS
    assert actual.values.min() >= 0


class WrittenOut(nn.Module):
    """`SmallConvNet` with biases, batch normalisation and ReLU6 written as plain arithmetic."""

    def __init__(self, net: SmallConvNet, chained: bool) -> None:
        super().__init__()
        self.net, self.chained = net, chained

    def normalised(self, x: Tensor, m: nn.BatchNorm2d) -> Tensor:
        mean, var, weight, bias = (
            t.detach().view(1, -1, 1, 1) for t in (m.running_mean, m.running_var, m.weight, m.bias)
        )
        if self.chained:  # as Keras does
            return x.subtract(mean).mul_(var.add(m.eps).rsqrt_().mul(weight)).add_(bias)
        return bias + (x - mean) / (var + m.eps).sqrt() * weight

    def forward(self, x: Tensor) -> Tensor:
        n = self.net
        x = n.pool(self.normalised(n.conv1(x), n.bn1).clamp_(0))
        x = F.conv2d(x, n.conv2.weight, padding=1)
        x = torch.relu_(x.add_(n.conv2.bias.view(1, -1, 1, 1)))
        x = F.hardtanh_(self.normalised(n.conv3(x), n.bn3), 0, 6)
        return x.mean((2, 3)) @ n.fc.weight.t() + n.fc.bias


def test_biases_written_as_arithmetic_are_collected() -> None:
    net = randomized(SmallConvNet())
    with torch.no_grad():
        net.bn3.weight *= 4  # so that 6 is reached
    x = random_images()
    assert bool(
        (net.relu3(net.bn3(net.conv3(net.relu2(net.conv2(net.pool(net.relu1(net.bn1(net.conv1(x))))))))) == 6).any()
    )
    expected = convscope.heatmaps(load_module(net), x, [[0, 4]] * 3, method="full-grad")
    assert np.abs(expected.extras["completeness_error"]).max() < SUMS * np.abs(expected.logits).max()
    for chained in (True, False):
        actual = convscope.heatmaps(load_module(WrittenOut(net, chained)), x, [[0, 4]] * 3, method="full-grad")
        assert relative_error(actual.logits, expected.logits) < SUMS
        assert relative_error(actual.values, expected.values) < SUMS
        assert np.abs(actual.extras["completeness_error"]).max() < SUMS * np.abs(expected.logits).max()


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "subtract": lambda x: x - 0.3,
    "subtract, used twice": lambda x: (y := x - 0.3) * y.detach().sign() + y,
    "subtract, scale": lambda x: (x - 0.3) * 2.5,
    "subtract, divide, add": lambda x: (x - torch.tensor(0.3)) / 2.5 + 1,
    "subtract twice": lambda x: (x - 0.3) - 0.2,
    "constant minus image": lambda x: 0.7 - x,
    "torch.rsub": lambda x: torch.rsub(x, 0.7),
    "with alpha": lambda x: torch.add(x, torch.tensor(0.7), alpha=-2),
    "in place": lambda x: (x * 1).add_(1).sub_(0.2),
    "larger than the image": lambda x: x.mean(1, keepdim=True) + torch.linspace(1, 2, 3).view(1, 3, 1, 1),
    "sum of images": lambda x: x + x.flip(3) + 1,
    "clamped": lambda x: x.clamp(-0.4, 0.6),
    "hard": lambda x: F.hardtanh(x, -0.3, 0.8),
    "transposed": lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 2, 2), torch.tensor([0.5, -1.0])),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_added_constants_are_biases(kind: str) -> None:
    net = nn.Sequential(
        Calling(lambda x: F.leaky_relu(CONSTANTS[kind](x), 0.2).flatten(1)[:, :600].cumsum(1)[:, ::100])
    )
    x = random_images()
    actual = convscope.heatmaps(load_module(net), x, [[1, 5]] * 3, method="full-grad")
    single = convscope.heatmaps(load_module(net), x, [[1, 5]] * 3, method="input-x-gradient").values.sum((2, 3))
    assert np.abs(single - actual.logits).max() > 0.1
    assert np.abs(actual.extras["completeness_error"]).max() < 1e-4  # sums of up to 500 values


def test_final_subtraction_is_a_bias() -> None:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3, bias=False), Calling(lambda x: x - 2))
    net(random_images())
    actual = convscope.heatmaps(load_module(randomized(net)), random_images(), 1, method="full-grad")
    assert np.abs(actual.extras["completeness_error"]).max() < SUMS


def test_full_grad_of_lite0_is_complete(lite0: convscope.Model, photos: list[str]) -> None:
    actual = convscope.heatmaps(lite0, photos[:2], method="full-grad")
    assert np.abs(actual.extras["completeness_error"]).max() < 1e-4 * np.abs(actual.logits).max()


def test_completeness_error_of_a_network_that_is_not_piecewise_linear() -> None:
    net = randomized(SharedReluNet())
    net.relu = nn.SiLU()
    actual = convscope.heatmaps(load_module(net), random_images(), 1, method="full-grad")
    assert np.abs(actual.extras["completeness_error"]).min() > 1e-3


# --- batches, side effects, shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_batch_targets_or_memory(method: str) -> None:
    model, x, targets = (
        load_module(randomized(SmallConvNet())),
        random_images(5),
        [[0, 3], [1, 2], [4, 0], [2, 2], [3, 1]],
    )
    options = METHODS[method]
    full = convscope.heatmaps(model, x, targets, method=method, **options)
    assert full.values.shape == (5, 2, SIZE, SIZE)
    permuted = convscope.heatmaps(
        model, x[[4, 0, 2, 2, 1]], [targets[i] for i in (4, 0, 2, 2, 1)], method=method, **options
    )
    assert np.array_equal(permuted.values, full.values[[4, 0, 2, 2, 1]])
    for position in range(2):
        gradient_of_one = convscope.heatmaps(model, x, [[row[position]] for row in targets], method=method, **options)
        assert relative_error(gradient_of_one.values[:, 0], full.values[:, position]) < TINY
    for memory in (1, 1 << 19):
        parts = convscope.heatmaps(model, x, targets, method=method, memory=memory, **options)
        assert relative_error(parts.values, full.values) < SUMS
        for key, value in full.extras.items():
            assert np.abs(parts.extras[key] - value).max() < SUMS
    for n in (0, 3):
        single = convscope.heatmaps(model, x[n : n + 1], [targets[n]], method=method, **options)
        assert relative_error(single.values, full.values[n : n + 1]) < SUMS


def test_memory_changes_single_precision_maps_by_rounding_only() -> None:
    """A single input takes other kernels, whose rounding switches ReLUs and thereby changes gradients."""
    model, x = load_module(random_resnet(blocks=1).float(), RESNET[1:]), random_images(2, RESNET)
    full, parts = (
        convscope.heatmaps(model, x, 3, method="integrated-gradients", steps=6, memory=m) for m in (1 << 30, 1)
    )
    assert relative_error(parts.values, full.values) < SUMS


@pytest.mark.parametrize("method", METHODS)
def test_model_is_unchanged_after_success_and_errors(method: str) -> None:
    net, _ = in_training(randomized(SmallConvNet()))
    model, before, options = load_module(net), snapshot(net), METHODS[method]
    reported: list[float] = []
    convscope.heatmaps(
        model, random_images(), [[0, 1]] * 3, method=method, progress=lambda d, n: reported.append(d / n), **options
    )
    assert diff_snapshots(before, snapshot(net)) == []
    assert reported == sorted(reported)
    assert reported[-1] == 1

    class StopError(Exception):
        pass

    def stop(done: float, count: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        convscope.heatmaps(model, random_images(), method=method, progress=stop, memory=1, **options)
    with pytest.raises(ConvscopeError):
        convscope.heatmaps(model, random_images(), 17, method=method, **options)
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize("method", [m for m in METHODS if m != "guided-grad-cam"])
@pytest.mark.parametrize("size", [(40,), (6, 8, 10)])
def test_signals_and_volumes(method: str, size: tuple[int, ...]) -> None:
    """The methods work on signals and volumes."""
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}[len(size)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = kinds[0](2, 4, 3, padding=1), kinds[1](4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.bn(self.conv(x))).flatten(2).mean(2))

    net = randomized(Net())
    model = load_module(net, size, channels=2)
    actual = convscope.heatmaps(model, random_images(2, (2, *size)), [[0, 2]] * 2, method=method, **METHODS[method])
    assert actual.values.shape == (2, 2, *size)
    assert actual.values.any()
    if method == "full-grad":
        assert np.abs(actual.extras["completeness_error"]).max() < SUMS


def test_guided_grad_cam_of_volumes_and_signals() -> None:
    for size, conv in (((40,), nn.Conv1d), ((6, 8, 10), nn.Conv3d)):
        net = randomized(nn.Sequential(conv(2, 4, 3, stride=2), nn.ReLU(), conv(4, 3, 1), nn.Flatten(2)))
        model = load_module(MeanOverPositions(net), size, channels=2)
        actual = convscope.heatmaps(model, random_images(2, (2, *size)), 0, method="guided-grad-cam", layer="net.1")
        assert actual.values.shape == (2, 1, *size)


class MeanOverPositions(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean(2)


def test_networks_that_modify_their_input_or_disable_gradients() -> None:
    x = random_images()
    for net in (nn.Sequential(nn.ReLU(inplace=True), randomized(SmallConvNet())), randomized(FrozenStemNet())):
        original = x.clone()
        actual = convscope.heatmaps(load_module(net), x, 1, method="saliency")
        assert actual.values.any()
        assert torch.equal(x, original)


def test_target_independent_of_the_input_has_zero_maps() -> None:
    model = load_module(randomized(SmallConvNet()))
    for method in ("saliency", "integrated-gradients", "guided-backprop", "full-grad"):
        actual = convscope.heatmaps(model, random_images(), lambda output: torch.ones(len(output)), method=method)
        assert not actual.values.any()
        assert "zero everywhere" in actual.notes[-1]


def test_function_and_contrast_targets() -> None:
    model, x = load_module(randomized(SmallConvNet())), random_images()
    for method in ("input-x-gradient", "integrated-gradients"):
        gradient_of_one, other, against = (
            convscope.heatmaps(model, x, t, method=method, against=a) for t, a in ((1, None), (2, None), (1, 2))
        )
        assert relative_error(against.values, gradient_of_one.values - other.values) < SUMS
        function = convscope.heatmaps(model, x, lambda output: output[:, 1] - output[:, 2], method=method)
        assert relative_error(function.values, against.values) < SUMS


# --- Keras -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras() -> Any:
    return importlib.import_module("keras")


class Twin(nn.Module):
    """The network that `keras_twin` builds in Keras."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-3)
        self.second, self.scores = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.norm(self.first(x))), 2)
        return self.scores(F.relu(self.second(x)).mean((2, 3)))


def keras_twin(keras: Any, twin: nn.Module) -> Any:
    layers = keras.layers
    x = image = keras.Input((12, 16, 3))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, padding="same", name="first")(x))
    x = layers.MaxPooling2D(2)(layers.ReLU(6.0)(x))
    x = layers.Conv2D(5, 3, padding="same", use_bias=False, activation="relu", name="second")(x)
    x = layers.Dense(3, activation="softmax", name="scores")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(image, x)
    for name in ("first", "second"):
        conv = getattr(twin, name)
        weights = [conv.weight.detach().permute(2, 3, 1, 0).numpy()]
        model.get_layer(name).set_weights(weights + ([] if conv.bias is None else [conv.bias.detach().numpy()]))
    norm = twin.norm
    model.get_layer("norm").set_weights(
        [t.detach().numpy() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    )
    model.get_layer("scores").set_weights([twin.scores.weight.detach().numpy().T, twin.scores.bias.detach().numpy()])
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras itself
def test_keras_model_has_the_maps_of_its_torch_twin(keras: Any) -> None:
    twin = randomized(Twin())
    with torch.no_grad():
        twin.norm.weight *= 5  # so that 6 is reached
    x = random_images(2, (3, 12, 16))
    torch_model, reference = load_module(twin, (12, 16)), convscope.load(keras_twin(keras, twin))
    for method, options in METHODS.items():
        options = {**options, "layer": "second"} if "layer" in options else options
        expected = convscope.heatmaps(torch_model, x, [[0, 2]] * 2, method=method, **options)
        actual = convscope.heatmaps(reference, x, [[0, 2]] * 2, method=method, **options)
        if method != "guided-grad-cam":  # in Keras the layer includes the activation
            assert relative_error(actual.values, expected.values) < 1e-4, method
        assert actual.values.any()
        for key, value in expected.extras.items():
            assert np.abs(actual.extras[key] - value).max() < 1e-4, method
