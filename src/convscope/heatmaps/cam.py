"""Class activation maps: how activations and gradients of a layer become evidence, one pure function a method.

`activation` and `gradient` are (N, C, H, W); each function returns (N, H, W), signed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Each channel's map, weighed by the mean of its gradient.

    L = sum_k a_k A_k  with  a_k = 1/(H W) sum_ij dy/dA_k,ij

    Selvaraju et al., Grad-CAM, ICCV 2017, equations 1 and 2, without the final rectification: what speaks against the
    target stays visible as negative values.
    """
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"grad-cam": grad_cam}
