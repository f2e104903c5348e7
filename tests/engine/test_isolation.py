"""Isolation of passes: threads, buffers, gradient checkpointing, networks that need contiguous inputs."""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver
from torch.utils import checkpoint

import convscope
from convscope.engine import isolation
from tests.engine.helpers import CALLS, inputs, load_model, relative_error
from tests.oracles.nets import SmallConvNet, diff_snapshots, randomized, snapshot

# --- threads ---


@pytest.fixture
def _frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def in_threads(call: Callable[[int], Any], count: int, repetitions: int) -> list[list[Any]]:
    """Call from `count` threads at once; return each thread's results."""
    results: list[list[Any]] = [[] for _ in range(count)]

    def work(i: int) -> None:
        results[i] += [call(i) for _ in range(repetitions)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(len(part) == repetitions for part in results)
    return results


THREADED: dict[str, Callable[[convscope.Model, Tensor, int], np.ndarray]] = {
    "activations": lambda m, x, i: convscope.activations(m, x, ["conv1", "relu3"])["relu3"],
    "grad-cam": lambda m, x, i: convscope.heatmaps(m, x, 1, layer=("conv1", "conv2", "relu3")[i]).values,
    "ablation-cam": lambda m, x, i: convscope.heatmaps(m, x, 1, layer="relu3", method="ablation-cam").values,
    "patterns": lambda m, x, i: convscope.patterns(m, "conv2", [i], recipe="plain", size=24, steps=2).scores,
}


@pytest.mark.usefixtures("_frequent_switches")
@pytest.mark.parametrize("name", THREADED)
def test_each_thread_gets_its_own_answer(name: str) -> None:
    model, x = load_model(randomized(SmallConvNet())), inputs()
    before = snapshot(model.module)
    alone = [THREADED[name](model, x[i : i + 1], i) for i in range(3)]
    together = in_threads(lambda i: THREADED[name](model, x[i : i + 1], i), 3, 6)
    for expected, results in zip(alone, together, strict=True):
        assert all(np.array_equal(expected, actual) for actual in results)
    after = snapshot(model.module)
    assert [key for key in diff_snapshots(before, after) if key != "random"] == []


def test_a_callback_may_call_the_same_model() -> None:
    """Hooks last for single passes: a call between two steps of another call is not affected by it."""
    model, x = load_model(randomized(SmallConvNet())), inputs()
    expected = convscope.predict(model, x).logits
    logits: list[np.ndarray] = []
    convscope.patterns(
        model,
        "conv1",
        [0],
        recipe="plain",
        steps=2,
        callback=lambda *_: logits.append(convscope.predict(model, x).logits),
    )
    assert len(logits) > 0
    assert all(np.array_equal(expected, actual) for actual in logits)


def test_other_threads_do_not_see_temporary_weights() -> None:
    model, x = load_model(randomized(SmallConvNet())), inputs()
    heatmaps = convscope.heatmaps(model, x, 1)
    expected = convscope.predict(model, x).logits
    results = in_threads(
        lambda i: (
            convscope.predict(model, x).logits
            if i
            else convscope.evaluate(model, x, heatmaps, metrics=("randomisation",))
        ),
        2,
        4,
    )
    assert all(np.array_equal(expected, logits) for logits in results[1])


def test_a_thread_waits_for_the_network_but_not_for_other_networks() -> None:
    first, second = nn.Identity(), nn.Identity()
    entered: list[str] = []

    def enter(name: str, module: nn.Module) -> threading.Thread:
        def work() -> None:
            with isolation.exclusive_access(module):
                entered.append(name)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    with isolation.exclusive_access(first), isolation.exclusive_access(first):  # the same thread may enter again
        waiting = enter("same", first)
        enter("other", second).join(10)
        assert entered == ["other"]
    waiting.join(10)
    assert entered == ["other", "same"]


# --- attributes ---


class AdaptiveWindow(nn.Module):
    """Keep the mean over windows; narrow them for good if an image is smaller, as Swin of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.window, self.grid, self.positions = 16, (0, 0), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.window = min(self.window, x.shape[-1])
        if tuple(x.shape[2:]) != self.grid:
            self.grid, self.positions = tuple(x.shape[2:]), torch.linspace(0, 1, x.shape[-1])
        x = self.conv(x).relu() + self.positions
        return self.fc(F.avg_pool2d(x, self.window).square().mean((2, 3)))


@pytest.mark.parametrize("recipe", ["plain", "robust"])
def test_attributes_that_depend_on_the_size_are_set_back(recipe: str) -> None:
    net = randomized(AdaptiveWindow())
    model = convscope.load(net, preprocessing={"size": 16})
    before = convscope.heatmaps(model, inputs()[:, :, :16, :16], 1, layer="conv").values
    convscope.patterns(model, "logits", [0], recipe=recipe, size=8, steps=2)
    assert (net.window, net.grid, len(net.positions)) == (16, (0, 0), 0)
    after = convscope.heatmaps(model, inputs()[:, :, :16, :16], 1, layer="conv").values
    np.testing.assert_array_equal(after, before)


# --- buffers ---


class Observed(nn.Module):
    """Write to buffers in inference mode too: observers, a counter, a cache that is made on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.observer, self.per_channel = MinMaxObserver(), PerChannelMinMaxObserver(ch_axis=1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.same = nn.Module()
        self.same.register_buffer("mean", self.mean)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.per_channel(self.observer(self.conv1(x).relu()))
        self.calls += 1
        self.cache = x.detach()
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
        assert self.same.mean is self.mean
        if "late" not in self._buffers:
            self.register_buffer("late", x.detach().mean())
        return self.fc(self.conv2(x - self.mean[:, None, None]).relu().mean((2, 3)))


@pytest.mark.parametrize("call", ["activations", "heatmaps", "predict", "plain", "robust classes"])
def test_buffers_are_as_before(call: str) -> None:
    net = randomized(Observed())
    before, names = snapshot(net), set(net.state_dict())
    model = load_model(net)
    assert diff_snapshots(before, snapshot(net)) == []
    calls: dict[str, Callable[..., Any]] = {
        **CALLS,
        "plain": lambda m: convscope.patterns(m, "conv2", [0], recipe="plain", size=24, steps=2),
    }
    calls[call](model)
    assert diff_snapshots(before, snapshot(net)) == []
    assert set(net.state_dict()) == names
    assert net.cache is None
    assert net.observer.min_val == torch.inf


def test_gradients_pass_a_buffer_that_is_written_in_the_same_pass() -> None:
    net, x = randomized(Observed()), inputs()
    leaf = net.conv1(x).relu().detach().requires_grad_()
    mean = net.mean * 0.9 + leaf.detach().mean((0, 2, 3))
    logits = net.fc(net.conv2(leaf - mean[:, None, None]).relu().mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), leaf)
    expected = (gradient.mean((2, 3), keepdim=True) * leaf).sum(1).detach()
    # The observer returns its input.
    actual = convscope.heatmaps(load_model(net), x, 2, layer="observer").values[:, 0]
    assert relative_error(actual, expected) < 1e-5


# --- gradient checkpointing ---


class Checkpointed(nn.Module):
    """Two blocks, run by `run`."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.run(self.b, self.run(self.a, x)).mean((2, 3)))


def sequentially(block: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint.checkpoint_sequential(block, 2, x, use_reentrant=True)
    return result


CHECKPOINTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": lambda block, x: checkpoint.checkpoint(block, x, use_reentrant=True),
    "not reentrant": lambda block, x: checkpoint.checkpoint(block, x, use_reentrant=False),
    "sequential": sequentially,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointing_changes_nothing(kind: str) -> None:
    x = inputs(2)
    on, off = (load_model(randomized(Checkpointed(run))) for run in (CHECKPOINTS[kind], lambda block, x: block(x)))
    for layer in ("a.0", "b.1", *(["b"] if kind != "sequential" else [])):
        maps = [convscope.heatmaps(m, x, [[0, 3]] * 2, layer=layer).values for m in (on, off)]
        assert np.abs(maps[1]).max() > 0
        assert np.array_equal(*maps)
        for recipe in ("plain", "robust"):
            scores = [convscope.patterns(m, layer, [1], recipe=recipe, size=24, steps=2).scores for m in (on, off)]
            assert np.array_equal(*scores)
    for method in ("saliency", "guided-backprop", "full-grad", "lrp-epsilon", "occlusion", "ablation-cam"):
        maps = [convscope.heatmaps(m, x, 1, method=method).values for m in (on, off)]
        assert np.array_equal(*maps), method


@pytest.mark.parametrize("reentrant", [True, False])
def test_other_threads_keep_their_checkpointing(reentrant: bool) -> None:
    """The function runs again in the backward pass of a thread that did not switch checkpointing off."""
    runs = {True: 0, False: 0}

    def train(inside: bool) -> None:
        def function(x: Tensor) -> Tensor:
            runs[inside] += 1
            return x.sin()

        x = torch.ones(3, requires_grad=True)
        checkpoint.checkpoint(function, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, torch.ones(3).cos())

    original = dict(vars(checkpoint))
    with isolation.without_checkpointing(), isolation.without_checkpointing():
        thread = threading.Thread(target=train, args=(False,))
        thread.start()
        thread.join()
        train(True)
    assert runs == {True: 1, False: 2}
    train(False)
    assert runs[False] == 4
    assert dict(vars(checkpoint)) == original
    assert "apply" not in vars(checkpoint.CheckpointFunction)


def test_an_exception_in_a_checkpointed_function_is_raised() -> None:
    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    for reentrant in (True, False):
        with isolation.without_checkpointing(), pytest.raises(ZeroDivisionError):
            checkpoint.checkpoint(fail, torch.ones(1, requires_grad=True), use_reentrant=reentrant)


# --- networks that call view ---


class ViewNet(nn.Module):
    """The textbook network: convolutions, then ``x.view``."""

    def __init__(self, ndim: int = 2) -> None:
        super().__init__()
        conv, self.pool = ((nn.Conv2d, F.max_pool2d), (nn.Conv3d, F.max_pool3d))[ndim - 2]
        self.conv1, self.conv2 = conv(3, 4, 3), conv(4, 6, 3)
        self.fc = nn.Linear(6 * 4**ndim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.pool(self.conv1(x).relu(), 2)).relu()
        return self.fc(x.view(-1, x[0].numel()))


@pytest.mark.parametrize("ndim", [2, 3])
def test_networks_that_need_contiguous_inputs(ndim: int) -> None:
    net = randomized(ViewNet(ndim))
    model = convscope.load(net, preprocessing={"size": (14,) * ndim, "channels": 3})
    assert model.contiguous_input == (ndim == 2)
    x = torch.randn((2, 3, *(14,) * ndim), generator=torch.Generator().manual_seed(0))
    if ndim == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    logits = net(x.contiguous())
    assert relative_error(convscope.predict(model, x).logits, logits.detach()) < 1e-6
    maps = net.conv2(net.pool(net.conv1(x.contiguous()).relu(), 2)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.fc(maps.relu().flatten(1))[:, 3].sum(), maps)
    expected = (gradient.flatten(2).mean(2)[(..., *[None] * ndim)] * maps).sum(1).detach()
    actual = convscope.heatmaps(model, x, 3, layer="conv2").values[:, 0]
    assert relative_error(actual, expected) < 1e-5
    for method in ("saliency", "ablation-cam", "score-cam", "occlusion", "integrated-gradients"):
        assert convscope.heatmaps(model, x, 3, method=method, layer=None).values.any()
    if ndim == 2:
        assert convscope.patterns(model, "logits", [0], steps=2, size=14).scores.shape == (1,)


def test_networks_that_convscope_makes_and_that_need_contiguous_inputs() -> None:
    sys.modules["viewnet"] = types.ModuleType("viewnet")
    sys.modules["viewnet"].make = lambda: randomized(ViewNet())  # type: ignore[attr-defined]
    try:
        model = convscope.load("viewnet:make", preprocessing={"size": 14})
    finally:
        del sys.modules["viewnet"]
    assert model.contiguous_input
    x = inputs(2, size=14)
    assert relative_error(convscope.predict(model, x).logits, randomized(ViewNet())(x.contiguous()).detach()) < 1e-6
    assert not load_model(randomized(SmallConvNet())).contiguous_input


def test_other_errors_at_loading_are_reported() -> None:
    class Strict(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            if not x.is_contiguous():
                raise RuntimeError("only contiguous images")
            return super().forward(x)

    with warnings.catch_warnings(), pytest.raises(convscope.ConvscopeError, match="only contiguous images"):
        load_model(randomized(Strict()))
