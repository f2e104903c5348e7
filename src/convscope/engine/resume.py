"""Restart a forward pass from a layer: run what comes after it many times, and what comes before it once.

The first pass caches what every call before the layer returned. Later passes run the network's own code with patched
``forward`` methods: calls that were finished before the layer return their cached outputs, the layer itself returns the
given maps, and all others run. Maps of several images can share a pass; whether that is exact is tried first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from convscope.engine.acceleration import accelerate
from convscope.engine.batching import pad_to_fixed_batch
from convscope.engine.capture import VIEW_ERROR, ForwardResult, capture_point, forward_hook, forward_pass
from convscope.engine.edits import apply_edits, patched_forward
from convscope.engine.isolation import isolated_pass
from convscope.engine.layer_table import Layer
from convscope.engine.layouts import Layout
from convscope.engine.model import Model
from convscope.engine.nested import map_tensors, replace_tensor
from convscope.errors import ConvscopeError

# In PyTorch's errors about tensors of which several positions share memory, and about views of them.
SHARED_MEMORY_ERRORS = ("single memory location", VIEW_ERROR)

RTOL = 1e-5  # of the largest logit: rounding

_Call = tuple[str, int]  # a module's name, and the number of the call


class ResumedForward:
    """Runs the part of a network after a layer, on maps that take the place of the layer's output. Gradients are off.

    Attributes
    ----------
    original : ForwardResult
        The first pass: the layer's own output (B, C, h, w), and the logits (B, K), of the images and of what pads them
        to a fixed batch size.
    is_exact : bool
        Whether a pass over maps of several images equals a full one, which is tried with two of them. If not, resume
        one image at a time.
    """

    def __init__(self, model: Model, layer: Layer, x: Tensor) -> None:
        self._model, self._layer, self._x = model, layer, pad_to_fixed_batch(model, x)
        self._modules, self._parameters = model.modules_and_parameters()
        self._run: Callable[[Tensor], object] = partial(self._resume, module=model.module)
        cache, output = self._first_pass()
        layouts = {_call(entry.name): entry.layout for entry in model.layers}
        self._replay = _PrefixReplay(cache, layouts, len(self._x))
        maps = {layer.name: cache.layer_maps()}
        self.original = ForwardResult(maps, model.reader.scores(output), output, tuple(x.shape[2:]))
        self.is_exact = len(x) == 1 or self._find_exact_mode()

    def __call__(self, maps: Tensor, rows: Tensor | None = None) -> ForwardResult:
        """Resume from maps.

        Parameters
        ----------
        maps : Tensor of shape (M, C, h, w)
        rows : Tensor of shape (M,), optional
            The image that each of the maps takes part in; needed where there are several.

        Returns
        -------
        ForwardResult
            `logits` are those of the maps (M, K); `maps` holds the layer's own output, as in `original`.
        """
        rows = torch.zeros(len(maps), dtype=torch.long) if rows is None else rows
        self._replay.rows = torch.cat([rows, rows[-1:].expand(len(maps) - len(rows))]).to(maps.device)
        try:
            output = self._run(maps)
        except RuntimeError as error:
            if self._replay.copy_memory or not any(text in str(error) for text in SHARED_MEMORY_ERRORS):
                raise
            self._replay.copy_memory = True  # the network writes into a layer's output
            return self(maps, rows)
        return ForwardResult(self.original.maps, self._model.reader.scores(output), output, tuple(self._x.shape[2:]))

    def accelerate(self) -> None:
        """Make the passes that follow faster if possible, at the cost of three passes of one map."""
        example = pad_to_fixed_batch(self._model, self.original.maps[self._layer.name][:1])
        self._replay.rows = torch.zeros(len(example), dtype=torch.long, device=example.device)
        self._run = accelerate(self._resume, self._model.module, example, enabled=self._model.can_accelerate, rtol=RTOL)

    def _resume(self, maps: Tensor, module: nn.Module) -> object:
        """Run the network, or a copy of its modules, with `maps` in place of the layer's output; return its output."""
        is_copy = module is not self._model.module
        modules = self._modules | self._model.adapter.modules(module) if is_copy else self._modules
        self._replay.begin(maps)
        with ExitStack() as patches:
            patches.enter_context(isolated_pass(self._model.module, self._modules.values(), self._parameters))
            patches.enter_context(apply_edits(self._model.edits, modules, self._replay.cache.num_calls))
            for name, layer in modules.items():
                patches.enter_context(patched_forward(layer, self._replay.patch(name, layer.forward)))
            return forward_pass(self._model, self._replay.repeat(self._x, Layout(1)), module)

    def _first_pass(self) -> tuple[_PrefixCache, object]:
        """Run the images once; return what calls before the layer returned, and the network's output."""
        cache, output = self._record_pass(copy_all=False)
        return (cache, output) if cache.is_copied else self._record_pass(copy_all=True)

    def _record_pass(self, *, copy_all: bool) -> tuple[_PrefixCache, object]:
        names = {id(module): name for name, module in self._modules.items()}
        cache = _PrefixCache(capture_point(self._model, self._layer), names, copy_all=copy_all)
        with ExitStack() as hooks:
            hooks.enter_context(isolated_pass(self._model.module, self._modules.values(), self._parameters))
            hooks.enter_context(apply_edits(self._model.edits, self._modules))
            for module in self._modules.values():
                hooks.callback(module.register_forward_pre_hook(cache.on_start).remove)
                hooks.enter_context(forward_hook(module, cache.on_finish))
            output = forward_pass(self._model, self._x.clone())
        return cache, output

    def _find_exact_mode(self) -> bool:
        """Try two images in reverse order: with the layer's output alone, then with all cached outputs."""
        rows = torch.tensor([1, 0])
        maps = pad_to_fixed_batch(self._model, self.original.maps[self._layer.name][:2].flip(0))
        expected = self.original.logits[:2].flip(0)
        for layer_only in (True, False):
            self._replay.layer_only = layer_only
            try:
                logits = self(maps, rows).logits[:2]
            except RuntimeError:  # shapes that do not fit together
                continue
            if bool(((logits - expected).abs() <= RTOL * expected.abs().max()).all()):
                return True
        return False


@contextmanager
def resume_from_layer(model: Model, layer: str, x: Tensor) -> Iterator[ResumedForward]:
    """Run preprocessed images once; the block gets a function that resumes from a layer. Gradients are off.

    Parameters
    ----------
    model : Model
    layer : str
        A name in ``model.layers``.
    x : Tensor
        (B, C, H, W).

    Yields
    ------
    ResumedForward
        Takes M maps (M, C, h, w) in place of the layer's output, and returns their logits (M, K).

    Raises
    ------
    ConvscopeError
        For an unknown layer, and for one that does not run or returns no tensor.
    """
    entry = model.layers.find(layer)
    with torch.inference_mode(False), torch.no_grad():
        yield ResumedForward(model, entry, x)


def _call(name: str) -> _Call:
    module, _, number = name.rpartition("#")
    return (module, int(number)) if module and number.isdecimal() else (name, 1)


class _PrefixCache:
    """What the calls that finish before one call of a layer return: in the end, the outermost of them only.

    Outputs are copied, because the network may write into them: those of calls that are outermost if modules run inside
    those that their names are in, or all.
    """

    def __init__(self, layer: Layer, names: Mapping[int, str], *, copy_all: bool) -> None:
        self.layer = layer
        self.outputs: dict[_Call, object] = {}
        self.layer_call: _Call | None = None
        self.is_copied = True  # every output that is needed
        self._names = names  # of modules, by identity
        self._parents = {layer.call[: m.start()] for m in re.finditer(r"[./]", layer.call)}
        self._copy_all = copy_all
        self._running: list[str] = []
        self.num_calls: dict[str, int] = {}  # of each module, that have finished
        # For each running module: the calls finished inside it, their outputs, and whether these are copies.
        self._frames: list[list[tuple[_Call, object, bool]]] = [[]]

    def on_start(self, module: nn.Module, _: object) -> None:
        """Open a frame: forward pre-hook of every module."""
        if self.layer_call is None:
            self._frames.append([])
            self._running.append(self._names[id(module)])

    def on_finish(self, _: nn.Module, __: object, output: object) -> None:
        """Record a call in its parent's frame: forward hook of every module."""
        if self.layer_call is not None:
            return
        self._frames.pop()
        name = self._running.pop()
        number = self.num_calls[name] = self.num_calls.get(name, 0) + 1
        copy = self._copy_all or self._parents.issuperset(self._running)
        self._frames[-1].append(((name, number), map_tensors(output, Tensor.clone) if copy else output, copy))
        if self.layer.call == (name if number == 1 else f"{name}#{number}"):
            self.layer_call = name, number
            calls = [call for frame in self._frames for call in frame]
            self.outputs = {call: output for call, output, _ in calls}
            self.is_copied = all(is_copy for _, _, is_copy in calls)

    def layer_maps(self) -> Tensor:
        """Return the layer's own output, channels first."""
        tensor = None if self.layer_call is None else self.layer.tensor(self.outputs[self.layer_call])
        if tensor is None:
            raise ConvscopeError(f"layer {self.layer.name!r} did not run for this input, or returned no tensor")
        return self.layer.to_nchw(tensor)


class _PrefixReplay:
    """Patches ``forward`` methods so that cached calls return their outputs and the layer returns the maps.

    Attributes
    ----------
    cache : _PrefixCache
    layouts : mapping of call to Layout
        Of the calls whose outputs depend on the image.
    num_images : int
    rows : Tensor of shape (M,)
        The image that each of the maps of a pass takes part in.
    copy_memory : bool
        Whether outputs for several maps are copies, which the network may write into.
    layer_only : bool
        Whether other cached outputs are not needed and stand-ins are returned for them.
    """

    def __init__(self, cache: _PrefixCache, layouts: Mapping[_Call, Layout], num_images: int) -> None:
        self.cache, self.layouts, self.num_images = cache, layouts, num_images
        self.copy_memory = self.layer_only = False
        self.rows = torch.empty(0, dtype=torch.long)
        self._maps = torch.empty(0)
        self._num_calls: dict[str, int] = {}

    def begin(self, maps: Tensor) -> None:
        """Start a pass in which the layer returns `maps` (M, C, h, w) for the images `rows` (M,)."""
        self._maps = maps
        self._num_calls = {}

    def patch(self, name: str, original: Callable[..., object]) -> Callable[..., object]:
        """Return the replacement of a module's ``forward``."""

        def forward(*args: object, **kwargs: object) -> object:
            number = self._num_calls[name] = self._num_calls.get(name, 0) + 1
            call = name, number
            if call not in self.cache.outputs:
                return original(*args, **kwargs)
            is_layer = call == self.cache.layer_call
            select = self._select if is_layer else self.repeat
            output = map_tensors(self.cache.outputs[call], partial(select, layout=self.layouts.get(call)))
            return self._replace_maps(output) if is_layer else output

        return forward

    def _replace_maps(self, output: object) -> object:
        tensor = self.cache.layer.tensor(output)
        if tensor is None:
            return output
        # A copy, because the network may write into it.
        maps = self.cache.layer.from_nchw(self._maps, tensor).clone()
        return replace_tensor(output, tensor, maps)

    def repeat(self, tensor: Tensor, layout: Layout | None) -> Tensor:
        """Return a cached tensor for all M maps, or its stand-in: NaN of the same shape.

        What NaN takes part in is NaN, so that a use of a stand-in shows.
        """
        if not self.layer_only:
            return self._select(tensor, layout)
        if layout is None or tensor.ndim == 0:
            return tensor.clone()
        shape = list(tensor.shape)
        dim = min(layout.batch_dim, tensor.ndim - 1)
        shape[dim] = shape[dim] // self.num_images * len(self._maps)
        value = torch.full((), torch.nan if tensor.is_floating_point() else 0, device=tensor.device)
        stand_in = value.to(tensor.dtype).expand(shape)
        return stand_in.clone() if self.copy_memory else stand_in

    def _select(self, tensor: Tensor, layout: Layout | None) -> Tensor:
        """Return for each of the M maps the rows of its image; of one image, copies that share memory.

        PyTorch refuses to write into shared memory, unless `copy_memory` is set.
        """
        rows = 1 if layout is None else layout.rows_per_image
        if self.num_images > 1:
            return self._select_rows(tensor, layout)
        if tensor.ndim > 0 and len(tensor) == rows > 1:
            return tensor.repeat(len(self._maps), *[1] * (tensor.ndim - 1))
        is_single = tensor.ndim > 0 and len(tensor) == 1 < len(self._maps)
        if is_single:
            tensor = tensor.expand(len(self._maps), *tensor.shape[1:])
        return tensor if is_single and not self.copy_memory else tensor.clone()

    def _select_rows(self, tensor: Tensor, layout: Layout | None) -> Tensor:
        if layout is None or tensor.ndim == 0:  # the same for all images
            return tensor.clone()
        if layout.batch_dim and tensor.ndim > layout.batch_dim:
            return tensor.index_select(layout.batch_dim, self.rows)
        if len(tensor) != self.num_images * layout.rows_per_image:
            return tensor.clone()
        images = tensor.reshape(self.num_images, layout.rows_per_image, *tensor.shape[1:])
        return images[self.rows].flatten(0, 1)
