"""A dictionary as a layer of a network, between its layer and what follows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from convscope.dictionaries.encoder import FeatureEncoder
from convscope.engine.data_flow import DataFlow
from convscope.engine.edits import LayerEdit
from convscope.engine.layer_table import Layer, LayerTable
from convscope.engine.layouts import Layout
from convscope.engine.model import Model
from convscope.errors import ConvscopeError

SUFFIX = "/dictionary"


class Features(nn.Module):
    """The layer of the features: returns what it gets, for hooks and edits."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


class DictionaryFunction(nn.Module):
    """Pass a layer's maps on, changed by what the change of its features decodes to.

    ::

        f = encode(x);  g = features(f);  output = x + (g - f) A

    Where nothing changes the features, the output is `x` itself, and so are its gradients. The gradient of the output
    by the features g is A.
    """

    def __init__(self, encoder: FeatureEncoder) -> None:
        super().__init__()
        self.encoder, self.features = encoder, Features()

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape."""
        encoded = self.encoder(maps)
        features: Tensor = self.features(encoded)
        if features is encoded:
            return maps
        change: Tensor = self.encoder.combine(features - encoded)
        return maps + change.to(maps.dtype)


def require_layer(layer: Layer, channels: int | None = None) -> None:
    """Raise ConvscopeError for a layer that cannot have a dictionary, or not one of so many channels."""
    if layer.unit_axis != 1 or layer.layout.rows_per_image != 1 or layer.layout.batch_dim != 0:
        raise ConvscopeError(
            f"layer {layer.name!r} returns {' x '.join(map(str, layer.shape))} per image, whose channels are not the "
            "first axis; choose another layer, or say the grid of tokens with load(..., grid=(h, w))"
        )
    if layer.tensor_index is not None:
        raise ConvscopeError(f"layer {layer.name!r} is one of several tensors of a layer; choose another layer")
    if channels is not None and layer.units != channels:
        raise ConvscopeError(
            f"layer {layer.name!r} has {layer.units} units; the dictionary is of a layer with {channels}"
        )


def attach(model: Model, layer: Layer, encoder: FeatureEncoder, kind: str) -> Model:
    """Return a model with the features of a dictionary as the layer "LAYER/dictionary".

    Parameters
    ----------
    model : Model
    layer : Layer
        The layer whose activations the dictionary is of.
    encoder : FeatureEncoder
    kind : str
        The kind of the new layer.
    """
    require_layer(layer, encoder.atoms.shape[1])
    name = layer.name + SUFFIX
    if name in model.layers.names:
        raise ConvscopeError(f"layer {layer.name!r} has a dictionary already; attach to the model without it")
    function = DictionaryFunction(encoder.to(model.device))
    description = f"{len(encoder.atoms)} features, {kind}"
    edit = LayerEdit(layer, function, description, fingerprint(encoder), {name: function.features})
    note = f"layer {name}: {description}; the layer's output is unchanged unless features are edited"
    return replace(
        model,
        layers=_with_features(model.layers, layer, name, encoder, kind),
        edits=(*model.edits, edit),
        notes=(*model.notes, note),
    )


def attached_dictionaries(model: Model) -> list[tuple[LayerEdit, FeatureEncoder]]:
    """Return the edits by which a model has dictionaries, in their order, and the encoders."""
    functions = [(edit, edit.function) for edit in model.edits]
    return [(edit, function.encoder) for edit, function in functions if isinstance(function, DictionaryFunction)]


def fingerprint(encoder: FeatureEncoder) -> bytes:
    """Return the SHA-256 of the weights of an encoder, and of its activation.

    What is computed from the weights is left out: its last digits differ between machines.
    """
    digest = hashlib.sha256(f"{encoder.activation} {encoder.active}".encode())
    for tensor in encoder.weights.tensors().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _with_features(table: LayerTable, layer: Layer, name: str, encoder: FeatureEncoder, kind: str) -> LayerTable:
    """Return the table with the features in front of their layer, which is computed from them."""
    shape = (len(encoder.atoms), *layer.shape[1:])
    features = replace(
        layer,
        name=name,
        kind=kind,
        shape=shape,
        parameters=sum(tensor.numel() for tensor in encoder.parameters()),
        alias_of=None,
        is_pooling=False,
        layout=Layout(1, tuple(range(2, 1 + len(shape)))),
        inputs=(layer.alias_of,) if layer.alias_of else layer.inputs,
        num_tensors=1,
    )
    return LayerTable(_rows(table, layer, features), _flow(table.flow, layer, name))


def _rows(table: LayerTable, layer: Layer, features: Layer) -> Iterator[Layer]:
    """Yield the rows; a layer that passed on an earlier one's output now changes it."""
    earlier, is_after = layer.alias_of, False
    for row in table:
        if row.name == layer.name:
            yield features
            yield replace(row, alias_of=None, inputs=(*features.inputs, features.name))
            is_after = True
        else:
            yield replace(row, alias_of=layer.name) if is_after and earlier and row.alias_of == earlier else row


def _flow(flow: DataFlow, layer: Layer, name: str) -> DataFlow:
    """Return the data flow with the features on a path of their own to the layer."""
    if layer.name not in flow.nodes:
        return flow
    node = flow.nodes[layer.name][0]
    sources = dict[str, frozenset[str]]()
    for key, value in flow.sources.items():
        if key == node:
            sources[name] = value
            value = value | {name}
        sources[key] = value
    return replace(flow, sources=sources, nodes={**flow.nodes, name: (name,)})
