"""Folded passes: the same numbers but for rounding, only where nobody else looks, and the network stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import convscope
from convscope.attribution import context
from convscope.engine import capture
from convscope.engine.acceleration import conv_fusion
from convscope.engine.model import Model
from tests.oracles.nets import SmallConvNet, diff_snapshots, randomized, snapshot

TINY = 1e-5


def apart(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def both(net: nn.Module, x: Tensor) -> tuple[conv_fusion.Folds, Tensor, Tensor]:
    """What was folded, the outputs with it and those without."""
    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, x[:1])
        return folds, conv_fusion.with_fusion(net, folds)(x), net(x)


def steps(folds: conv_fusion.Folds) -> list[str]:
    return sorted(" ".join(chain.steps()) for chain, _ in folds.values())


def named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: randomized(getattr(torchvision.models, name)(weights=None, **options))


BOTH, NORMALISED, ACTIVE = "normalisation activation", "normalisation", "activation"
REAL: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    # A block's second convolution is added to before its rectifier, and so are the three that make smaller maps.
    "resnet18": (named("resnet18"), {BOTH: 9, NORMALISED: 11}),
    "vgg11": (named("vgg11"), {ACTIVE: 8}),
    "mobilenet_v2": (named("mobilenet_v2"), {BOTH: 35, NORMALISED: 17}),
    # Squeeze-and-excitation: two small convolutions each, of which the first is rectified.
    "mobilenet_v3_small": (named("mobilenet_v3_small"), {BOTH: 23, NORMALISED: 11, ACTIVE: 9}),
    # Normalisation comes in front of the convolutions, except for the first and those inside a dense layer.
    "densenet121": (named("densenet121"), {BOTH: 59}),
    "googlenet": (named("googlenet", init_weights=False, aux_logits=False), {BOTH: 57}),
}


@pytest.mark.parametrize("name", REAL)
def test_the_same_numbers(name: str) -> None:
    make, counts = REAL[name]
    net = make()
    x = inputs(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    folds, found, expected = both(net, x)
    assert apart(found, expected) < TINY
    assert {what: steps(folds).count(what) for what in set(steps(folds))} == counts
    with torch.no_grad():
        alone = conv_fusion.with_fusion(net, folds)(x[:1])
    assert apart(alone, expected[:1]) < TINY


def test_lite0(lite0: Model) -> None:
    x = inputs(2, 3, 224, 224)
    folds, found, expected = both(lite0.module, x)
    assert apart(found, expected) < TINY
    assert len(folds) == 49  # every convolution it has


def test_other_sizes_than_the_one_that_was_watched() -> None:
    net = randomized(SmallConvNet())
    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, inputs(1, 3, 24, 24))
        other = inputs(2, 3, 31, 18)
        assert len(folds) == 3
        assert apart(conv_fusion.with_fusion(net, folds)(other), net(other)) < TINY


class Layers(nn.Module):
    """Any function of one convolution, one normalisation and the input."""

    def __init__(self, function: Callable[..., Tensor], axes: int = 2, **options: Any) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes]
        self.conv = conv(4, 4, 3, padding=1, **options)
        self.bn = norm(4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv, self.bn, x)


def varied(net: nn.Module) -> nn.Module:
    """With statistics for normalisations of any number of axes."""
    randomized(net)
    draw = torch.Generator().manual_seed(5)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.copy_(torch.randn(4, generator=draw))
            m.running_var.copy_(0.5 + torch.rand(4, generator=draw))
    return net


FOLDED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "relu": (lambda c, b, x: F.relu(b(c(x))), BOTH),
    "relu in place": (lambda c, b, x: F.relu(b(c(x)), inplace=True) * 2, BOTH),
    "method": (lambda c, b, x: b(c(x)).relu(), BOTH),
    "method in place": (lambda c, b, x: b(c(x)).relu_(), BOTH),
    "relu6": (lambda c, b, x: F.relu6(b(c(x))), BOTH),
    "hardtanh": (lambda c, b, x: F.hardtanh(b(c(x)), -0.3, 0.2), BOTH),
    "hardtanh by name": (lambda c, b, x: F.hardtanh(b(c(x)), max_val=0.5), BOTH),
    "silu": (lambda c, b, x: F.silu(b(c(x))), BOTH),
    "hardswish": (lambda c, b, x: F.hardswish(b(c(x))), BOTH),
    "without normalisation": (lambda c, b, x: F.relu(c(x)), ACTIVE),
    "without activation": (lambda c, b, x: b(c(x)) + x, NORMALISED),
    "twice rectified": (lambda c, b, x: F.relu(F.relu(b(c(x)))), BOTH),
    "rectified in front of the normalisation": (lambda c, b, x: b(F.relu(c(x))), ACTIVE),
    "its shape is asked": (lambda c, b, x: F.relu(b(y)) if (y := c(x)).shape[0] and y.dim() else x, BOTH),
    "normalised behind a sum": (lambda c, b, x: F.relu(b(c(x)) + x), NORMALISED),
    "seen by others later": (lambda c, b, x: b(y := c(x)).relu() + y, ""),
    "seen by others before": (lambda c, b, x: (y := c(x)).mean() + b(y).relu(), ""),
    "normalised is seen later": (lambda c, b, x: (y := b(c(x))).relu() + y, ""),
    "written into": (lambda c, b, x: F.relu(b(c(x).add_(1))), ""),
    "changed in between": (lambda c, b, x: F.relu(b(c(x) * 2)), ""),
    "called by name": (lambda c, b, x: F.relu(F.conv2d(x, weight=c.weight, bias=c.bias, padding=1)), ""),
    "used twice": (lambda c, b, x: F.relu(b(c(b(c(x))))), ""),
    "plain": (lambda c, b, x: c(x).tanh(), ""),
    "statistics of the batch": (lambda c, b, x: F.batch_norm(c(x), None, None, training=True), ""),
    "training": (
        lambda c, b, x: F.batch_norm(c(x), b.running_mean, b.running_var, training=True, momentum=0.0),
        "",
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_only_what_nobody_else_sees_is_folded(name: str) -> None:
    function, expected_steps = FOLDED[name]
    net = varied(Layers(function))
    folds, found, expected = both(net, inputs(3, 4, 9, 8))
    assert apart(found, expected) < TINY
    assert steps(folds) == ([expected_steps] if expected_steps else [])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"groups": 2}, {"groups": 4}, {"stride": 2}, {"padding_mode": "circular"}]
)
def test_convolutions_of_all_kinds(axes: int, options: dict[str, Any]) -> None:
    net = varied(Layers(lambda c, b, x: F.relu(b(c(x))), axes, **options))
    folds, found, expected = both(net, inputs(3, 4, *[8, 7, 6][:axes]))
    assert steps(folds) == [BOTH]
    assert apart(found, expected) < TINY


@pytest.mark.parametrize("affine", [True, False])
def test_normalisation_without_weights_of_its_own(affine: bool) -> None:
    net = varied(Layers(lambda c, b, x: b(c(x))))
    if not affine:
        net.bn.weight = net.bn.bias = None
    folds, found, expected = both(net, inputs(2, 4, 9, 9))
    assert steps(folds) == [NORMALISED]
    assert apart(found, expected) < TINY


def test_double_precision_folds_normalisation_alone() -> None:
    net = varied(Layers(lambda c, b, x: F.relu(b(c(x))))).double()
    folds, found, expected = both(net, inputs(2, 4, 9, 9).double())
    assert steps(folds) == [NORMALISED]
    assert apart(found, expected) < 1e-12


def padded(net: nn.Module, x: Tensor, *, gradients: bool) -> list[bool]:
    """Of each convolution, whether it pads by itself. Outputs and gradients are compared at several sizes."""
    folds = conv_fusion.find_fusions(net, x[:1], gradients=gradients)
    quick = conv_fusion.with_fusion(net, folds)
    for size in ((12, 12), (13, 11), (9, 16)):
        both = []
        for run in (net, quick):
            at = inputs(2, 4, *size).to(x.dtype).requires_grad_(gradients)
            with torch.set_grad_enabled(gradients):
                found = run(at)
            weights = inputs(*found.shape).to(x.dtype)
            both.append((found.detach(), torch.autograd.grad(found, at, weights)[0] if gradients else weights))
        for found, expected in zip(*both, strict=True):
            assert apart(found, expected) < (1e-12 if x.dtype == torch.float64 else TINY)
    return [chain.padded for chain, _ in folds.values()]


PADDED: dict[str, tuple[Callable[..., Tensor], dict[str, Any], bool]] = {
    "more behind": (lambda c, b, x: b(c(F.pad(x, (0, 1, 0, 1)))), {"stride": 2, "groups": 4}, True),
    "more in front": (lambda c, b, x: b(c(F.pad(x, (2, 1, 3, 0)))), {"groups": 4}, True),
    "alike": (lambda c, b, x: c(F.pad(x, (1, 1, 1, 1))), {}, True),
    "one axis": (lambda c, b, x: c(F.pad(x, (2, 0))), {"groups": 2}, True),
    "rectified": (lambda c, b, x: F.relu(c(F.pad(x, (0, 1, 0, 1)))), {"stride": 2}, True),
    "dilated": (lambda c, b, x: b(c(F.pad(x, (0, 2, 0, 4)))), {"dilation": 2, "groups": 4}, True),
    "between two taps": (lambda c, b, x: b(c(F.pad(x, (0, 1, 0, 2)))), {"dilation": 2, "groups": 4}, True),
    "as the size asks": (lambda c, b, x: b(c(F.pad(x, (0, x.shape[3] % 2)))), {"groups": 4}, True),
    "its shape is asked": (lambda c, b, x: c(y) if (y := F.pad(x, (0, 1))).shape[3] > 3 else x, {}, True),
    "by name": (lambda c, b, x: b(c(F.pad(input=x, pad=(0, 1)))), {"groups": 4}, True),
    "a module": (lambda c, b, x: b(c(nn.ZeroPad2d((0, 1, 1, 0))(x))), {"groups": 4}, True),
    "with ones": (lambda c, b, x: b(c(F.pad(x, (0, 1), value=1.0))), {}, False),
    "reflected": (lambda c, b, x: b(c(F.pad(x, (1, 1, 1, 1), mode="reflect"))), {}, False),
    "cropped": (lambda c, b, x: b(c(F.pad(x, (-1, 1)))), {}, False),
    "padded twice": (lambda c, b, x: b(c(F.pad(F.pad(x, (0, 1)), (1, 0)))), {}, False),
    "seen by others": (lambda c, b, x: b(c(y := F.pad(x, (0, 1, 0, 1)))) + y, {}, False),
    "written over": (lambda c, b, x: b(c(_and_clear(F.pad(x, (0, 1)), x))), {}, False),
    "another for somebody else": (lambda c, b, x: c(F.pad(x, (0, 1)))[..., :9] + F.pad(x, (1, 1))[..., :9], {}, False),
}


def _and_clear(padded: Tensor, x: Tensor) -> Tensor:
    """What was padded, after what it was made of has been written over."""
    if not x.requires_grad:
        x.zero_()
    return padded


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", PADDED)
def test_a_convolution_pads_by_itself_what_nobody_else_sees(name: str, gradients: bool) -> None:
    function, options, expected = PADDED[name]
    net = varied(Layers(function, **options)).requires_grad_(False)
    assert any(padded(net, inputs(1, 4, 12, 12), gradients=gradients)) is expected
    padded(net.double(), inputs(1, 4, 12, 12).double(), gradients=gradients)


def test_what_no_convolution_pads_by_itself_is_padded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that serve twice are not folded; whoever comes behind them is not padded for."""

    def twice(c: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
        weight = torch.ones(4, 4, 2, 2)
        x = b(c(F.pad(x, (1, 1))))
        for _ in range(2):
            x = F.conv2d(F.pad(x, (0, 1)), weight, None, (1, 1), (0, 0), (1, 1), 1) * 0.1 + 1
        return x.relu().mean((2, 3))

    net, x, calls = varied(Layers(twice)), inputs(2, 4, 12, 12), []
    with torch.no_grad():
        expected, folds = net(x), conv_fusion.find_fusions(net, x)
        usual = conv_fusion._laid_around
        monkeypatch.setattr(conv_fusion, "_laid_around", lambda x, pads: calls.append(x.shape[0]) or usual(x, pads))
        assert apart(conv_fusion.with_fusion(net, folds)(x), expected) < TINY
    assert calls == [4, 2, 2]  # a kernel, and two batches


def test_a_kernel_grows_only_where_that_costs_little() -> None:
    """Unequal ends need a larger kernel: 16 taps for 9. Where many maps go into each output, padding is cheaper."""
    one, many = torch.ones(8, 1, 3, 3), torch.ones(8, 8, 3, 3)
    window = conv_fusion.absorb_padding(conv_fusion.ConvGeometry(one, (0, 0), (1, 1)), ((0, 1), (1, 1)))
    assert window is not None
    assert window.padding == (1, 1)
    assert torch.equal(window.weight, F.pad(one, (0, 0, 1, 0)))
    assert conv_fusion.absorb_padding(conv_fusion.ConvGeometry(many, (0, 0), (1, 1)), ((0, 1), (1, 1))) is None
    alike = conv_fusion.absorb_padding(conv_fusion.ConvGeometry(many, (1, 0), (1, 1)), ((1, 1), (2, 2)))
    assert alike is not None
    assert alike.padding == (2, 2)
    assert torch.equal(alike.weight, many)


def test_lite0_pads_by_itself(lite0: Model) -> None:
    """Its five convolutions with a stride, at sizes that ask for zeros at one end and at both."""
    net = copy.deepcopy(lite0.module).double()  # in which no rectifier is found on the other side of its kink
    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, inputs(1, 3, 224, 224).double(), gradients=True)
    assert sum(chain.padded for chain, _ in folds.values()) == 5
    for side in (80, 111):
        x = inputs(2, 3, side, side).double().requires_grad_()
        slow, quick = (run(x)[:, 7].sum() for run in (net, conv_fusion.with_fusion(net, folds)))
        (expected,), (found,) = (torch.autograd.grad(value, x) for value in (slow, quick))
        assert apart(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {BOTH: 9, NORMALISED: 11}),
        ("vgg11", {ACTIVE: 8}),
        ("mobilenet_v2", {BOTH: 35, NORMALISED: 17}),
        # Hard swish, after most of them, cannot be told from what comes out.
        ("mobilenet_v3_small", {BOTH: 5, NORMALISED: 29, ACTIVE: 9}),
    ],
)
def test_gradients_through_rectifiers(name: str, expected: dict[str, int]) -> None:
    net = named(name)().double().requires_grad_(False)
    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, inputs(1, 3, 64, 64).double(), gradients=True)
    assert {what: steps(folds).count(what) for what in set(steps(folds))} == expected
    x = inputs(2, 3, 64, 64).double().requires_grad_()
    (a, slow), (b, quick) = (
        (y := run(x), torch.autograd.grad(y[:, 7].sum(), x)[0]) for run in (net, conv_fusion.with_fusion(net, folds))
    )
    assert apart(b.detach(), a.detach()) < 1e-10
    assert apart(quick, slow) < 1e-10


@pytest.mark.parametrize(
    "behind", [lambda y, x: y.add_(x), lambda y, x: y.div_(6), lambda y, x: F.relu6(y.mul_(2), inplace=True)]
)
def test_a_rectifier_into_whose_output_is_written(behind: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Its gradient cannot be told from what came out any more: left to torch, which keeps what went in."""
    convolution = randomized(nn.Conv2d(3, 3, 1)).requires_grad_(False)
    convolution.weight.mul_(4)

    def net(x: Tensor) -> Tensor:
        return behind(F.relu6(convolution(x)), x)

    x = inputs(2, 3, 5, 5).requires_grad_()
    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, x, gradients=True)
    assert not folds
    slow, quick = (
        torch.autograd.grad(run(x).square().sum(), x)[0] for run in (net, conv_fusion.with_fusion(net, folds))
    )
    assert torch.equal(slow, quick)


def test_what_no_function_of_torch_looks_at_is_found_by_trying() -> None:
    """Foreign code is not seen, and would find what was rectified in the place of what went in."""
    convolution = nn.Conv2d(3, 3, 1)

    def net(x: Tensor) -> Tensor:
        y = convolution(x)
        with torch._C.DisableTorchFunction():  # as what is called from C++
            foreign = y * 2
        return F.relu(y) + foreign

    x = inputs(2, 3, 5, 5)
    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, x, gradients=True)
    assert steps(folds) == [ACTIVE]
    assert not conv_fusion.outputs_match(net, conv_fusion.with_fusion(net, folds), x)
    usual = named("mobilenet_v2")()
    with torch.no_grad():
        folds = conv_fusion.find_fusions(usual, inputs(1, 3, 64, 64), gradients=True)
    assert conv_fusion.outputs_match(usual, conv_fusion.with_fusion(usual, folds), inputs(1, 3, 64, 64))


@pytest.mark.parametrize("axes", [1, 3])
def test_gradients_through_rectifiers_of_other_convolutions(axes: int) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    net = nn.Sequential(convolution(3, 4, 3), nn.ReLU6(), convolution(4, 2, 1), nn.ReLU()).requires_grad_(False)
    x = inputs(2, 3, *[5] * axes).requires_grad_()
    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, x, gradients=True)
    assert steps(folds) == [ACTIVE] * 2
    slow, quick = (
        torch.autograd.grad(run(x).square().sum(), x)[0] for run in (net, conv_fusion.with_fusion(net, folds))
    )
    assert torch.equal(slow, quick)


@pytest.mark.parametrize("rectifier", [nn.ReLU, nn.ReLU6, partial(nn.Hardtanh, -1.0, 2.0)])
@pytest.mark.parametrize("inplace", [True, False])
def test_what_goes_into_a_rectifier_is_not_kept(rectifier: Callable[..., nn.Module], inplace: bool) -> None:
    """Of two convolutions with a rectifier between, only what goes into them is kept for the gradient."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), rectifier(inplace=inplace), nn.Conv2d(4, 2, 3)).requires_grad_(False)
    x = inputs(1, 3, 9, 9).requires_grad_()
    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, x, gradients=True)
    assert steps(folds) == [ACTIVE]
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quick = conv_fusion.with_fusion(net, folds)(x)
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    maps = kept - weights - {x.untyped_storage().data_ptr()}
    assert len(maps) == 1
    slow = net(x)
    assert torch.equal(quick, slow)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (quick, slow)))


def test_nothing_is_kept_during_a_pass_but_what_is_still_asked_for() -> None:
    net = named("resnet18")()
    x = inputs(1, 3, 64, 64)
    kept: list[int] = []

    class Counting(conv_fusion._FusionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_function__(func, types, args, kwargs)
            kept.append(len(self.done))
            return out

    with torch.no_grad():
        folds = conv_fusion.find_fusions(net, x)
        with Counting(folds):
            net(x)
    assert max(kept) == 1
    assert kept[-1] == 0


def test_nothing_of_the_network_changes() -> None:
    net = randomized(SmallConvNet())
    before = snapshot(net)
    both(net, inputs(2, 3, 24, 24))
    assert diff_snapshots(before, snapshot(net)) == []
    net.conv1.register_forward_hook(crash)
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError):
        conv_fusion.find_fusions(net, inputs(1, 3, 24, 24))
    assert diff_snapshots(before, snapshot(net)) == []


def crash(*_: Any) -> None:
    raise ZeroDivisionError


# --- where it is used ------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, wrong: float = 0.0) -> list[int]:
    """The batches that went through folded passes; `wrong` is what is added to their logits."""
    batches: list[int] = []

    def quickened(
        run: Callable[[Tensor], capture.ForwardResult], folds: conv_fusion.Folds
    ) -> Callable[[Tensor], capture.ForwardResult]:
        quick = conv_fusion.with_fusion(run, folds)

        def counting(x: Tensor) -> capture.ForwardResult:
            batches.append(len(x))
            seen = quick(x)
            return seen._replace(logits=seen.logits + wrong)

        return counting

    monkeypatch.setattr(context, "quickened", quickened)
    return batches


METHODS: dict[str, dict[str, Any]] = {
    "score-cam": {"layer": "blocks.2.0.bn1"},
    "occlusion": {"window": 64, "stride": 64},
    "rise": {"samples": 20, "tolerance": 0.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_load_made_is_folded(
    lite0: Model, photos: list[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    batches = counted(monkeypatch)
    options = {"targets": 281, "method": method, **METHODS[method]}
    quick = convscope.heatmaps(lite0, photos[:1], **options).values
    assert len(batches) > 3
    monkeypatch.setattr(context, "plan", lambda run, x: {})
    batches.clear()
    slow = convscope.heatmaps(lite0, photos[:1], **options).values
    assert batches == []
    assert np.abs(quick - slow).max() / np.abs(slow).max() < 1e-4  # drops are a tenth of the score


def test_numbers_that_do_not_agree_are_not_used(
    lite0: Model, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = counted(monkeypatch, wrong=0.01)
    found = convscope.heatmaps(lite0, photos[:1], 281, method="occlusion", window=112, stride=112).values
    assert batches == [1]  # the comparison and nothing else
    monkeypatch.setattr(context, "plan", lambda run, x: {})
    plain = convscope.heatmaps(lite0, photos[:1], 281, method="occlusion", window=112, stride=112).values
    assert np.array_equal(found, plain)


def test_a_network_in_hand_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = counted(monkeypatch)
    model = convscope.load(randomized(SmallConvNet()), preprocessing={"size": 24})
    convscope.heatmaps(model, inputs(1, 3, 24, 24), 0, method="occlusion")
    assert batches == []
    assert not model.loaded_by_convscope
