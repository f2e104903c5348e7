"""Fused convolutions: results equal to rounding, only where no other function reads what lies between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

from convscope.engine.acceleration import conv_fusion
from convscope.engine.acceleration.conv_fusion import (
    NORMS,
    SAME_PADDING,
    ConvChain,
    class_name,
    find_chains,
    same_padding,
    with_fusion,
)
from convscope.engine.model import Model
from tests.oracles.nets import SmallConvNet, diff_snapshots, randomized, snapshot

TOLERANCE = 1e-5  # of the largest value

BATCH_NORM, ACTIVATION, BOTH = "batch_norm", "activation", "batch_norm activation"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def run_network(x: Tensor, net: nn.Module) -> Tensor:
    return net(x)  # type: ignore[no-any-return]


def fuse(net: nn.Module, example: Tensor) -> tuple[list[ConvChain], Callable[[Tensor], Tensor]]:
    """Return what is fused, and the fused network."""
    _, copied, chains = find_chains(run_network, net, example)
    return chains, with_fusion(run_network, copied, chains)


def fuse_and_run(net: nn.Module, x: Tensor) -> tuple[list[ConvChain], Tensor, Tensor]:
    """Return what is fused, the fused output and the plain output."""
    with torch.no_grad():
        chains, fused = fuse(net, x[:1])
        return chains, fused(x), net(x)


def fused_steps(chains: list[ConvChain]) -> list[str]:
    names = [[BATCH_NORM if isinstance(m, NORMS) else ACTIVATION for m in chain.modules] for chain in chains]
    return sorted(map(" ".join, names))


def counts(chains: list[ConvChain]) -> dict[str, int]:
    steps = fused_steps(chains)
    return {name: steps.count(name) for name in set(steps)}


def torchvision_net(name: str) -> nn.Module:
    options: dict[str, Any] = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    return randomized(getattr(torchvision.models, name)(weights=None, **options))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # A block's second convolution is added to before its ReLU, and so are the three that downsample.
        ("resnet18", {BOTH: 9, BATCH_NORM: 11}),
        ("squeezenet1_1", {ACTIVATION: 26}),
        ("mobilenet_v2", {BOTH: 35, BATCH_NORM: 17}),
        # Squeeze-and-excitation has two small convolutions each, the first of them with a ReLU.
        ("mobilenet_v3_small", {BOTH: 23, BATCH_NORM: 11, ACTIVATION: 9}),
        # Batch normalisation precedes the convolutions, except for the first and those inside a dense layer.
        ("densenet121", {BOTH: 59}),
        ("googlenet", {BATCH_NORM: 57}),  # its ReLUs are functions
    ],
)
def test_real_networks_give_the_same_outputs(name: str, expected: dict[str, int]) -> None:
    net = torchvision_net(name)
    x = noise(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (chains, fused), exact = fuse(net, x[:1]), copy.deepcopy(net).double()(x.double())
        assert counts(chains) == expected
        assert relative_error(fused(x), exact) < TOLERANCE
        assert relative_error(fused(x[:1]), exact[:1]) < TOLERANCE


def test_every_convolution_of_lite0_is_fused_and_five_absorb_their_padding(lite0: Model) -> None:
    net = lite0.module
    with torch.no_grad():
        chains, fused = fuse(net, noise(1, 3, 224, 224))
        assert counts(chains) == {BOTH: 33, BATCH_NORM: 16}
        assert sum(class_name(chain.conv) == SAME_PADDING for chain in chains) == 5
        for side in (224, 80, 111):  # zeros on one side, and on both
            x = noise(2, 3, side, side)
            assert relative_error(fused(x), net(x)) < TOLERANCE


def test_other_input_sizes_than_the_observed_one() -> None:
    net, x = randomized(SmallConvNet()), noise(2, 3, 31, 18)
    with torch.no_grad():
        chains, fused = fuse(net, noise(1, 3, 24, 24))
        assert len(chains) == 3
        assert relative_error(fused(x), net(x)) < TOLERANCE


class SmallNet(nn.Module):
    """Any function of one convolution, one batch normalisation, one activation and the input."""

    def __init__(
        self, function: Callable[..., Tensor], axes: int = 2, act: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__()
        options = {"padding": 1, **options}
        self.conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes](4, 4, 3, **options)
        self.bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes](4)
        self.act = act or nn.ReLU()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv, self.bn, self.act, x)


def with_random_statistics(net: nn.Module) -> nn.Module:
    """Fill weights and batch statistics, for normalisations of any number of axes."""
    randomized(net)
    generator = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(4, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(4, generator=generator))
    return net


CHAINS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "all": (lambda c, b, a, x: a(b(c(x))), BOTH),
    "function": (lambda c, b, a, x: F.relu(b(c(x))), BATCH_NORM),
    "without batch norm": (lambda c, b, a, x: a(c(x)), ACTIVATION),
    "without activation": (lambda c, b, a, x: b(c(x)) + x, BATCH_NORM),
    "two activations": (lambda c, b, a, x: a(a(b(c(x)))), BOTH),
    "activation elsewhere": (lambda c, b, a, x: a(b(c(a(x)))), BOTH),
    "activation before batch norm": (lambda c, b, a, x: b(a(c(x))), ACTIVATION),
    "shape is read": (lambda c, b, a, x: a(b(y)) if (y := c(x)).shape[0] and y.dim() else x, ""),
    "activation after a sum": (lambda c, b, a, x: a(b(c(x)) + x), BATCH_NORM),
    "output is written into": (lambda c, b, a, x: a(b(c(x))).add_(1), BOTH),
    "convolution is read later": (lambda c, b, a, x: a(b(y := c(x))) + y, ""),
    "convolution is read before": (lambda c, b, a, x: (y := c(x)).mean() + a(b(y)), ""),
    "convolution is read twice": (lambda c, b, a, x: b(y := c(x)) + a(y), ""),
    "batch norm is read later": (lambda c, b, a, x: a(y := b(c(x))) + y, BATCH_NORM),
    "convolution is written into": (lambda c, b, a, x: a(b(c(x).add_(1))), ""),
    "a function in between": (lambda c, b, a, x: a(b(c(x) * 2)), ""),
    "called as a function": (lambda c, b, a, x: a(F.conv2d(x, weight=c.weight, bias=c.bias, padding=1)), ""),
    "convolution is called twice": (lambda c, b, a, x: a(b(c(b(c(x))))), ""),
    "another activation": (lambda c, b, a, x: c(x).tanh(), ""),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("inplace", [False, True])
def test_only_chains_without_other_readers_are_fused(name: str, inplace: bool) -> None:
    function, expected = CHAINS[name]
    net = with_random_statistics(SmallNet(function, act=nn.ReLU(inplace)))
    x = noise(3, 4, 9, 8)
    with torch.no_grad():
        chains, fused = fuse(net, x[:1].clone())
        actual, plain = fused(x.clone()), net(x.clone())
    assert relative_error(actual, plain) < TOLERANCE
    if not (inplace and "read" in name):  # what is read then is the activation's own output
        assert fused_steps(chains) == ([expected] if expected else [])


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.3, 0.2),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(inplace=True),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_all_activations(name: str) -> None:
    net = with_random_statistics(SmallNet(lambda c, b, a, x: a(b(c(x))) * 2, act=ACTIVATIONS[name]))
    chains, actual, plain = fuse_and_run(net, noise(3, 4, 9, 8))
    assert fused_steps(chains) == [BOTH]
    assert relative_error(actual, plain) < TOLERANCE


def test_batch_statistics_are_not_fused() -> None:
    net = with_random_statistics(SmallNet(lambda c, b, a, x: b(c(x))))
    net.bn = nn.BatchNorm2d(4, track_running_stats=False).eval()
    chains, actual, plain = fuse_and_run(net, noise(3, 4, 9, 8))
    assert not chains
    assert torch.equal(actual, plain)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"groups": 2},
        {"groups": 4},
        {"stride": 2},
        {"padding_mode": "circular"},
        {"padding": "same"},
    ],
)
def test_all_kinds_of_convolutions(axes: int, options: dict[str, Any]) -> None:
    net = with_random_statistics(SmallNet(lambda c, b, a, x: a(b(c(x))), axes, **options))
    chains, actual, plain = fuse_and_run(net, noise(3, 4, *[8, 7, 6][:axes]))
    assert fused_steps(chains) == [BATCH_NORM if options.keys() & {"padding_mode"} or "padding" in options else BOTH]
    assert relative_error(actual, plain) < TOLERANCE


def test_batch_norm_without_affine_parameters() -> None:
    net = with_random_statistics(SmallNet(lambda c, b, a, x: b(c(x))))
    net.bn.weight = net.bn.bias = None
    chains, actual, plain = fuse_and_run(net, noise(2, 4, 9, 9))
    assert fused_steps(chains) == [BATCH_NORM]
    assert relative_error(actual, plain) < TOLERANCE


def test_double_precision_fuses_batch_norm_only() -> None:
    net = with_random_statistics(SmallNet(lambda c, b, a, x: a(b(c(x))))).double()
    chains, actual, plain = fuse_and_run(net, noise(2, 4, 9, 9).double())
    assert fused_steps(chains) == [BATCH_NORM]
    assert relative_error(actual, plain) < 1e-12


def same_padding_net(groups: int, kernel: int = 3, stride: int = 2, dilation: int = 1) -> nn.Sequential:
    conv = Conv2dSame(8, 8, kernel, stride=stride, dilation=dilation, groups=groups)
    return randomized(nn.Sequential(conv, BatchNormAct2d(8)))  # type: ignore[return-value]


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (2, 2, 1), (4, 1, 3), (1, 2, 1)]
)
def test_convolutions_that_pad_as_tensorflow_does(groups: int, kernel: int, stride: int, dilation: int) -> None:
    net = same_padding_net(groups, kernel, stride, dilation)
    with torch.no_grad():
        chains, fused = fuse(net, noise(1, 8, 12, 12))
        assert fused_steps(chains) == [BOTH]
        for size in ((12, 12), (13, 11), (9, 16)):
            x = noise(2, 8, *size)
            padded = F.pad(x, [end for pair in reversed(same_padding(net[0], x.shape)) for end in pair])
            conv = net[0]
            expected = F.conv2d(padded, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
            assert torch.equal(expected, conv(x))
            assert relative_error(fused(x), net(x)) < TOLERANCE


def test_a_kernel_grows_only_if_few_channels_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unequal ends need a larger kernel: 16 taps for 9. With many channels per group, padding is cheaper."""
    kernels: list[tuple[int, ...]] = []
    convolve = conv_fusion.onednn_convolution

    def observed(x: Tensor, arguments: Any, *others: Any) -> Tensor:
        kernels.append((*arguments[0].shape[2:], *arguments[3]))
        return convolve(x, arguments, *others)

    monkeypatch.setattr(conv_fusion, "onednn_convolution", observed)
    for groups in (8, 1):
        with torch.no_grad():
            _, fused = fuse(same_padding_net(groups), noise(1, 8, 12, 13))
            fused(noise(1, 8, 12, 13))
    assert kernels == [(4, 3, 1, 1), (3, 3, 0, 0)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", {BATCH_NORM: 20}), ("mobilenet_v2", {BATCH_NORM: 52}), ("mobilenet_v3_small", {BATCH_NORM: 34})],
)
def test_gradients_of_real_networks(name: str, expected: dict[str, int]) -> None:
    """Double precision, so that rounding moves no value across the kink of a ReLU."""
    net = torchvision_net(name).double().requires_grad_(False)
    x = noise(2, 3, 64, 64).double().requires_grad_()
    chains, fused = fuse(net, x[:1])
    assert counts(chains) == expected
    plain, actual = (torch.autograd.grad(run(x)[:, 7].sum(), x)[0] for run in (net, fused))
    assert relative_error(actual, plain) < 1e-10


def test_the_network_is_left_unchanged() -> None:
    net = randomized(SmallConvNet())
    before = snapshot(net)
    fuse_and_run(net, noise(2, 3, 24, 24))
    assert diff_snapshots(before, snapshot(net)) == []

    def crash(*_: object) -> None:
        raise ZeroDivisionError

    net.conv1.register_forward_hook(crash)
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError):
        fuse(net, noise(1, 3, 24, 24))
    assert diff_snapshots(before, snapshot(net)) == []
