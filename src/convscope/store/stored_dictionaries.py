"""The dictionaries whose features a scan has recorded: copies in the store, so that it needs nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from convscope.dictionaries.attachment import SUFFIX, attach, attached_dictionaries
from convscope.dictionaries.encoder import DictionaryWeights, FeatureEncoder
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.results import file_names
from convscope.store.io import Folder, Json

if TYPE_CHECKING:
    from convscope.store.tables import StoreTables

KEY = "dictionaries"  # in the manifest; also the folder


def write_dictionaries(store: Folder, model: Model) -> list[Json]:
    """Write a model's dictionaries into a store; return what the manifest says about them."""
    attached = attached_dictionaries(model)
    files = file_names(edit.layer.name for edit, _ in attached)
    entries = []
    for edit, encoder in attached:
        layer = edit.layer.name
        name = f"{KEY}/{files[layer]}.safetensors"
        with store.atomic_write(name) as file:
            file.write(save({key: t.cpu().contiguous() for key, t in encoder.weights.tensors().items()}))
        kind = next(model.layers.find(key).kind for key in edit.modules)
        settings: dict[str, Any] = {"activation": encoder.activation, "active": encoder.active}
        entries.append({"layer": layer, "method": kind, **settings, "file": name})
    return entries


def with_stored_dictionaries(store: StoreTables, model: Model) -> Model:
    """Return the network as it was scanned: with the dictionaries of the store, if it is that network without them.

    Another network, and one that has them already, is returned as it is.
    """
    entries, scanned = store.manifest.get(KEY, ()), store.manifest["model"]["weights_sha256"]
    if not entries or model.weights_hash() == scanned:
        return model
    attached = model
    for entry in entries:
        weights = _read(store.folder, entry["file"])
        row = next((row for row in attached.layers if row.name == entry["layer"]), None)
        if row is None or row.units != weights.atoms.shape[1] or row.name + SUFFIX in attached.layers.names:
            return model
        attached = attach(attached, row, FeatureEncoder(weights, entry["activation"], entry["active"]), entry["method"])
    return attached if attached.weights_hash() == scanned else model


def _read(store: Folder, name: str) -> DictionaryWeights:
    with store.open(name) as file:
        content = file.read()
    try:
        return DictionaryWeights(**load(content))
    except (SafetensorError, TypeError) as error:
        raise ConvscopeError(f"{name} in {store.address} is not a dictionary: {error}") from error
