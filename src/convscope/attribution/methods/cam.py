"""Class activation maps: how activations and gradients of a layer become evidence, one pure function a method.

`activation` A and `gradient` G = dy/dA are (N, C, ...) with one, two or three spatial axes, over which i runs; k runs
over channels. Each function returns (N, ...), signed, without any final rectification: what speaks against the target
stays visible as negative values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.errors import ConvscopeError


def cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """L = sum_k w_k A_k  with  w_k the weight of channel k's average in the class score.

    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016, equation 2. Where the score is
    linear in the averages of the maps, its gradient is the same at all places, w_k / Z; only there it is defined.
    Where more than one layer makes the score of the averages, w_k is the slope of what they make.

    Raises ConvscopeError where the gradient is not the same at all places.
    """
    w = _sum(gradient)
    uneven = (gradient * gradient[0, 0].numel() - w).abs().flatten(1).amax(1)
    if bool((uneven > 1e-3 * w.abs().flatten(1).amax(1)).any()):
        raise ConvscopeError(
            "cam is defined only where the class score is a weighted sum of the layer's averages; behind this layer "
            "there is more than that: choose the last layer with spatial extent, or grad-cam"
        )
    return (w * activation).sum(1)


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """L = sum_k a_k A_k  with  a_k = 1/Z sum_i G_k,i: each channel's map, weighed by its mean gradient.

    Selvaraju et al., Grad-CAM, ICCV 2017, equations 1 and 2.
    """
    return (_mean(gradient) * activation).sum(1)


def hirescam(activation: Tensor, gradient: Tensor) -> Tensor:
    """L = sum_k G_k A_k: each place weighed by its own gradient.

    Draelos & Carin, Use HiResCAM instead of Grad-CAM, 2020, equation 5. For a network whose part behind the layer is
    linear, the sum over the map is the class score without its bias.
    """
    return (gradient * activation).sum(1)


def grad_cam_pp(activation: Tensor, gradient: Tensor) -> Tensor:
    """L = sum_k w_k A_k  with  w_k = sum_i a_k,i relu(G_k,i),  a_k,i = G^2 / (2 G^2 + sum_i' A_k,i' G^3).

    Chattopadhay et al., Grad-CAM++, WACV 2018, equation 19 for a (second and third derivatives of exp(y) are powers of
    the gradient, and exp(y) itself cancels), equation 7 for w, in which exp(y), the same for the whole map, is left
    out. Where the denominator is 0, a is 0. G^2 is cancelled, so that small gradients are not lost to rounding.
    """
    below = 2 + _sum(activation) * gradient
    alpha = torch.where(below != 0, 1 / torch.where(below != 0, below, 1), 0)
    return (_sum(alpha * gradient.clamp(min=0)) * activation).sum(1)


def xgrad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """L = sum_k a_k A_k  with  a_k = sum_i (A_k,i / sum_i' A_k,i') G_k,i.

    Fu et al., Axiom-based Grad-CAM, BMVC 2020, equation 8: weights that keep the score (conservation) and react to what
    is taken away (sensitivity) as well as weights of whole channels can. A channel whose sum is 0 gets the weight 0.
    """
    total = _sum(activation)
    weighed = _sum(activation * gradient)
    return (torch.where(total != 0, weighed / torch.where(total != 0, total, 1), 0) * activation).sum(1)


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """L = sum_k relu(G_k) A_k: each place weighed by its own gradient where that is positive.

    Jiang et al., LayerCAM, IEEE TIP 2021, equations 5 and 6.
    """
    return (gradient.clamp(min=0) * activation).sum(1)


def eigen_cam(activation: Tensor, gradient: Tensor | None = None) -> Tensor:
    """L = A v_1, the places' coordinates along the first right singular vector of A (places x channels).

    Muhammad & Yeasin, Eigen-CAM, IJCNN 2020, equation 3; no centring. Looks at no gradient. With A = U S V^T,
    A v_1 = s_1 u_1, so the smaller one of A^T A and A A^T is all that is decomposed. The sign, which a singular vector
    leaves open, is the one that makes the map's sum positive.
    """
    return _first_component(activation)


def eigen_grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Eigen-CAM of gradient times activation: the first principal direction of what hirescam sums up.

    After Muhammad & Yeasin 2020, with class discrimination as in pytorch-grad-cam's EigenGradCAM; no centring. The sign
    is that of the map's inner product with hirescam's, so that evidence for the target is positive.
    """
    evidence = gradient * activation
    first = _first_component(evidence)
    agreement = (first * evidence.sum(1)).flatten(1).sum(1)
    sign = torch.where(agreement < 0, -1.0, 1.0).reshape(-1, *[1] * (first.ndim - 1))
    return sign * first


def _first_component(maps: Tensor) -> Tensor:
    positions = maps.flatten(2).transpose(1, 2)  # (N, Z, C)
    scale = positions.abs().amax((1, 2), keepdim=True)
    # What is not finite stays so in `scale`, and comes back in the end; a decomposition would only crash on it.
    positions = (positions / torch.where(scale > 0, scale, 1)).nan_to_num()
    # Rows and columns of nought change nothing, and lay every picture's matrix out alike: the same bytes anywhere.
    count, channels = positions.shape[1:]
    positions = F.pad(positions, (0, -channels % 16, 0, -count % 16))
    if count <= channels:
        values, vectors = torch.linalg.eigh(positions @ positions.transpose(1, 2))
        first: Tensor = vectors[..., -1:] * values[:, -1:, None].clamp(min=0).sqrt()
    else:
        first = positions @ torch.linalg.eigh(positions.transpose(1, 2) @ positions)[1][..., -1:]
    first = first[:, :count]
    first = first * torch.where(first.sum(1, keepdim=True) < 0, -1.0, 1.0) * scale
    return first.reshape(len(maps), *maps.shape[2:])


def _sum(maps: Tensor) -> Tensor:
    return maps.sum(tuple(range(2, maps.ndim)), keepdim=True)


def _mean(maps: Tensor) -> Tensor:
    return maps.mean(tuple(range(2, maps.ndim)), keepdim=True)
