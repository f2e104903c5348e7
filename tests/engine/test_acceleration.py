"""The seam of acceleration: verified, falling back to the plain pass, switched off on request."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope.attribution import context
from convscope.engine import torch_ops
from convscope.engine.acceleration import ENVIRONMENT_VARIABLE, accelerate, api
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.evaluation import api as evaluation
from convscope.featurevis import plan
from convscope.scanning import batch_statistics
from tests.oracles.nets import SmallConvNet, diff_snapshots, randomized, snapshot

SCHEMAS = {
    "mkldnn._convolution_pointwise": "(Tensor X, Tensor W, Tensor? B, int[] padding, int[] stride, int[] dilation, "
    "int groups, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y",
    "mkldnn._reorder_convolution_weight": "(Tensor self, int[2] padding=0, int[2] stride=1, int[2] dilation=1, "
    "int groups=1, int[]? input_size=None) -> Tensor Y",
    "aten.hardtanh_backward": "(Tensor grad_output, Tensor self, Scalar min_val, Scalar max_val) -> Tensor",
}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> nn.Module:
    return randomized(SmallConvNet()).requires_grad_(False)


@pytest.fixture
def debug_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, logger="convscope"):
        yield caplog


@pytest.mark.parametrize("name", SCHEMAS)
def test_signatures_of_private_operators(name: str) -> None:
    """If this fails, adapt `convscope.engine.torch_ops`; until then passes are not accelerated."""
    namespace, operator = name.split(".")
    schema = str(getattr(getattr(torch.ops, namespace), operator).default._schema)
    assert schema.partition("(")[1] + schema.partition("(")[2] == SCHEMAS[name]


@pytest.mark.parametrize("gradients", [False, True])
def test_results_are_the_same(net: nn.Module, gradients: bool) -> None:
    before, example = snapshot(net), noise(1, 3, 24, 24)
    fast = accelerate(net, example, gradients=gradients)
    assert fast is not net
    assert not example.requires_grad
    assert torch.equal(example, noise(1, 3, 24, 24))
    x = noise(3, 3, 31, 20).requires_grad_(gradients)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-6)
    if gradients:
        actual, expected = (torch.autograd.grad(run(x).square().sum(), x)[0] for run in (fast, net))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert diff_snapshots(before, snapshot(net)) == []


def foreign_reader(conv: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a network whose extension reads the convolution's output unseen by function modes."""

    def run(x: Tensor) -> Tensor:
        y = conv(x)
        with torch._C.DisableTorchFunction():
            foreign = y * 2
        return F.relu(y) + foreign

    return run


def writes_into_its_batch_norm(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a network with a hidden in-place write between a convolution and its batch normalisation."""

    def run(x: Tensor) -> Tensor:
        y = net.conv1(x)
        with torch._C.DisableTorchFunction():
            y.mul_(2)
        return net.bn1(y)  # type: ignore[no-any-return]

    return run


def test_a_wrong_result_is_not_used(net: nn.Module, debug_log: pytest.LogCaptureFixture) -> None:
    run = foreign_reader(nn.Conv2d(3, 3, 1))
    assert accelerate(run, noise(2, 3, 5, 5)) is run
    run = writes_into_its_batch_norm(net)
    assert accelerate(run, noise(2, 3, 24, 24)) is run
    assert [record.message for record in debug_log.records] == ["not accelerated: the results differ"] * 2


def test_a_wrong_gradient_is_not_used(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs agree, the gradients do not."""

    class HalvedGradient(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] / 2

    with_fusion = api.with_fusion
    monkeypatch.setattr(api, "with_fusion", lambda *args: lambda x: HalvedGradient.apply(with_fusion(*args)(x)))
    assert accelerate(net, noise(1, 3, 24, 24), gradients=True) is net
    assert accelerate(net, noise(1, 3, 24, 24)) is not net


@pytest.mark.parametrize("operator", ["onednn_convolution", "pack_weight", "supports_onednn"])
def test_an_operator_that_is_missing_or_has_changed(
    net: nn.Module, operator: str, monkeypatch: pytest.MonkeyPatch, debug_log: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    monkeypatch.setattr(f"convscope.engine.acceleration.conv_fusion.{operator}", missing)
    assert accelerate(net, noise(1, 3, 24, 24)) is net
    assert [record.message for record in debug_log.records] == ["not accelerated"]


def test_a_batch_that_fails_later_takes_the_plain_pass(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, debug_log: pytest.LogCaptureFixture
) -> None:
    fast = accelerate(net, noise(1, 3, 24, 24))
    monkeypatch.setattr("convscope.engine.acceleration.conv_fusion.onednn_convolution", None)
    x = noise(2, 3, 24, 24)
    assert torch.equal(fast(x), net(x))
    assert [record.message for record in debug_log.records] == ["batch of shape (2, 3, 24, 24) not accelerated"]


def test_an_error_of_the_network_itself_is_raised(net: nn.Module) -> None:
    def failing(x: Tensor) -> Tensor:
        if len(x) > 1:
            raise ZeroDivisionError
        return net(x)  # type: ignore[no-any-return]

    with pytest.raises(ZeroDivisionError):
        accelerate(failing, noise(1, 3, 24, 24))(noise(2, 3, 24, 24))
    assert accelerate(failing, noise(2, 3, 24, 24)) is failing


def test_nothing_to_fuse(debug_log: pytest.LogCaptureFixture) -> None:
    run = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert accelerate(run, noise(1, 3, 2, 2)) is run
    assert [record.message for record in debug_log.records] == ["not accelerated: nothing to fuse"]


@pytest.mark.parametrize(
    ("value", "accelerated"), [("0", False), ("1", True), ("conv_fusion", True), ("padding", False)]
)
def test_the_environment_variable(
    net: nn.Module, value: str, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
    assert (accelerate(net, noise(1, 3, 24, 24)) is not net) is accelerated


def test_an_unknown_piece_is_refused(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "conv_fusion,magic")
    with pytest.raises(ConvscopeError, match="'conv_fusion,magic'; expected 0, 1 or a list of conv_fusion, padding"):
        accelerate(net, noise(1, 3, 24, 24))


# --- where it is used ------------------------------------------------------------------------------------------------


def use_heatmaps(model: Model, photos: list[str]) -> np.ndarray:
    return convscope.heatmaps(model, photos[:1], 281, method="occlusion", window=112, stride=112).values


def use_evaluate(model: Model, photos: list[str]) -> np.ndarray:
    return convscope.evaluate(
        model, photos[:1], np.random.default_rng(0).random((1, 7, 7)), targets=281, steps=3
    ).curves["deletion"]


def use_patterns(model: Model, _: list[str]) -> np.ndarray:
    return convscope.patterns(model, "blocks.2", [3], size=64, steps=2).scores


def use_scan(model: Model, _: list[str]) -> np.ndarray:
    x = noise(2, 3, 224, 224)
    with batch_statistics.forward_with_statistics(model, ["bn1", "blocks.2", "logits"], 2) as forward:
        statistics = forward(x, {})
    return np.concatenate([reduction.maxima.numpy().ravel() for reduction in statistics.layers.values()])


CALL_SITES = {  # the module that calls `accelerate`, what leads there, and the relative tolerance of its results
    "heatmaps": (context, use_heatmaps, 1e-4),  # differences of scores
    "evaluate": (evaluation, use_evaluate, 1e-5),
    "patterns": (plan, use_patterns, 1e-2),  # gradient ascent amplifies rounding
    "scan": (batch_statistics, use_scan, 1e-5),
}


@pytest.mark.parametrize("name", CALL_SITES)
def test_call_sites_accelerate_loaded_models_only(
    name: str, lite0: Model, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, use, rtol = CALL_SITES[name]
    accelerated: list[bool] = []

    def observed(run: Callable[[Tensor], Any], example: Tensor, **options: Any) -> Callable[[Tensor], Any]:
        fast = accelerate(run, example, **options)
        accelerated.append(fast is not run)
        return fast

    monkeypatch.setattr(module, "accelerate", observed)
    fast = use(lite0, photos)
    assert accelerated == [True]
    switched_off = use(dataclasses.replace(lite0, accelerate=False), photos)
    user_module = use(dataclasses.replace(lite0, loaded_by_convscope=False), photos)
    assert accelerated == [True, False, False]
    assert np.array_equal(switched_off, user_module)
    np.testing.assert_allclose(fast, switched_off, rtol=rtol, atol=rtol * np.abs(switched_off).max())


def test_load_switches_acceleration_off() -> None:
    assert convscope.load("lite0").can_accelerate
    assert not convscope.load("lite0", accelerate=False).can_accelerate
    assert not convscope.load(randomized(SmallConvNet()), preprocessing={"size": 24}).can_accelerate


def test_logits_that_differ_are_not_used(lite0: Model, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A heatmap accepts 1e-5 of the logits' norm."""
    plain = use_heatmaps(dataclasses.replace(lite0, accelerate=False), photos)
    with_fusion = api.with_fusion

    def inexact(run: Callable[[Tensor], Any], fusions: Any) -> Callable[[Tensor], Any]:
        def fused(x: Tensor) -> Any:
            result = with_fusion(run, fusions)(x)
            return dataclasses.replace(result, logits=result.logits + 0.01)

        return fused

    monkeypatch.setattr(api, "with_fusion", inexact)
    assert np.array_equal(use_heatmaps(lite0, photos), plain)


def test_hardtanh_backward() -> None:
    gradient = torch_ops.hardtanh_backward(
        torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-1.0, 0.0, 1.0, 6.0]), 0, 6
    )
    assert gradient.tolist() == [0, 0, 3, 0]
