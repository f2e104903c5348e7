"""Layer-wise relevance propagation: the score, handed back from layer to layer in proportion to what each input gave.

A rule says what share of the relevance R_k of a layer's output goes to its input j; z_jk = x_j w_jk:

    epsilon   R_j = sum_k z_jk / (z_k + eps sign z_k) R_k  with  z_k = sum_j z_jk + b_k
    gamma     the same with w + gamma max(w, 0) in the place of w, so that what speaks for k counts more
    z-plus    the same with the positive z_jk (and a positive b_k) alone
    z-box     for pixels, between l and h:  z_jk = x_j w_jk - l_j max(w_jk, 0) - h_j min(w_jk, 0)

Bach et al., PLOS ONE 2015; Montavon et al., Pattern Recognition 2017 and Layer-Wise Relevance Propagation: An Overview,
2019, section 10.3. Activations and max-pooling pass relevance on; batch normalisation is merged into the layer before
it; sums and averages hand it to their terms as the epsilon rule does. The rules of layers are those of zennit, hung
into a copy of the network; those of sums, averages and clamps are set while it runs, whether they are modules or not.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from convscope.attribution.context import MethodContext
from convscope.attribution.methods.full_grad import FUNCTION_ALIASES
from convscope.attribution.methods.gradient import grad_batch_size
from convscope.attribution.methods.relu_rules import OTHER_ACTIVATIONS, RELU_LIKE, straight_through
from convscope.engine import capture
from convscope.engine.batching import balanced_chunks
from convscope.engine.capture import ForwardResult
from convscope.engine.nested import map_tensors
from convscope.errors import ConvscopeError

EPSILON = 1e-6  # of sums, averages and rules that have none of their own; keeps fractions finite


def lrp_epsilon(question: MethodContext, *, epsilon: float = 1e-6) -> tuple[Tensor, dict[str, Tensor]]:
    """M = sum_c R_c at the input, the epsilon rule at every layer. Signed.

    Bach et al., PLOS ONE 2015, equation 58. "conservation_error" (B, T) is the sum of the map minus the score: what
    biases keep for themselves.
    """
    rules = _rules()
    return _relevance(question, lambda layer, first: rules.Epsilon(epsilon=epsilon))


def lrp_gamma(
    question: MethodContext, *, gamma: float = 0.25, epsilon: float = 1e-6
) -> tuple[Tensor, dict[str, Tensor]]:
    """M = sum_c R_c: z-box at the first convolution, gamma at all others, epsilon at linear layers. Signed.

    Montavon et al., Layer-Wise Relevance Propagation: An Overview, 2019, section 10.3; zennit's `EpsilonGammaBox`. The
    box is between the prepared pixels of black and white; where pictures are changed before the first convolution, that
    has the gamma rule too. "conservation_error" as of `lrp_epsilon`.
    """
    rules = _rules()
    ends = (torch.full_like(question.x[:1], value) for value in (0.0, 1.0))
    one, other = (question.model.preprocessing.normalize(end) for end in ends)
    low, high = torch.minimum(one, other), torch.maximum(one, other)

    def rule(layer: nn.Module, first: bool) -> Any:
        if not isinstance(layer, _ConvNd):
            return rules.Epsilon(epsilon=epsilon)
        return rules.ZBox(low=low, high=high) if first else rules.Gamma(gamma=gamma)

    return _relevance(question, rule)


def lrp_zplus(
    question: MethodContext, *, epsilon: float = 1e-6, biases: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """M = sum_c R_c: z-plus at every convolution, epsilon at linear layers. Signed.

    Montavon et al., Explaining Nonlinear Classification Decisions with Deep Taylor Decomposition, 2017, section 4.1;
    zennit's `EpsilonPlus`. "conservation_error" as of `lrp_epsilon`: in a deep network with batch normalisation biases
    keep nearly all. With biases=False, as in the paper of 2017, those of convolutions keep nothing.
    """
    rules = _rules()

    def rule(layer: nn.Module, first: bool) -> Any:
        if isinstance(layer, _ConvNd):
            return rules.ZPlus(zero_params=None if biases else ["bias"])
        return rules.Epsilon(epsilon=epsilon)

    return _relevance(question, rule)


def _rules() -> Any:
    try:
        return importlib.import_module("zennit.rules")
    except ImportError as error:
        raise ConvscopeError("lrp needs zennit, which is not installed; pip install 'convscope[lrp]'") from error


def _relevance(question: MethodContext, rule: Callable[[nn.Module, bool], Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The relevance at the input. At the output it is what each logit adds to the score: its value times dS/d logit."""
    if question.model.adapter.name != "torch":
        raise ConvscopeError("lrp needs a network of PyTorch's own layers; this is a Keras model: try full-grad")
    x, most = question.x, grad_batch_size(question)
    module = copy.deepcopy(question.model.module)
    maps: list[Tensor] = []
    errors: list[Tensor] = []
    with (
        capture.capture_layers(replace(question.model, module=module, loaded_by_convscope=False), []) as run,
        ExitStack() as stack,
    ):
        found = _LayerGraph(module, x[:most])
        with found, torch.no_grad():
            before = question.targets.scores(run(x[:most]), torch.arange(len(x[:most]), device=x.device))
        found.merge()
        for layer in found.layers:
            stack.callback(rule(layer, layer is found.first).register(layer).remove)
        for part in balanced_chunks(range(len(x)), most):
            at = slice(part[0], part[-1] + 1)
            with torch.enable_grad():
                leaf = x[at].detach().requires_grad_()
                with _LrpMode():
                    seen = run(leaf.clone())
                scores = question.targets.scores(seen, torch.arange(at.start, at.stop, device=x.device))
            if at.start == 0:
                _require_same(before[: len(scores)], scores)
            found_here = torch.stack([m.sum(1) for m in _backward_relevance(leaf, seen, scores)], 1)
            maps.append(found_here)
            errors.append(found_here.flatten(2).sum(2) - scores.detach().to(found_here))
            question.report_progress(at.stop / len(x))
    return torch.cat(maps), {"conservation_error": torch.cat(errors)}


def _backward_relevance(leaf: Tensor, seen: ForwardResult, scores: Tensor) -> Iterator[Tensor]:
    """The relevance at the input (M, C, ...), target by target."""
    ends: list[Tensor] = []
    map_tensors(seen.output, lambda tensor: ends.append(tensor) or tensor)  # type: ignore[func-returns-value]
    ends = [end for end in ends if end.requires_grad]
    for t in range(scores.shape[1]):
        one = torch.zeros_like(scores)
        one[:, t] = 1
        more = t + 1 < scores.shape[1]
        found = None
        if scores.requires_grad:
            slopes = torch.autograd.grad(scores, ends, one, retain_graph=True, allow_unused=True)
            used = [(end, end.detach() * slope) for end, slope in zip(ends, slopes, strict=True) if slope is not None]
            outputs, relevance = zip(*used, strict=True)
            (found,) = torch.autograd.grad(outputs, leaf, relevance, retain_graph=more, allow_unused=True)
        yield torch.zeros_like(leaf, requires_grad=False).float() if found is None else found.float()


def _require_same(before: Tensor, after: Tensor) -> None:
    """Merging may change the scores by rounding only."""
    if float((before - after).detach().abs().max()) > 1e-3 * float(before.abs().max()):
        raise ConvscopeError(
            "lrp cannot merge this network's batch normalisation into the layers before it: its scores change"
        )


class _LayerGraph:
    """What the rules need to know of a network, from one pass: its layers, which of them sees the pictures themselves,
    and behind which of them a batch normalisation follows at once."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
        self.layers: list[nn.Module] = []
        self.first: nn.Module | None = None
        self.made: dict[int, tuple[nn.Module, Tensor, int]] = {}
        self.pairs: list[tuple[nn.Module, _BatchNorm]] = []
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for layer in self.module.modules():
            if isinstance(layer, _LAYERS):
                self.handles.append(layer.register_forward_hook(self.done))
            elif isinstance(layer, _BatchNorm):
                self.handles.append(layer.register_forward_pre_hook(self.starts))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def done(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        if layer in self.layers:
            raise ConvscopeError(f"lrp cannot follow a layer that runs twice; {type(layer).__name__} does")
        self.layers.append(layer)
        self.made[id(output)] = layer, output, output._version
        if len(self.layers) == 1 and isinstance(layer, _ConvNd) and torch.equal(args[0], self.x.to(args[0])):
            self.first = layer

    def starts(self, norm: nn.Module, args: Any) -> None:
        layer, output, version = self.made.get(id(args[0]), (norm, None, 0))
        follows = output is args[0] and output._version == version  # nothing was written into it since
        if follows and isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            self.pairs.append((layer, norm))

    def merge(self) -> None:
        self.made.clear()
        if not self.layers:
            raise ConvscopeError("lrp finds no convolution or linear layer that is a module of PyTorch's own")
        for layer, norm in self.pairs:
            _merge(layer, norm)


_LAYERS = (_ConvNd, nn.Linear)


def _merge(layer: Any, norm: Any) -> None:
    """w <- w gamma / sigma,  b <- (b - mu) gamma / sigma + beta;  the normalisation becomes the identity."""
    weight, dim = layer.weight, 1 if isinstance(layer, _ConvTransposeNd) else 0
    if dim == 1 and layer.groups > 1:
        return  # its output channels do not lie along one dimension
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    bias = (0 if layer.bias is None else layer.bias) - norm.running_mean
    column = [1] * weight.ndim
    column[dim] = -1
    layer.weight = nn.Parameter((weight * scale.view(column)).detach(), requires_grad=False)
    layer.bias = nn.Parameter((bias * scale + (0 if norm.bias is None else norm.bias)).detach(), requires_grad=False)
    norm.weight, norm.bias, norm.eps = None, None, 0.0
    norm.running_mean, norm.running_var = torch.zeros_like(scale), torch.ones_like(scale)


class _LrpMode(TorchFunctionMode):
    """While active, what is no layer hands relevance back: sums and averages to their terms, activations as it comes.

    So do products with numbers, which would scale it otherwise. To what is added and does not depend on the picture
    nothing goes.

    Raises ConvscopeError for what neither paper has a rule for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = getattr(func, "__name__", "").partition(".")[0]
        name = FUNCTION_ALIASES.get(given.strip("_"), given.strip("_"))
        tensors = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        if not tensors or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in _REFUSED or (name in _PRODUCTS and len(tensors) > 1):
            raise ConvscopeError(
                f"lrp has no rule for {name} of what depends on the picture (normalisation by the picture's own "
                "statistics, squeeze-and-excitation, attention); try full-grad or integrated-gradients"
            )
        if name in _PASS:
            return straight_through(func, args[0], args[1:], kwargs, _as_it_comes)
        if name in _LINEAR or (name in ("add", "sub") and len(tensors) > 1):
            return _shared_out(func, args, kwargs, given.startswith("__i") or (given.endswith("_") and given[0] != "_"))
        return func(*args, **kwargs)


def _shared_out(func: Any, args: Sequence[Any], kwargs: Any, in_place: bool) -> Tensor:
    """func(...), linear in its tensors, whose relevance goes to each in proportion to what it gave."""
    at = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]

    def call(*tensors: Tensor) -> Tensor:
        filled = list(args)
        for i, tensor in zip(at, tensors, strict=True):
            filled[i] = tensor.clone() if in_place else tensor
        output: Tensor = func(*filled, **kwargs)
        return output

    shared: Tensor = _EpsilonRule.apply(call, *(args[i] for i in at))
    return args[0].copy_(shared) if in_place else shared


class _EpsilonRule(torch.autograd.Function):
    """y = call(*x), linear; on the way back  R_x = x dy/dx R_y / (y + eps sign y)."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], *x: Tensor) -> Tensor:
        ctx.call, ctx.x = call, [t.detach().clone() for t in x]  # copies: what follows may write into them
        return call(*x)

    @staticmethod
    def backward(ctx: Any, *relevance: Any) -> Any:
        x = [t.requires_grad_() for t in ctx.x]
        with torch.enable_grad():
            y = ctx.call(*x)
        share = relevance[0] / (y + EPSILON * torch.where(y < 0, -1.0, 1.0)).detach()
        return None, *(t.detach() * slope for t, slope in zip(x, torch.autograd.grad(y, x, share), strict=True))


def _as_it_comes(relevance: Tensor) -> Tensor:
    return relevance


_LINEAR = frozenset(
    {"mean", "sum", "neg", "mul", "div", "rsub"}
    | {f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)}
)
_PASS = frozenset({"batch_norm", *RELU_LIKE, *OTHER_ACTIVATIONS})
_PRODUCTS = frozenset({"mul", "div", "matmul", "bmm", "einsum"})
_REFUSED = frozenset({"layer_norm", "group_norm", "instance_norm", "scaled_dot_product_attention"})
