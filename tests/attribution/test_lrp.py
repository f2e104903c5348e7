"""LRP: by hand on small networks, against zennit's own attribution on large ones."""

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
from tests.attribution.helpers import SIZE, load_module, random_images, random_resnet, relative_error
from tests.attribution.test_gradient import SUMS, TINY
from tests.oracles.nets import SharedReluNet, SmallConvNet, diff_snapshots, in_training, randomized, snapshot

METHODS = ("lrp-epsilon", "lrp-gamma", "lrp-zplus")
HALF = {"mean": (0.5,) * 3, "std": (0.25,) * 3}  # preprocessed pixels are between -2 and 2
EPS = 0.01  # large enough that denominators near 0 do not amplify rounding


def zennit_composite(method: str, canonizer: Any) -> Any:
    if method == "lrp-epsilon":
        return LayerMapComposite([*layer_map_base(), (Linear, Epsilon(epsilon=EPS))], canonizers=[canonizer])
    if method == "lrp-gamma":
        low, high = torch.full((1, 3, 1, 1), -2.0), torch.full((1, 3, 1, 1), 2.0)
        return EpsilonGammaBox(low, high, epsilon=EPS, canonizers=[canonizer])
    return EpsilonPlus(epsilon=EPS, canonizers=[canonizer])


def zennit_relevance(net: nn.Module, x: Tensor, targets: list[int], composite: Any) -> Tensor:
    """Compute relevance (N, T, ...) by zennit alone, starting from the target's logit."""
    net, actual = copy.deepcopy(net), []
    with Gradient(net, composite) as attributor:
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 0.0  # a merged batch normalisation must be the identity
        for target in targets:
            _, relevance = attributor(x.clone().requires_grad_(), lambda y, t=target: y * torch.eye(y.shape[1])[[t]])
            actual.append(relevance.sum(1).detach())
    return torch.stack(actual, 1)


@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_zennit(method: str) -> None:
    for net, size, canonizer in (
        (random_resnet(blocks=1).double(), 32, ResNetCanonizer()),
        (randomized(SmallConvNet()).double(), SIZE, SequentialMergeBatchNorm()),
    ):
        x = random_images(2, (3, size, size)).double()
        expected = zennit_relevance(net, x, [3, 0], zennit_composite(method, canonizer))
        actual = convscope.heatmaps(load_module(net, size, **HALF), x, [[3, 0]] * 2, method=method, epsilon=EPS)
        assert actual.values.dtype == np.float32
        assert relative_error(actual.values, expected) < SUMS
        error = expected.sum((2, 3)) - net(x)[:, [3, 0]].detach()
        assert relative_error(actual.extras["conservation_error"], error) < SUMS


# --- by hand ---------------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """A 1 x 1 convolution, an activation and a linear layer on all positions: all sums can be written down."""

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
    net = randomized(TwoLayers(activation))
    x = random_images(1, (3, 2, 3))
    w, b = net.conv.weight.detach().double().numpy()[..., 0, 0], net.conv.bias.detach().double().numpy()
    v, c = net.fc.weight.detach().double().numpy(), net.fc.bias.detach().double().numpy()
    pixels = x[0].double().numpy().reshape(3, 6)
    z = w @ pixels + b[:, None]
    a = activation(torch.from_numpy(z.copy())).numpy()
    logits = v @ a.reshape(-1) + c
    start = np.zeros(3)
    start[1] = logits[1]
    hidden = epsilon_step(a.reshape(-1), v, logits, start, 1e-6).reshape(4, 6)
    expected = np.zeros(6)
    for i in range(6):
        p, r = pixels[:, i], hidden[:, i]
        if method == "lrp-epsilon":
            expected[i] = epsilon_step(p, w, z[:, i], r, 1e-6).sum()
        elif method == "lrp-gamma":  # z-box: pixels are between 0 and 1
            parts = w * p - np.minimum(w, 0)
            expected[i] = sum((parts[k] / (parts[k].sum() + 1e-6) * r[k]).sum() for k in range(4))  # b cancels out
        else:
            parts = np.maximum(w * p, 0)
            below = parts.sum(1) + np.maximum(b, 0)
            expected[i] = sum((parts[k] / (below[k] + 1e-6) * r[k]).sum() for k in range(4))
    actual = convscope.heatmaps(load_module(net, (2, 3)), x, 1, method=method)
    assert relative_error(actual.values[0, 0].ravel(), expected) < 1e-4


def test_gamma_rule_after_the_first_layer() -> None:
    """R_j = sum_k a_j (w + g w+)_jk / sum_j (...) R_k where the ReLU is active."""
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()))
    x = random_images(1, (3, 1, 1))
    x = x.abs() * 0.5
    with torch.no_grad():
        z = net[0](x).double().numpy().ravel()
        out = net(x).double().numpy().ravel()
    w, b = net[2].weight.detach().double().numpy()[..., 0, 0], net[2].bias.detach().double().numpy()
    v = net[0].weight.detach().double().numpy()[..., 0, 0]
    a, p = np.maximum(z, 0), x.double().numpy().ravel()
    for t in range(2):
        # Positive outputs distribute by w + g w+, negative ones by w + g w-.
        biased = np.maximum if out[t] > 0 else np.minimum
        weight, bias = w[t] + 0.25 * biased(w[t], 0), b[t] + 0.25 * biased(b[t], 0)
        below = (a * weight).sum() + bias
        hidden = a * weight / below * out[t]
        parts = v * p - np.minimum(v, 0)
        expected = sum((parts[k] / parts[k].sum() * hidden[k]).sum() for k in range(4))
        actual = convscope.heatmaps(load_module(net, (1, 1)), x, t, method="lrp-gamma")
        assert actual.values.ravel() == pytest.approx(expected, rel=1e-4)


def test_relevance_is_conserved_without_biases() -> None:
    """With positive weights and pixels, each rule distributes all relevance."""
    net = randomized(SmallConvNet())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.abs_()
            if name.endswith("bias"):
                parameter.zero_()
        for m in (net.bn1, net.bn3):
            m.running_mean.zero_()
    model, x = load_module(net), random_images().abs() / 4
    for method in METHODS:
        actual = convscope.heatmaps(model, x, [[0, 4]] * 3, method=method)
        assert relative_error(actual.values.sum((2, 3)), actual.logits) < 1e-4
        assert np.abs(actual.extras["conservation_error"]).max() < 1e-4 * actual.logits.max()
    with torch.no_grad():
        net.conv2.bias.fill_(3)
        net.bn1.bias.fill_(2)
    biased = convscope.heatmaps(load_module(net), x, 0, method="lrp-zplus")
    assert biased.extras["conservation_error"].max() < -0.1 * biased.logits.min()
    free = convscope.heatmaps(load_module(net), x, 0, method="lrp-zplus", biases=False)
    assert np.abs(free.extras["conservation_error"]).max() < 1e-4 * free.logits.max()


# --- functions that are no layers ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A residual network whose sum and average can be written in several ways."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], average: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.add, self.average = add, average

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(x)))
        return self.fc(self.average(F.relu(self.add(self.conv2(x), x))))


SUMS_AND_AVERAGES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "operators": (lambda a, b: a + b, lambda x: x.mean((2, 3))),
    "in place": (lambda a, b: a.add_(b), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "in place, return value ignored": (lambda a, b: [a.add_(b), a][1], lambda x: F.avg_pool2d(x, SIZE).flatten(1)),
    "augmented assignment": (lambda a, b: a.__iadd__(b), lambda x: nn.AdaptiveAvgPool2d(1)(x)[..., 0, 0]),
    "subtraction of a negative": (lambda a, b: a - -b, lambda x: x.sum((2, 3)) / SIZE**2),
    "function": (torch.add, lambda x: torch.mean(x, dim=(2, 3))),
    "swapped": (lambda a, b: b + a, lambda x: x.mean(3).mean(2)),
}


def residual_by_hand(net: Residual, x: Tensor, target: int, eps: float) -> Tensor:
    """Apply the epsilon rule at every step, by the gradient of that step alone."""

    def back(step: Callable[..., Tensor], ins: list[Tensor], relevance: Tensor, eps: float) -> list[Tensor]:
        ins = [t.detach().requires_grad_() for t in ins]
        y = step(*ins)
        share = relevance / (y + eps * torch.where(y < 0, -1.0, 1.0)).detach()
        return [t.detach() * g for t, g in zip(ins, torch.autograd.grad(y, ins, share), strict=True)]

    normalized_conv = lambda t: net.bn1(net.conv1(t))  # noqa: E731
    with torch.no_grad():
        single_target = normalized_conv(x).relu()
        two = net.conv2(single_target)
        three = (single_target + two).relu()
        four = three.mean((2, 3))
        logits = net.fc(four)
    (r,) = back(net.fc, [four], logits * F.one_hot(torch.tensor(target), 4), eps)
    (r,) = back(lambda t: t.mean((2, 3)), [three], r, 1e-6)
    skip, r = back(torch.add, [single_target, two], r, 1e-6)
    (r,) = back(net.conv2, [single_target], r, eps)
    (r,) = back(normalized_conv, [x], r + skip, eps)
    return r.sum(1)


@pytest.mark.parametrize("variant", SUMS_AND_AVERAGES)
def test_sums_and_averages_in_any_notation(variant: str) -> None:
    net = randomized(Residual(*SUMS_AND_AVERAGES[variant])).double()
    x = random_images(2).double()
    expected = residual_by_hand(randomized(Residual(*SUMS_AND_AVERAGES["operators"])).double(), x, 2, EPS)
    actual = convscope.heatmaps(load_module(net), x, 2, method="lrp-epsilon", epsilon=EPS)
    assert relative_error(actual.values[:, 0], expected) < SUMS


TIMM_NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "tf_efficientnet_lite0": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "regnetx_002": {},
    "resnetv2_18": {},
}


@pytest.mark.parametrize("name", TIMM_NETWORKS)
def test_networks_of_timm(name: str) -> None:
    """Batch normalisation before or after convolutions, or with an activation inside; sums of every kind."""
    torch.manual_seed(0)
    try:
        net = timm.create_model(name, num_classes=7, **TIMM_NETWORKS[name])
    except RuntimeError:
        pytest.skip(f"this timm has no {name}")
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.8, 1.2)
    before = snapshot(net.eval())
    x = random_images(2, 32)
    actual = convscope.heatmaps(load_module(net, 32, **HALF), x, [[0, 5]] * 2, method="lrp-zplus")
    assert diff_snapshots(before, snapshot(net)) == []
    assert np.isfinite(actual.values).all()
    assert (actual.values != 0).mean() > 0.9
    with torch.no_grad():
        assert relative_error(actual.logits, net(x)[:, [0, 5]]) < SUMS


def test_batch_normalisation_is_merged_by_order_of_execution() -> None:
    """zennit goes by the order of definition, which differs from the order of execution here."""

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
            self.single_target, self.two, self.fc = fuse(net.conv1, net.bn1), fuse(net.conv2, net.bn2), net.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.two(self.single_target(x).relu()).relu().mean((2, 3)))

    net = randomized(Net())
    x = random_images()
    for method in METHODS:
        actual, expected = (
            convscope.heatmaps(load_module(n, **HALF), x, 1, method=method) for n in (net, Merged(net).eval())
        )
        assert relative_error(actual.values, expected.values) < 1e-4


def test_batch_normalisation_after_an_inplace_relu_is_not_merged() -> None:
    """The in-place ReLU returns the convolution's tensor with other values."""
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    nets = [
        randomized(nn.Sequential(conv, nn.ReLU(inplace), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
        for inplace in (True, False)
    ]
    actual, expected = (convscope.heatmaps(load_module(n), random_images(), 1, method="lrp-zplus") for n in nets)
    assert relative_error(actual.logits, expected.logits) < TINY
    assert relative_error(actual.values, expected.values) < SUMS


# --- unsupported networks --------------------------------------------------------------------------------------------


class Gated(SharedReluNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.fc(self.conv2(x * x.mean((2, 3), keepdim=True).sigmoid()).mean((2, 3)))


class Normed(SharedReluNet):
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
        (Gated, "lrp has no rule for mul of tensors that depend on the image"),
        (Normed, "lrp has no rule for group_norm"),
        (Shared, "lrp cannot handle a layer that runs twice; Conv2d does"),
        (Functional, "lrp finds no PyTorch module that is a convolution or linear layer"),
    ],
)
def test_networks_without_rules_are_refused(net: Any, message: str) -> None:
    module, _ = in_training(randomized(net()))
    model, before = load_module(module), snapshot(module)
    for method in METHODS:
        with pytest.raises(ConvscopeError, match=message):
            convscope.heatmaps(model, random_images(), 0, method=method)
    assert diff_snapshots(before, snapshot(module)) == []


def test_missing_zennit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zennit.rules", None)
    model = load_module(randomized(SmallConvNet()))
    for method in METHODS:
        with pytest.raises(ConvscopeError, match=r"zennit is not installed; pip install 'convscope\[lrp\]'"):
            convscope.heatmaps(model, random_images(), method=method)


@pytest.mark.slow
def test_keras_models_are_refused() -> None:
    keras = importlib.import_module("keras")
    image = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(image))
    model = convscope.load(keras.Model(image, x))
    with pytest.raises(ConvscopeError, match="this is a Keras model: use full-grad instead"):
        convscope.heatmaps(model, random_images(1, (3, 8, 8)), 0, method="lrp-zplus")


# --- batches, side effects, shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_batch_targets_or_memory(method: str) -> None:
    """In double precision, because sums near 0 amplify rounding."""
    model, x = load_module(randomized(SmallConvNet()).double()), random_images(5).double()
    targets, options = [[0, 3], [1, 2], [4, 0], [2, 2], [3, 1]], {"epsilon": EPS}
    full = convscope.heatmaps(model, x, targets, method=method, **options)
    permuted = convscope.heatmaps(
        model, x[[4, 0, 2, 2, 1]], [targets[i] for i in (4, 0, 2, 2, 1)], method=method, **options
    )
    assert np.array_equal(permuted.values, full.values[[4, 0, 2, 2, 1]])
    for position in range(2):
        single_target = convscope.heatmaps(model, x, [[row[position]] for row in targets], method=method, **options)
        assert relative_error(single_target.values[:, 0], full.values[:, position]) < TINY
    parts = convscope.heatmaps(model, x, targets, method=method, memory=1, **options)
    assert relative_error(parts.values, full.values) < SUMS
    assert relative_error(parts.extras["conservation_error"], full.extras["conservation_error"]) < SUMS
    single = convscope.heatmaps(model, x[1:2], [targets[1]], method=method, **options)
    assert relative_error(single.values, full.values[1:2]) < SUMS


@pytest.mark.parametrize("method", METHODS)
def test_model_is_unchanged_after_success_and_errors(method: str) -> None:
    net, _ = in_training(randomized(SmallConvNet()))
    model, before = load_module(net), snapshot(net)
    reported: list[float] = []
    convscope.heatmaps(
        model, random_images(), [[0, 1]] * 3, method=method, progress=lambda d, n: reported.append(d / n)
    )
    assert diff_snapshots(before, snapshot(net)) == []
    assert reported[-1] == 1

    class StopError(Exception):
        pass

    def stop(done: float, count: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        convscope.heatmaps(model, random_images(), method=method, progress=stop, memory=1)
    assert diff_snapshots(before, snapshot(net)) == []
    with pytest.raises(ConvscopeError, match=r"has no option 'alpha'; its options: .*epsilon"):
        convscope.heatmaps(model, random_images(), method=method, alpha=1)
    assert diff_snapshots(before, snapshot(net)) == []


def test_changed_weights_of_a_module_are_used() -> None:
    net = randomized(SmallConvNet())
    model, x = load_module(net), random_images()
    first = convscope.heatmaps(model, x, 1, method="lrp-zplus")
    with torch.no_grad():
        net.fc.weight[1] *= 2
        net.fc.bias[1] *= 2
    assert relative_error(convscope.heatmaps(model, x, 1, method="lrp-zplus").values, 2 * first.values) < SUMS


def test_contrasts_functions_and_several_outputs() -> None:
    model, x = load_module(randomized(SmallConvNet())), random_images()
    single_target, other = (convscope.heatmaps(model, x, t, method="lrp-zplus").values for t in (1, 2))
    against = convscope.heatmaps(model, x, 1, against=2, method="lrp-zplus")
    assert relative_error(against.values, single_target - other) < SUMS
    function = convscope.heatmaps(model, x, lambda output: output[:, 1] - output[:, 2], method="lrp-zplus")
    assert relative_error(function.values, single_target - other) < SUMS
    nothing = convscope.heatmaps(model, x, lambda output: torch.ones(len(output)), method="lrp-zplus")
    assert not nothing.values.any()


def test_signals_and_volumes() -> None:
    for size, conv, norm in (((40,), nn.Conv1d, nn.BatchNorm1d), ((6, 8, 10), nn.Conv3d, nn.BatchNorm3d)):
        net = randomized(nn.Sequential(conv(2, 4, 3), norm(4), nn.ReLU(), conv(4, 3, 1), nn.Flatten(2)))

        class Net(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x).mean(2)

        for method in METHODS:
            actual = convscope.heatmaps(
                load_module(Net(net), size, channels=2), random_images(2, (2, *size)), 0, method=method
            )
            assert actual.values.shape == (2, 1, *size)
            assert actual.values.any()
