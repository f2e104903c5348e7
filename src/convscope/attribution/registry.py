"""The table of heatmap methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.context import MethodOutput
from convscope.attribution.methods import (
    attention,
    attn_lrp,
    baselines,
    cam,
    expected_gradients,
    full_grad,
    gradient,
    legrad,
    lrp,
    perturbation,
    rise,
)
from convscope.engine.capture import ForwardResult
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, find_name


@dataclass(frozen=True)
class CamMethod:
    """A pure function of a layer's activation and gradient.

    All such methods share one forward and one backward pass.

    Attributes
    ----------
    function : callable
        ``function(activation, gradient) -> map``, from (N, C, ...) twice to (N, ...); ``function(activation)`` if
        `score` is None.
    needs_boxes : bool
        Whether its targets are boxes, not classes: ``function(activation, gradient, boxes)``, with one target's boxes
        (N, 4) as fractions of the input.
    score : callable or None
        ``score(targets, outputs) -> Tensor`` of shape (B, T): what the gradient is taken of. None for methods that
        need no gradient and give the same map for every target.
    """

    function: Callable[..., Tensor]
    score: Callable[[BatchTargets, ForwardResult], Tensor] | None = BatchTargets.scores
    needs_boxes: bool = False
    at_input = False
    signed = False  # class activation maps are rectified for display, as in their papers


@dataclass(frozen=True)
class ModelMethod:
    """A method that runs its own forward and backward passes.

    Attributes
    ----------
    function : callable
        ``function(context, **options) -> MethodOutput``; `context` is a `MethodContext` if `at_input`, else a
        `LayerContext`.
    at_input : bool
        Whether its maps lie on the input rather than on a layer.
    signed : bool
        Whether negative values are evidence against the target by the method's definition, and drawn as such.
    mean_scores : bool
        Whether values are mean scores of changed images, most of which are positive: drawn is what exceeds their mean.
    needs_gradient : bool
        Whether it needs gradients or layers, which functions as models do not have.
    needs_boxes : bool
        Whether its targets are boxes, not classes.
    supports : callable or None
        ``supports(model)`` returns whether a network has what the method needs; None if any network has.
    check : callable or None
        ``check(**options)`` validates the options before the network runs; raises ``ConvscopeError``.
    """

    function: Callable[..., MethodOutput]
    at_input: bool = True
    signed: bool = False
    mean_scores: bool = False
    check: Callable[..., None] | None = None
    needs_gradient: bool = True
    needs_boxes: bool = False
    supports: Callable[[Model], bool] | None = None


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
    "odam": CamMethod(cam.odam, needs_boxes=True),
    "finer-cam": CamMethod(cam.grad_cam, cam.finer_cam_score),
    "saliency": ModelMethod(gradient.saliency),
    "input-x-gradient": ModelMethod(gradient.input_x_gradient, signed=True),
    "smooth-grad": ModelMethod(gradient.smooth_grad, check=gradient.check_noise),
    "var-grad": ModelMethod(gradient.var_grad, check=gradient.check_noise),
    "integrated-gradients": ModelMethod(gradient.integrated_gradients, signed=True, check=gradient.check_path),
    "expected-gradients": ModelMethod(
        expected_gradients.expected_gradients, signed=True, check=expected_gradients.check_expected_gradients
    ),
    "guided-backprop": ModelMethod(gradient.guided_backprop),
    "deconvnet": ModelMethod(gradient.deconvnet),
    "guided-grad-cam": ModelMethod(gradient.guided_grad_cam, at_input=False),
    "full-grad": ModelMethod(full_grad.full_grad),
    "lrp-epsilon": ModelMethod(lrp.lrp_epsilon, signed=True),
    "lrp-gamma": ModelMethod(lrp.lrp_gamma, signed=True),
    "lrp-zplus": ModelMethod(lrp.lrp_zplus),
    "attention-rollout": ModelMethod(attention.attention_rollout, supports=attention.has_global_attention),
    "transformer-attribution": ModelMethod(attention.transformer_attribution, supports=attention.has_global_attention),
    "attn-lrp": ModelMethod(attn_lrp.attn_lrp, signed=True),
    "legrad": ModelMethod(legrad.legrad, supports=attention.has_global_attention),
    "score-cam": ModelMethod(perturbation.score_cam, at_input=False),
    "ablation-cam": ModelMethod(perturbation.ablation_cam, at_input=False),
    "occlusion": ModelMethod(
        perturbation.occlusion, signed=True, check=perturbation.check_occlusion, needs_gradient=False
    ),
    "rise": ModelMethod(rise.rise, mean_scores=True, check=rise.check_rise, needs_gradient=False),
    "d-rise": ModelMethod(rise.d_rise, mean_scores=True, check=rise.check_rise, needs_gradient=False, needs_boxes=True),
    "random": ModelMethod(baselines.random_map, at_input=False),
    "centred": ModelMethod(baselines.center_gaussian, at_input=False),
}
BASELINES = ("random", "centred")
"""Methods that do not depend on the network: an explanation must do better than these."""


def usable_methods(model: Model) -> list[str]:
    """Return the keys of the methods that a network allows for classes.

    Without layers or gradients only some work, and methods that read attention need attention.
    """
    return [
        name
        for name, method in METHODS.items()
        if _is_usable(model, method)
        and not (isinstance(method, ModelMethod) and method.supports is not None and not method.supports(model))
    ]


def _is_usable(model: Model, method: Method) -> bool:
    """Check whether a method explains classes, and has the layers and gradients that it needs."""
    if method.needs_boxes:
        return False
    has_layers = model.differentiable and (method.at_input or len(model.layers) > 0)
    return has_layers or (isinstance(method, ModelMethod) and not method.needs_gradient)


def default_method(model: Model) -> str:
    """Return the key of the method for networks of this kind."""
    names = ("grad-cam", "integrated-gradients", "occlusion")
    return next(name for name in names if _is_usable(model, METHODS[name]))


def default_method_for_boxes(model: Model) -> str:
    """Return the key of the method for boxes that networks of this kind detect."""
    return "odam" if model.differentiable and len(model.layers) else "d-rise"


def get_method(name: str) -> Method:
    """Look up a method by name; raise ConvscopeError with the nearest names for an unknown one."""
    return METHODS[find_name("method", name, list(METHODS))]


def is_signed(name: str) -> bool:
    """Return whether negative values of a method are drawn; False for maps of unknown origin."""
    return name in METHODS and METHODS[name].signed


def has_mean_scores(name: str) -> bool:
    """Return whether a method's values are mean scores, of which the excess over their mean is drawn."""
    method = METHODS.get(name)
    return isinstance(method, ModelMethod) and method.mean_scores


def method_options(name: str, method: Method, options: Mapping[str, object]) -> dict[str, object]:
    """Validate a method's options and add the defaults of the others; raise ConvscopeError for invalid ones."""
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(method.function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for key in options:
        if key not in defaults:
            known = f"its options: {', '.join(defaults)}" if defaults else "it has no options"
            raise ConvscopeError(f"method {name!r} has no option {key!r}; {known}")
    settings = {**defaults, **options}
    if isinstance(method, ModelMethod) and method.check is not None:
        method.check(**settings)
    return settings
