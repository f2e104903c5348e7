"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convscope.engine.capture import ForwardResult, extract_logits, forward_hook, forward_pass, frozen_eval_mode
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.nested import map_tensors, primary_tensor, replace_tensor
from convscope.errors import ConvscopeError


@contextmanager
def resume_from_layer(model: Model, layer: str, x: Tensor) -> Iterator[Callable[[Tensor], ForwardResult]]:
    """Restart from a layer: run one prepared picture `x` (1, C, H, W) once, and only what lies behind `layer` again.

    The block gets a function that takes M maps (M, C, h, w) in the place of the layer's output and returns what the
    network makes of each: `maps` holds the layer's own output for `x` under its name, `logits` are (M, K). Layers that
    were done before this one return what they returned for `x`, M times; gradients are off.
    """
    row = model.layers.find(layer)
    modules, parameters = model.modules_and_parameters()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(frozen_eval_mode((model.module, *modules.values()), parameters))
        record = _PrefixCache(row, {id(module): name for name, module in modules.items()})
        with ExitStack() as hooks:
            for module in modules.values():
                hooks.callback(module.register_forward_pre_hook(record.start).remove)
                hooks.enter_context(forward_hook(module, record.done))
            forward_pass(model, x.expand(model.fixed_batch_size or 1, *x.shape[1:]).clone())
        replay = _PrefixReplay(record)
        for name, module in modules.items():
            stack.enter_context(_patched_forward(module, replay.forward(name, module.forward)))

        def run(maps: Tensor) -> ForwardResult:
            replay.begin(maps)
            try:
                output = forward_pass(model, replay.many(x))
            except RuntimeError as error:
                if replay.copies or "single memory location" not in str(error):
                    raise
                replay.copies = True  # the network writes into what a layer returned
                return run(maps)
            return ForwardResult({row.name: record.own[:1]}, extract_logits(output), output)

        yield run


class _PrefixCache:
    """What the layers that are done before one call of `row` return: in the end, the outermost of them only."""

    def __init__(self, row: Layer, names: Mapping[int, str]) -> None:
        self.row, self.names = row, names
        self.calls: dict[str, int] = {}
        self.inside: list[list[tuple[tuple[str, int], Any]]] = [[]]  # of every layer that runs: what is done inside it
        self.kept: dict[tuple[str, int], Any] = {}
        self.key: tuple[str, int] | None = None

    def start(self, *_: Any) -> None:
        if self.key is None:
            self.inside.append([])

    def done(self, module: nn.Module, _: Any, output: Any) -> None:
        if self.key is not None:
            return
        self.inside.pop()
        name = self.names[id(module)]
        call = self.calls[name] = self.calls.get(name, 0) + 1
        # A copy, because what follows may write into it.
        self.inside[-1].append(((name, call), map_tensors(output, Tensor.clone)))
        if self.row.name == (name if call == 1 else f"{name}#{call}"):
            self.key = name, call
            self.kept = dict(entry for frame in self.inside for entry in frame)

    @property
    def own(self) -> Tensor:
        """The layer's own output, NCHW."""
        tensor = None if self.key is None else primary_tensor(self.kept[self.key])
        if tensor is None:
            raise ConvscopeError(f"layer {self.row.name!r} did not run for this input, or gave no tensor")
        return self.row.to_nchw(tensor)


class _PrefixReplay:
    """Layers that were done return what they returned, the layer itself returns the maps, all others run."""

    def __init__(self, record: _PrefixCache) -> None:
        self.record = record
        self.copies = False

    def begin(self, maps: Tensor) -> None:
        self.maps = maps
        self.calls: dict[str, int] = {}

    def forward(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            call = self.calls[name] = self.calls.get(name, 0) + 1
            key = name, call
            if key not in self.record.kept:
                return own(*args, **kwargs)
            many = map_tensors(self.record.kept[key], self.many)
            if key != self.record.key:
                return many
            old = primary_tensor(many)
            assert old is not None
            # A copy, because what follows may write into it.
            return replace_tensor(many, old, self.record.row.from_nchw(self.maps, old).to(old.dtype, copy=True))

        return instead

    def many(self, tensor: Tensor) -> Tensor:
        """One picture's tensor, for all of them. Several share its memory, where torch refuses to write, unless it must
        be written into."""
        several = tensor.ndim > 0 and len(tensor) == 1 < len(self.maps)
        if several:
            tensor = tensor.expand(len(self.maps), *tensor.shape[1:])
        return tensor if several and not self.copies else tensor.clone()


@contextmanager
def _patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward` in the place of a layer's own; what the user may have put there comes back."""
    missing = object()
    before = vars(module).get("forward", missing)
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before
