"""What each source returns to `load`, and helpers that sources share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from convscope.engine.adapters import FrameworkAdapter, TorchAdapter
from convscope.engine.dual_encoder import DualEncoder
from convscope.engine.outputs import OutputSelector
from convscope.images.preprocessing import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PREPROCESSING_ASSUMED = "preprocessing is assumed"  # one of `Model.assumptions`


@dataclass
class ModelSpec:
    """A network and what its source knows about it.

    Attributes
    ----------
    loaded_by_convscope : bool
        Whether `load` made the network, so that it may freeze it and change its memory format.
    task : str or None
        What the outputs mean, where the source says it.
    select : str, int, callable or None
        Which of several outputs holds the scores, where the source says it.
    preprocessing_origin : str or None
        Where the preprocessing comes from, if it was inferred from the module.
    other_inputs : str
        The inputs of a network that takes several, so that `forward` has to say how it is called.
    size, channels : tuple of int, int or None
        Height, width and channels of the input, where the network itself fixes them.
    differentiable : bool
        Whether gradients pass through the network.
    dual_encoder : DualEncoder or None
        The encoders of a network that compares images with text.
    range, mean, std : tuple of float
        Used for the assumed preprocessing if `preprocessing` is None.
    """

    module: nn.Module
    name: str
    adapter: FrameworkAdapter = field(default_factory=TorchAdapter)
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    task: str | None = None
    select: OutputSelector = None
    notes: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    loaded_by_convscope: bool = True
    preprocessing_origin: str | None = None
    fixed_batch_size: int | None = None
    differentiable: bool = True
    other_inputs: str = ""
    size: tuple[int, ...] | None = None
    channels: int | None = None
    dual_encoder: DualEncoder | None = None
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def assumed_preprocessing(self, size: tuple[int, ...], channels: int) -> Preprocessing:
        """Return the preprocessing to assume when the source specifies none."""
        mean, std = ((v if len(v) == channels else v[:1] * channels) for v in (self.mean, self.std))
        order = {1: "L", 3: "RGB"}.get(channels if len(size) == 2 else 0, "channels")
        return Preprocessing(size=size, range=self.range, mean=mean, std=std, channel_order=order)


def input_channels(module: nn.Module) -> int:
    """Return the input channels of the first 2-D convolution; 3 if there is none."""
    return next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d) and m.in_channels), 3)


def imagenet_classes() -> tuple[str, ...]:
    """Return the first name of each ImageNet-1k class, from timm."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(i).partition(",")[0] for i in range(info.num_classes()))


@contextmanager
def fixed_seed(seed: int = 0) -> Iterator[None]:
    """Seed torch's generator inside the block; restore its state on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
