"""The seam of acceleration: verified, falling back to the plain pass, switched off on request."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope.attribution import context
from convscope.engine.acceleration import ENVIRONMENT_VARIABLE, accelerate, api
from convscope.engine.model import Model
from convscope.evaluation import api as evaluation
from convscope.featurevis import plan
from convscope.scanning import batch_statistics
from tests.oracles.nets import SmallConvNet, diff_snapshots, randomized, snapshot

SCHEMA = (
    "mkldnn::_convolution_pointwise(Tensor X, Tensor W, Tensor? B, int[] padding, int[] stride, int[] dilation, "
    "int groups, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> nn.Module:
    return randomized(SmallConvNet()).requires_grad_(False)


@pytest.fixture
def debug_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, logger="convscope"):
        yield caplog


def test_signature_of_the_private_operator() -> None:
    """If this fails, adapt `convscope.engine.torch_ops`; until then passes are not accelerated."""
    assert str(torch.ops.mkldnn._convolution_pointwise.default._schema) == SCHEMA


def run_network(x: Tensor, net: nn.Module) -> Tensor:
    return net(x)  # type: ignore[no-any-return]


def is_accelerated(run: Callable[[Tensor], Tensor]) -> bool:
    return run.__name__ == "accelerated"


@pytest.mark.parametrize("gradients", [False, True])
def test_results_are_the_same(net: nn.Module, gradients: bool) -> None:
    before, example = snapshot(net), noise(1, 3, 24, 24)
    fast = accelerate(run_network, net, example, gradients=gradients)
    assert is_accelerated(fast)
    assert not example.requires_grad
    assert torch.equal(example, noise(1, 3, 24, 24))
    x = noise(3, 3, 31, 20).requires_grad_(gradients)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-6)
    if gradients:
        actual, expected = (torch.autograd.grad(run(x).square().sum(), x)[0] for run in (fast, net))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert diff_snapshots(before, snapshot(net)) == []


class ForeignReader(nn.Module):
    """An extension reads the convolution's output unseen by function modes, or writes into it."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.writes = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), writes

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch._C.DisableTorchFunction():
            foreign = y.mul_(2) if self.writes else y * 2
        return self.relu(self.bn(y)) + (0 if self.writes else foreign)  # type: ignore[no-any-return]


@pytest.mark.parametrize("writes", [False, True])
def test_a_wrong_result_is_not_used(writes: bool, debug_log: pytest.LogCaptureFixture) -> None:
    net = randomized(ForeignReader(writes))
    fast = accelerate(run_network, net, noise(2, 3, 5, 5))
    assert not is_accelerated(fast)
    assert torch.equal(fast(noise(2, 3, 5, 5)), net(noise(2, 3, 5, 5)))
    assert [record.message for record in debug_log.records] == ["not accelerated: the results differ"]


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
    assert not is_accelerated(accelerate(run_network, net, noise(1, 3, 24, 24), gradients=True))
    assert is_accelerated(accelerate(run_network, net, noise(1, 3, 24, 24)))


@pytest.mark.parametrize("operator", ["onednn_convolution", "supports_onednn"])
def test_an_operator_that_is_missing_or_has_changed(
    net: nn.Module, operator: str, monkeypatch: pytest.MonkeyPatch, debug_log: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    monkeypatch.setattr(f"convscope.engine.acceleration.conv_fusion.{operator}", missing)
    assert not is_accelerated(accelerate(run_network, net, noise(1, 3, 24, 24)))
    assert [record.message for record in debug_log.records] == ["not accelerated"]


def test_a_batch_that_fails_later_takes_the_plain_pass(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, debug_log: pytest.LogCaptureFixture
) -> None:
    fast = accelerate(run_network, net, noise(1, 3, 24, 24))
    monkeypatch.setattr("convscope.engine.acceleration.conv_fusion.onednn_convolution", None)
    x = noise(2, 3, 24, 24)
    assert torch.equal(fast(x), net(x))
    assert [record.message for record in debug_log.records] == ["batch of shape (2, 3, 24, 24) not accelerated"]


def test_a_module_that_does_not_run_later() -> None:
    """A batch takes the plain pass if the network skips the batch normalisation that was fused."""

    class Conditional(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            return self.bn1(y) if len(x) < 3 else y  # type: ignore[no-any-return]

    net = randomized(Conditional())
    fast = accelerate(run_network, net, noise(1, 3, 24, 24))
    assert is_accelerated(fast)
    for size in (2, 3):
        torch.testing.assert_close(fast(noise(size, 3, 24, 24)), net(noise(size, 3, 24, 24)), rtol=1e-5, atol=1e-6)


def test_an_error_of_the_network_itself_is_raised(net: nn.Module) -> None:
    def failing(x: Tensor, net: nn.Module) -> Tensor:
        if len(x) > 1:
            raise ZeroDivisionError
        return net(x)  # type: ignore[no-any-return]

    with pytest.raises(ZeroDivisionError):
        accelerate(failing, net, noise(1, 3, 24, 24))(noise(2, 3, 24, 24))
    assert not is_accelerated(accelerate(failing, net, noise(2, 3, 24, 24)))


def test_nothing_to_fuse(debug_log: pytest.LogCaptureFixture) -> None:
    for net in (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Tanh()), nn.Sequential(nn.Flatten(), nn.Linear(12, 2))):
        assert not is_accelerated(accelerate(run_network, net, noise(1, 3, 2, 2)))
    assert [record.message for record in debug_log.records] == ["not accelerated: nothing to fuse"]


def test_threads_run_one_accelerated_network(net: nn.Module) -> None:
    """With and without acceleration, at once; each pass has its own result."""
    fast, batches = accelerate(run_network, net, noise(1, 3, 24, 24)), noise(16, 2, 3, 24, 24)
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        actual = list(pool.map(lambda i: (fast if i % 3 else net)(batches[i % 16]), range(200)))
    for i, y in enumerate(actual):
        torch.testing.assert_close(y, net(batches[i % 16]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv1", "bn1", "relu1", "conv2"])
@torch.no_grad()
def test_hooks_get_the_same_values(name: str) -> None:
    """Chains end at modules whose outputs a hook gets, even if it calls no function of torch."""
    net, x, outputs = randomized(SmallConvNet(inplace=False)), noise(2, 3, 24, 24), []
    net.get_submodule(name).register_forward_hook(lambda *args: outputs.append(args[2]))
    fast = accelerate(run_network, net, x)
    assert is_accelerated(fast)
    outputs.clear()
    fast(x), net(x)
    actual, expected = outputs
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("value", "accelerated"), [("0", False), ("1", True)])
def test_the_environment_variable(
    net: nn.Module, value: str, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
    assert is_accelerated(accelerate(run_network, net, noise(1, 3, 24, 24))) is accelerated


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

    def observed(*args: Any, **options: Any) -> Callable[[Tensor], Any]:
        fast = accelerate(*args, **options)
        accelerated.append(is_accelerated(fast))
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

    def inexact(*args: Any) -> Callable[[Tensor], Any]:
        run = with_fusion(*args)

        def fused(x: Tensor) -> Any:
            result = run(x)
            return dataclasses.replace(result, logits=result.logits + 0.01)

        return fused

    monkeypatch.setattr(api, "with_fusion", inexact)
    assert np.array_equal(use_heatmaps(lite0, photos), plain)
