"""Probe a network with one traced forward pass, to fill its layer table.

The pass tells which layers run and in which order, the shape and layout of their outputs, their receptive fields, how
data flows between them, and which activation ends the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.capture import VIEW_ERROR, run_with_callback
from convscope.engine.data_flow import IMAGE, DataFlow, Output
from convscope.engine.folding import fold_rows
from convscope.engine.function_modes import LogitsRecorder
from convscope.engine.grids import GridInference, layout_on_grid
from convscope.engine.layer_table import Layer, LayerTable
from convscope.engine.layouts import Layout
from convscope.engine.nested import iter_tensors, primary_tensor
from convscope.engine.output_inference import OutputFacts, OutputMeaning, OutputRequest, infer_output, select_scores
from convscope.engine.outputs import pick_output
from convscope.engine.receptive_field import UNKNOWN, Axes, Axis, Field
from convscope.engine.tracing import Trace, start_trace
from convscope.errors import ConvscopeError

FINAL_ACTIVATIONS = ("softmax", "log_softmax", "sigmoid")
STOCHASTIC_NOTE = (
    "the network gives another output each time it runs (dropout or other random numbers that stay on in eval mode): "
    "results differ from run to run"
)
_NO_REQUEST = OutputRequest()
_Version = tuple[int, int]  # a tensor's identity and the number of times that it was written to


@dataclass(frozen=True)
class ProbeResult:
    """What one forward pass tells about a network.

    Attributes
    ----------
    layers : LayerTable
        The layers, in the order in which they finish.
    meaning : OutputMeaning
        The task, and how scores are read from the output.
    is_stochastic : bool
        Whether the network gives another output each time it runs.
    channels_last_output : bool
        Whether the network returns class maps (N, H, W, K).
    contiguous_input : bool
        Whether the network needs contiguous inputs: it fails on images in the channels_last memory format.
    """

    layers: LayerTable
    meaning: OutputMeaning
    channels_last_output: bool
    is_stochastic: bool = False
    contiguous_input: bool = False


def probe(
    module: nn.Module,
    adapter: FrameworkAdapter,
    x: Tensor,
    request: OutputRequest = _NO_REQUEST,
    grid: tuple[int, int] | None = None,
) -> ProbeResult:
    """Run `x` once without gradients and describe every layer.

    Parameters
    ----------
    module : torch.nn.Module
    adapter : FrameworkAdapter
    x : Tensor
        One image (1, C, H, W), signal (1, C, L) or volume (1, C, D, H, W).
    request : OutputRequest
        What is known of the output.
    grid : tuple of int, optional
        Height and width of the grid on which tokens lie that cannot be followed.

    Raises
    ------
    ConvscopeError
        If the output has no scores per image, as that of a detector.
    """

    def weights() -> Iterator[Tensor]:
        attributes = (iter_tensors(vars(part)) for part in module.modules())
        return chain(adapter.parameters(module), module.buffers(), chain.from_iterable(attributes))

    with start_trace(x, weights) as trace, LogitsRecorder() as activations:
        recorder = _LayerRecorder(trace, adapter, tuple(x.shape), grid)
        output = run_with_callback(module, adapter, x, recorder.record)
        select, notes = select_scores(output, request)
        final = primary_tensor(pick_output(output, select))
        _require_scores(output if select is None else final, final)
        field = UNKNOWN if final is None else trace.field(final)
        layout = Layout(1) if final is None else _find_layout(final, field, x.ndim)[0]
    notes += recorder.check_grid()

    def rerun() -> Tensor | None:
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        repeated = run_with_callback(module, adapter, noise.to(x), lambda *_: None)
        return primary_tensor(pick_output(repeated, select))

    facts = _output_facts(output, final, field, layout, x, activations, rerun)
    meaning = infer_output(
        replace(facts, is_removable=facts.is_removable and adapter.name != "torchscript"), request, select
    )
    is_stochastic = trace.draws_random_numbers and not _are_equal(rerun(), rerun())
    notes += [*meaning.notes, *[STOCHASTIC_NOTE] * is_stochastic, *recorder.quantization_notes()]
    flow = recorder.flow(output, final, returns_maps=bool(layout.spatial_dims))
    return ProbeResult(
        LayerTable(fold_rows(module, adapter, x, recorder.layers, recorder.folded), flow),
        replace(meaning, notes=tuple(notes)),
        facts.channels_last,
        contiguous_input=_needs_contiguous(module, adapter, x),
        is_stochastic=is_stochastic,
    )


def _output_facts(
    output: object,
    final: Tensor | None,
    field: Field,
    layout: Layout,
    x: Tensor,
    activations: LogitsRecorder,
    rerun: Callable[[], Tensor | None],
) -> OutputFacts:
    """Return what the traced pass tells about the tensor `final` in a network's output."""
    activation = field.op.strip("_")
    is_returned = any(tensor is final for tensor in iter_tensors(output))
    record = activations.find(final)
    return OutputFacts(
        output=output,
        spatial_dims=layout.spatial_dims,
        activation=activation if activation in FINAL_ACTIVATIONS and is_returned else None,
        is_removable=record is not None,
        softmax_dim=None if record is None else record[1],
        input_shape=tuple(x.shape),
        channels_last=bool(layout.spatial_dims) and layout.channel_dim != 1 and not layout.grid and is_returned,
        rerun=rerun,
    )


def _are_equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is None or second is None or torch.equal(first, second)


def _needs_contiguous(module: nn.Module, adapter: FrameworkAdapter, x: Tensor) -> bool:
    """Check whether the network, which runs on `x`, fails on the same image in the channels_last memory format."""
    if x.ndim != 4:
        return False
    try:
        run_with_callback(module, adapter, x.contiguous(memory_format=torch.channels_last), lambda *_: None)
    except RuntimeError as error:
        if VIEW_ERROR in str(error):
            return True
        raise
    return False


class _LayerRecorder:
    """Describes layers as they finish."""

    def __init__(
        self, trace: Trace, adapter: FrameworkAdapter, input_shape: tuple[int, ...], grid: tuple[int, int] | None
    ) -> None:
        self.trace, self.adapter, self.input_shape = trace, adapter, input_shape
        self.user_grid, self.grids = grid, GridInference(input_shape)
        self.layers: list[Layer] = []
        self.folded: dict[str, Tensor] = {}  # copies of outputs that have other than one row
        self.num_quantized = 0
        self._calls: dict[str, int] = {}
        self._makers: dict[_Version, str] = {}  # the node of each tensor, named after the first layer that returned it
        self._layer_of_node: dict[str, str] = {}
        self._sources: dict[str, frozenset[str]] = {}
        self._nodes: dict[str, tuple[str, ...]] = {}
        self._tensors: list[Tensor] = []  # referenced, so that identities are not reused

    def record(self, name: str, module: nn.Module, output: object) -> None:
        """Add a layer that has just returned `output`; one that returned weights or constants alone is no layer."""
        call = self._calls[name] = self._calls.get(name, 0) + 1
        tensor = primary_tensor(output)
        self.num_quantized += any(part.is_quantized for part in iter_tensors(output))
        if tensor is None or tensor.ndim < 2 or self.trace.is_constant(tensor):
            return
        name = name if call == 1 else f"{name}#{call}"
        if len(tensor) != 1:
            self.folded[name] = tensor.clone()
        others = {i: t for i, t in enumerate(iter_tensors(output)) if t is not tensor and not self.trace.is_constant(t)}
        first = self._describe(name, module, tensor, 1 + len(others))
        further = [
            replace(layer, tensor_index=i, num_tensors=first.num_tensors)
            for i, t in others.items()
            for layer in self._describe_map(f"{name}[{i}]", module, t)
        ]
        rows = [first, *further]
        names = {layer.name for layer in rows}
        nodes = [self._add_node(tensor, name, name)]
        for i, other in others.items():
            node = f"{name}[{i}]"
            nodes.append(self._add_node(other, node if node in names else name, node))
        self.layers += rows
        for layer in rows:
            primary = nodes[0] if layer is first else layer.name
            self._nodes[layer.name] = (primary, *(node for node in nodes if node != primary))

    def _describe_map(self, name: str, module: nn.Module, tensor: Tensor) -> Iterator[Layer]:
        """Describe a further tensor of a layer, if it has positions and no earlier layer made it."""
        if _version(tensor) not in self._makers and tensor.ndim > 1 and len(tensor) == 1:
            layer = self._describe(name, module, tensor, 1)
            if layer.is_spatial:
                yield layer

    def _add_node(self, tensor: Tensor, layer: str, node: str) -> str:
        """Add a tensor that a layer returned to the graph; return its node, the existing one if there is one."""
        if (known := self._makers.setdefault(_version(tensor), node)) != node:
            return known
        self._tensors.append(tensor)
        self._layer_of_node[node] = layer
        self._sources[node] = self.trace.field(tensor).ancestors
        self.trace.mark(tensor, node)
        return node

    def flow(self, output: object, final: Tensor | None, returns_maps: bool) -> DataFlow:
        """Return the data flow to the tensors in the network's output, of which `final` holds the scores."""
        outputs = tuple(self._output(tensor) for tensor in iter_tensors(output))
        scores = Output() if final is None else self._output(final)
        return DataFlow(self._sources, self._nodes, outputs, scores, returns_maps)

    def _output(self, tensor: Tensor) -> Output:
        return Output(self.trace.field(tensor).ancestors, self._makers.get(_version(tensor)))

    def _describe(self, name: str, module: nn.Module, tensor: Tensor, num_tensors: int) -> Layer:
        field, maker = self.trace.field(tensor), self._makers.get(_version(tensor), name)
        # The second tensor of another layer is not that layer's output.
        alias_of = maker if maker != name and self._layer_of_node[maker] == maker else None
        inputs = {self._layer_of_node[node] for node in field.ancestors if node != IMAGE}
        layout, axes = _find_layout(tensor, field, len(self.input_shape))
        layout = self._grid_layout(name, tensor, field, layout)
        shape = tuple(layout.to_nchw(tensor).shape[1:])
        is_known = len(axes) > 0 and all(axis.is_bounded for axis in axes)
        return Layer(
            name=name,
            kind=type(module).__name__,
            shape=shape,
            receptive_field=tuple(_num_pixels(axis) for axis in axes) if is_known else None,
            stride=tuple(axis.jump for axis in axes) if is_known else None,
            origin=tuple(axis.low for axis in axes) if is_known else None,
            has_global_context=field.is_global or not is_known,
            parameters=sum(p.numel() for p in self.adapter.parameters(module)),
            alias_of=alias_of,
            allocated_bytes=self.trace.allocated_bytes,
            is_pooling="pool" in field.op or field.op == "mean",
            is_spatial=len(layout.spatial_dims) > 0 and math.prod(shape[1:]) > 1,
            layout=layout,
            inputs=(alias_of,) if alias_of else tuple(sorted(inputs)),
            num_tensors=num_tensors,
        )

    def _grid_layout(self, name: str, tensor: Tensor, field: Field, layout: Layout) -> Layout:
        """Return the layout of tokens by the grid that the user says, or that their number tells."""
        if layout.spatial_dims or tensor.ndim != 3 or len(self.input_shape) != 4:
            self.grids.add(layout, tensor)
            return layout
        if self.user_grid is not None:
            return layout_on_grid(tensor, self.user_grid) or layout
        return layout if field.axes is not None else self.grids.infer(name, tensor) or layout

    def quantization_notes(self) -> list[str]:
        """Return a note on layers that return integers."""
        if not self.num_quantized:
            return []
        return [
            f"the network is quantised: {self.num_quantized} layers return integers, which are shown as the numbers "
            "they stand for; no gradients pass through them. Methods without gradients: ablation-cam, score-cam, "
            "eigen-cam, occlusion, rise; their maps are zero where the integers leave no difference"
        ]

    def check_grid(self) -> list[str]:
        """Return notes on grids that were inferred; raise if the grid that the user says fits no layer."""
        if self.user_grid is None:
            return self.grids.notes()
        if not any(layer.layout.grid == self.user_grid for layer in self.layers):
            counts = sorted({layer.shape[0] for layer in self.layers if len(layer.shape) == 2})
            raise ConvscopeError(
                f"grid is {self.user_grid}, {math.prod(self.user_grid)} positions; no layer returns as many tokens "
                f"(the layers return {', '.join(map(str, counts)) or 'no token sequences'})"
            )
        return []


def _version(tensor: Tensor) -> _Version:
    """Identify a tensor with its values: writing in place changes the version, which inference tensors do not have."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - has no public name


def _require_scores(output: object, final: Tensor | None) -> None:
    """Refuse outputs that are not one set of scores per image."""
    is_boxes = isinstance(output, list) and any(isinstance(part, Mapping) for part in output)
    if is_boxes:
        raise ConvscopeError(
            "the network returns no scores per image but boxes; choose scores with output=lambda out: ..., or "
            "load the detector's backbone: load(detector.backbone)"
        )
    if final is not None and final.ndim > 0 and final.shape[0] != 1:
        raise ConvscopeError(
            f"the network returns no scores per image: {tuple(final.shape)} for one image, whose first axis is not "
            "the batch; bring it to the front with output=lambda out: ..., or, of a detector, load(detector.backbone)"
        )


def _find_layout(tensor: Tensor, field: Field, input_ndim: int) -> tuple[Layout, Axes]:
    """Return the layout of a layer's output, and its spatial axes, if it has any."""
    unmerged, tokens = field.unmerged_axes(tensor), field.token_axes(tensor)
    dims = [] if unmerged is None or tensor.ndim != input_ndim else [axis.dim for axis in unmerged]
    if unmerged is not None and dims == list(range(2, input_ndim)):
        return Layout(1, tuple(dims)), unmerged
    if unmerged is not None and dims == list(range(1, input_ndim - 1)):
        return Layout(input_ndim - 1, tuple(dims)), unmerged
    if tokens is not None and tensor.ndim == 3 < input_ndim and tokens[0].dim == 1:
        return Layout(2, (1,), tuple(axis.length for axis in tokens), tokens[0].prefix), tokens
    return Layout(2 if tensor.ndim == 3 < input_ndim else 1), ()


def _num_pixels(axis: Axis) -> int:
    return math.floor(axis.high - axis.low + 1e-6) + 1
