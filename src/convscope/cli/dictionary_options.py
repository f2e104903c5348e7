"""The option --dictionary, of the commands that work on layers: features as layers of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.options import NETWORK, NetworkOptions
from convscope.cli.output import log_note
from convscope.cli.parsing import open_store_in
from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from convscope.dictionaries.result import Dictionary
    from convscope.engine.model import Model
    from convscope.store.store import Store


@dataclass(frozen=True)
class LayerNetworkOptions(NetworkOptions):
    """What a network is loaded with, and dictionaries whose features are layers of it.

    The dictionaries of a store are attached without being named.
    """

    dictionary: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="A sparse dictionary of a layer: its features are the layer LAYER/dictionary, and the default layer; "
            "repeatable.",
            rich_help_panel=NETWORK,
        ),
    ] = None

    def load(self, name: str, store: Store | None = None) -> Model:
        """Load a network with the given dictionaries or, if none is given, those of a store; print its notes."""
        return self.load_several([name], store)[name]

    def load_several(self, names: Sequence[str], store: Store | None = None) -> dict[str, Model]:
        """Load networks, each with the dictionaries that are of it; raise ConvscopeError if one is of none."""
        learned = {folder: read_dictionary(folder) for folder in self.dictionary or ()}
        plain = {name: NetworkOptions.load(self, name) for name in names}
        networks = plain
        if learned:
            networks = attach_dictionaries(plain, learned)
        elif store is not None:
            networks = {name: attach_stored(store, network) for name, network in plain.items()}
        for name, network in networks.items():
            for note in network.notes[len(plain[name].notes) :]:
                log_note(note)
        return networks

    def load_with_store_in(self, folder: Path, name: str) -> tuple[Model, Store | None]:
        """Load a network, and open the store in an output folder, if it is one.

        Raises
        ------
        ConvscopeError
            If the store was made with other weights.
        """
        store = open_store_in(folder)
        network = self.load(name, store)
        if store is not None:
            store.check_weights(network)
        return network, store

    def default_layer(self, layer: str | None, network: Model) -> str | None:
        """Return the layer that was named or, if none was, that of the features of the given dictionary."""
        if layer is not None or not self.dictionary:
            return layer
        names = attached_features(network)
        if len(names) > 1:
            raise ConvscopeError(f"--layer is missing; with several dictionaries say which: {' or '.join(names)}")
        return names[0]

    def default_heatmap_layer(self, layer: str, network: Model) -> str:
        """Do the same for heatmaps, whose layer is "auto" if none was named."""
        return self.default_layer(None if layer == "auto" else layer, network) or "auto"

    def default_layers(self, layers: Sequence[str] | None, network: Model) -> Sequence[str] | None:
        """Return the layers that were named or, if none was, those of the features of the given dictionaries."""
        return layers if layers is not None or not self.dictionary else attached_features(network)


def attach_stored(store: Store, network: Model) -> Model:
    """Return the network with the dictionaries of a store, if the store is of it."""
    from convscope.store.stored_dictionaries import with_stored_dictionaries

    return with_stored_dictionaries(store, network)


def attached_features(network: Model) -> list[str]:
    """Return the layers of features, in the order of the dictionaries."""
    from convscope.dictionaries.attachment import attached_dictionaries

    return [name for edit, _ in attached_dictionaries(network) for name in edit.modules]


def read_dictionary(folder: Path) -> Dictionary:
    """Read a dictionary; raise ConvscopeError for anything else, before a network is loaded."""
    import convscope

    if folder.is_file():
        raise ConvscopeError(
            f"--dictionary {folder} is a file; expected a folder written by `convscope dictionary`. In Python, "
            "convscope.load_dictionary(FILE, layer=LAYER).save(FOLDER) makes one of a file"
        )
    if not (folder / "manifest.json").is_file():
        lack = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise ConvscopeError(f"--dictionary {folder} {lack}; expected a folder written by `convscope dictionary`")
    try:
        return convscope.load_dictionary(folder)
    except ConvscopeError as error:
        raise ConvscopeError(f"--dictionary {error}") from error


def attach_dictionaries(networks: Mapping[str, Model], learned: Mapping[Path, Dictionary]) -> dict[str, Model]:
    """Attach each dictionary to the networks that it is of, in the order of their layers.

    Raises
    ------
    ConvscopeError
        For a dictionary that is of none of the networks, and for two of one layer.
    """
    hashes = {name: network.weights_hash() for name, network in networks.items()}
    attached = dict(networks)
    for folder, one in learned.items():
        if _trained_on(one) not in (None, *hashes.values()):
            raise ConvscopeError(
                f"--dictionary {folder} was learned on layer {one.layer} of {one.model.name} with other weights than "
                f"those of {' or '.join(networks)}; give that network, or learn a dictionary of this one: convscope "
                f"dictionary {next(iter(networks))} IMAGES --layer {one.layer}"
            )
    for name, network in networks.items():
        of_network = {folder: one for folder, one in learned.items() if _trained_on(one) in (None, hashes[name])}
        rows = {folder: _row(folder, one, network) for folder, one in of_network.items()}
        _require_distinct(rows)
        order = [layer.name for layer in network.layers]
        for folder in sorted(rows, key=lambda folder: order.index(rows[folder])):  # the same network in any order
            attached[name] = of_network[folder].attach(attached[name])
    return attached


def _trained_on(learned: Dictionary) -> object:
    """Return the hash of the weights of a dictionary's network; None for one made of a file of another package."""
    return learned.model.describe().get("weights_sha256")


def _row(folder: Path, learned: Dictionary, network: Model) -> str:
    """Return the name of a dictionary's layer; raise ConvscopeError if the network lacks it, or it is another one."""
    from convscope.dictionaries.attachment import require_layer
    from convscope.engine.layer_selection import find_layer

    try:
        row = find_layer(network, learned.layer)
        require_layer(row, learned.atoms.shape[1])
    except ConvscopeError as error:
        raise ConvscopeError(f"--dictionary {folder}: {error}; `convscope layers` lists all") from error
    return row.name


def _require_distinct(rows: Mapping[Path, str]) -> None:
    """Refuse two dictionaries of one layer."""
    folders: dict[str, Path] = {}
    for folder, row in rows.items():
        if row in folders:
            raise ConvscopeError(f"--dictionary {folders[row]} and {folder} are both of layer {row}; give one of them")
        folders[row] = folder
