"""Gradients at the input: which pixels the score reacts to, and how much of it they account for.

G = dS/dx, (C, ...) with one, two or three spatial axes, is the gradient of a target's score S at a picture x. c runs
over channels; every map is (...), one value for each place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.context import MethodContext
from convscope.attribution.methods import relu_rules
from convscope.attribution.methods.cam import grad_cam
from convscope.engine import capture
from convscope.engine.batching import balanced_chunks, cache_friendly_batch_size
from convscope.errors import ConvscopeError, require_int, require_number

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}  # interpolation, by the number of spatial axes


def saliency(question: MethodContext) -> Tensor:
    """M = max_c |G_c|: how strongly the score reacts to each place, whichever way. Unsigned.

    Simonyan et al., Deep Inside Convolutional Networks, ICLR workshop 2014, section 3.1.
    """
    return _strongest(_gradient(question))


def input_x_gradient(question: MethodContext) -> Tensor:
    """M = sum_c x_c G_c: what the score would lose, to first order, if the place were set to 0. Signed.

    Shrikumar et al., Not Just a Black Box, 2016; Ancona et al., ICLR 2018, table 1. The sum over channels keeps the
    total.
    """
    return (question.x.unsqueeze(1) * _gradient(question)).sum(2)


def smooth_grad(question: MethodContext, *, samples: int = 50, noise: float = 0.15) -> Tensor:
    """M = max_c |1/n sum_i G_c(x + e_i)|  with  e_i ~ N(0, s^2),  s = noise (max x - min x). Unsigned.

    Smilkov et al., SmoothGrad, 2017: equation in section 3, noise level and n = 50 from section 3.2. What is averaged
    is the signed gradient; the mean is then made a map as in `saliency`, whose maps the paper sets out to smooth.
    """
    mean, _ = _moments(question, samples, noise)
    return _strongest(mean)


def var_grad(question: MethodContext, *, samples: int = 50, noise: float = 0.15) -> Tensor:
    """M = sum_c Var_i G_c(x + e_i), the variance over noisy copies e_i as in `smooth_grad`. Unsigned.

    Adebayo et al., Local Explanation Methods for Deep Neural Networks Lack Sensitivity to Parameter Values, ICLR
    workshop 2018, section 2. Variances add up over channels, and so the sum is taken.
    """
    _, variance = _moments(question, samples, noise)
    return variance.sum(2)


def integrated_gradients(
    question: MethodContext, *, steps: int = 32, baseline: Any = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """M = sum_c (x_c - x'_c) int_0^1 G_c(x' + a (x - x')) da: the way from a baseline x' to x. Signed.

    Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017, equation 1; the integral by Gauss-Legendre
    quadrature with `steps` nodes. The sum over places and channels is S(x) - S(x') (completeness, proposition 1); by
    how much the quadrature misses it is "completeness_error".

    `baseline` is in the network's own input space: a number or an array that broadcasts to one picture (C, ...). The
    default 0 is the mean colour wherever the preprocessing takes the mean off. "black" is a black picture.
    """
    check_path(steps=steps, baseline=baseline)
    x, start = question.x, _baseline(question, baseline)
    nodes, weights = np.polynomial.legendre.leggauss(steps)

    def along(x: Tensor, _: Tensor) -> Iterator[Tensor]:
        return (start + (1 + node) / 2 * (x - start) for node in nodes)

    total = x.new_zeros(question.num_targets, *x.shape, dtype=torch.float32)
    for at, first, gradients in _passes(question, steps, along):
        share = torch.as_tensor(weights[first : first + gradients.shape[1]] / 2).to(gradients)
        total[:, at] += torch.tensordot(share, gradients, ([0], [1]))
    maps = ((x - start) * total).sum(2).transpose(0, 1)
    rows = torch.arange(len(x), device=x.device)
    gain = question.scores(x, rows) - question.scores(start.expand_as(x), rows)
    return maps, {"completeness_error": maps.flatten(2).sum(2) - gain}


def guided_backprop(question: MethodContext) -> Tensor:
    """M = sum_c of the gradient under the rule  R_in = 1[out > 0] relu(R_out)  at every rectifier. Signed.

    Springenberg et al., Striving for Simplicity, ICLR workshop 2015, section 3.4 and figure 1. The paper shows the
    result (C, ...) as a picture in colours; for a map the channels are summed up. See `rectifiers` for what has a rule.
    """
    return _gradient(relu_rules.with_relu_rule(question, relu_rules.guided_backprop)).sum(2)


def deconvnet(question: MethodContext) -> Tensor:
    """M = sum_c of the gradient under the rule  R_in = relu(R_out)  at every rectifier. Signed.

    Zeiler & Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014, section 2.1: in the way back
    signals are rectified by themselves, not by what the rectifier let through. Shown and summed up as guided_backprop.
    """
    return _gradient(relu_rules.with_relu_rule(question, relu_rules.deconvnet)).sum(2)


def guided_grad_cam(question: MethodContext) -> Tensor:
    """M = relu(Grad-CAM at the layer, upsampled) times guided backpropagation, summed over channels. Signed.

    Selvaraju et al., Grad-CAM, ICCV 2017, section 3.3: bilinear interpolation to the size of the input, and a product
    place by place.
    """
    assert question.layer is not None
    with capture.capture_layers(question.model, [question.layer.name], detach_at_layer=True) as run:
        seen = run(question.x)
        with torch.enable_grad():
            scores = question.targets.scores(seen)
        layer = seen.maps[question.layer.name]
        maps = [grad_cam(layer.detach().float(), g) for g in question.backward(layer, scores)]
    cam = torch.stack(maps, 1).clamp(min=0)
    size = question.x.shape[2:]
    cam = F.interpolate(cam, size, mode=LINEAR[len(size)], align_corners=False)
    return cam.to(question.x.device) * guided_backprop(question)


# --- passes ----------------------------------------------------------------------------------------------------------

Copies = Callable[[Tensor, Tensor], Iterator[Tensor]]
"""From pictures (P, C, ...) and the range of values of each, (P, 1, ...): changed copies of all of them."""


def grad_batch_size(question: MethodContext) -> int:
    """Inputs whose gradients are taken in one pass: what fits into memory, no more than is quick, a fixed batch full.

    But two at least: a lone input takes other kernels, whose rounding switches other rectifiers.
    """
    if question.model.fixed_batch_size is not None:
        return question.batch_size
    return max(
        2, min(question.batch_size, max(4, cache_friendly_batch_size(question.model, None, question.x[0, 0].numel(), with_gradients=True)))
    )


def _gradient(question: MethodContext) -> Tensor:
    """The gradient at the pictures themselves, (B, T, C, ...)."""
    found = [gradients[:, 0] for _, _, gradients in _passes(question, 1, lambda x, _: iter([x]))]
    return torch.cat(found, 1).transpose(0, 1)


def _moments(question: MethodContext, samples: int, noise: float) -> tuple[Tensor, Tensor]:
    """Mean and variance (1/n) of the gradient over noisy copies, (B, T, C, ...) each.

    In parts, as by Chan et al. 1979: sums of squares would cancel out.
    """
    check_noise(samples=samples, noise=noise)

    def noisy(x: Tensor, spread: Tensor) -> Iterator[Tensor]:
        draw = question.generator()
        for _ in range(samples):
            yield x + noise * spread * torch.randn(x.shape[1:], generator=draw).to(x)

    mean = question.x.new_zeros(question.num_targets, *question.x.shape, dtype=torch.float32)
    squares = torch.zeros_like(mean)
    for at, before, gradients in _passes(question, samples, noisy):
        count = gradients.shape[1]
        own = gradients.mean(1)
        off = own - mean[:, at]
        squares[:, at] += ((gradients - own.unsqueeze(1)) ** 2).sum(1) + off**2 * (before * count / (before + count))
        mean[:, at] += off * (count / (before + count))
    return mean.transpose(0, 1), squares.transpose(0, 1) / samples


def _passes(question: MethodContext, count: int, copies: Copies) -> Iterator[tuple[slice, int, Tensor]]:
    """Gradients at `count` copies of each picture, as many at once as are quick.

    Each time: which pictures, how many of their copies were done before, and the gradients (T, k, P, C, ...) at k more.
    """
    x, most, done = question.x, grad_batch_size(question), 0
    spread = x.amax(tuple(range(1, x.ndim)), keepdim=True) - x.amin(tuple(range(1, x.ndim)), keepdim=True)
    for part in balanced_chunks(range(len(x)), most):
        at = slice(part[0], part[-1] + 1)
        rows = torch.arange(at.start, at.stop, device=x.device)
        changed = copies(x[at], spread[at])
        for these in balanced_chunks(range(count), max(1, most // len(part))):
            inputs = torch.cat(list(islice(changed, len(these))))
            gradients, _ = question.gradients(inputs, rows.repeat(len(these)))
            yield at, these[0], gradients.reshape(-1, len(these), len(part), *x.shape[1:])
            done += len(inputs)
            question.report_progress(done / (count * len(x)))


def _strongest(gradient: Tensor) -> Tensor:
    return gradient.abs().amax(2)


def _baseline(question: MethodContext, baseline: Any) -> Tensor:
    """(1, C, ...), in the network's input space."""
    x = question.x[:1]
    if isinstance(baseline, str):
        return question.model.preprocessing.normalize(torch.zeros_like(x))
    given = torch.as_tensor(np.asarray(baseline, np.float32)).to(x)
    try:
        return given.expand(x.shape[1:])[None]
    except RuntimeError as error:
        raise ConvscopeError(
            f"a baseline of shape {tuple(given.shape)} does not broadcast to a picture {tuple(x.shape[1:])}"
        ) from error


def check_path(*, steps: int, baseline: Any) -> None:
    """Refuse options of integrated gradients that make no sense."""
    require_int("steps", steps)
    if isinstance(baseline, str) and baseline != "black":
        raise ConvscopeError(f"baseline is {baseline!r}; expected 'black', a number or an array (C, ...)")


def check_noise(*, samples: int, noise: float) -> None:
    """Refuse options of noisy copies that make no sense."""
    require_int("samples", samples)
    require_number("noise", noise, above=0)

