"""What the tests of the engine share: loading, inputs, and one call of each technique."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import convscope
from convscope import Model

SIZE = 24


def load_model(net: nn.Module, size: int = SIZE, **kwargs: Any) -> Model:
    return convscope.load(net, preprocessing={"size": size, "channels": kwargs.pop("channels", 3)}, **kwargs)


def inputs(count: int = 3, channels: int = 3, size: int = SIZE, seed: int = 1) -> Tensor:
    x = torch.randn((count, channels, size, size), generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)  # the memory format of convscope's own batches


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def output_and_logits_by_hook(net: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Any]:
    """Return a copy of a layer's output, and the network's output, by a plain forward hook."""
    outputs: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
    with torch.no_grad():
        result = net(x)
    handle.remove()
    return outputs[0], result


CALLS: dict[str, Callable[..., Any]] = {
    "activations": lambda m, **kwargs: convscope.activations(m, inputs(), **kwargs),
    "activations of a layer": lambda m, **kwargs: convscope.activations(m, inputs(), "relu3", **kwargs),
    "predict": lambda m, **kwargs: convscope.predict(m, inputs(), **kwargs),
    "heatmaps": lambda m, **kwargs: convscope.heatmaps(m, inputs(), [[0, 1]] * 3, **kwargs),
    "heatmaps of an early layer": lambda m, **kwargs: convscope.heatmaps(m, inputs(), layer="conv1", **kwargs),
    "plain": lambda m, **kwargs: convscope.patterns(m, "relu3", [0, 1], recipe="plain", size=40, steps=2, **kwargs),
    "robust": lambda m, **kwargs: convscope.patterns(m, "relu3", [0, 1], steps=2, **kwargs),
    "plain classes": lambda m, **kwargs: convscope.patterns(
        m, "logits", [0], recipe="plain", size=40, steps=2, **kwargs
    ),
    "robust classes": lambda m, **kwargs: convscope.patterns(m, "logits", [0], steps=2, **kwargs),
}
