"""Class activation maps: one pure function per method.

Each function combines the activation ``A`` of a layer with the gradient ``G = dy/dA`` of a target's score ``y``. Both
have shape (N, C, ...) with one, two or three spatial axes; in the formulas, ``k`` runs over the C channels and ``i``
over the Z positions. The functions return maps of shape (N, ...), signed and without the final ReLU of the papers, so
that evidence against the target stays visible as negative values. Finer-CAM is `grad_cam` of another score,
`finer_cam_score`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.batch_targets import BatchTargets
from convscope.engine.capture import ForwardResult
from convscope.errors import ConvscopeError


def cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight each channel by the weight of its average in the class score (CAM).

    ::

        L = sum_k w_k A_k,    w_k = sum_i G_ki

    The weight is read off the gradient: where the score is linear in the channels' averages, the gradient is
    ``w_k / Z`` at every position. CAM is defined for such layers only.

    Parameters
    ----------
    activation : Tensor of shape (N, C, ...)
    gradient : Tensor of shape (N, C, ...)

    Returns
    -------
    Tensor of shape (N, ...)

    Raises
    ------
    ConvscopeError
        If the gradient differs between positions.

    References
    ----------
    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016, equation 2.
    """
    weights = _sum(gradient)
    deviation = (gradient * gradient[0, 0].numel() - weights).abs().flatten(1).amax(1)
    if bool((deviation > 1e-3 * weights.abs().flatten(1).amax(1)).any()):
        raise ConvscopeError(
            "cam needs a layer whose channel averages determine the class score linearly; this layer's gradient "
            "differs between positions: choose the last layer with spatial extent, or use grad-cam"
        )
    return (weights * activation).sum(1)


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight each channel by its mean gradient (Grad-CAM).

    ::

        L = sum_k a_k A_k,    a_k = (1 / Z) sum_i G_ki

    Parameters
    ----------
    activation : Tensor of shape (N, C, ...)
    gradient : Tensor of shape (N, C, ...)

    Returns
    -------
    Tensor of shape (N, ...)

    References
    ----------
    Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017,
    equations 1 and 2.
    """
    return (_mean(gradient) * activation).sum(1)


def hirescam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight each position by its own gradient (HiResCAM).

    ::

        L = sum_k G_k A_k

    If the network after the layer is linear, the map sums to the class score without its bias.

    Parameters
    ----------
    activation : Tensor of shape (N, C, ...)
    gradient : Tensor of shape (N, C, ...)

    Returns
    -------
    Tensor of shape (N, ...)

    References
    ----------
    Draelos and Carin, Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks,
    2020, equation 5.
    """
    return (gradient * activation).sum(1)


def grad_cam_pp(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight each channel by a weighted sum of its positive gradients (Grad-CAM++).

    ::

        L = sum_k w_k A_k,    w_k = sum_i a_ki relu(G_ki),    a_ki = G_ki^2 / (2 G_ki^2 + sum_j A_kj G_ki^3)

    ``G^2`` is cancelled in ``a``, so that small gradients are not lost to rounding; where the denominator is 0, ``a``
    is 0. The factor ``exp(y)`` of the paper's weights is constant over the map and left out.

    Parameters
    ----------
    activation : Tensor of shape (N, C, ...)
    gradient : Tensor of shape (N, C, ...)

    Returns
    -------
    Tensor of shape (N, ...)

    References
    ----------
    Chattopadhay et al., Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks, WACV 2018,
    equations 7 and 19.
    """
    denominator = 2 + _sum(activation) * gradient
    alpha = torch.where(denominator != 0, 1 / torch.where(denominator != 0, denominator, 1), 0)
    return (_sum(alpha * gradient.clamp(min=0)) * activation).sum(1)


def xgrad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight each channel by its gradient, averaged with the activation as weights (XGrad-CAM).

    ::

        L = sum_k a_k A_k,    a_k = sum_i (A_ki / sum_j A_kj) G_ki

    These weights satisfy sensitivity and conservation as closely as weights of whole channels can. A channel whose
    activation sums to 0 has weight 0.

    Parameters
    ----------
    activation : Tensor of shape (N, C, ...)
    gradient : Tensor of shape (N, C, ...)

    Returns
    -------
    Tensor of shape (N, ...)

    References
    ----------
    Fu et al., Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs, BMVC 2020, equation 8.
    """
    total = _sum(activation)
    weighted = _sum(activation * gradient)
    return (torch.where(total != 0, weighted / torch.where(total != 0, total, 1), 0) * activation).sum(1)


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight each position by its own gradient where that is positive (LayerCAM).

    ::

        L = sum_k relu(G_k) A_k

    Parameters
    ----------
    activation : Tensor of shape (N, C, ...)
    gradient : Tensor of shape (N, C, ...)

    Returns
    -------
    Tensor of shape (N, ...)

    References
    ----------
    Jiang et al., LayerCAM: Exploring Hierarchical Class Activation Maps for Localization, IEEE TIP 2021,
    equations 5 and 6.
    """
    return (gradient.clamp(min=0) * activation).sum(1)


def odam(activation: Tensor, gradient: Tensor, boxes: Tensor | None) -> Tensor:
    """Weight each position by the gradient around it, for the score of a box (ODAM).

    ::

        L = sum_k (g * G_k) A_k

    ``g *`` is the convolution with a Gaussian whose standard deviations are a quarter of the box's sides. The score of
    a box depends on few positions, those that predict it, and the weights of the channels hold around these. A mean
    over the whole map, as in Grad-CAM, would extend them to positions that have nothing to do with the box; the
    gradient itself, as in HiResCAM, leaves a dot.

    Parameters
    ----------
    activation : Tensor of shape (N, C, h, w)
    gradient : Tensor of shape (N, C, h, w)
    boxes : Tensor of shape (N, 4), or None
        Left, top, right and bottom edge as fractions of the input; None where targets are no boxes.

    Returns
    -------
    Tensor of shape (N, h, w)

    Raises
    ------
    ConvscopeError
        Without boxes, and for maps that have not two axes.

    References
    ----------
    Zhao and Chan, ODAM: Gradient-based Instance-Specific Visual Explanations for Object Detection, ICLR 2023. Their
    program leaves the gradient as it is, which is `hirescam`.
    """
    if boxes is None:
        raise ConvscopeError("odam explains boxes: targets=convscope.box_target(label, box); for classes: grad-cam")
    if activation.ndim != 4:
        raise ConvscopeError(f"odam needs maps of images; got maps of shape {tuple(activation.shape[1:])}")
    sides = (boxes[:, 2:] - boxes[:, :2]).to(gradient)
    rows, columns = (_gaussian(n, sides[:, axis] * n / 4) for n, axis in zip(gradient.shape[2:], (1, 0), strict=True))
    weights = torch.einsum("nchw,nih,njw->ncij", gradient, rows, columns)
    return (weights * activation).sum(1)


def _gaussian(count: int, deviation: Tensor) -> Tensor:
    """Return matrices (N, count, count) that convolve an axis with Gaussians of these standard deviations (N,)."""
    offsets = torch.arange(1 - count, count, device=deviation.device)
    kernel = torch.exp(-0.5 * (offsets / deviation.clamp(min=1e-3)[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    positions = torch.arange(count, device=deviation.device)
    return kernel[:, positions - positions[:, None] + count - 1]


def eigen_cam(activation: Tensor) -> Tensor:
    """Project the activation on its first principal direction (Eigen-CAM).

    ::

        L = A v_1,    A = U S V^T  (Z x C, not centred)

    The sign, which a singular vector leaves open, is chosen so that the map has a positive sum. The map depends on no
    target.

    Parameters
    ----------
    activation : Tensor of shape (N, C, ...)

    Returns
    -------
    Tensor of shape (N, ...)

    References
    ----------
    Muhammad and Yeasin, Eigen-CAM: Class Activation Map using Principal Components, IJCNN 2020, equation 3.
    """
    return _first_component(activation)


def eigen_grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Project gradient times activation on its first principal direction (EigenGradCAM).

    ::

        L = E v_1,    E = G * A = U S V^T  (Z x C, not centred)

    The sign is that of the map's inner product with HiResCAM's map, so that evidence for the target is positive.

    Parameters
    ----------
    activation : Tensor of shape (N, C, ...)
    gradient : Tensor of shape (N, C, ...)

    Returns
    -------
    Tensor of shape (N, ...)

    References
    ----------
    Muhammad and Yeasin, Eigen-CAM: Class Activation Map using Principal Components, IJCNN 2020; made
    class-discriminative as in pytorch-grad-cam's ``EigenGradCAM``.
    """
    evidence = gradient * activation
    component = _first_component(evidence)
    agreement = (component * evidence.sum(1)).flatten(1).sum(1)
    sign = torch.where(agreement < 0, -1.0, 1.0).reshape(-1, *[1] * (component.ndim - 1))
    return sign * component


def finer_cam_score(targets: BatchTargets, outputs: ForwardResult, nearest: int = 3, gamma: float = 0.6) -> Tensor:
    """Contrast each target's logit with those of the most similar classes (Finer-CAM).

    ::

        s_c = y_c - gamma (1 / D) sum_d y_d

    ``d`` runs over the D classes whose logits are closest to ``y_c``.

    Parameters
    ----------
    targets : BatchTargets
        T classes for each of B images.
    outputs : ForwardResult
        The outputs of a pass over the B images.
    nearest : int
        The number D of classes to contrast with.
    gamma : float
        Strength of the contrast.

    Returns
    -------
    Tensor of shape (B, T)

    Raises
    ------
    ConvscopeError
        For targets that are functions or contrasts, and for a network with a single class.

    Notes
    -----
    The authors' program differs from their equations: it weights the classes by their probabilities and differentiates
    these as well.

    References
    ----------
    Zhang et al., Finer-CAM: Spotting the Difference Reveals Finer Details for Visual Explanation, CVPR 2025,
    equations 5 to 8.
    """
    if targets.functions or targets.against is not None or targets.boxes is not None:
        raise ConvscopeError(
            "finer-cam contrasts each class with the classes nearest to it: give classes as targets, and no against="
        )
    logits = outputs.logits
    if logits.shape[1] == 1:
        raise ConvscopeError("finer-cam contrasts classes with each other, and this network has a single output")
    target_logits = logits.gather(1, targets.classes)
    distance = (logits.detach()[:, None] - target_logits.detach()[..., None]).abs()  # (B, T, K)
    distance.scatter_(2, targets.classes[..., None], -1)
    others = distance.topk(min(nearest + 1, logits.shape[1]), dim=2, largest=False).indices[..., 1:]
    return target_logits - gamma * logits.gather(1, others.flatten(1)).reshape(others.shape).mean(2)


def _first_component(maps: Tensor) -> Tensor:
    """Project maps (N, C, ...) on their first right singular vector over the positions: (N, ...)."""
    matrix = maps.flatten(2).transpose(1, 2)  # (N, Z, C)
    scale = matrix.abs().amax((1, 2), keepdim=True)
    # The decomposition fails on NaN and infinity. They stay in `scale`, which multiplies the result.
    matrix = (matrix / torch.where(scale > 0, scale, 1)).nan_to_num()
    # Zero rows and columns change nothing and align each image's matrix in memory: the same bytes in any batch.
    num_positions, num_channels = matrix.shape[1:]
    matrix = F.pad(matrix, (0, -num_channels % 16, 0, -num_positions % 16))
    # A v_1 = s_1 u_1, so the smaller of A A^T and A^T A is decomposed.
    if num_positions <= num_channels:
        values, vectors = torch.linalg.eigh(matrix @ matrix.transpose(1, 2))
        component: Tensor = vectors[..., -1:] * values[:, -1:, None].clamp(min=0).sqrt()
    else:
        component = matrix @ torch.linalg.eigh(matrix.transpose(1, 2) @ matrix)[1][..., -1:]
    component = component[:, :num_positions]
    component = component * torch.where(component.sum(1, keepdim=True) < 0, -1.0, 1.0) * scale
    return component.reshape(len(maps), *maps.shape[2:])


def _sum(maps: Tensor) -> Tensor:
    """Sum maps (N, C, ...) over positions, keeping the axes."""
    return maps.sum(tuple(range(2, maps.ndim)), keepdim=True)


def _mean(maps: Tensor) -> Tensor:
    """Average maps (N, C, ...) over positions, keeping the axes."""
    return maps.mean(tuple(range(2, maps.ndim)), keepdim=True)
