"""Models that the explorer serves."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from functools import cached_property
from typing import TYPE_CHECKING

from convscope.dictionaries.attachment import attached_dictionaries
from convscope.engine.layer_selection import last_per_resolution
from convscope.engine.layer_table import Layer
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.explorer.service.images import UnknownResource
from convscope.explorer.service.model_copy import copy_model
from convscope.explorer.service.stored_patterns import StoredPatterns
from convscope.results import versions

if TYPE_CHECKING:
    from convscope.store.store import Store

WEIGHT_CHECK_INTERVAL = 0.2  # seconds between two checks whether the user has changed the weights


class Network:
    """A model under a key.

    Parameters
    ----------
    key : str
        Its part of URLs.
    model : Model
    source : str
        What the model was loaded from.
    store : Store, optional
        Ignored if it was made with other weights.
    """

    def __init__(self, key: str, model: Model, source: str, store: Store | None = None) -> None:
        self.key, self.model, self.source = key, model, source
        self._fingerprint, self._next_check = _weight_fingerprint(model), 0.0
        self._process_id = uuid.uuid4()  # fingerprints mean nothing to another process that reads the same cache folder
        weights = model.weights_hash()
        self._store = store if store is not None and store.manifest["model"]["weights_sha256"] == weights else None
        self._stored_patterns = None if self._store is None else StoredPatterns(self._store)
        identity = f"{weights} {versions().get('convscope')} {model.preprocessing}"
        self._first_version = self._version = _short_hash(identity)
        # Copied before anything runs: a copy made during a forward pass would have the hooks of that pass.
        self._background_model: Model | str
        try:
            self._background_model = copy_model(model)
        except ConvscopeError as error:
            self._background_model = str(error)

    @property
    def version(self) -> str:
        """Hash of weights, preprocessing and program. It changes when the user changes the weights."""
        if not self.model.loaded_by_convscope and time.monotonic() >= self._next_check:
            fingerprint, self._next_check = _weight_fingerprint(self.model), time.monotonic() + WEIGHT_CHECK_INTERVAL
            if fingerprint == self._fingerprint:
                self._version = self._first_version
            else:
                self._version = _short_hash(f"{self._first_version} {self._process_id} {fingerprint}")
        return self._version

    @property
    def store(self) -> Store | None:
        """Store made with the present weights, if there is one."""
        return self._store if self.version == self._first_version else None

    @property
    def stored_patterns(self) -> StoredPatterns | None:
        """Patterns in `store`, if there is one."""
        return self._stored_patterns if self.version == self._first_version else None

    @property
    def background_model(self) -> Model:
        """Copy of the model for background jobs. Raises ConvscopeError if the model cannot be copied."""
        if isinstance(self._background_model, str):
            raise ConvscopeError(self._background_model)
        return self._background_model

    @property
    def takes_images(self) -> bool:
        """Whether the model takes ordinary images."""
        preprocessing = self.model.preprocessing
        return preprocessing.axes == 2 and preprocessing.channel_order != "channels"

    @property
    def detects(self) -> bool:
        """Whether the model is a detector, which finds boxes."""
        return self.model.task == "detection"

    @property
    def layers(self) -> list[Layer]:
        """Layers with distinct feature maps, from first to last."""
        return self.model.layers.unique_spatial()

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """Data flow between `layers`: pairs of indices."""
        indices = {layer.name: i for i, layer in enumerate(self.layers)}
        return [(indices[start], indices[end]) for start, end in self.model.layers.edges(indices)]

    @property
    def main_layers(self) -> list[str]:
        """Names of the last layers of each resolution."""
        return [layer.name for layer in last_per_resolution(self.model)]

    @property
    def feature_layers(self) -> list[str]:
        """Names of the layers of features, of attached dictionaries."""
        return [name for edit, _ in attached_dictionaries(self.model) for name in edit.modules]

    @property
    def num_classes(self) -> int:
        """Number of outputs; 0 if the model has none that can be explained."""
        return self.model.num_outputs or 0

    @cached_property
    def class_indices(self) -> dict[str, int]:
        """Index of each class name; the first one of a name that occurs more than once."""
        return {self.model.class_name(k): k for k in reversed(range(self.num_classes))}

    def layer(self, name: str) -> Layer:
        """Return a layer. Raises UnknownResource for a name that does not exist."""
        if name not in self.model.layers.names:
            raise UnknownResource(f"{self.model.name} has no layer {name[:80]!r}")
        return self.model.layers.find(name)

    def num_units(self, layer: str) -> int:
        """Return the number of units of a layer, or of classes for "logits". Raises UnknownResource."""
        return self.num_classes if layer == LOGITS else self.layer(layer).units

    def require_unit(self, layer: str, unit: int) -> None:
        """Raise UnknownResource unless the layer has this unit."""
        if not 0 <= unit < self.num_units(layer):
            raise UnknownResource(f"layer {layer!r} has units 0 to {self.num_units(layer) - 1}; there is no {unit}")

    def require_class(self, index: int) -> None:
        """Raise UnknownResource unless the model has this class."""
        if not 0 <= index < self.num_classes:
            raise UnknownResource(f"{self.model.name} has classes 0 to {self.num_classes - 1}; there is no {index}")

    def classifies(self) -> bool:
        """Return whether the model has classes."""
        return self.num_classes > 0


def url_key(name: str) -> str:
    """Return a model's part of URLs: letters, digits, dots, hyphens and underscores of what it was loaded from."""
    last = name.rpartition("/")[2] if "/" in name or os.sep in name else name
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last).strip(".") or "model"


def _weight_fingerprint(model: Model) -> list[tuple[int, int, int]]:
    """Return the identity, address and write count of each weight: they change with the weights, and are cheap."""
    weights = [*model.adapter.parameters(model.module), *model.module.buffers()]
    return [(id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]  # noqa: SLF001 - the write count


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
