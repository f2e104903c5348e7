"""Restart a forward pass from a layer: run what comes after it many times, and what comes before it once.

The first pass caches what every call before the layer returned. Later passes run the network's own code with patched
``forward`` methods: calls that were finished before the layer return their cached outputs, the layer itself returns the
given maps, and all others run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from convscope.engine.capture import VIEW_ERROR, ForwardResult, capture_point, forward_hook, forward_pass
from convscope.engine.edits import apply_edits, patched_forward
from convscope.engine.isolation import isolated_pass
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.nested import map_tensors, replace_tensor
from convscope.errors import ConvscopeError

# In PyTorch's errors about tensors of which several positions share memory, and about views of them.
SHARED_MEMORY_ERRORS = ("single memory location", VIEW_ERROR)

_Call = tuple[str, int]  # a module's name, and the number of the call


@contextmanager
def resume_from_layer(model: Model, layer: str, x: Tensor) -> Iterator[Callable[[Tensor], ForwardResult]]:
    """Run one preprocessed image once; the block gets a function that resumes from a layer. Gradients are off.

    Parameters
    ----------
    model : Model
    layer : str
        A name in ``model.layers``.
    x : Tensor
        (1, C, H, W).

    Yields
    ------
    callable
        Takes M maps (M, C, h, w) in place of the layer's output. In the `ForwardResult` that it returns, `maps` holds
        the layer's own output for `x` (1, C, h, w), and `logits` are those of the maps (M, K).

    Raises
    ------
    ConvscopeError
        For an unknown layer, and for one that does not run or returns no tensor.
    """
    entry = model.layers.find(layer)
    modules, parameters = model.modules_and_parameters()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        cache = _PrefixCache(capture_point(model, entry), {id(module): name for name, module in modules.items()})
        with ExitStack() as hooks:
            hooks.enter_context(isolated_pass(model.module, modules.values(), parameters))
            hooks.enter_context(apply_edits(model.edits, modules))
            for module in modules.values():
                hooks.callback(module.register_forward_pre_hook(cache.on_start).remove)
                hooks.enter_context(forward_hook(module, cache.on_finish))
            forward_pass(model, x.expand(model.fixed_batch_size or 1, *x.shape[1:]).clone())
        original = cache.layer_maps()
        replay = _PrefixReplay(cache, {_call(e.name): e.layout.rows_per_image for e in model.layers})

        def run(maps: Tensor) -> ForwardResult:
            replay.begin(maps)
            try:
                with ExitStack() as patches:
                    patches.enter_context(isolated_pass(model.module, modules.values(), parameters))
                    patches.enter_context(apply_edits(model.edits, modules, cache.num_calls))
                    for name, module in modules.items():
                        patches.enter_context(patched_forward(module, replay.patch(name, module.forward)))
                    output = forward_pass(model, replay.repeat(x))
            except RuntimeError as error:
                if replay.copy_memory or not any(text in str(error) for text in SHARED_MEMORY_ERRORS):
                    raise
                replay.copy_memory = True  # the network writes into a layer's output
                return run(maps)
            return ForwardResult({entry.name: original[:1]}, model.reader.scores(output), output, tuple(x.shape[2:]))

        yield run


def _call(name: str) -> _Call:
    module, _, number = name.partition("#")
    return module, int(number or 1)


class _PrefixCache:
    """What the calls that finish before one call of a layer return: in the end, the outermost of them only."""

    def __init__(self, layer: Layer, names: Mapping[int, str]) -> None:
        self.layer = layer
        self.outputs: dict[_Call, object] = {}
        self.layer_call: _Call | None = None
        self._names = names  # of modules, by identity
        self.num_calls: dict[str, int] = {}  # of each module, that have finished
        self._frames: list[list[tuple[_Call, object]]] = [[]]  # for each running module: the calls finished inside it

    def on_start(self, *_: object) -> None:
        """Open a frame: forward pre-hook of every module."""
        if self.layer_call is None:
            self._frames.append([])

    def on_finish(self, module: nn.Module, _: object, output: object) -> None:
        """Record a call in its parent's frame: forward hook of every module."""
        if self.layer_call is not None:
            return
        self._frames.pop()
        name = self._names[id(module)]
        number = self.num_calls[name] = self.num_calls.get(name, 0) + 1
        # A copy, because the network may write into the output.
        self._frames[-1].append(((name, number), map_tensors(output, Tensor.clone)))
        if self.layer.call == (name if number == 1 else f"{name}#{number}"):
            self.layer_call = name, number
            self.outputs = dict(call for frame in self._frames for call in frame)

    def layer_maps(self) -> Tensor:
        """Return the layer's own output, channels first."""
        tensor = None if self.layer_call is None else self.layer.tensor(self.outputs[self.layer_call])
        if tensor is None:
            raise ConvscopeError(f"layer {self.layer.name!r} did not run for this input, or returned no tensor")
        return self.layer.to_nchw(tensor)


class _PrefixReplay:
    """Patches ``forward`` methods so that cached calls return their outputs and the layer returns the maps."""

    def __init__(self, cache: _PrefixCache, rows: Mapping[_Call, int]) -> None:
        self.cache, self.rows = cache, rows
        self.copy_memory = False
        self._maps = torch.empty(0)
        self._num_calls: dict[str, int] = {}

    def begin(self, maps: Tensor) -> None:
        """Start a pass in which the layer returns `maps` (M, C, h, w)."""
        self._maps = maps
        self._num_calls = {}

    def patch(self, name: str, original: Callable[..., object]) -> Callable[..., object]:
        """Return the replacement of a module's ``forward``."""

        def forward(*args: object, **kwargs: object) -> object:
            number = self._num_calls[name] = self._num_calls.get(name, 0) + 1
            call = name, number
            if call not in self.cache.outputs:
                return original(*args, **kwargs)
            repeated = map_tensors(self.cache.outputs[call], partial(self.repeat, rows=self.rows.get(call, 1)))
            return repeated if call != self.cache.layer_call else self._replace_maps(repeated)

        return forward

    def _replace_maps(self, output: object) -> object:
        tensor = self.cache.layer.tensor(output)
        if tensor is None:
            return output
        # A copy, because the network may write into it.
        maps = self.cache.layer.from_nchw(self._maps, tensor).clone()
        return replace_tensor(output, tensor, maps)

    def repeat(self, tensor: Tensor, rows: int = 1) -> Tensor:
        """Repeat one image's tensor, of `rows` rows, for all M maps.

        The copies share memory, which PyTorch refuses to write into, unless `copy_memory` is set.
        """
        if tensor.ndim > 0 and len(tensor) == rows > 1:
            return tensor.repeat(len(self._maps), *[1] * (tensor.ndim - 1))
        is_single = tensor.ndim > 0 and len(tensor) == 1 < len(self._maps)
        if is_single:
            tensor = tensor.expand(len(self._maps), *tensor.shape[1:])
        return tensor if is_single and not self.copy_memory else tensor.clone()
