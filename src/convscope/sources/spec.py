"""What a source hands over to `load`, and what the sources share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from convscope.engine.adapters import FrameworkAdapter, TorchAdapter
from convscope.images.preprocessing import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class ModelSpec:
    """A network and what its source knows about it. `owned`: made by `load`, so ours to freeze and lay out anew."""

    module: nn.Module
    name: str
    adapter: FrameworkAdapter = field(default_factory=TorchAdapter)
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    loaded_by_convscope: bool = True
    recognised: str | None = None  # where the preprocessing of a model in hand was found, by its looks
    fixed_batch_size: int | None = None
    size: tuple[int, int] | None = None  # where the network itself fixes the picture's size and channels
    channels: int | None = None
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def assume(self, size: tuple[int, int], channels: int) -> Preprocessing:
        """The preprocessing of a network whose source does not say."""
        mean, std = ((v if len(v) == channels else v[:1] * channels) for v in (self.mean, self.std))
        order = {1: "L", 3: "RGB"}.get(channels, "channels")
        return Preprocessing(size=size, range=self.range, mean=mean, std=std, channel_order=order)


def first_convolution(module: nn.Module) -> int:
    """Channels that the first 2-D convolution takes; 3 if there is none."""
    return next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d) and m.in_channels), 3)


def imagenet_classes() -> tuple[str, ...]:
    """The first of each ImageNet-1k class's names, as timm carries them."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(i).partition(",")[0] for i in range(info.num_classes()))


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Random weights drawn in the block come from `seed`; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
