"""Operators of PyTorch that are not public: named here alone; a test pins their signatures."""

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


def pack_weight(arguments: Sequence[object], input_shape: Sequence[int]) -> Tensor:
    """Lay out the weight among the arguments of ``torch.conv2d`` for oneDNN."""
    weight, _, stride, padding, dilation, groups = arguments
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(  # noqa: SLF001 - the purpose of this module
        weight, padding, stride, dilation, groups, input_shape
    )
    return packed


def hardtanh_backward(gradient: Tensor, values: Tensor, low: float, high: float) -> Tensor:
    """Return the gradient where ``low < values < high``, and 0 elsewhere."""
    result: Tensor = torch.ops.aten.hardtanh_backward(gradient, values, low, high)
    return result
