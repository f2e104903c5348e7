"""Choose the layer for heatmaps if none is given: by the data flow, and by proof of its influence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from convscope.attribution.influence import depends_on
from convscope.attribution.output_targets import ScoreFunction
from convscope.engine import capture
from convscope.engine.batching import pad_to_fixed_batch
from convscope.engine.capture import ForwardResult
from convscope.engine.data_flow import Output
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.nested import iter_tensors
from convscope.errors import ConvscopeError

CANDIDATES = (3, 24)  # the number of layers whose gradients are computed first, and if none of these has influence
LINEAR_RTOL = 1e-3  # of gradients that are the same but for rounding
MAX_CHANGED = 2  # layers whose outputs are changed if none has a gradient

Choice = tuple[Layer, str]
Ends = frozenset[int] | None  # positions of the outputs that a target depends on; None for the scores

_choices: WeakKeyDictionary[Model, dict[Ends, Choice]] = WeakKeyDictionary()
_box_candidates: WeakKeyDictionary[Model, list[Layer]] = WeakKeyDictionary()


def choose_layer(model: Model, functions: Sequence[ScoreFunction] = ()) -> Choice:
    """Choose the layer for heatmaps and explain the choice.

    The choice is the last layer with spatial extent that every path from the image to the target passes through, and
    that the target depends on: its gradient is not 0. Where a block returns several maps that every path passes
    through together, such as those of two streams, it is the last of these. It is no pooling and not the network's own
    output; of a network that returns class maps it is in front of these, with a nonlinear function between. A
    transformer that classifies by its class token passes no patch on after its last attention, so there it is the input
    of the last attention block.

    The choice is made once per model; that of another output of the network once per output.

    Parameters
    ----------
    model : Model
    functions : sequence of callable
        Functions of the network's output, if the target is no class.

    Returns
    -------
    layer : Layer
    reason : str

    Raises
    ------
    ConvscopeError
        If no layer has spatial extent.
    """
    ends = _used_outputs(model, functions)
    known = _choices.setdefault(model, {})
    if ends not in known:
        known[ends] = _choose(model, ends)
    return known[ends]


def choose_layer_for_boxes(model: Model, x: Tensor, scores: Callable[[ForwardResult], Tensor]) -> Choice:
    """Choose the layer for heatmaps of boxes in an image, and explain the choice.

    A detector finds objects of different sizes at different layers, so the boxes decide. The choice is the last layer
    with spatial extent of which every box depends on several positions; at later ones, which hold class scores of
    candidates, it depends on its own candidate alone. The layers that come into question are found once per model.

    Parameters
    ----------
    model : Model
    x : Tensor
        The image (1, C, H, W).
    scores : callable
        Returns the scores (1, T) of the boxes.

    Returns
    -------
    layer : Layer
    reason : str
    """
    if model not in _box_candidates:
        num_boxes = _num_boxes(model, x)
        layers = _candidates(model, [model.layers.flow.scores])
        _box_candidates[model] = [layer for layer in layers if not _holds_queries(layer, num_boxes)]
    candidates = _box_candidates[model]
    counts: list[list[int]] = []
    for start in range(0, len(candidates), CANDIDATES[-1]):
        group = candidates[start : start + CANDIDATES[-1]]
        counts += _position_counts(model, [layer.name for layer in group], x, scores)
        for layer, positions in zip(candidates, counts, strict=False):
            if min(positions) > 1:
                rule = "of which every box depends on several positions"
                return layer, f"the last layer with spatial extent ({_size(layer)}) {rule}"
    for layer, positions in zip(candidates, counts, strict=True):
        if min(positions) > 0:
            return layer, f"the last layer with spatial extent ({_size(layer)}) that influences every box"
    return choose_layer(model)


def _num_boxes(model: Model, x: Tensor) -> int:
    """Return the number of candidates that a detector proposes for an image."""
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        outputs = run(pad_to_fixed_batch(model, x))
    return model.detection_reader.candidates(outputs.output, outputs.input_size).boxes.shape[1]


def _holds_queries(layer: Layer, num_boxes: int) -> bool:
    """Whether a layer's tokens are a detector's queries: one per box, and only by chance one more than a grid has."""
    prefix = layer.layout.prefix_tokens
    return prefix > 0 and prefix + layer.shape[1] * layer.shape[2] == num_boxes


def _position_counts(
    model: Model, names: Sequence[str], x: Tensor, scores: Callable[[ForwardResult], Tensor]
) -> list[list[int]]:
    """Count for each layer the positions with a gradient of each score."""
    with torch.no_grad(), capture.capture_layers(model, names, detach_at_layer=True) as run:
        outputs = run(pad_to_fixed_batch(model, x))
        maps = [outputs.maps[name] for name in names]
        with torch.enable_grad():
            values = scores(outputs)[0]
    missing = [None] * len(maps)
    gradients = [
        torch.autograd.grad(value, maps, retain_graph=True, allow_unused=True) if value.requires_grad else missing
        for value in values
    ]
    return [
        [0 if g is None else int(g[0].any(0).count_nonzero()) for g in of_layer]
        for of_layer in zip(*gradients, strict=True)
    ]


def _choose(model: Model, ends: Ends) -> Choice:
    outputs = [model.layers.flow.scores] if ends is None else [model.layers.flow.outputs[i] for i in sorted(ends)]
    candidates = _candidates(model, outputs)
    if not candidates:
        last = _last_spatial(model)
        return last, f"the last layer with spatial extent ({_size(last)}): it is the network's own output"
    on_every_path = list(islice(_on_every_path(model, candidates, outputs), CANDIDATES[-1]))
    for layers, rule in (
        (on_every_path, "that every path to the target passes through"),
        (candidates[: CANDIDATES[-1]], "that influences the target; some paths may bypass it"),
    ):
        if (layer := _last_with_gradient(model, layers, ends)) is not None:
            reason = _reason(model, layer, rule, is_last=layer is layers[0])
            return layer, reason + (_later_stages(model, layer, candidates, ends) if layers is on_every_path else "")
        for layer in layers[:MAX_CHANGED]:
            if bool(depends_on(model, layer, _noise_image(model), partial(_flat_scores, ends=ends)).any()):
                return layer, f"{_reason(model, layer, rule)}; no gradient reaches it, but changes of its output count"
    last = (on_every_path or candidates)[0]
    return last, f"{_reason(model, last, '')}; no layer has influence on the target for an image of noise"


def _last_spatial(model: Model) -> Layer:
    """Return the last layer with spatial extent; raise ConvscopeError, with the reason, if there is none."""
    reasons = [reason for layer in reversed(model.layers) if (reason := explain_shape(model, layer))]
    if reasons and not any(layer.is_spatial for layer in model.layers):
        raise ConvscopeError(f"no layer has positions of the input; the last one with any: {reasons[0]}")
    return model.layers.last_spatial()


def explain_shape(model: Model, layer: Layer) -> str:
    """Say why a layer with positions has no spatial extent; nothing of layers without positions."""
    size = f"layer {layer.name!r} is {' x '.join(map(str, layer.shape))}"
    if model.preprocessing.axes == 1 and len(layer.shape) == 3 and layer.layout.rows_per_image == 1:
        return (
            f"{size}: positions of a spectrogram that the network makes of the signal, which are not samples of the "
            "signal; use method='saliency', or make the spectrogram outside, as the network's input"
        )
    if layer.layout.rows_per_image != 1 and len(layer.shape) > 2:
        return (
            f"{size} and has {layer.layout.rows_per_image or 'several'} rows per image (frames, windows or crops), "
            "whose positions in the image are unknown; use method='saliency', 'integrated-gradients' or 'occlusion'"
        )
    return ""


def _candidates(model: Model, outputs: Sequence[Output]) -> list[Layer]:
    """Return the layers with maps, those computed last first.

    Of several with the same maps it is the outermost, of tokens the first.
    """
    nodes = model.layers.flow.nodes
    position = {layer.name: i for i, layer in enumerate(model.layers)}
    by_node: dict[str, Layer] = {}
    for layer in reversed(model.layers):
        node = nodes[layer.name][0] if layer.name in nodes else layer.name
        if layer.is_spatial and not layer.is_pooling and all(node != output.node for output in outputs):
            first = model.layers[layer.alias_of] if layer.alias_of and layer.layout.prefix_tokens else layer
            by_node.setdefault(node, first)
    return sorted(
        by_node.values(),
        key=lambda layer: position[layer.alias_of or layer.name],
        reverse=True,
    )


def _on_every_path(model: Model, candidates: Sequence[Layer], outputs: Sequence[Output]) -> Iterator[Layer]:
    """Yield the candidates that every path from the image to the outputs passes through.

    Where the maps alone are enough, a layer that returns more, such as a body that pools them as well, is replaced by
    the outermost one in it that returns nothing else.
    """
    flow = model.layers.flow
    ends = frozenset[str]().union(*(output.sources for output in outputs))
    dominators = set(flow.dominators(ends))
    returned = {output.node for output in outputs}
    for layer in candidates:
        nodes = [node for node in flow.nodes.get(layer.name, ()) if node not in returned]
        if flow.nodes.get(layer.name, ("",))[0] in dominators.intersection(nodes):
            yield _returning_maps_alone(model, layer)
        elif not dominators.isdisjoint(nodes) or (len(nodes) > 1 and flow.separate(nodes, ends)):
            yield layer


def _returning_maps_alone(model: Model, layer: Layer) -> Layer:
    nodes = model.layers.flow.nodes
    same = (
        other
        for other in reversed(model.layers)
        if other.num_tensors == 1 and nodes.get(other.name) == nodes[layer.name][:1]
    )
    return layer if layer.num_tensors == 1 else next(same, layer)


def _later_stages(model: Model, layer: Layer, candidates: Sequence[Layer], ends: Ends) -> str:
    """Say whether layers of fewer positions that follow influence the target as well, past which other paths lead."""
    names = [candidate.name for candidate in candidates]
    later = candidates[: names.index(layer.name)] if layer.name in names else ()
    coarser = [other for other in later if math.prod(other.shape[1:]) < math.prod(layer.shape[1:])]
    last = _last_with_gradient(model, coarser, ends)
    if last is None:
        return ""
    return (
        f"; part of the influence passes through later layers ({last.name!r}, {_size(last)}), which other paths bypass"
    )


def _reason(model: Model, layer: Layer, rule: str, is_last: bool = True) -> str:
    size = _size(layer)
    if layer.tensor_index is not None:
        rule = f"{rule}, or through another output of {layer.call!r},"
    if layer.layout.prefix_tokens and not is_last:
        return (
            f"the input of the last attention block ({size}), {rule} and whose patches influence it: later layers pass "
            "on the class token alone"
        )
    position = "in front of the class maps, " if model.layers.flow.returns_maps else ""
    return f"the last layer with spatial extent ({size}), {position}{rule}".removesuffix(", ")


def _size(layer: Layer) -> str:
    return " x ".join(map(str, layer.shape[1:]))


# --- gradients -------------------------------------------------------------------------------------------------------


def _last_with_gradient(model: Model, layers: Sequence[Layer], ends: Ends) -> Layer | None:
    """Return the first of `layers` that has influence on the outputs; of class maps, one that is in front of them."""
    start = 0
    for count in CANDIDATES:
        group, start = layers[start:count], count
        for layer, is_usable in zip(group, _are_usable(model, group, ends), strict=True):
            if is_usable:
                return layer
    return None


def _are_usable(model: Model, layers: Sequence[Layer], ends: Ends) -> list[bool]:
    def weighted_squares(outputs: ForwardResult) -> Tensor:
        """Vary with every score, also where their sum (probabilities) or that of their squares (embeddings) is 1."""
        scores = _flat_scores(outputs, ends)
        return (scores.square() * torch.linspace(1, 2, scores.shape[1], device=scores.device)).sum()

    if not layers:
        return []
    influence = [bool(gradient.any()) for gradient in _gradients(model, layers, weighted_squares, seed=0)]
    if not model.layers.flow.returns_maps or ends is not None:
        return influence
    linear = _are_followed_by_linear_layers(model, layers)
    return [has_gradient and not is_linear for has_gradient, is_linear in zip(influence, linear, strict=True)]


def _flat_scores(outputs: ForwardResult, ends: Ends) -> Tensor:
    """Return what targets depend on, (N, ...) flattened: the scores, or the outputs `ends`."""
    if ends is None:
        return outputs.logits
    tensors = [tensor for i, tensor in enumerate(iter_tensors(outputs.output)) if i in ends]
    return torch.cat([tensor.reshape(len(outputs.logits), -1).float() for tensor in tensors], dim=1)


def _are_followed_by_linear_layers(model: Model, layers: Sequence[Layer]) -> list[bool]:
    """Check which layers are class maps but for linear operations: a score's gradient is the same for two images.

    There the channels' weights do not depend on the image, nor on where in it a region lies.
    """

    def of_first_class(outputs: ForwardResult) -> Tensor:
        return outputs.logits[:, 0].sum()

    first, second = (_gradients(model, layers, of_first_class, seed) for seed in (0, 1))
    return [bool((a - b).norm() <= LINEAR_RTOL * a.norm()) for a, b in zip(first, second, strict=True)]


def _gradients(
    model: Model, layers: Sequence[Layer], score: Callable[[ForwardResult], Tensor], seed: int
) -> list[Tensor]:
    """Compute the gradients (1, C, h, w) of a score at layers, for an image of noise; zeros where there are none."""
    names = [layer.name for layer in layers]
    with torch.no_grad(), capture.capture_layers(model, names, detach_at_layer=True) as run:
        outputs = run(_noise_image(model, seed))
        maps = [outputs.maps[name] for name in names]
        with torch.enable_grad():
            value = score(outputs)
    missing = [None] * len(maps)
    gradients = torch.autograd.grad(value, maps, allow_unused=True) if value.requires_grad else missing
    return [
        torch.zeros_like(m[:1]) if gradient is None else gradient[:1].detach()
        for m, gradient in zip(maps, gradients, strict=True)
    ]


def _used_outputs(model: Model, functions: Sequence[ScoreFunction]) -> Ends:
    """Find which of several outputs the targets depend on; None for the scores."""
    if not functions or len(model.layers.flow.outputs) < 2:
        return None
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        output = run(_noise_image(model)).output
    leaves: dict[int, Tensor] = {}
    for i, tensor in enumerate(iter_tensors(output)):
        if tensor.is_floating_point():
            leaves[i] = tensor.requires_grad_()
    with torch.enable_grad():
        scores = [function(output) for function in functions]
        ends = [score.sum() for score in scores if isinstance(score, Tensor) and score.requires_grad]
    if not ends:
        return None
    gradients = torch.autograd.grad(ends, list(leaves.values()), allow_unused=True)
    used = frozenset(i for i, gradient in zip(leaves, gradients, strict=True) if gradient is not None)
    return None if all(leaves[i] is model.reader.tensor(output) for i in used) else used


def _noise_image(model: Model, seed: int = 0) -> Tensor:
    """Return an image of noise (1, C, H, W) as the network's input, repeated up to its fixed batch size."""
    shape = (1, model.preprocessing.channels, *model.preprocessing.size)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return pad_to_fixed_batch(model, model.preprocessing.normalize(pixels))
