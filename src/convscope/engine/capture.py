"""The one place where hooks live: watch layers, stop behind them, begin gradients at them. Restores on every exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convscope.engine.adapters import Dialect
from convscope.engine.function_modes import HeadInput, Insisting, RowsOnly
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.nested import first_tensor, with_tensor
from convscope.errors import ConvscopeError

Look = Callable[[str, Tensor], None]


class Seen(NamedTuple):
    """What one pass through the network gave: the watched layers' outputs, NCHW, and the logits (N, K), float32.

    `logits` is None when the pass was stopped behind the last watched layer. `output` is what the network itself
    returned, with the softmax or sigmoid that ended it taken off.
    """

    maps: dict[str, Tensor]
    logits: Tensor | None
    output: Any = None


@contextmanager
def settled(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
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
def attach(
    model: Model,
    layers: Sequence[str],
    *,
    leaf: bool = False,
    stop: bool = False,
    several: bool = False,
    look: Look | None = None,
) -> Iterator[Callable[[Tensor], Seen]]:
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
    pass_ = _Pass(wanted, leaf, stop, look)
    modules, parameters = model.parts()
    no_gradients = not model.owned and any(p.is_inference() for p in parameters)
    heavy = leaf and not several and model.layers.largest_matrix >= RowsOnly.WORTH
    names = dict.fromkeys(name.partition("#")[0] if name not in modules else name for name in wanted)
    insists = False

    def once(x: Tensor) -> Seen:
        pass_.begin()
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(insists or (torch.is_grad_enabled() and not leaf)))
            if insists:
                stack.enter_context(Insisting())
            if heavy and len(x) == 1:
                stack.enter_context(RowsOnly())
            try:
                output = _run(model, x)
                logits = _as_logits(model, output)
            except _Stop:
                return Seen(pass_.seen, None)
        missing = [name for name in wanted if name not in pass_.seen]
        if missing:
            raise ConvscopeError(f"layer {missing[0]!r} did not run for this input")
        return Seen(pass_.seen, logits, output)

    def run(x: Tensor) -> Seen:
        nonlocal insists
        expected = leaf or (torch.is_grad_enabled() and x.requires_grad)
        if expected and no_gradients:
            raise ConvscopeError(
                "the network's weights were made under torch.inference_mode() and let no gradients through; "
                "make the network, or copy it, outside of it"
            )
        seen = once(x)
        ends = seen.maps.values() if seen.logits is None else (seen.logits,)
        if expected and not insists and not any(end.requires_grad for end in ends):
            insists = True
            seen = once(x)
        return seen

    with ExitStack() as stack:
        gradients = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(False))  # which also turns gradients on
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(settled((model.module, *modules.values()), parameters))
        for name in names:
            stack.enter_context(_hooked(modules[name], pass_.hook(name)))
        yield run


def observe(module: nn.Module, dialect: Dialect, x: Tensor, callback: Callable[[str, nn.Module, Any], None]) -> Any:
    """One pass without gradients; `callback(name, layer, output)` is called each time a layer is done."""
    with ExitStack() as stack:
        modules = dialect.modules(module)
        stack.enter_context(settled((module, *modules.values()), dialect.parameters(module)))
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


class _Pass:
    """The state of one forward pass, shared by the hooks."""

    def __init__(self, wanted: Mapping[str, Layer], leaf: bool, stop: bool, look: Look | None) -> None:
        self.wanted, self.leaf, self.stop, self.look = wanted, leaf, stop, look
        self.begin()

    def begin(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def hook(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def on_output(_: nn.Module, __: Any, output: Any) -> Any:
            call = self.calls[name] = self.calls.get(name, 0) + 1
            layer = self.wanted.get(name if call == 1 else f"{name}#{call}")
            if layer is None:
                return None
            own = first_tensor(output)
            if own is None:
                raise ConvscopeError(f"layer {layer.name!r} gave no tensor")
            last = self.stop and len(self.seen) + 1 == len(self.wanted)
            tensor = layer.to_nchw(own)
            if self.leaf and tensor.is_inference():
                raise ConvscopeError(
                    f"layer {layer.name!r} runs under the network's own torch.inference_mode(), where there are no "
                    "gradients; put torch.no_grad() in its place, or choose a layer behind it"
                )
            if self.leaf and not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
                torch.set_grad_enabled(True)
            elif self.look is not None:
                self.look(layer.name, tensor)
                tensor = tensor[:0]
            elif not self.leaf and not last:
                tensor = tensor.clone()  # an in-place layer may follow
            self.seen[layer.name] = tensor
            if last:
                raise _Stop
            return with_tensor(output, own, layer.from_nchw(tensor, own).clone()) if self.leaf else None

        return on_output


def _run(model: Model, x: Tensor) -> Any:
    """The network's own output, without the softmax or sigmoid at its end; maps of classes as (N, K, H, W)."""
    x = x.to(device=model.device, dtype=model.dtype)
    if model.head is None:
        output = model.dialect.run(model.module, x)
    else:
        with HeadInput() as head:
            output = head.undo(model.dialect.run(model.module, x))
    if model.classes_last and (maps := first_tensor(output)) is not None:
        output = with_tensor(output, maps, maps.movedim(-1, 1))
    return output


def _as_logits(model: Model, output: Any) -> Tensor:
    tensor = first_tensor(output)
    if tensor is None:
        raise ConvscopeError(f"the network gives {type(output).__name__}, in which there is no tensor of floats")
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    # A class map (segmentation) speaks for a picture by its mean.
    return (tensor if tensor.ndim == 2 else tensor.flatten(2).mean(2)).float()
