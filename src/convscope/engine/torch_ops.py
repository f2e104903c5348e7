"""The operator of PyTorch that is not public: named here alone; a test pins its signature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def supports_onednn(x: Tensor) -> bool:
    """Check whether oneDNN convolves this tensor: float32 on a CPU."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and x.device.type == "cpu" and x.dtype == torch.float32


def onednn_convolution(x: Tensor, arguments: Sequence[object], activation: str, bounds: Sequence[float]) -> Tensor:
    """Convolve, with the arguments of ``torch.conv2d``, and apply an activation. Not differentiable."""
    weight, bias, stride, padding, dilation, groups = arguments
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(  # noqa: SLF001 - the purpose of this module
        x, weight, bias, padding, stride, dilation, groups, activation, bounds, ""
    )
    return y
