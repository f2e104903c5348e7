"""Isolation of forward passes: what a pass needs to be exact, repeatable and without side effects.

Inside `isolated_pass` one thread has the network to itself, the network is in inference mode with frozen parameters,
buffers that it writes to are copies, attributes that it sets are set back, and gradient checkpointing is off. On exit
everything is as it was before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

from torch import Size, Tensor, nn
from torch.utils import checkpoint

from convscope.engine.function_modes import without_function_modes

# In inference mode these read their buffers and never write them.
READ_ONLY_BUFFERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Of attributes; flags such as `built` of Keras stay, as what they stand for does.
RESTORED_TYPES = frozenset({int, float, tuple, Size, Tensor})

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def isolated_pass(
    module: nn.Module, modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Prepare a network for one forward pass; restore it on exit.

    Parameters
    ----------
    module : nn.Module
        The network.
    modules : iterable of nn.Module
        Its layers.
    parameters : iterable of nn.Parameter
        All of its parameters.
    """
    modules = (module, *modules)
    with ExitStack() as stack:
        stack.enter_context(exclusive_access(module))
        stack.enter_context(frozen_eval_mode(modules, parameters))
        stack.enter_context(temporary_buffers(modules))
        stack.enter_context(temporary_attributes(modules))
        stack.enter_context(without_checkpointing())
        yield


# --- threads ---------------------------------------------------------------------------------------------------------


@contextmanager
def exclusive_access(module: nn.Module) -> Iterator[None]:
    """Let one thread at a time use or modify a network; that thread may enter again."""
    with _locks_lock:
        lock = _locks.setdefault(module, threading.RLock())
    with lock:
        yield


def _forget_locks() -> None:
    """Drop all locks in a forked process, where the threads that held them do not exist."""
    global _locks_lock, _checkpointing_lock
    _locks_lock, _checkpointing_lock = threading.Lock(), threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


# --- flags and buffers -----------------------------------------------------------------------------------------------


@contextmanager
def frozen_eval_mode(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Set eval mode and freeze parameters inside the block; restore every flag on exit."""
    training = [m for m in modules if m.training]
    # Inference tensors never get gradients, and `requires_grad_` raises on them.
    with without_function_modes():  # active modes need not see how parameters are inspected
        trainable = [p for p in parameters if p.requires_grad and not p.is_inference()]
    try:
        for m in training:
            m.training = False
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for m in training:
            m.training = True


@contextmanager
def temporary_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules copies of their buffers inside the block, so that the originals are never written.

    Observers of quantisation and caches write to buffers in inference mode too. Batch normalisation does not, and keeps
    its own.
    """
    with_buffers = [m for m in modules if m._buffers and not isinstance(m, READ_ONLY_BUFFERS)]  # noqa: SLF001
    original = [(m, dict(m._buffers)) for m in with_buffers]  # noqa: SLF001
    copies: dict[int, Tensor] = {}  # modules may share a buffer
    try:
        for m, buffers in original:
            for name, buffer in buffers.items():
                if buffer is not None:
                    m._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())  # noqa: SLF001
        yield
    finally:
        for m, buffers in original:
            m._buffers.clear()  # noqa: SLF001
            m._buffers.update(buffers)  # noqa: SLF001


@contextmanager
def temporary_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set numbers, tuples and tensors that modules keep in attributes back on exit.

    Some networks adapt to the size of each image: Swin of transformers narrows its windows for a small one, and then
    fails for larger ones.
    """
    # Modules of PyTorch itself do not adapt.
    custom = (vars(m) for m in modules if not type(m).__module__.startswith("torch.nn.modules."))
    original = [(attributes, attributes.copy()) for attributes in custom]
    try:
        yield
    finally:
        for attributes, before in original:
            is_same = len(attributes) == len(before) and all(map(is_, attributes.values(), before.values()))
            if not is_same:
                attributes.update({name: value for name, value in before.items() if type(value) in RESTORED_TYPES})


# --- gradient checkpointing ------------------------------------------------------------------------------------------

# Names in `torch.utils.checkpoint`, depending on the version of PyTorch.
_GENERATORS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")

_checkpointing_lock = threading.Lock()
_original_generators: dict[str, Any] = {}
_num_passes = 0
_thread = threading.local()


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Run the functions that `torch.utils.checkpoint` would run again during the backward pass once only.

    The second run would lack the hooks and modes of the first. Other threads are not affected.
    """
    global _num_passes
    with _checkpointing_lock:
        if _num_passes == 0:
            _patch_checkpoint()
        _num_passes += 1
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1
        with _checkpointing_lock:
            _num_passes -= 1
            if _num_passes == 0:
                _restore_checkpoint()


def _patch_checkpoint() -> None:
    checkpoint.CheckpointFunction.apply = _apply_once
    _original_generators.update({name: vars(checkpoint)[name] for name in _GENERATORS if name in vars(checkpoint)})
    for name, original in _original_generators.items():
        setattr(checkpoint, name, _yield_once(original))


def _restore_checkpoint() -> None:
    del checkpoint.CheckpointFunction.apply
    for name, original in _original_generators.items():
        setattr(checkpoint, name, original)


def _is_off() -> bool:
    return getattr(_thread, "depth", 0) > 0


def _apply_once(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    """Replace ``CheckpointFunction.apply``, the reentrant kind of checkpointing."""
    if _is_off():
        return function(*args)
    return super(checkpoint.CheckpointFunction, checkpoint.CheckpointFunction).apply(
        function, preserve_rng_state, *args
    )


def _yield_once(original: Any) -> Any:
    """Replace a generator that sets up the other kind of checkpointing before its only ``yield``."""

    def generator(*args: Any, **kwargs: Any) -> Any:
        return _do_nothing() if _is_off() else original(*args, **kwargs)

    return generator


def _do_nothing() -> Iterator[None]:
    yield
