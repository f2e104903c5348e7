"""Edits: functions that replace the output of layers whenever the network runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from convscope.engine.layer_table import Layer
from convscope.engine.nested import primary_tensor, replace_tensor
from convscope.errors import ConvscopeError

MapFunction = Callable[[Tensor], Tensor]
"""Takes a layer's output (N, C, H, W) and returns a tensor of the same shape."""


@dataclass(frozen=True)
class LayerEdit:
    """An edit of one layer.

    Attributes
    ----------
    layer : Layer
    function : callable
        Takes the layer's output, channels first: (N, C, H, W) for images. Returns a tensor of the same shape.
    description : str
        What the edit does, such as "unit 17 set to 0".
    fingerprint : bytes
        Identifies the function and its values.
    modules : mapping of str to nn.Module
        Modules that the function calls, by the names under which they are layers of the edited model.
    """

    layer: Layer
    function: MapFunction
    description: str
    fingerprint: bytes
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    def apply(self, output: object) -> object:
        """Return the layer's output with the function applied; raise ConvscopeError for another shape."""
        tensor = primary_tensor(output)
        if tensor is None:
            return output
        maps = self.layer.to_nchw(tensor)
        edited = self.function(maps.clone())
        if not isinstance(edited, Tensor) or edited.shape != maps.shape:
            kind = tuple(edited.shape) if isinstance(edited, Tensor) else f"a {type(edited).__name__}"
            raise ConvscopeError(
                f"the edit of layer {self.layer.name!r} returned {kind}; expected a tensor of shape {tuple(maps.shape)}"
            )
        return replace_tensor(output, tensor, self.layer.from_nchw(edited.to(maps), tensor))


def digest_edits(edits: Sequence[LayerEdit]) -> bytes:
    """Return bytes that identify edits; empty if there are none."""
    digest = hashlib.sha256()
    for edit in edits:
        digest.update(f"{edit.layer.name} {edit.description} ".encode() + edit.fingerprint)
    return digest.digest() if edits else b""


@contextmanager
def apply_edits(
    edits: Sequence[LayerEdit], modules: Mapping[str, nn.Module], calls: Mapping[str, int] | None = None
) -> Iterator[None]:
    """Edit the outputs of layers inside the block; hooks see the edited outputs.

    Parameters
    ----------
    edits : sequence of LayerEdit
        Applied in this order where several concern one layer.
    modules : mapping of str to nn.Module
        All layers of the network by name.
    calls : mapping of str to int, optional
        The number of calls of each module that have already run, in a pass that starts in the middle of the network.
    """
    names = {name if (name := edit.layer.name) in modules else name.partition("#")[0] for edit in edits}
    with ExitStack() as stack:
        for name in names:
            forward = _edited_forward(name, modules[name].forward, edits, (calls or {}).get(name, 0))
            stack.enter_context(patched_forward(modules[name], forward))
        yield


def _edited_forward(
    name: str, original: Callable[..., object], edits: Sequence[LayerEdit], num_calls: int
) -> Callable[..., object]:
    def forward(*args: object, **kwargs: object) -> object:
        nonlocal num_calls
        output = original(*args, **kwargs)
        num_calls += 1
        call = name if num_calls == 1 else f"{name}#{num_calls}"
        for edit in edits:
            if edit.layer.name == call:
                output = edit.apply(output)
        return output

    return forward


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Replace a module's ``forward`` for the duration of the block, whatever it was."""
    missing = object()
    original = vars(module).get("forward", missing)
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if original is missing:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = original
