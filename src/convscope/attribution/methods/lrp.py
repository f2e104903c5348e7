"""Layer-wise relevance propagation (LRP): the score is redistributed from layer to layer down to the input.

A rule determines the share of the relevance ``R_k`` of a layer's output that input ``j`` receives, with
``z_jk = x_j w_jk``::

    epsilon   R_j = sum_k z_jk / (z_k + eps sign z_k) R_k,    z_k = sum_j z_jk + b_k
    gamma     as epsilon, with w + gamma max(w, 0) in place of w, which gives more weight to positive contributions
    z-plus    as epsilon, with the positive z_jk (and a positive b_k) only
    z-box     for pixels between l and h:  z_jk = x_j w_jk - l_j max(w_jk, 0) - h_j min(w_jk, 0)

Activations and max-pooling pass relevance on unchanged. Batch normalisation is merged into the layer before it. Sums
and averages distribute relevance to their terms by the epsilon rule. The rules of layers are zennit's, registered in a
copy of the network; those of other functions are applied by `LrpMode` as they are called.

References
----------
Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation, PLOS
ONE 2015; Montavon et al., Explaining Nonlinear Classification Decisions with Deep Taylor Decomposition, Pattern
Recognition 2017; Montavon et al., Layer-Wise Relevance Propagation: An Overview, 2019, section 10.3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convscope.attribution.context import Extras, MethodContext
from convscope.attribution.methods.gradient import grad_batch_size
from convscope.attribution.methods.lrp_network import CONVOLUTIONS, LayerGraph, LrpMode
from convscope.engine import capture, isolation
from convscope.engine.batching import balanced_chunks
from convscope.engine.capture import ForwardResult
from convscope.engine.nested import iter_tensors
from convscope.errors import ConvscopeError, require_extra

MERGE_RTOL = 1e-3  # accepted change of the scores by merging batch normalisation, relative to the largest


class Rule(Protocol):
    """A rule of zennit."""

    def register(self, module: nn.Module) -> RemovableHandle:
        """Apply the rule to a layer until the handle is removed."""


RuleForLayer = Callable[[nn.Module, bool], Rule]
"""Chooses the rule of a layer; the flag marks a convolution that gets the images themselves."""


def lrp_epsilon(context: MethodContext, *, epsilon: float = 1e-6) -> tuple[Tensor, Extras]:
    """Propagate relevance by the epsilon rule at every layer (LRP-epsilon, signed).

    Parameters
    ----------
    context : MethodContext
    epsilon : float
        Stabilises the denominators.

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
        The input's relevance, summed over the channels.
    extras : dict
        "conservation_error" (B, T): the map's sum minus the score, which is the biases' share of the relevance.

    References
    ----------
    Bach et al., PLOS ONE 2015, equation 58.
    """
    rules = _zennit_rules()

    def rule(_layer: nn.Module, _first: bool) -> Rule:
        epsilon_rule: Rule = rules.Epsilon(epsilon=epsilon)
        return epsilon_rule

    return _propagate(context, rule)


def lrp_gamma(context: MethodContext, *, gamma: float = 0.25, epsilon: float = 1e-6) -> tuple[Tensor, Extras]:
    """Propagate by z-box at the first convolution, gamma at others, epsilon at linear layers (LRP-gamma, signed).

    The box lies between the preprocessed pixels of black and white. If the network changes the images before its first
    convolution, that one gets the gamma rule.

    Parameters
    ----------
    context : MethodContext
    gamma : float
        Preference for positive contributions.
    epsilon : float
        Stabilises the denominators of linear layers.

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
    extras : dict
        "conservation_error" (B, T) as of `lrp_epsilon`.

    References
    ----------
    Montavon et al., Layer-Wise Relevance Propagation: An Overview, 2019, section 10.3; zennit's ``EpsilonGammaBox``.
    """
    rules = _zennit_rules()
    normalize = context.model.preprocessing.normalize
    black, white = (normalize(torch.full_like(context.x[:1], value)) for value in (0.0, 1.0))
    low, high = torch.minimum(black, white), torch.maximum(black, white)

    def rule(layer: nn.Module, first: bool) -> Rule:
        layer_rule: Rule
        if not isinstance(layer, CONVOLUTIONS):
            layer_rule = rules.Epsilon(epsilon=epsilon)
        else:
            layer_rule = rules.ZBox(low=low, high=high) if first else rules.Gamma(gamma=gamma)
        return layer_rule

    return _propagate(context, rule)


def lrp_zplus(context: MethodContext, *, epsilon: float = 1e-6, biases: bool = True) -> tuple[Tensor, Extras]:
    """Propagate relevance by z-plus at every convolution and epsilon at linear layers (LRP-z+, signed).

    Parameters
    ----------
    context : MethodContext
    epsilon : float
        Stabilises the denominators of linear layers.
    biases : bool
        Whether positive biases of convolutions absorb relevance; False as in the paper. In deep networks with batch
        normalisation they absorb nearly all of it.

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
    extras : dict
        "conservation_error" (B, T) as of `lrp_epsilon`.

    References
    ----------
    Montavon et al., Explaining Nonlinear Classification Decisions with Deep Taylor Decomposition, Pattern Recognition
    2017, section 4.1; zennit's ``EpsilonPlus``.
    """
    rules = _zennit_rules()

    def rule(layer: nn.Module, _first: bool) -> Rule:
        convolution = isinstance(layer, CONVOLUTIONS)
        layer_rule: Rule = (
            rules.ZPlus(zero_params=None if biases else ["bias"]) if convolution else rules.Epsilon(epsilon=epsilon)
        )
        return layer_rule

    return _propagate(context, rule)


def _zennit_rules() -> ModuleType:
    return require_extra("zennit.rules", "lrp")


def _propagate(context: MethodContext, rule: RuleForLayer) -> tuple[Tensor, Extras]:
    """Propagate the scores to the input of a copy of the network in which every layer follows its rule."""
    if context.model.adapter.name != "torch":
        kind = {"keras": "a Keras model: use full-grad", "torchscript": "TorchScript: use integrated-gradients"}
        name = context.model.adapter.name
        raise ConvscopeError(f"lrp needs a network of PyTorch layers; this is {kind.get(name, name)} instead")
    x, size = context.x, grad_batch_size(context)
    module = copy.deepcopy(context.model.module)
    maps: list[Tensor] = []
    errors: list[Tensor] = []
    with (
        isolation.frozen_eval_mode(module.modules(), module.parameters()),  # the rules run layers in backward passes
        capture.capture_layers(replace(context.model, module=module, loaded_by_convscope=False), []) as run,
        ExitStack() as stack,
    ):
        graph = LayerGraph(module, x[:size])
        with graph, torch.no_grad():
            unmerged_scores = context.targets.scores(run(x[:size]), torch.arange(len(x[:size]), device=x.device))
        graph.merge_batch_norms()
        for layer in graph.layers:
            stack.callback(rule(layer, layer is graph.first).register(layer).remove)
        for positions in balanced_chunks(range(len(x)), size):
            images = slice(positions[0], positions[-1] + 1)
            with torch.enable_grad():
                leaf = x[images].detach().requires_grad_()
                with LrpMode():
                    outputs = run(leaf.clone())
                scores = context.targets.scores(outputs, torch.arange(images.start, images.stop, device=x.device))
            context.require_gradient(scores)
            if images.start == 0:
                _require_close(unmerged_scores[: len(scores)], scores)
            relevance = torch.stack([r.sum(1) for r in _backward_relevance(leaf, outputs, scores)], 1)
            maps.append(relevance)
            errors.append(relevance.flatten(2).sum(2) - scores.detach().to(relevance))
            context.report_progress(images.stop / len(x))
    return torch.cat(maps), {"conservation_error": torch.cat(errors)}


def _backward_relevance(leaf: Tensor, outputs: ForwardResult, scores: Tensor) -> Iterator[Tensor]:
    """Yield the relevance at the input (M, C, ...), target by target.

    The relevance of an output is its contribution to the score: its value times the score's gradient.
    """
    ends = [tensor for tensor in iter_tensors(outputs.output) if tensor.requires_grad]
    for t in range(scores.shape[1]):
        one_hot = torch.zeros_like(scores)
        one_hot[:, t] = 1
        retain_graph = t + 1 < scores.shape[1]
        relevance = None
        if scores.requires_grad:
            gradients = torch.autograd.grad(scores, ends, one_hot, retain_graph=True, allow_unused=True)
            used = [(end, end.detach() * g) for end, g in zip(ends, gradients, strict=True) if g is not None]
            used_ends, end_relevance = zip(*used, strict=True)
            (relevance,) = torch.autograd.grad(
                used_ends, leaf, end_relevance, retain_graph=retain_graph, allow_unused=True
            )
        yield torch.zeros_like(leaf, requires_grad=False).float() if relevance is None else relevance.float()


def _require_close(before: Tensor, after: Tensor) -> None:
    """Raise ConvscopeError if merging has changed the scores by more than rounding."""
    if float((before - after).detach().abs().max()) > MERGE_RTOL * float(before.abs().max()):
        raise ConvscopeError(
            "lrp cannot merge this network's batch normalisation into the layers before it: the scores change. Use "
            "full-grad instead"
        )
