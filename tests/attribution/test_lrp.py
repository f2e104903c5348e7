"""Relevance handed back layer by layer: by hand on small networks, as zennit's own attribution on large ones."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonGammaBox, EpsilonPlus, LayerMapComposite, layer_map_base
from zennit.rules import Epsilon
from zennit.torchvision import ResNetCanonizer
from zennit.types import Linear

import convscope
from convscope import ConvscopeError
from tests.attribution.test_gradient import SIZE, SUMS, TINY, apart, inputs, loaded, resnet
from tests.oracles.nets import Twice, Usual, changes, filled, lived_in, snapshot

METHODS = ("lrp-epsilon", "lrp-gamma", "lrp-zplus")
HALF = {"mean": (0.5,) * 3, "std": (0.25,) * 3}  # so that prepared pixels are between -2 and 2
EPS = 0.01  # of the epsilon rule, where sums of either sign come close to 0 and rounding would be blown up


def theirs(method: str, canonizer: Any) -> Any:
    if method == "lrp-epsilon":
        return LayerMapComposite([*layer_map_base(), (Linear, Epsilon(epsilon=EPS))], canonizers=[canonizer])
    if method == "lrp-gamma":
        low, high = torch.full((1, 3, 1, 1), -2.0), torch.full((1, 3, 1, 1), 2.0)
        return EpsilonGammaBox(low, high, epsilon=EPS, canonizers=[canonizer])
    return EpsilonPlus(epsilon=EPS, canonizers=[canonizer])


def attributed(net: nn.Module, x: Tensor, targets: list[int], composite: Any) -> Tensor:
    """By zennit alone, (N, T, ...); the relevance begins with the target's logit."""
    net, found = copy.deepcopy(net), []
    with Gradient(net, composite) as attributor:
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 0.0  # what is left of a merged one should be the identity
        for target in targets:
            _, relevance = attributor(x.clone().requires_grad_(), lambda y, t=target: y * torch.eye(y.shape[1])[[t]])
            found.append(relevance.sum(1).detach())
    return torch.stack(found, 1)


@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_zennit(method: str) -> None:
    for net, size, canonizer in (
        (resnet(), 64, ResNetCanonizer()),
        (filled(Usual()).double(), SIZE, SequentialMergeBatchNorm()),
    ):
        x = inputs(3, (3, size, size)).double()
        expected = attributed(net, x, [3, 0], theirs(method, canonizer))
        found = convscope.heatmaps(loaded(net, size, **HALF), x, [[3, 0]] * 3, method=method, epsilon=EPS)
        assert found.values.dtype == np.float32
        assert apart(found.values, expected) < SUMS
        error = expected.sum((2, 3)) - net(x)[:, [3, 0]].detach()
        assert apart(found.extras["conservation_error"], error) < SUMS


# --- by hand ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A convolution of one pixel, a rectifier, and a linear layer for all places: all sums can be written down."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4 * 6, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.activation(self.conv(x)).flatten(1))


def epsilon_step(x: np.ndarray, w: np.ndarray, z: np.ndarray, relevance: np.ndarray, eps: float) -> np.ndarray:
    return x * (w.T @ (relevance / (z + eps * np.where(z < 0, -1, 1))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", [F.relu, F.silu, lambda x: F.relu6(x), lambda x: x.relu_()])
def test_rules_by_hand(method: str, activation: Callable[[Tensor], Tensor]) -> None:
    net = filled(Two(activation))
    x = inputs(1, (3, 2, 3))
    w, b = net.conv.weight.detach().double().numpy()[..., 0, 0], net.conv.bias.detach().double().numpy()
    v, c = net.fc.weight.detach().double().numpy(), net.fc.bias.detach().double().numpy()
    pixels = x[0].double().numpy().reshape(3, 6)
    z = w @ pixels + b[:, None]
    a = activation(torch.from_numpy(z.copy())).numpy()
    logits = v @ a.reshape(-1) + c
    begun = np.zeros(3)
    begun[1] = logits[1]
    hidden = epsilon_step(a.reshape(-1), v, logits, begun, 1e-6).reshape(4, 6)
    expected = np.zeros(6)
    for i in range(6):
        p, r = pixels[:, i], hidden[:, i]
        if method == "lrp-epsilon":
            expected[i] = epsilon_step(p, w, z[:, i], r, 1e-6).sum()
        elif method == "lrp-gamma":  # z-box: the picture's range is 0 to 1
            parts = w * p - np.minimum(w, 0)
            expected[i] = sum((parts[k] / (parts[k].sum() + 1e-6) * r[k]).sum() for k in range(4))  # b cancels out
        else:
            parts = np.maximum(w * p, 0)
            below = parts.sum(1) + np.maximum(b, 0)
            expected[i] = sum((parts[k] / (below[k] + 1e-6) * r[k]).sum() for k in range(4))
    found = convscope.heatmaps(loaded(net, (2, 3)), x, 1, method=method)
    assert apart(found.values[0, 0].ravel(), expected) < 1e-4


def test_gamma_behind_the_first_layer() -> None:
    """R_j = sum_k a_j (w + g w+)_jk / sum_j (...) R_k, for what the rectifier lets through."""
    net = filled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()))
    x = inputs(1, (3, 1, 1))
    x = x.abs() * 0.5
    with torch.no_grad():
        z = net[0](x).double().numpy().ravel()
        out = net(x).double().numpy().ravel()
    w, b = net[2].weight.detach().double().numpy()[..., 0, 0], net[2].bias.detach().double().numpy()
    v = net[0].weight.detach().double().numpy()[..., 0, 0]
    a, p = np.maximum(z, 0), x.double().numpy().ravel()
    for t in range(2):
        # What is positive hands on by w + g w+, what is negative by w + g w-.
        kept = np.maximum if out[t] > 0 else np.minimum
        weight, bias = w[t] + 0.25 * kept(w[t], 0), b[t] + 0.25 * kept(b[t], 0)
        below = (a * weight).sum() + bias
        hidden = a * weight / below * out[t]
        parts = v * p - np.minimum(v, 0)
        expected = sum((parts[k] / parts[k].sum() * hidden[k]).sum() for k in range(4))
        found = convscope.heatmaps(loaded(net, (1, 1)), x, t, method="lrp-gamma")
        assert found.values.ravel() == pytest.approx(expected, rel=1e-4)


def test_without_biases_nothing_is_lost() -> None:
    """All weights and pixels positive: each rule shares out all that it gets."""
    net = filled(Usual())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.abs_()
            if name.endswith("bias"):
                parameter.zero_()
        for m in (net.bn1, net.bn3):
            m.running_mean.zero_()
    model, x = loaded(net), inputs().abs() / 4
    for method in METHODS:
        found = convscope.heatmaps(model, x, [[0, 4]] * 3, method=method)
        assert apart(found.values.sum((2, 3)), found.logits) < 1e-4
        assert np.abs(found.extras["conservation_error"]).max() < 1e-4 * found.logits.max()
    with torch.no_grad():
        net.conv2.bias.fill_(3)
        net.bn1.bias.fill_(2)
    kept = convscope.heatmaps(loaded(net), x, 0, method="lrp-zplus")
    assert kept.extras["conservation_error"].max() < -0.1 * kept.logits.min()
    free = convscope.heatmaps(loaded(net), x, 0, method="lrp-zplus", biases=False)
    assert np.abs(free.extras["conservation_error"]).max() < 1e-4 * free.logits.max()


# --- what is no layer ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Conv, batch normalisation, a sum around a second convolution, an average, a head; said in several ways."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], average: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.add, self.average = add, average

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(x)))
        return self.fc(self.average(F.relu(self.add(self.conv2(x), x))))


SAID: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "operators": (lambda a, b: a + b, lambda x: x.mean((2, 3))),
    "in place": (lambda a, b: a.add_(b), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "in place, its value ignored": (lambda a, b: [a.add_(b), a][1], lambda x: F.avg_pool2d(x, SIZE).flatten(1)),
    "augmented": (lambda a, b: a.__iadd__(b), lambda x: nn.AdaptiveAvgPool2d(1)(x)[..., 0, 0]),
    "minus minus": (lambda a, b: a - -b, lambda x: x.sum((2, 3)) / SIZE**2),
    "function": (torch.add, lambda x: torch.mean(x, dim=(2, 3))),
    "the other way round": (lambda a, b: b + a, lambda x: x.mean(3).mean(2)),
}


def residual_by_hand(net: Residual, x: Tensor, target: int, eps: float) -> Tensor:
    """The epsilon rule at every step, in float64, by torch's gradient of each step alone."""

    def back(step: Callable[..., Tensor], ins: list[Tensor], relevance: Tensor, eps: float) -> list[Tensor]:
        ins = [t.detach().requires_grad_() for t in ins]
        y = step(*ins)
        share = relevance / (y + eps * torch.where(y < 0, -1.0, 1.0)).detach()
        return [t.detach() * g for t, g in zip(ins, torch.autograd.grad(y, ins, share), strict=True)]

    first = lambda t: net.bn1(net.conv1(t))  # noqa: E731
    with torch.no_grad():
        one = first(x).relu()
        two = net.conv2(one)
        three = (one + two).relu()
        four = three.mean((2, 3))
        logits = net.fc(four)
    (r,) = back(net.fc, [four], logits * F.one_hot(torch.tensor(target), 4), eps)
    (r,) = back(lambda t: t.mean((2, 3)), [three], r, 1e-6)
    straight, r = back(torch.add, [one, two], r, 1e-6)
    (r,) = back(net.conv2, [one], r, eps)
    (r,) = back(first, [x], r + straight, eps)
    return r.sum(1)


@pytest.mark.parametrize("way", SAID)
def test_sums_and_averages_however_they_are_said(way: str) -> None:
    net = filled(Residual(*SAID[way])).double()
    x = inputs(2).double()
    expected = residual_by_hand(filled(Residual(*SAID["operators"])).double(), x, 2, EPS)
    found = convscope.heatmaps(loaded(net), x, 2, method="lrp-epsilon", epsilon=EPS)
    assert apart(found.values[:, 0], expected) < SUMS


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "densenet121", "regnetx_002", "resnetv2_18"])
def test_networks_of_timm(name: str) -> None:
    """Batch normalisation with an activation inside, in front of or behind convolutions, sums of every kind."""
    torch.manual_seed(0)
    try:
        net = timm.create_model(name, num_classes=7)
    except RuntimeError:
        pytest.skip(f"this timm has no {name}")
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.8, 1.2)
    before = snapshot(net.eval())
    x = inputs(2, (3, 64, 64))
    found = convscope.heatmaps(loaded(net, 64, **HALF), x, [[0, 5]] * 2, method="lrp-zplus")
    assert changes(before, snapshot(net)) == []
    assert np.isfinite(found.values).all()
    assert (found.values != 0).mean() > 0.9
    with torch.no_grad():
        assert apart(found.logits, net(x)[:, [0, 5]]) < SUMS


def test_batch_normalisation_is_merged_where_it_follows_at_once() -> None:
    """zennit goes by the order in which layers were made; here that is not the order in which they run."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv2, self.bn1 = nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)
            self.conv1, self.bn2 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.conv1(x)).relu()
            return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))

    class Merged(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
            self.one, self.two, self.fc = fuse(net.conv1, net.bn1), fuse(net.conv2, net.bn2), net.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.two(self.one(x).relu()).relu().mean((2, 3)))

    net = filled(Net())
    x = inputs()
    for method in METHODS:
        found, expected = (
            convscope.heatmaps(loaded(n, **HALF), x, 1, method=method) for n in (net, Merged(net).eval())
        )
        assert apart(found.values, expected.values) < 1e-4


def test_batch_normalisation_behind_a_rectifier_in_place_is_not_merged() -> None:
    """The rectifier hands on the very tensor that the convolution made, with other values in it."""
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    nets = [
        filled(nn.Sequential(conv, nn.ReLU(inplace), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
        for inplace in (True, False)
    ]
    found, expected = (convscope.heatmaps(loaded(n), inputs(), 1, method="lrp-zplus") for n in nets)
    assert apart(found.logits, expected.logits) < TINY
    assert apart(found.values, expected.values) < SUMS


# --- what is refused -------------------------------------------------------------------------------------------------


class Gated(Twice):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.fc(self.conv2(x * x.mean((2, 3), keepdim=True).sigmoid()).mean((2, 3)))


class Normed(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(F.group_norm(self.conv1(x), 2)).mean((2, 3)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.conv(x)).mean((2, 3)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.ones(2, 3, 3, 3)), nn.Identity()
        self.aside = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.conv2d(x, self.weight).mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Gated, "lrp has no rule for mul of what depends on the picture"),
        (Normed, "lrp has no rule for group_norm"),
        (Shared, "lrp cannot follow a layer that runs twice; Conv2d does"),
        (Functional, "lrp finds no convolution or linear layer"),
    ],
)
def test_networks_that_have_no_rule(net: Any, message: str) -> None:
    own, _ = lived_in(filled(net()))
    model, before = loaded(own), snapshot(own)
    for method in METHODS:
        with pytest.raises(ConvscopeError, match=message):
            convscope.heatmaps(model, inputs(), 0, method=method)
    assert changes(before, snapshot(own)) == []


def test_without_zennit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zennit.rules", None)
    model = loaded(filled(Usual()))
    for method in METHODS:
        with pytest.raises(ConvscopeError, match=r"zennit, which is not installed; pip install 'convscope\[lrp\]'"):
            convscope.heatmaps(model, inputs(), method=method)


def test_keras_models() -> None:
    keras = importlib.import_module("keras")
    image = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(image))
    model = convscope.load(keras.Model(image, x))
    with pytest.raises(ConvscopeError, match="this is a Keras model: try full-grad"):
        convscope.heatmaps(model, inputs(1, (3, 8, 8)), 0, method="lrp-zplus")


# --- the engine's promises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_neighbours_targets_and_chunks_change_nothing(method: str) -> None:
    """In double precision, because sums near 0 blow rounding up."""
    model, x = loaded(filled(Usual()).double()), inputs(5).double()
    targets, options = [[0, 3], [1, 2], [4, 0], [2, 2], [3, 1]], {"epsilon": EPS}
    whole = convscope.heatmaps(model, x, targets, method=method, **options)
    turned = convscope.heatmaps(
        model, x[[4, 0, 2, 2, 1]], [targets[i] for i in (4, 0, 2, 2, 1)], method=method, **options
    )
    assert np.array_equal(turned.values, whole.values[[4, 0, 2, 2, 1]])
    for position in range(2):
        one = convscope.heatmaps(model, x, [[row[position]] for row in targets], method=method, **options)
        assert apart(one.values[:, 0], whole.values[:, position]) < TINY
    parts = convscope.heatmaps(model, x, targets, method=method, memory=1, **options)
    assert apart(parts.values, whole.values) < SUMS
    assert apart(parts.extras["conservation_error"], whole.extras["conservation_error"]) < SUMS
    alone = convscope.heatmaps(model, x[1:2], [targets[1]], method=method, **options)
    assert apart(alone.values, whole.values[1:2]) < SUMS


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method: str) -> None:
    net, _ = lived_in(filled(Usual()))
    model, before = loaded(net), snapshot(net)
    told: list[float] = []
    convscope.heatmaps(model, inputs(), [[0, 1]] * 3, method=method, progress=lambda d, n: told.append(d / n))
    assert changes(before, snapshot(net)) == []
    assert told[-1] == 1

    class StopError(Exception):
        pass

    def stop(done: float, count: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        convscope.heatmaps(model, inputs(), method=method, progress=stop, memory=1)
    assert changes(before, snapshot(net)) == []
    with pytest.raises(ConvscopeError, match=r"has no option 'alpha'; its options: .*epsilon"):
        convscope.heatmaps(model, inputs(), method=method, alpha=1)
    assert changes(before, snapshot(net)) == []


def test_a_model_in_hand_is_used_as_it_is() -> None:
    net = filled(Usual())
    model, x = loaded(net), inputs()
    first = convscope.heatmaps(model, x, 1, method="lrp-zplus")
    with torch.no_grad():
        net.fc.weight[1] *= 2
        net.fc.bias[1] *= 2
    assert apart(convscope.heatmaps(model, x, 1, method="lrp-zplus").values, 2 * first.values) < SUMS


def test_contrasts_functions_and_several_outputs() -> None:
    model, x = loaded(filled(Usual())), inputs()
    one, other = (convscope.heatmaps(model, x, t, method="lrp-zplus").values for t in (1, 2))
    against = convscope.heatmaps(model, x, 1, against=2, method="lrp-zplus")
    assert apart(against.values, one - other) < SUMS
    function = convscope.heatmaps(model, x, lambda output: output[:, 1] - output[:, 2], method="lrp-zplus")
    assert apart(function.values, one - other) < SUMS
    nothing = convscope.heatmaps(model, x, lambda output: torch.ones(len(output)), method="lrp-zplus")
    assert not nothing.values.any()


def test_signals_and_volumes() -> None:
    for size, conv, norm in (((40,), nn.Conv1d, nn.BatchNorm1d), ((6, 8, 10), nn.Conv3d, nn.BatchNorm3d)):
        net = filled(nn.Sequential(conv(2, 4, 3), norm(4), nn.ReLU(), conv(4, 3, 1), nn.Flatten(2)))

        class Net(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x).mean(2)

        for method in METHODS:
            found = convscope.heatmaps(loaded(Net(net), size, channels=2), inputs(2, (2, *size)), 0, method=method)
            assert found.values.shape == (2, 1, *size)
            assert found.values.any()
