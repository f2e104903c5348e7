"""Fused convolutions: results equal to rounding, only where no other function reads what lies between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from convscope.engine.acceleration import conv_fusion
from convscope.engine.acceleration.conv_fusion import ConvArguments, Fusions, find_fusions, with_fusion
from convscope.engine.model import Model
from tests.oracles.nets import SmallConvNet, diff_snapshots, randomized, snapshot

TOLERANCE = 1e-5  # of the largest value

BATCH_NORM, ACTIVATION, BOTH = "batch_norm", "activation", "batch_norm activation"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def fuse(net: nn.Module, x: Tensor) -> tuple[Fusions, Tensor, Tensor]:
    """Return the fusions, the fused output and the plain output."""
    with torch.no_grad():
        _, fusions = find_fusions(net, x[:1])
        return fusions, with_fusion(net, fusions)(x), net(x)


def fused_steps(fusions: Fusions) -> list[str]:
    return sorted(" ".join(chain.steps) for chain in fusions.values())


def counts(fusions: Fusions) -> dict[str, int]:
    steps = fused_steps(fusions)
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
        ("googlenet", {BOTH: 57}),
    ],
)
def test_real_networks_give_the_same_outputs(name: str, expected: dict[str, int]) -> None:
    net = torchvision_net(name)
    x = noise(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    fusions, actual, plain = fuse(net, x)
    assert relative_error(actual, plain) < TOLERANCE
    assert counts(fusions) == expected
    with torch.no_grad():
        single = with_fusion(net, fusions)(x[:1])
    assert relative_error(single, plain[:1]) < TOLERANCE


def test_every_convolution_of_lite0_is_fused_and_five_absorb_their_padding(lite0: Model) -> None:
    fusions, actual, plain = fuse(lite0.module, noise(2, 3, 224, 224))
    assert relative_error(actual, plain) < TOLERANCE
    assert len(fusions) == 49
    assert sum(chain.padded for chain in fusions.values()) == 5
    for side in (80, 111):  # zeros on one side, and on both
        x = noise(2, 3, side, side)
        with torch.no_grad():
            assert relative_error(with_fusion(lite0.module, fusions)(x), lite0.module(x)) < TOLERANCE


def test_other_input_sizes_than_the_observed_one() -> None:
    net, x = randomized(SmallConvNet()), noise(2, 3, 31, 18)
    with torch.no_grad():
        _, fusions = find_fusions(net, noise(1, 3, 24, 24))
        assert len(fusions) == 3
        assert relative_error(with_fusion(net, fusions)(x), net(x)) < TOLERANCE


class SmallNet(nn.Module):
    """Any function of one convolution, one batch normalisation and the input."""

    def __init__(self, function: Callable[..., Tensor], axes: int = 2, **options: Any) -> None:
        super().__init__()
        options = {"padding": 1, **options}
        self.conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes](4, 4, 3, **options)
        self.bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes](4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv, self.bn, x)


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
    "relu": (lambda c, b, x: F.relu(b(c(x))), BOTH),
    "relu in place": (lambda c, b, x: F.relu(b(c(x)), inplace=True) * 2, BOTH),
    "method": (lambda c, b, x: b(c(x)).relu(), BOTH),
    "method in place": (lambda c, b, x: b(c(x)).relu_(), BOTH),
    "relu6": (lambda c, b, x: F.relu6(b(c(x))), BOTH),
    "hardtanh": (lambda c, b, x: F.hardtanh(b(c(x)), -0.3, 0.2), BOTH),
    "hardtanh with keyword": (lambda c, b, x: F.hardtanh(b(c(x)), max_val=0.5), BOTH),
    "silu": (lambda c, b, x: F.silu(b(c(x))), BOTH),
    "hardswish": (lambda c, b, x: F.hardswish(b(c(x))), BOTH),
    "without batch norm": (lambda c, b, x: F.relu(c(x)), ACTIVATION),
    "without activation": (lambda c, b, x: b(c(x)) + x, BATCH_NORM),
    "two activations": (lambda c, b, x: F.relu(F.relu(b(c(x)))), BOTH),
    "activation before batch norm": (lambda c, b, x: b(F.relu(c(x))), ACTIVATION),
    "shape is read": (lambda c, b, x: F.relu(b(y)) if (y := c(x)).shape[0] and y.dim() else x, BOTH),
    "activation after a sum": (lambda c, b, x: F.relu(b(c(x)) + x), BATCH_NORM),
    "output is written into": (lambda c, b, x: F.relu(b(c(x))).add_(1), BOTH),
    "convolution is read later": (lambda c, b, x: b(y := c(x)).relu() + y, ""),
    "convolution is read before": (lambda c, b, x: (y := c(x)).mean() + b(y).relu(), ""),
    "batch norm is read later": (lambda c, b, x: (y := b(c(x))).relu() + y, ""),
    "convolution is written into": (lambda c, b, x: F.relu(b(c(x).add_(1))), ""),
    "a function in between": (lambda c, b, x: F.relu(b(c(x) * 2)), ""),
    "called with keywords": (lambda c, b, x: F.relu(F.conv2d(x, weight=c.weight, bias=c.bias, padding=1)), ""),
    "weight is used twice": (lambda c, b, x: F.relu(b(c(b(c(x))))), ""),
    "another activation": (lambda c, b, x: c(x).tanh(), ""),
    "batch statistics": (lambda c, b, x: F.batch_norm(c(x), None, None, training=True), ""),
    "training": (lambda c, b, x: F.batch_norm(c(x), b.running_mean, b.running_var, training=True, momentum=0.0), ""),
}


@pytest.mark.parametrize("name", CHAINS)
def test_only_chains_without_other_readers_are_fused(name: str) -> None:
    function, expected = CHAINS[name]
    fusions, actual, plain = fuse(with_random_statistics(SmallNet(function)), noise(3, 4, 9, 8))
    assert relative_error(actual, plain) < TOLERANCE
    assert fused_steps(fusions) == ([expected] if expected else [])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"groups": 2}, {"groups": 4}, {"stride": 2}, {"padding_mode": "circular"}]
)
def test_all_kinds_of_convolutions(axes: int, options: dict[str, Any]) -> None:
    net = with_random_statistics(SmallNet(lambda c, b, x: F.relu(b(c(x))), axes, **options))
    fusions, actual, plain = fuse(net, noise(3, 4, *[8, 7, 6][:axes]))
    assert fused_steps(fusions) == [BOTH]
    assert relative_error(actual, plain) < TOLERANCE


def test_convolution_with_numbers_for_stride_and_padding() -> None:
    def function(c: nn.Conv2d, b: nn.Module, x: Tensor) -> Tensor:
        return b(F.conv2d(x, c.weight, c.bias, 1, 1, 1, 1)).relu()  # type: ignore[no-any-return]

    fusions, actual, plain = fuse(with_random_statistics(SmallNet(function)), noise(3, 4, 9, 8))
    assert fused_steps(fusions) == [BOTH]
    assert relative_error(actual, plain) < TOLERANCE


def test_batch_norm_without_affine_parameters() -> None:
    net = with_random_statistics(SmallNet(lambda c, b, x: b(c(x))))
    net.bn.weight = net.bn.bias = None
    fusions, actual, plain = fuse(net, noise(2, 4, 9, 9))
    assert fused_steps(fusions) == [BATCH_NORM]
    assert relative_error(actual, plain) < TOLERANCE


def test_double_precision_fuses_batch_norm_only() -> None:
    net = with_random_statistics(SmallNet(lambda c, b, x: F.relu(b(c(x))))).double()
    fusions, actual, plain = fuse(net, noise(2, 4, 9, 9).double())
    assert fused_steps(fusions) == [BATCH_NORM]
    assert relative_error(actual, plain) < 1e-12


def _pad_and_clear(x: Tensor) -> Tensor:
    """Pad, and overwrite the original."""
    padded = F.pad(x, (0, 1))
    x.zero_()
    return padded


PADDINGS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], bool]] = {
    "more after": (lambda c, b, x: b(c(F.pad(x, (0, 1, 0, 1)))), {"stride": 2, "groups": 4}, True),
    "more before": (lambda c, b, x: b(c(F.pad(x, (2, 1, 3, 0)))), {"groups": 4}, True),
    "equal": (lambda c, b, x: c(F.pad(x, (1, 1, 1, 1))), {}, True),
    "one axis": (lambda c, b, x: c(F.pad(x, (2, 0))), {"groups": 2}, True),
    "with activation": (lambda c, b, x: F.relu(c(F.pad(x, (0, 1, 0, 1)))), {"stride": 2}, True),
    "dilated": (lambda c, b, x: b(c(F.pad(x, (0, 2, 0, 4)))), {"dilation": 2, "groups": 4}, True),
    "between two taps": (lambda c, b, x: b(c(F.pad(x, (0, 1, 0, 2)))), {"dilation": 2, "groups": 4}, True),
    "depends on the size": (lambda c, b, x: b(c(F.pad(x, (0, x.shape[3] % 2)))), {"groups": 4}, True),
    "shape is read": (lambda c, b, x: c(y) if (y := F.pad(x, (0, 1))).shape[3] > 3 else x, {}, True),
    "with keywords": (lambda c, b, x: b(c(F.pad(input=x, pad=(0, 1)))), {"groups": 4}, True),
    "module": (lambda c, b, x: b(c(nn.ZeroPad2d((0, 1, 1, 0))(x))), {"groups": 4}, True),
    "ones": (lambda c, b, x: b(c(F.pad(x, (0, 1), value=1.0))), {}, False),
    "reflected": (lambda c, b, x: b(c(F.pad(x, (1, 1, 1, 1), mode="reflect"))), {}, False),
    "cropped": (lambda c, b, x: b(c(F.pad(x, (-1, 1)))), {}, False),
    "padded twice": (lambda c, b, x: b(c(F.pad(F.pad(x, (0, 1)), (1, 0)))), {}, False),
    "read later": (lambda c, b, x: b(c(y := F.pad(x, (0, 1, 0, 1)))) + y, {}, False),
    "original is overwritten": (lambda c, b, x: b(c(_pad_and_clear(x * 1))), {}, False),
    "another padding elsewhere": (lambda c, b, x: c(F.pad(x, (0, 1)))[..., :9] + F.pad(x, (1, 1))[..., :9], {}, False),
}


@pytest.mark.parametrize("name", PADDINGS)
def test_a_convolution_absorbs_padding_without_other_readers(name: str) -> None:
    function, options, expected = PADDINGS[name]
    net = with_random_statistics(SmallNet(function, **options))
    with torch.no_grad():
        _, fusions = find_fusions(net, noise(1, 4, 12, 12))
    assert any(chain.padded for chain in fusions.values()) is expected
    for size in ((12, 12), (13, 11), (9, 16)):
        x = noise(2, 4, *size)
        with torch.no_grad():
            assert relative_error(with_fusion(net, fusions)(x), net(x)) < TOLERANCE


def test_no_padding_is_absorbed_with_gradients() -> None:
    net = with_random_statistics(SmallNet(lambda c, b, x: b(c(F.pad(x, (0, 1, 0, 1)))), groups=4))
    _, fusions = find_fusions(net, noise(1, 4, 12, 12))
    assert [chain.padded for chain in fusions.values()] == [False]


def test_padding_that_no_convolution_absorbs_is_applied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution whose weight is used twice is not fused; its input is padded before."""

    def function(c: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
        weight = torch.ones(4, 4, 2, 2)
        x = b(c(F.pad(x, (1, 1))))
        for _ in range(2):
            x = F.conv2d(F.pad(x, (0, 1)), weight, None, (1, 1), (0, 0), (1, 1), 1) * 0.1 + 1
        return x.relu().mean((2, 3))

    net, x, calls = with_random_statistics(SmallNet(function)), noise(2, 4, 12, 12), []
    pad_zeros = conv_fusion.pad_zeros
    with torch.no_grad():
        plain, (_, fusions) = net(x), find_fusions(net, x)
        monkeypatch.setattr(conv_fusion, "pad_zeros", lambda x, zeros: calls.append(len(x)) or pad_zeros(x, zeros))
        assert relative_error(with_fusion(net, fusions)(x), plain) < TOLERANCE
    assert calls == [4, 2, 2]  # a kernel, and two batches


def test_a_kernel_grows_only_if_few_channels_are_summed() -> None:
    """Unequal ends need a larger kernel: 16 taps for 9. With many channels per group, padding is cheaper."""

    def absorb(channels: int, padding: tuple[int, int], zeros: conv_fusion.Zeros) -> ConvArguments | None:
        weight = torch.ones(8, channels, 3, 3)
        return conv_fusion.absorb_padding(ConvArguments(weight, None, (1, 1), padding, (1, 1), 1), zeros)

    depthwise = absorb(1, (0, 0), ((0, 1), (1, 1)))
    assert depthwise is not None
    assert depthwise.padding == (1, 1)
    assert torch.equal(depthwise.weight, F.pad(torch.ones(8, 1, 3, 3), (0, 0, 1, 0)))
    assert absorb(8, (0, 0), ((0, 1), (1, 1))) is None
    equal = absorb(8, (1, 0), ((1, 1), (2, 2)))
    assert equal is not None
    assert equal.padding == (2, 2)
    assert torch.equal(equal.weight, torch.ones(8, 8, 3, 3))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", {BATCH_NORM: 20}), ("mobilenet_v2", {BATCH_NORM: 52}), ("mobilenet_v3_small", {BATCH_NORM: 34})],
)
def test_gradients_of_real_networks(name: str, expected: dict[str, int]) -> None:
    """Double precision, so that rounding moves no value across the kink of a ReLU."""
    net = torchvision_net(name).double().requires_grad_(False)
    x = noise(2, 3, 64, 64).double().requires_grad_()
    _, fusions = find_fusions(net, x[:1])
    assert counts(fusions) == expected
    plain, actual = (torch.autograd.grad(run(x)[:, 7].sum(), x)[0] for run in (net, with_fusion(net, fusions)))
    assert relative_error(actual, plain) < 1e-10


def test_only_outputs_still_to_be_skipped_are_kept_during_a_pass() -> None:
    net, x = torchvision_net("resnet18"), noise(1, 3, 64, 64)
    num_kept: list[int] = []

    class CountingMode(conv_fusion._FusionMode):
        def intercept(self, *args: Any) -> Any:
            output = super().intercept(*args)
            num_kept.append(len(self.computed))
            return output

    with torch.no_grad():
        _, fusions = find_fusions(net, x)
        with CountingMode(fusions):
            net(x)
    assert max(num_kept) == 1
    assert num_kept[-1] == 0


def test_the_network_is_left_unchanged() -> None:
    net = randomized(SmallConvNet())
    before = snapshot(net)
    fuse(net, noise(2, 3, 24, 24))
    assert diff_snapshots(before, snapshot(net)) == []

    def crash(*_: object) -> None:
        raise ZeroDivisionError

    net.conv1.register_forward_hook(crash)
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError):
        find_fusions(net, noise(1, 3, 24, 24))
    assert diff_snapshots(before, snapshot(net)) == []
