"""Methods that differentiate a target's score with respect to the input.

In the formulas, ``G = dS/dx`` is the gradient of a target's score ``S`` at the image ``x``, both of shape (C, ...) with
one, two or three spatial axes, and ``c`` runs over the C channels. The methods return maps of shape (B, T, ...) for B
images and T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.context import Extras, LayerContext, MethodContext
from convscope.attribution.methods import relu_rules
from convscope.attribution.methods.cam import grad_cam
from convscope.engine import capture
from convscope.engine.batching import balanced_chunks, cache_friendly_batch_size
from convscope.errors import ConvscopeError, require_int, require_number

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the number of spatial axes


def saliency(context: MethodContext) -> Tensor:
    """Take the gradient's largest absolute value over the channels (saliency, unsigned).

    ::

        M = max_c |G_c|

    Parameters
    ----------
    context : MethodContext

    Returns
    -------
    Tensor of shape (B, T, ...)

    References
    ----------
    Simonyan et al., Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps,
    ICLR workshop 2014, section 3.1.
    """
    return _max_over_channels(_input_gradient(context))


def input_x_gradient(context: MethodContext) -> Tensor:
    """Multiply the input by the gradient and sum over the channels (input x gradient, signed).

    ::

        M = sum_c x_c G_c

    To first order, this is what the score loses if the position is set to 0.

    Parameters
    ----------
    context : MethodContext

    Returns
    -------
    Tensor of shape (B, T, ...)

    References
    ----------
    Shrikumar et al., Not Just a Black Box: Learning Important Features Through Propagating Activation Differences,
    2016; Ancona et al., Towards better understanding of gradient-based attribution methods for deep neural networks,
    ICLR 2018, table 1.
    """
    return (context.x.unsqueeze(1) * _input_gradient(context)).sum(2)


def smooth_grad(context: MethodContext, *, samples: int = 50, noise: float = 0.15) -> Tensor:
    """Average the gradient over noisy copies of the image (SmoothGrad, unsigned).

    ::

        M = max_c |(1 / n) sum_i G_c(x + e_i)|,    e_i ~ N(0, s^2),    s = noise (max x - min x)

    Signed gradients are averaged; the mean is reduced over the channels as in `saliency`.

    Parameters
    ----------
    context : MethodContext
    samples : int
        The number n of noisy copies.
    noise : float
        Standard deviation of the noise, as a fraction of the image's range of values.

    Returns
    -------
    Tensor of shape (B, T, ...)

    References
    ----------
    Smilkov et al., SmoothGrad: removing noise by adding noise, 2017, section 3.
    """
    mean, _ = _noisy_moments(context, samples, noise)
    return _max_over_channels(mean)


def var_grad(context: MethodContext, *, samples: int = 50, noise: float = 0.15) -> Tensor:
    """Compute the gradient's variance over noisy copies of the image (VarGrad, unsigned).

    ::

        M = sum_c Var_i G_c(x + e_i)

    with noise ``e_i`` as in `smooth_grad`.

    Parameters
    ----------
    context : MethodContext
    samples : int
        The number of noisy copies.
    noise : float
        Standard deviation of the noise, as a fraction of the image's range of values.

    Returns
    -------
    Tensor of shape (B, T, ...)

    References
    ----------
    Adebayo et al., Local Explanation Methods for Deep Neural Networks Lack Sensitivity to Parameter Values, ICLR
    workshop 2018, section 2.
    """
    _, variance = _noisy_moments(context, samples, noise)
    return variance.sum(2)


def integrated_gradients(
    context: MethodContext, *, steps: int = 32, baseline: str | npt.ArrayLike = 0.0
) -> tuple[Tensor, Extras]:
    """Integrate the gradient along the straight path from a baseline to the image (integrated gradients, signed).

    ::

        M = sum_c (x_c - x'_c) int_0^1 G_c(x' + a (x - x')) da

    The integral is computed by Gauss-Legendre quadrature. The map sums to ``S(x) - S(x')`` (completeness).

    Parameters
    ----------
    context : MethodContext
    steps : int
        Number of quadrature nodes.
    baseline : float, array_like or "black"
        The baseline x' in the network's input space: a number, or an array that broadcasts to one image (C, ...). The
        default 0 is the mean color if the preprocessing subtracts the mean; "black" is a black image.

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
    extras : dict
        "completeness_error" (B, T): the map's sum minus ``S(x) - S(x')``.

    References
    ----------
    Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017, equation 1 and proposition 1.
    """
    check_path(steps=steps, baseline=baseline)
    x, start = context.x, _baseline_image(context, baseline)
    nodes, weights = np.polynomial.legendre.leggauss(steps)

    def points_on_path(x: Tensor, _: Tensor) -> Iterator[Tensor]:
        return (start + (1 + node) / 2 * (x - start) for node in nodes)

    integral = x.new_zeros(context.num_targets, *x.shape, dtype=torch.float32)
    for images, first, gradients in iter_gradients(context, steps, points_on_path):
        node_weights = torch.as_tensor(weights[first : first + gradients.shape[1]] / 2).to(gradients)
        integral[:, images] += torch.tensordot(node_weights, gradients, ([0], [1]))
    maps = ((x - start) * integral).sum(2).transpose(0, 1)
    rows = torch.arange(len(x), device=x.device)
    difference = context.scores(x, rows) - context.scores(start.expand_as(x), rows)
    return maps, {"completeness_error": maps.flatten(2).sum(2) - difference}


def guided_backprop(context: MethodContext) -> Tensor:
    """Backpropagate positive signals through active ReLUs only (guided backpropagation, signed).

    Every ReLU passes ``R_in = 1[out > 0] relu(R_out)`` back. The paper shows the result (C, ...) as a color image; here
    it is summed over the channels. `relu_rules` says which functions count as a ReLU.

    Parameters
    ----------
    context : MethodContext

    Returns
    -------
    Tensor of shape (B, T, ...)

    Raises
    ------
    ConvscopeError
        If the network has no ReLU.

    References
    ----------
    Springenberg et al., Striving for Simplicity: The All Convolutional Net, ICLR workshop 2015, section 3.4, figure 1.
    """
    return _input_gradient(relu_rules.with_relu_rule(context, relu_rules.guided_backprop)).sum(2)


def deconvnet(context: MethodContext) -> Tensor:
    """Backpropagate positive signals through all ReLUs (deconvolutional network, signed).

    Every ReLU passes ``R_in = relu(R_out)`` back, whether it was active or not. The result is summed over the channels.

    Parameters
    ----------
    context : MethodContext

    Returns
    -------
    Tensor of shape (B, T, ...)

    Raises
    ------
    ConvscopeError
        If the network has no ReLU.

    References
    ----------
    Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014, section 2.1.
    """
    return _input_gradient(relu_rules.with_relu_rule(context, relu_rules.deconvnet)).sum(2)


def guided_grad_cam(context: LayerContext) -> Tensor:
    """Multiply Grad-CAM, upsampled to the input, by guided backpropagation (Guided Grad-CAM, signed).

    ::

        M = upsample(relu(L_grad-cam)) M_guided-backprop

    Parameters
    ----------
    context : LayerContext

    Returns
    -------
    Tensor of shape (B, T, ...)
        At the input's resolution.

    References
    ----------
    Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017,
    section 3.3.
    """
    with capture.capture_layers(context.model, [context.layer.name], detach_at_layer=True) as run:
        outputs = run(context.x)
        with torch.enable_grad():
            scores = context.targets.scores(outputs)
        activation = outputs.maps[context.layer.name]
        maps = [grad_cam(activation.detach().float(), g) for g in context.backward(activation, scores, context.layer)]
    cam = torch.stack(maps, 1).clamp(min=0)
    size = context.x.shape[2:]
    cam = F.interpolate(cam, size, mode=INTERPOLATION[len(size)], align_corners=False)
    return cam.to(context.x.device) * guided_backprop(context)


# --- gradients at many inputs ----------------------------------------------------------------------------------------

MakeCopies = Callable[[Tensor, Tensor], Iterator[Tensor]]
"""Takes images (P, C, ...) and their ranges of values (P, 1, ...); yields modified copies (P, C, ...)."""


def grad_batch_size(context: MethodContext) -> int:
    """Return the number of inputs per backward pass that is fast and fits into memory.

    It is at least 2: a single input takes other kernels, and their rounding switches ReLUs.
    """
    if context.model.fixed_batch_size is not None:
        return context.batch_size
    fast = cache_friendly_batch_size(context.model, None, context.x[0, 0].numel(), with_gradients=True)
    return max(2, min(context.batch_size, max(4, fast)))


def _input_gradient(context: MethodContext) -> Tensor:
    """Compute the gradient (B, T, C, ...) at the images themselves."""
    chunks = [gradients[:, 0] for _, _, gradients in iter_gradients(context, 1, lambda x, _: iter([x]))]
    return torch.cat(chunks, 1).transpose(0, 1)


def _noisy_moments(context: MethodContext, samples: int, noise: float) -> tuple[Tensor, Tensor]:
    """Compute the gradient's mean and variance (1/n), (B, T, C, ...) each, over noisy copies.

    Means and sums of squared deviations are updated chunk by chunk (Chan et al. 1979), which avoids cancellation.
    """
    check_noise(samples=samples, noise=noise)

    def noisy_copies(x: Tensor, value_range: Tensor) -> Iterator[Tensor]:
        generator = context.generator()
        for _ in range(samples):
            yield x + noise * value_range * torch.randn(x.shape[1:], generator=generator).to(x)

    mean = context.x.new_zeros(context.num_targets, *context.x.shape, dtype=torch.float32)
    squares = torch.zeros_like(mean)
    for images, num_done, gradients in iter_gradients(context, samples, noisy_copies):
        count = gradients.shape[1]
        total = num_done + count
        chunk_mean = gradients.mean(1)
        shift = chunk_mean - mean[:, images]
        deviations = gradients - chunk_mean.unsqueeze(1)
        squares[:, images] += (deviations**2).sum(1) + shift**2 * (num_done * count / total)
        mean[:, images] += shift * (count / total)
    return mean.transpose(0, 1), squares.transpose(0, 1) / samples


def iter_gradients(
    context: MethodContext, num_copies: int, make_copies: MakeCopies
) -> Iterator[tuple[slice, int, Tensor]]:
    """Compute gradients at modified copies of every image, in chunks of `grad_batch_size`.

    Yields
    ------
    images : slice
        The P images that the chunk belongs to.
    num_done : int
        How many of their copies came before.
    gradients : Tensor of shape (T, k, P, C, ...)
        At the next k copies.
    """
    x, size, done = context.x, grad_batch_size(context), 0
    axes = tuple(range(1, x.ndim))
    value_range = x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)
    for positions in balanced_chunks(range(len(x)), size):
        images = slice(positions[0], positions[-1] + 1)
        rows = torch.arange(images.start, images.stop, device=x.device)
        copies = make_copies(x[images], value_range[images])
        for chunk in balanced_chunks(range(num_copies), max(1, size // len(positions))):
            inputs = torch.cat(list(islice(copies, len(chunk))))
            gradients, _ = context.gradients(inputs, rows.repeat(len(chunk)))
            yield images, chunk[0], gradients.reshape(-1, len(chunk), len(positions), *x.shape[1:])
            done += len(inputs)
            context.report_progress(done / (num_copies * len(x)))


def _max_over_channels(gradient: Tensor) -> Tensor:
    return gradient.abs().amax(2)


def _baseline_image(context: MethodContext, baseline: str | npt.ArrayLike) -> Tensor:
    """Expand the baseline to one image (1, C, ...) in the network's input space."""
    x = context.x[:1]
    if isinstance(baseline, str):
        return context.model.preprocessing.normalize(torch.zeros_like(x))
    values = torch.as_tensor(np.asarray(baseline, np.float32)).to(x)
    try:
        return values.expand(x.shape[1:])[None]
    except RuntimeError as error:
        raise ConvscopeError(
            f"baseline has shape {tuple(values.shape)}, which does not broadcast to an image {tuple(x.shape[1:])}"
        ) from error


# --- validation of options -------------------------------------------------------------------------------------------


def check_path(*, steps: int, baseline: str | npt.ArrayLike) -> None:
    """Validate the options of `integrated_gradients`; raise ConvscopeError."""
    require_int("steps", steps)
    if isinstance(baseline, str) and baseline != "black":
        raise ConvscopeError(f"baseline is {baseline!r}; expected 'black', a number or an array (C, ...)")


def check_noise(*, samples: int, noise: float) -> None:
    """Validate the options of `smooth_grad` and `var_grad`; raise ConvscopeError."""
    require_int("samples", samples)
    require_number("noise", noise, above=0)
