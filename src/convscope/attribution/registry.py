"""The table of methods: one row each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from convscope.attribution.context import MethodOutput
from convscope.attribution.methods import baselines, cam, full_grad, gradient, lrp, perturbation
from convscope.attribution.targets import BatchTargets, finer_cam_score
from convscope.engine.capture import ForwardResult
from convscope.errors import ConvscopeError, nearest


@dataclass(frozen=True)
class CamMethod:
    """A pure function of a layer's output and its gradient, (N, C, ...) both, that gives (N, ...).

    All of these share one forward and one backward pass. `scores` are what the gradient is taken of; None: the function
    takes the layer's output alone, and gives the same for every target.
    """

    function: Callable[..., Tensor]
    scores: Callable[[BatchTargets, ForwardResult], Tensor] | None = BatchTargets.scores
    at_input = False


@dataclass(frozen=True)
class ModelMethod:
    """A function that puts its own questions to the network. `at_input`: its maps lie on the input, not on a layer.

    `check` takes the options and raises ConvscopeError for what makes no sense whatever the picture.
    """

    function: Callable[..., MethodOutput]
    at_input: bool = True
    check: Callable[..., None] | None = None


Method = CamMethod | ModelMethod

METHODS: dict[str, Method] = {
    "cam": CamMethod(cam.cam),
    "grad-cam": CamMethod(cam.grad_cam),
    "hirescam": CamMethod(cam.hirescam),
    "grad-cam++": CamMethod(cam.grad_cam_pp),
    "xgrad-cam": CamMethod(cam.xgrad_cam),
    "layer-cam": CamMethod(cam.layer_cam),
    "eigen-cam": CamMethod(cam.eigen_cam, None),
    "eigen-grad-cam": CamMethod(cam.eigen_grad_cam),
    "finer-cam": CamMethod(cam.grad_cam, finer_cam_score),
    "saliency": ModelMethod(gradient.saliency),
    "input-x-gradient": ModelMethod(gradient.input_x_gradient),
    "smooth-grad": ModelMethod(gradient.smooth_grad, check=gradient.check_noise),
    "var-grad": ModelMethod(gradient.var_grad, check=gradient.check_noise),
    "integrated-gradients": ModelMethod(gradient.integrated_gradients, check=gradient.check_path),
    "guided-backprop": ModelMethod(gradient.guided_backprop),
    "deconvnet": ModelMethod(gradient.deconvnet),
    "guided-grad-cam": ModelMethod(gradient.guided_grad_cam, at_input=False),
    "full-grad": ModelMethod(full_grad.full_grad),
    "lrp-epsilon": ModelMethod(lrp.lrp_epsilon),
    "lrp-gamma": ModelMethod(lrp.lrp_gamma),
    "lrp-zplus": ModelMethod(lrp.lrp_zplus),
    "score-cam": ModelMethod(perturbation.score_cam, at_input=False),
    "ablation-cam": ModelMethod(perturbation.ablation_cam, at_input=False),
    "occlusion": ModelMethod(perturbation.occlusion, check=perturbation.check_occlusion),
    "rise": ModelMethod(perturbation.rise, check=perturbation.check_rise),
    "random": ModelMethod(baselines.random_map, at_input=False),
    "centred": ModelMethod(baselines.center_gaussian, at_input=False),
}


def get_method(name: str) -> Method:
    """The method of that name. Raises ConvscopeError, with the nearest names, when there is none."""
    if name not in METHODS:
        raise ConvscopeError(f"method {name!r} is not known; nearest: {nearest(name, list(METHODS))}")
    return METHODS[name]


def method_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method, the given ones and the others' defaults.

    Raises ConvscopeError for unknown ones, and for values that make no sense.
    """
    method = get_method(name)
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(method.function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for key in options:
        if key not in known:
            has = f"its options: {', '.join(known)}" if known else "it has no options"
            raise ConvscopeError(f"method {name!r} has no option {key!r}; {has}")
    settings = {**known, **options}
    if isinstance(method, ModelMethod) and method.check is not None:
        method.check(**settings)
    return settings
