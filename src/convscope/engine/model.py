"""A network with all that is needed to look into it: preprocessing, class names and the table of its layers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.layer_table import LayerTable
from convscope.errors import ConvscopeError, nearest
from convscope.images.preprocessing import Preprocessing

LOGITS = "logits"  # the name under which the classes themselves can be asked for, beside the layers


@dataclass(frozen=True, eq=False)
class Model:
    """A network ready to be looked into; made by `convscope.load`.

    `module` is the network itself, `head` the activation that ends it ("softmax", "log_softmax", "sigmoid" or None):
    logits are what went into it. `notes` say what had to be assumed. `fixed_batch` is the only batch size that an
    exported network takes, if there is one. `owned` says that `load` made the module and nobody else changes it,
    `classes_last` that it ends in maps of classes (N, H, W, K).
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    layers: LayerTable
    adapter: FrameworkAdapter
    final_activation: str | None = None
    notes: tuple[str, ...] = ()
    fixed_batch_size: int | None = None
    num_outputs: int | None = None
    loaded_by_convscope: bool = False
    channels_last_output: bool = False

    def modules_and_parameters(self) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
        """All layers by name, and all parameters. Those of a model in hand are looked up anew: it may have changed."""
        return self._parts if self.loaded_by_convscope else self._look_up()

    @cached_property
    def _parts(self) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
        return self._look_up()

    def _look_up(self) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
        return self.adapter.modules(self.module), list(self.adapter.parameters(self.module))

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.adapter.parameters(self.module)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating type: what the network wants its input in."""
        floats = (p.dtype for p in self.adapter.parameters(self.module) if p.is_floating_point())
        return next(floats, torch.float32)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of the classes (N, K): each by itself where the network ends in a sigmoid or has one output, else shares."""
        return logits.sigmoid() if self.final_activation == "sigmoid" or logits.shape[1] == 1 else logits.softmax(1)

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7" where no names are known."""
        return self.classes[index] if self.classes is not None else f"class {index}"

    def class_index(self, target: int | str) -> int:
        """The index of a class given by index or by name (case and underscores do not matter).

        Raises ConvscopeError for an index out of range and for a name that is unknown or borne by several classes.
        """
        if isinstance(target, str):
            return self._index_of_name(target)
        if isinstance(target, bool) or not isinstance(target, Integral):
            raise ConvscopeError(f"class {target!r} is neither an index nor a name")
        count = self.num_outputs if self.num_outputs is not None else (len(self.classes) if self.classes else None)
        if count is not None and not 0 <= target < count:
            raise ConvscopeError(f"class {target} is out of range: this model has {count} classes, 0 to {count - 1}")
        return int(target)

    def _index_of_name(self, name: str) -> int:
        if self.classes is None and name.strip().isdecimal():
            return self.class_index(int(name))
        if self.classes is None:
            raise ConvscopeError(f"class {name!r} given by name, but this model has no class names; give the index")

        def plain(text: str) -> str:
            return text.replace("_", " ").strip().casefold()

        found = [i for i, known in enumerate(self.classes) if plain(known) == plain(name)]
        if not found and name.strip().isdecimal():
            return self.class_index(int(name))
        if not found:
            raise ConvscopeError(f"class {name!r} is not in this model; nearest: {nearest(name, list(self.classes))}")
        if len(found) > 1:
            raise ConvscopeError(f"class {name!r} is the name of several classes: {found}; give the index")
        return found[0]

    def weights_hash(self) -> str:
        """SHA-256 over all parameters and buffers, names included: tells two sets of weights apart."""
        digest = hashlib.sha256()
        tensors = self.module.state_dict() if self.adapter.name == "torch" else _named(self.adapter, self.module)
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the model."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_hash(),
            "preprocessing": self.preprocessing.as_dict(),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        classes = f"{self.num_outputs} outputs" if self.classes is None else f"{len(self.classes)} classes"
        return f"<convscope model {self.name}: {len(self.layers)} layers, {classes}, {self.preprocessing}>"


def _named(dialect: FrameworkAdapter, module: nn.Module) -> dict[str, Tensor]:
    return {str(i): p for i, p in enumerate(dialect.parameters(module))}
