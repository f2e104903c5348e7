"""Recorded passes: the same bytes as the network's own, and where that cannot be, the network's own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from convscope.engine import capture
from convscope.engine.acceleration import conv_fusion
from convscope.engine.acceleration.replay import with_replay
from convscope.engine.model import Model
from convscope.featurevis.optimizer import RedirectedReLU
from convscope.featurevis.skip_gradient import with_skip_gradient
from tests.oracles.nets import Output, filled

PASSES = 6


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pulled(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = run(x)
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape)
    return y.detach(), torch.autograd.grad((y * weights).sum(), x)[0]


def agree(run: Callable[[Tensor], Tensor], quick: Callable[[Tensor], Tensor], *shape: int) -> None:
    """The same bytes at every pass, of other inputs each."""
    for seed in range(PASSES):
        expected, found = (pulled(way, inputs(*shape, seed=seed)) for way in (run, quick))
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)


class Counted:
    """A function that counts how often it was run."""

    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        self.run, self.count = run, 0

    def __call__(self, x: Tensor) -> Any:
        self.count += 1
        return self.run(x)


RUNS = 3  # of the network itself, however many passes: as it is, noted, and once more to compare with


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "densenet121", "googlenet", "shufflenet_v2_x0_5", "vit_b_16"]
)
def test_real_networks(name: str) -> None:
    options: dict[str, Any] = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    options |= {"image_size": 64} if name.startswith("vit") else {}
    net = filled(getattr(torchvision.models, name)(weights=None, **options)).requires_grad_(False)
    own = Counted(net)
    agree(net, with_replay(own), 2, 3, 64, 64)
    assert own.count == RUNS


def test_every_trick_at_once(lite0: Model) -> None:
    """Folded, with more of the gradient along skip connections, from a layer within, and the logits."""
    x = torch.zeros(1, 3, 96, 96)
    with capture.capture_layers(lite0, ["blocks.3.1"]) as run:
        own = Counted(
            with_skip_gradient(conv_fusion.with_fusion(run, conv_fusion.find_fusions(run, x, gradients=True)), 0.3)
        )
        quick = with_replay(own)
        agree(lambda x: own(x).logits, lambda x: quick(x).logits, 2, 3, 96, 96)
        own.count = 0
        agree(lambda x: own(x).maps["blocks.3.1"], lambda x: quick(x).maps["blocks.3.1"], 2, 3, 96, 96)
        assert own.count == PASSES  # those to compare with


def test_stopped_behind_a_layer(lite0: Model) -> None:
    with capture.capture_layers(lite0, ["blocks.2"], stop_early=True) as run:
        own = Counted(run)
        quick = with_replay(own)
        agree(lambda x: run(x).maps["blocks.2"], lambda x: quick(x).maps["blocks.2"], 1, 3, 64, 64)
        assert own.count == RUNS
        assert not isinstance(quick(inputs(1, 3, 64, 64).requires_grad_()), capture.ForwardResult)


def test_redirected_gradients() -> None:
    """What is asked of torch is asked anew, so whoever answers otherwise still does."""
    net = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.ReLU()))
    net.requires_grad_(False)
    net[2].bias.fill_(-1e3)
    quick = with_replay(net)
    for seed in range(PASSES):
        x = inputs(2, 3, 8, 8, seed=seed)
        assert not pulled(quick, x)[1].any()
        with RedirectedReLU(torch.tensor([True, False])):
            expected, found = pulled(net, x), pulled(quick, x)
        assert torch.equal(expected[1], found[1])
        assert found[1][0].any()
        assert not found[1][1].any()


def test_each_shape_for_itself() -> None:
    """Sizes are Python's, and stay what they were: other sizes are noted anew."""
    weight = inputs(3, 3, 3, 3, seed=9)

    def run(x: Tensor) -> Tensor:
        return F.conv2d(x, weight).flatten(1).view(len(x), -1).mean(1) * x.shape[-1]

    own = Counted(run)
    quick = with_replay(own)
    for shape in ((1, 3, 5, 5), (2, 3, 5, 5), (2, 3, 7, 5), (1, 3, 5, 5)):
        agree(run, quick, *shape)
    assert own.count == 3 * RUNS


class Doubled(torch.autograd.Function):
    """x, with twice its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return 2 * gradients[0]


class Stateful:
    """Gives something else at every pass."""

    def __init__(self) -> None:
        self.passes = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x * self.passes


def on_its_mean(x: Tensor) -> Tensor:
    return x.relu() if x.mean() > 0 else x * 3


def by_a_number(x: Tensor) -> Tensor:
    return x * float(x.detach().max())


def by_numpy(x: Tensor) -> Tensor:
    return x * torch.from_numpy(x.detach().numpy().copy())


def to_its_largest(x: Tensor) -> Tensor:
    return x[:, : int(x.argmax()) % 3 + 1].sum(1)


def one_by_one(x: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in x if bool(row.sum() > 0)] or [x[0]])


def where_it_is_positive(x: Tensor) -> Tensor:
    found = x[x > 0]
    return found * len(found)


def up_to_a_place(x: Tensor) -> Tensor:
    found = x[..., : x.argmax() % 3 + 1]
    return found * found.shape[-1]


def as_many_as_there_are(x: Tensor) -> Tensor:
    return x * len(x.gt(0).nonzero())


BY_VALUE = [on_its_mean, by_a_number, by_numpy, to_its_largest, one_by_one, where_it_is_positive, up_to_a_place]


def as_many_by_where(x: Tensor) -> Tensor:
    return x * len(torch.where(x > 0)[0])


def into_a_slice_up_to_a_place(x: Tensor) -> Tensor:
    y = x * 2
    y[..., : x.argmax() % 3 + 1] = 0
    return y


def of_a_table_up_to_a_place(x: Tensor) -> Tensor:
    return x * torch.arange(1.0, 5)[: x.argmax() % 3 + 1].sum()


class Turned(torch.autograd.Function):
    """x itself, with its gradient turned round: nothing that is called tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return -gradients[0]


def turned_in_place(x: Tensor) -> Tensor:
    return Turned.apply(x * 2) * 3


COUNTED = [as_many_as_there_are, as_many_by_where, into_a_slice_up_to_a_place, of_a_table_up_to_a_place]


@pytest.mark.parametrize("run", [Doubled.apply, *BY_VALUE, *COUNTED])
def test_run_as_it_is(run: Callable[[Tensor], Tensor]) -> None:
    """What torch's functions alone do not tell: the network is run at each pass."""
    own = Counted(run)
    agree(run, with_replay(own), 2, 3, 4, 4)
    assert own.count == PASSES


def test_gradients_that_no_call_tells_of() -> None:
    """Found out by comparing gradients before the third pass: one run more, and the network's own from then on."""
    own = Counted(turned_in_place)
    agree(turned_in_place, with_replay(own), 2, 3, 4, 4)
    assert own.count == PASSES + 1


def test_a_network_that_writes_into_what_comes_in() -> None:
    def run(x: Tensor) -> Tensor:
        return x.sub_(0.5).relu_()

    own = Counted(run)
    quick = with_replay(own)
    agree(lambda x: run(x * 1), lambda x: quick(x * 1), 2, 3, 4, 4)
    assert own.count == RUNS


def test_state_of_its_own() -> None:
    """Found out by comparing both ways before the third pass."""
    quick = Stateful()
    again = with_replay(quick)
    x = inputs(1, 3, 4, 4).requires_grad_()
    for _ in range(PASSES):
        assert torch.equal(again(x), x * quick.passes)
    assert quick.passes == PASSES + 1


def into_a_buffer(x: Tensor) -> Tensor:
    buffer = torch.zeros(2, 4, 4, 4)
    buffer[:, 1:] = x
    buffer[:, :1].add_(x[:, :1]).mul_(2)
    return buffer


def several(x: Tensor) -> Tensor:
    first, *rest = x.split(1, dim=1)
    largest = torch.max(x, dim=1)
    return torch.cat([first, *rest, largest.values[:, None], torch.stack(x.unbind(1), 1)], 1)


def by_name(x: Tensor) -> Tensor:
    return torch.add(input=x, other=torch.clamp(input=x, min=0), alpha=2)


def partly_frozen(x: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = x.sigmoid()
    return x * frozen


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y += x
    return y.mul_(0.5).sigmoid_()


def itself(x: Tensor) -> Tensor:
    return x


def at_places(x: Tensor) -> Tensor:
    return x[:, x.flatten(2).argmax(2)[0] % 3] * x[..., torch.tensor([1, 0])].sum()


@pytest.mark.parametrize("run", [into_a_buffer, several, by_name, partly_frozen, in_place, itself, at_places])
def test_ways_to_write_it(run: Callable[[Tensor], Tensor]) -> None:
    own = Counted(run)
    agree(run, with_replay(own), 2, 3, 4, 4)
    assert own.count == RUNS


def test_whatever_it_returns() -> None:
    def run(x: Tensor) -> dict[str, Any]:
        y = x * 2
        return {"a": (y, [y + 1]), "b": Output(3, x), "shape": x.shape}

    quick = with_replay(run)
    for seed in range(PASSES):
        x = inputs(1, 2, 3, 3, seed=seed).requires_grad_()
        found = quick(x)
        assert found["a"][0] is not None
        assert torch.equal(found["a"][0], x * 2)
        assert torch.equal(found["a"][1][0], x * 2 + 1)
        assert found["b"] == Output(3, found["b"].logits)
        assert found["b"].logits is x
        assert found["shape"] == (1, 2, 3, 3)


def test_without_gradients_the_network_runs() -> None:
    own = Counted(lambda x: x * 2)
    quick = with_replay(own)
    for _ in range(PASSES):
        quick(inputs(1, 2))
        with torch.no_grad():
            quick(inputs(1, 2).requires_grad_())
    assert own.count == 2 * PASSES


def test_an_error_on_the_way_leaves_gradients_on() -> None:
    factor = torch.eye(3)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = x @ factor
        return x * frozen

    quick = with_replay(run)
    for _ in range(PASSES):
        quick(inputs(2, 3).requires_grad_())
    factor.resize_(2, 2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        quick(inputs(2, 3).requires_grad_())
    assert torch.is_grad_enabled()


def test_nothing_is_kept_of_a_pass() -> None:
    """Neither pictures nor what is computed on the way, from the noted pass on."""
    alive: list[weakref.ref[Tensor]] = []
    weight = inputs(3, 3, 1, 1, seed=5)

    def run(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight)
        z = y.relu()
        alive.extend(map(weakref.ref, (x, y, z)))
        return z.sum((1, 2, 3))

    quick = with_replay(run)
    for _ in range(3):
        x = inputs(2, 3, 4, 4).requires_grad_()
        torch.autograd.grad(quick(x).sum(), x)
    del x
    gc.collect()
    assert len(alive) == 3 * RUNS
    assert not [ref for ref in alive if ref() is not None]


def test_what_is_done_with_is_let_go_on_the_way() -> None:
    """Of ten maps in a row that nobody needs for gradients, no more than a few are held at once."""
    most = 0

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive: list[weakref.ref[Tensor]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            output = func(*args, **(kwargs or {}))
            self.alive = [ref for ref in self.alive if ref() is not None]
            self.alive.append(weakref.ref(output))
            most = max(most, len(self.alive))
            return output

    def run(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x + 1
        return x

    quick = with_replay(run)
    for _ in range(4):
        quick(inputs(2, 3).requires_grad_())
    with Watching():
        quick(inputs(2, 3).requires_grad_())
    assert 1 <= most <= 3
