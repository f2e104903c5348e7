"""The one place where hooks live: watch layers, stop behind them, begin gradients at them. Restores on every exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.function_modes import ForceGradMode, LogitsRecorder, RowsOnly
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.nested import primary_tensor, replace_tensor
from convscope.errors import ConvscopeError

OutputCallback = Callable[[str, Tensor], None]


class ForwardResult(NamedTuple):
    """What one pass through the network gave: the watched layers' outputs, NCHW, and the logits (N, K), float32.

    `logits` is None when the pass was stopped behind the last watched layer. `output` is what the network itself
    returned, with the softmax or sigmoid that ended it taken off.
    """

    maps: dict[str, Tensor]
    logits: Tensor | None
    output: Any = None


@contextmanager
def frozen_eval_mode(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inference mode without parameter gradients, for as long as the block lasts; every flag is put back behind it."""
    training = [m for m in modules if m.training]
    # Weights made under inference_mode never get gradients, and may not be told so.
    learning = [p for p in parameters if p.requires_grad and not p.is_inference()]
    try:
        for m in training:
            m.training = False
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for m in training:
            m.training = True


@contextmanager
def capture_layers(
    model: Model,
    layers: Sequence[str],
    *,
    detach_at_layer: bool = False,
    stop_early: bool = False,
    multiple_backward: bool = False,
    on_output: OutputCallback | None = None,
) -> Iterator[Callable[[Tensor], ForwardResult]]:
    """Watch `layers`; the block gets a function that runs a prepared NCHW batch through the network.

    leaf: the part in front of the layers runs without gradients; at each layer that has none yet a fresh leaf takes
        the output's place, and gradients exist only behind it: `torch.autograd.grad(logits[...], maps[layer])`.
        A copy of it goes on, so that an in-place activation behind the layer cannot change what was seen.
    stop: nothing behind the last of the layers runs, and `logits` is None.
    several: several gradients will be taken at once, so nothing is to be saved by what only one of them needs.
    look: is given each layer's name and maps (N, C, H, W) as soon as they are made, which may change behind it; nothing
        is copied or kept then, and `maps` holds empty tensors.

    Without `leaf`, the pass runs in the caller's gradient mode; the caller's `inference_mode` is left for the block.
    A network that turns gradients off by itself, around a frozen front part say, is run again with its `no_grad` passed
    over. Raises ConvscopeError for an unknown layer.
    """
    wanted = {(row := model.layers.find(name)).name: row for name in layers}
    pass_ = _CaptureState(wanted, detach_at_layer, stop_early, on_output)
    modules, parameters = model.modules_and_parameters()
    no_gradients = not model.loaded_by_convscope and any(p.is_inference() for p in parameters)
    heavy = detach_at_layer and not multiple_backward and model.layers.largest_matrix >= RowsOnly.WORTH
    names = dict.fromkeys(name.partition("#")[0] if name not in modules else name for name in wanted)
    force_grad = False

    def once(x: Tensor) -> ForwardResult:
        pass_.begin()
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(force_grad or (torch.is_grad_enabled() and not detach_at_layer)))
            if force_grad:
                stack.enter_context(ForceGradMode())
            if heavy and len(x) == 1:
                stack.enter_context(RowsOnly())
            try:
                output = _run(model, x)
                logits = _as_logits(model, output)
            except _Stop:
                return ForwardResult(pass_.outputs, None)
        missing = [name for name in wanted if name not in pass_.outputs]
        if missing:
            raise ConvscopeError(f"layer {missing[0]!r} did not run for this input")
        return ForwardResult(pass_.outputs, logits, output)

    def run(x: Tensor) -> ForwardResult:
        nonlocal force_grad
        expected = detach_at_layer or (torch.is_grad_enabled() and x.requires_grad)
        if expected and no_gradients:
            raise ConvscopeError(
                "the network's weights were made under torch.inference_mode() and let no gradients through; "
                "make the network, or copy it, outside of it"
            )
        seen = once(x)
        ends = seen.maps.values() if seen.logits is None else (seen.logits,)
        if expected and not force_grad and not any(end.requires_grad for end in ends):
            force_grad = True
            seen = once(x)
        return seen

    with ExitStack() as stack:
        gradients = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(False))  # which also turns gradients on
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(frozen_eval_mode((model.module, *modules.values()), parameters))
        for name in names:
            stack.enter_context(_hooked(modules[name], pass_.hook(name)))
        yield run


def run_with_callback(
    module: nn.Module, dialect: FrameworkAdapter, x: Tensor, callback: Callable[[str, nn.Module, Any], None]
) -> Any:
    """One pass without gradients; `callback(name, layer, output)` is called each time a layer is done."""
    with ExitStack() as stack:
        modules = dialect.modules(module)
        stack.enter_context(frozen_eval_mode((module, *modules.values()), dialect.parameters(module)))
        stack.enter_context(torch.no_grad())
        for name, layer in modules.items():

            def hook(layer: nn.Module, _: Any, output: Any, name: str = name) -> None:
                callback(name, layer, output)

            stack.enter_context(_hooked(layer, hook))
        return dialect.run(module, x)


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Stop(BaseException):
    """Unwinds a forward pass whose rest is not needed; no handler of the network's own catches a BaseException."""


class _CaptureState:
    """The state of one forward pass, shared by the hooks."""

    def __init__(self, wanted: Mapping[str, Layer], leaf: bool, stop: bool, look: OutputCallback | None) -> None:
        self.layers, self.detach_at_layer, self.stop_early, self.on_output = wanted, leaf, stop, look
        self.begin()

    def begin(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def hook(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def on_output(_: nn.Module, __: Any, output: Any) -> Any:
            call = self.calls[name] = self.calls.get(name, 0) + 1
            layer = self.layers.get(name if call == 1 else f"{name}#{call}")
            if layer is None:
                return None
            own = primary_tensor(output)
            if own is None:
                raise ConvscopeError(f"layer {layer.name!r} gave no tensor")
            last = self.stop_early and len(self.outputs) + 1 == len(self.layers)
            tensor = layer.to_nchw(own)
            if self.detach_at_layer and tensor.is_inference():
                raise ConvscopeError(
                    f"layer {layer.name!r} runs under the network's own torch.inference_mode(), where there are no "
                    "gradients; put torch.no_grad() in its place, or choose a layer behind it"
                )
            if self.detach_at_layer and not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
                torch.set_grad_enabled(True)
            elif self.on_output is not None:
                self.on_output(layer.name, tensor)
                tensor = tensor[:0]
            elif not self.detach_at_layer and not last:
                tensor = tensor.clone()  # an in-place layer may follow
            self.outputs[layer.name] = tensor
            if last:
                raise _Stop
            return replace_tensor(output, own, layer.from_nchw(tensor, own).clone()) if self.detach_at_layer else None

        return on_output


def _run(model: Model, x: Tensor) -> Any:
    """The network's own output, without the softmax or sigmoid at its end; maps of classes as (N, K, H, W)."""
    x = x.to(device=model.device, dtype=model.dtype)
    if model.final_activation is None:
        output = model.adapter.run(model.module, x)
    else:
        with LogitsRecorder() as head:
            output = head.pre_activation(model.adapter.run(model.module, x))
    if model.channels_last_output and (maps := primary_tensor(output)) is not None:
        output = replace_tensor(output, maps, maps.movedim(-1, 1))
    return output


def _as_logits(model: Model, output: Any) -> Tensor:
    tensor = primary_tensor(output)
    if tensor is None:
        raise ConvscopeError(f"the network gives {type(output).__name__}, in which there is no tensor of floats")
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    # A class map (segmentation) speaks for a picture by its mean.
    return (tensor if tensor.ndim == 2 else tensor.flatten(2).mean(2)).float()
