"""Tiny networks with one property each, and snapshots of a network's whole state."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as globals_of_modules

Scores = namedtuple("Scores", "aux logits")


@dataclasses.dataclass
class Output:
    """An output as many libraries return it."""

    loss: Any
    logits: Tensor


def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network with random weights and batch statistics, in inference mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 1
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=generator))
                m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=generator))
                if m.running_mean is not None and m.running_var is not None:
                    m.running_mean.copy_(0.3 * torch.randn(m.running_mean.shape, generator=generator))
                    m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=generator))
    return net.eval()


class SmallConvNet(nn.Module):
    """Convolutions, batch normalisation, ReLUs, pooling, dropout and a linear head; any image size."""

    def __init__(self, channels: int = 3, classes: int = 5, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU(inplace=inplace)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=inplace)
        self.conv3 = nn.Conv2d(12, 10, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(10)
        self.relu3 = nn.ReLU6(inplace=inplace)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.conv2(x))
        x = self.relu3(self.bn3(self.conv3(x)))
        return self.fc(self.drop(self.gap(x).flatten(1)))


class SoftmaxNet(SmallConvNet):
    """Ends in probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class HeadedNet(nn.Module):
    """A network with an activation after its logits."""

    def __init__(self, head: Callable[[Tensor], Any], classes: int = 5) -> None:
        super().__init__()
        self.body = SmallConvNet(classes=classes)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class DigitNet(nn.Module):
    """A network for gray images of 28 x 28 pixels only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc = nn.Linear(8 * 5 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


class SharedReluNet(nn.Module):
    """One ReLU module, called after both convolutions."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv2 = nn.Conv2d(6, 7, 3)
        self.relu = nn.ReLU(inplace=inplace)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class PackedConv(nn.Module):
    """A convolution whose output is in a container."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.conv(x))


class PackedNet(nn.Module):
    """A network whose inner and outer outputs are in containers."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner = PackedConv(pack)
        self.pack, self.unpack = pack, unpack
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.relu(self.unpack(self.inner(x)))
        return self.pack(self.fc(x.mean((2, 3))))


PACKINGS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda t: t, lambda o: o),
    "tuple": (lambda t: (t, None), lambda o: o[0]),
    "list": (lambda t: ["a word", t], lambda o: o[1]),
    "dict": (lambda t: {"aux": t[:, :1] * 0, "logits": t}, lambda o: o["logits"]),
    "ordered": (lambda t: OrderedDict(aux=t[:, :1] * 0, out=t), lambda o: o["out"]),
    "namedtuple": (lambda t: Scores(None, t), lambda o: o.logits),
    "dataclass": (lambda t: Output(t.sum() * 0, t), lambda o: o.logits),
    "nested": (lambda t: {"steps": [(3, t)]}, lambda o: o["steps"][0][1]),
}


class FrozenStemNet(nn.Module):
    """Runs its stem without gradients, as when only a head is trained."""

    def __init__(self, without: Callable[[], Any] | None = torch.no_grad) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3))
        self.head = nn.Conv2d(8, 5, 3)
        self.without = without

    def forward(self, x: Tensor) -> Tensor:
        if self.without is None:
            x = self.stem(x)
        else:
            with self.without():
                x = self.stem(x)
        return self.head(x).relu().mean((2, 3))


class UnusedBranchNet(nn.Module):
    """The output of `unused` is dropped; that of `zeroed` reaches the scores multiplied by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(3, 4, 3)
        self.zeroed = nn.Conv2d(3, 4, 3)
        self.used = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x).mean((2, 3)) + 0 * self.zeroed(x).mean((2, 3))


class Spy(nn.Module):
    """Passes its input on; records gradient mode and batch size, and may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []
        self.batches: list[int] = []
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(torch.is_grad_enabled())
        self.batches.append(len(x))
        if self.error is not None:
            raise self.error
        return x


class SpiedNet(nn.Module):
    """Two convolutions with a spy before, between and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = Spy(), Spy(), Spy()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.conv1(self.before(x)))
        return self.after(self.conv2(x.relu())).mean((2, 3))


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
GLOBAL_HOOKS = tuple(name for name in vars(globals_of_modules) if name.startswith("_global_") and "hooks" in name)


def snapshot(net: nn.Module) -> dict[str, Any]:
    """Return the whole state of a network, and torch's state of the process.

    Values are compared bit by bit; gradients and hooks must be the same objects in the same order.
    """
    state: dict[str, Any] = {}
    for name, m in net.named_modules():
        state[f"{name} training"] = m.training
        state[f"{name} hooks"] = {kind: list(getattr(m, kind).items()) for kind in HOOKS}
        state[f"{name} attributes"] = sorted(vars(m))
        state[f"{name} plain"] = {
            key: value for key, value in vars(m).items() if isinstance(value, bool | int | float | str | type(None))
        }
        state[f"{name} forward"] = getattr(m.forward, "__func__", m.forward)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        state[f"{name} is"] = (id(tensor), tensor.requires_grad, tensor.dtype, tensor.device, tensor.data_ptr())
        state[f"{name} lies"] = (tensor.stride(), tensor.is_contiguous(memory_format=_format(tensor)))
        state[f"{name} written"] = tensor._version
        state[f"{name} holds"] = _bytes(tensor)
        state[f"{name} hooks"] = list((tensor._backward_hooks or {}).items())
        state[f"{name} gradient"] = None if tensor.grad is None else (id(tensor.grad), _bytes(tensor.grad))
    state["global hooks"] = {kind: list((getattr(globals_of_modules, kind) or {}).items()) for kind in GLOBAL_HOOKS}
    state["gradient modes"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled())
    state["modes"] = (
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )
    state["random"] = (torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state()))
    return state


def diff_snapshots(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the entries in which two snapshots differ."""
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def in_training(net: nn.Module) -> tuple[nn.Module, Iterable[Any]]:
    """Bring the network into a user's state: training, half frozen, gradients, hooks; return it and the hooks."""
    net.train()
    for position, m in enumerate(net.modules()):
        if position % 3 == 1:
            m.training = False
    for position, weight in enumerate(net.parameters()):
        weight.requires_grad_(position % 2 == 0)
        if position % 3 == 0:
            weight.grad = torch.full_like(weight, 0.5)
        if weight.requires_grad:
            weight.register_hook(_identity)
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    handles = [
        first.register_forward_hook(_no_op),
        first.register_forward_hook(_no_op, with_kwargs=True, always_call=True),
        first.register_forward_pre_hook(_no_op),
        first.register_forward_pre_hook(_no_op, with_kwargs=True),
        first.register_full_backward_hook(_no_op),
        first.register_full_backward_pre_hook(_no_op),
        net.register_forward_hook(_no_op, prepend=True),
        first.register_state_dict_post_hook(_no_op),
        first.register_load_state_dict_post_hook(_no_op),
    ]
    return net, handles


def _no_op(*_: Any, **__: Any) -> None:
    return None


def _identity(gradient: Tensor) -> Tensor:
    return gradient
