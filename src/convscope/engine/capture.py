"""Run a network and capture the outputs of its layers with forward hooks.

`capture_layers` is the entry point. Hooks, inference mode and frozen parameters last for single passes, in which a
thread has the network to itself; between passes everything is as it was before. Gradients exist only after the captured
layers (`detach_at_layer`), so that Grad-CAM and its relatives cost little more than a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.edits import apply_edits
from convscope.engine.function_modes import ForceGradMode, LogitsRecorder
from convscope.engine.isolation import isolated_pass
from convscope.engine.layer_table import Layer
from convscope.engine.model import LOGITS, Model
from convscope.engine.nested import iter_tensors, map_tensors, replace_tensor
from convscope.errors import ConvscopeError

VIEW_ERROR = "view size is not compatible"
"""In PyTorch's error about a ``view`` of a tensor that is not contiguous."""

OutputCallback = Callable[[str, Tensor], None]
R_co = TypeVar("R_co", bound="LayerOutputs", covariant=True)


class NetworkForward(Protocol[R_co]):
    """Runs a preprocessed batch (N, C, H, W); on a copy of the network's modules, if one is given."""

    def __call__(self, x: Tensor, module: nn.Module | None = None, /) -> R_co:
        """Run a batch."""


@dataclass(frozen=True)
class LayerOutputs:
    """Outputs of the captured layers in one forward pass.

    Attributes
    ----------
    maps : dict of str to Tensor
        One entry per captured layer, channels first: (N, C, H, W) for images.
    """

    maps: dict[str, Tensor]

    def __getitem__(self, layer: str) -> Tensor:
        return self.maps[layer]


@dataclass(frozen=True)
class ForwardResult(LayerOutputs):
    """Outputs of the captured layers and of the network in one complete forward pass.

    ``result["logits"]`` is `logits`.

    Attributes
    ----------
    logits : Tensor
        (N, K) float32, before any softmax or sigmoid.
    output : object
        What the network returned, before a final softmax or sigmoid.
    input_size : tuple of int
        Sides of the input in pixels: (H, W) for images.
    """

    logits: Tensor
    output: object = None
    input_size: tuple[int, ...] = ()

    def __getitem__(self, layer: str) -> Tensor:
        return self.logits if layer == LOGITS else self.maps[layer]


@overload
def capture_layers(
    model: Model,
    layers: Sequence[str],
    *,
    detach_at_layer: bool = False,
    stop_early: Literal[False] = False,
    on_output: OutputCallback | None = None,
) -> AbstractContextManager[NetworkForward[ForwardResult]]: ...
@overload
def capture_layers(
    model: Model,
    layers: Sequence[str],
    *,
    detach_at_layer: bool = False,
    stop_early: bool,
    on_output: OutputCallback | None = None,
) -> AbstractContextManager[NetworkForward[LayerOutputs]]: ...
def capture_layers(
    model: Model,
    layers: Sequence[str],
    *,
    detach_at_layer: bool = False,
    stop_early: bool = False,
    on_output: OutputCallback | None = None,
) -> AbstractContextManager[NetworkForward[LayerOutputs]]:
    """Capture the outputs of `layers`; the block gets a function that runs a batch.

    Without `detach_at_layer`, gradients follow the caller's gradient mode. The caller's ``torch.inference_mode`` does
    not apply inside the block. If the network disables gradients itself (around a frozen stem, say), the pass is
    repeated with its ``torch.no_grad`` ignored.

    Parameters
    ----------
    model : Model
        The network; unchanged after the block.
    layers : sequence of str
        Names in ``model.layers``.
    detach_at_layer : bool
        Run without gradients up to the layers, and make each layer's output a new leaf from which gradients are
        recorded: ``torch.autograd.grad(result.logits[...], result.maps[layer])``. A copy of the leaf is passed on, so
        that a following in-place activation cannot change what was captured.
    stop_early : bool
        Stop after the last of the layers. There are no logits then.
    on_output : callable, optional
        ``on_output(layer, maps)``, called with the maps (N, C, H, W) as soon as they exist. Later layers may change
        them in place. Nothing is copied, and `maps` in the result holds empty tensors.

    Returns
    -------
    context manager of callable
        The callable takes a preprocessed batch (N, C, H, W) and returns a `ForwardResult`, or `LayerOutputs` with
        `stop_early`.

    Raises
    ------
    ConvscopeError
        For an unknown layer; when a batch is run: for a layer that does not run or returns no tensor, and where
        gradients are impossible because tensors were created under ``torch.inference_mode``.
    """
    return _capture(_CaptureState(model, layers, detach_at_layer, stop_early, on_output))


def run_with_callback(
    module: nn.Module, adapter: FrameworkAdapter, x: Tensor, callback: Callable[[str, nn.Module, object], None]
) -> object:
    """Run `x` without gradients; call ``callback(name, layer, output)`` whenever a layer finishes."""
    with ExitStack() as stack:
        modules = adapter.modules(module)
        stack.enter_context(isolated_pass(module, modules.values(), adapter.parameters(module)))
        stack.enter_context(torch.no_grad())
        for name, layer in modules.items():

            def hook(layer: nn.Module, _: object, output: object, name: str = name) -> None:
                callback(name, layer, output)

            stack.enter_context(forward_hook(layer, hook))
        return adapter.run(module, x)


@contextmanager
def forward_hook(layer: nn.Module, hook: Callable[..., object]) -> Iterator[None]:
    """Register a forward hook for the duration of the block."""
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def forward_pass(model: Model, x: Tensor, module: nn.Module | None = None) -> object:
    """Run the network, or a copy of its modules, and return its own output, before a final softmax or sigmoid.

    Class maps (N, H, W, K) are returned as (N, K, H, W).
    """
    x, module = model.as_input(x), model.module if module is None else module
    if model.final_activation is None:
        output = model.adapter.run(module, x)
    else:
        with LogitsRecorder() as recorder:
            output = model.adapter.run(module, x)
            output = recorder.pre_activation(output, model.reader.tensor(output))
    if model.channels_last_output and (maps := model.reader.tensor(output)) is not None:
        output = replace_tensor(output, maps, maps.movedim(-1, 1))
    return output


def capture_point(model: Model, layer: Layer) -> Layer:
    """Return the layer at which gradients of a layer's tensor begin.

    That is the layer itself or, if it returns the tensor of an earlier layer among others, that layer.
    """
    is_earlier = layer.num_tensors > 1 and layer.alias_of is not None
    return model.layers.find(layer.alias_of) if is_earlier and layer.alias_of is not None else layer


def _gradient_copy(tensor: Tensor) -> Tensor:
    """Return a copy that gradients are recorded from, which the network may write into."""
    is_usable = tensor.is_floating_point() and not tensor.is_inference()
    return tensor.detach().requires_grad_().clone() if is_usable else tensor


class _StopForward(BaseException):
    """Unwinds a forward pass whose rest is not needed; a network's own handlers do not catch a BaseException."""


class _CaptureState:
    """State of `capture_layers`: the hooks and the forward pass share it."""

    def __init__(
        self,
        model: Model,
        layers: Sequence[str],
        detach_at_layer: bool,
        stop_early: bool,
        on_output: OutputCallback | None,
    ) -> None:
        self.model = model
        self.layers: Mapping[str, Layer] = {(layer := model.layers.find(name)).name: layer for name in layers}
        # The layers and the points at which they are captured, by the call of a module.
        self.points: dict[str, list[tuple[Layer, Layer]]] = {}
        for layer in self.layers.values():
            point = capture_point(model, layer) if detach_at_layer else layer
            self.points.setdefault(point.call, []).append((layer, point))
        self.detach_at_layer, self.stop_early, self.on_output = detach_at_layer, stop_early, on_output
        self.modules, self.parameters = model.modules_and_parameters()
        self.inference_weights = not model.loaded_by_convscope and any(p.is_inference() for p in self.parameters)
        self.force_grad = False
        self.outputs: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    @property
    def hooked_modules(self) -> list[str]:
        """Names of the modules whose calls are the layers, without call numbers."""
        return list(dict.fromkeys(n if n in self.modules else n.partition("#")[0] for n in self.points))

    @property
    def recorded_modules(self) -> set[str]:
        """Names of the modules that must be recorded as well, because they return several tensors."""
        points = [p for p, pairs in self.points.items() if any(layer.num_tensors > 1 for layer, _ in pairs)]
        return {p if p in self.modules else p.partition("#")[0] for p in points} if self.detach_at_layer else set()

    def run(self, x: Tensor, module: nn.Module | None = None, /) -> LayerOutputs:
        """Run a batch; repeat with gradients forced where the network disables gradients that are needed."""
        needs_grad = self.detach_at_layer or (torch.is_grad_enabled() and x.requires_grad)
        if needs_grad and self.inference_weights:
            raise ConvscopeError(
                "the network's parameters were created under torch.inference_mode() and pass no gradients on; "
                "create or copy the network outside of it"
            )
        result = self._run_once(x, module)
        ends = [result.logits] if isinstance(result, ForwardResult) else result.maps.values()
        if needs_grad and not self.force_grad and not any(end.requires_grad for end in ends):
            self.force_grad = True
            result = self._run_once(x, module)
        return result

    def _run_once(self, x: Tensor, module: nn.Module | None) -> LayerOutputs:
        self.outputs, self.calls = {}, {}
        with ExitStack() as stack:
            caller_grad = torch.is_grad_enabled() and not self.detach_at_layer
            stack.enter_context(isolated_pass(self.model.module, self.modules.values(), self.parameters))
            if self.model.edits:
                stack.enter_context(apply_edits(self.model.edits, self.modules))
            for name in self.hooked_modules:
                stack.enter_context(forward_hook(self.modules[name], self.hook(name)))
                if name in self.recorded_modules:
                    pre_hook = self.modules[name].register_forward_pre_hook(self.pre_hook(name), with_kwargs=True)
                    stack.callback(pre_hook.remove)
            stack.enter_context(torch.set_grad_enabled(self.force_grad or caller_grad))
            if self.force_grad:
                stack.enter_context(ForceGradMode())
            try:
                output = forward_pass(self.model, x, module)
                logits = self.model.reader.scores(output)
            except _StopForward:
                return LayerOutputs(self.outputs)
        missing = [name for name in self.layers if name not in self.outputs]
        if missing:
            raise ConvscopeError(f"layer {missing[0]!r} did not run for this input")
        return ForwardResult(self.outputs, logits, output, tuple(x.shape[2:]))

    def hook(self, name: str) -> Callable[[nn.Module, object, object], object]:
        """Return the forward hook of the module called `name`."""

        def count_and_record(_: nn.Module, __: object, output: object) -> object:
            call = self.calls[name] = self.calls.get(name, 0) + 1
            for layer, point in self.points.get(name if call == 1 else f"{name}#{call}", ()):
                replacement = self._record(layer.name, point, output)
                output = output if replacement is None else replacement
            return output if self.detach_at_layer else None

        return count_and_record

    def pre_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        """Return the forward pre-hook of the module called `name`.

        A layer may make one of its tensors of another: a map, and the pooled map. The map's gradient then exists only
        if the layer itself is recorded.
        """

        def record_from_here(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self.calls.get(name, 0) + 1
            pairs = self.points.get(name if call == 1 else f"{name}#{call}", ())
            is_recorded = any(tensor.requires_grad for tensor in iter_tensors((args, kwargs)))
            if is_recorded or not any(layer.num_tensors > 1 for layer, _ in pairs):
                return None
            torch.set_grad_enabled(True)
            return map_tensors((args, kwargs), _gradient_copy)

        return record_from_here

    def _record(self, name: str, layer: Layer, output: object) -> object:
        """Record a layer's output under a name; return its replacement, or None to leave it as it is."""
        original = layer.tensor(output)
        if original is None:
            raise ConvscopeError(f"layer {name!r} returned no tensor")
        is_last = self.stop_early and len(self.outputs) + 1 == len(self.layers)
        tensor = layer.to_nchw(original)
        if self.detach_at_layer and tensor.is_inference():
            raise ConvscopeError(
                f"layer {name!r} runs under the network's own torch.inference_mode(), which allows no gradients; "
                "use torch.no_grad() there, or choose a later layer"
            )
        if self.detach_at_layer and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
            torch.set_grad_enabled(True)
        elif self.on_output is not None:
            self.on_output(name, tensor)
            tensor = tensor[:0]
        elif not self.detach_at_layer and not is_last:
            tensor = tensor.clone()  # an in-place layer may follow
        self.outputs[name] = tensor
        if is_last:
            raise _StopForward
        if not self.detach_at_layer:
            return None
        return replace_tensor(output, original, layer.from_nchw(tensor, original).clone())


@contextmanager
def _capture(state: _CaptureState) -> Iterator[NetworkForward[LayerOutputs]]:
    with ExitStack() as stack:
        grad_enabled = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(False))  # which also enables gradients
        stack.enter_context(torch.set_grad_enabled(grad_enabled))
        yield state.run
