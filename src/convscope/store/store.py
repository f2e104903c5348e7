"""Open the store of a scan and query it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from convscope.arguments import check_arguments
from convscope.engine.layer_selection import name_of
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.store import analysis, image_search, search
from convscope.store.image_record import ImageRecord
from convscope.store.io import Folder, Json
from convscope.store.saved_results import SavedResult, SavedResultIndex, StorableResult, save_path
from convscope.store.schema import FORMAT
from convscope.store.search import Matches
from convscope.store.tables import StoreTables
from convscope.store.unit_record import UnitRecord


@check_arguments
def open_store(folder: str | os.PathLike[str], storage: Mapping[str, object] | None = None) -> Store:
    """Open a store that `convscope.scan` has written.

    Only the manifest is read at once; every query reads the parts of the files that it needs.

    Parameters
    ----------
    folder : str or path
        A folder, or an fsspec address such as ``s3://bucket/store``.
    storage : mapping, optional
        Options of fsspec for the address.

    Returns
    -------
    Store
        The store; files are read when they are needed.

    Raises
    ------
    ConvscopeError
        If there is no finished store, or one of another format.

    Examples
    --------
    >>> import convscope
    >>> from convscope import samples
    >>> model = convscope.load("lite0")
    >>> images = samples.photographs()
    >>> _ = convscope.scan(model, images, "store", layers=["blocks.2"], k=2, workers=0)
    >>> store = convscope.open_store("store")
    >>> store
    <convscope store store: lite0, 2 layers, 1,040 units, 4 images>
    >>> len(store.unit("blocks.2", 7).examples())
    2
    """
    store = Folder(folder, storage)
    manifest = store.read_json("manifest.json")
    kind, version = (manifest.get("kind"), manifest.get("format")) if isinstance(manifest, dict) else (None, None)
    if kind != "scan":
        raise ConvscopeError(f"{store.address} is not a store: its manifest is of kind {kind!r}, expected 'scan'")
    if version != FORMAT:
        raise ConvscopeError(
            f"{store.address} has store format {version!r}, expected {FORMAT}; "
            "rerun `convscope scan MODEL DATA -o OUT` with a new folder"
        )
    try:
        return Store(store, manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise ConvscopeError(f"{store.address} is not a readable store: manifest.json lacks {error}") from error


class Store(StoreTables):
    """The results of a scan: statistics and examples of every unit, predictions for every image.

    Made by `open_store` and `convscope.scan`. Concepts, atlases and diagnoses can be
    saved in it.

    Parameters
    ----------
    folder : Folder
        Where the store is.
    manifest : dict
        The content of its manifest.json.

    Attributes
    ----------
    address, manifest, layers, unit_counts, classes, labels, num_images, input_size, images, thumbnails
        As of `StoreTables`.
    """

    def __init__(self, folder: Folder, manifest: Json) -> None:
        super().__init__(folder, manifest)
        self._concepts, self._atlases = SavedResultIndex(folder, "concepts"), SavedResultIndex(folder, "atlas")
        self._diagnoses = SavedResultIndex(folder, "diagnosis")

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layers, {self.num_units:,} units, {self.num_images:,} images"
        return f"<convscope store {self.address}: {self.manifest['model']['name']}, {size}>"

    def unit(self, layer: str | Layer, unit: int | str) -> UnitRecord:
        """Return the record of a unit.

        Parameters
        ----------
        layer : str or Layer
            A name in `layers`, or a row of ``model.layers``; "logits" for the classes.
        unit : int or str
            The unit's number; for "logits" also the name of the class.

        Raises
        ------
        ConvscopeError
            For a unit that is not in the store.
        """
        if not isinstance(layer, str | Layer):
            raise ConvscopeError(f"layer is a {type(layer).__name__}; a store has layers by name, as in store.layers")
        name = name_of(layer)
        index = self.unit_index(name, unit)
        self.row_of_unit(name, index)
        return UnitRecord(self, name, index)

    def image(self, image: int) -> ImageRecord:
        """Return the record of an image. Raises ConvscopeError for an id that is not in the store."""
        if not 0 <= image < self.num_images:
            raise ConvscopeError(
                f"image {image} is out of range: there are {self.num_images}, 0 to {self.num_images - 1}"
            )
        return ImageRecord(self, int(image))

    def search(self, query: object, n: int = 20, *, judge: Model | None = None, model: Model | None = None) -> Matches:
        """Find units by name, or by an example image.

        Names are those of `convscope.name_units`, and for the logits those of the classes. Without `judge`, names match
        by their words. A name that contains all words of the text comes first; half a match counts half: parts of
        words, and runners-up.

        Parameters
        ----------
        query : str, or path or other image
            What to search for, such as "striped fur"; or an example image, as a `pathlib.Path`, PIL image, array or
            tensor: the units come first that it excites more than most images of the sample do.
        n : int
            How many units to list at most.
        judge : Model, optional
            A network that compares images with text, such as CLIP: names match by the cosine similarity of the
            embeddings of text and name, so that "tiger" finds "striped fur".
        model : Model, optional
            The network that was scanned; needed for an image.

        Returns
        -------
        Matches
            The best first. Of equally good names, those with the higher scores; of units that the image excites more
            than the same fraction of the sample, those that it excites by more standard deviations.

        Raises
        ------
        ConvscopeError
            For an empty text, a store without any names, a `judge` that does not take text, an image without the
            network, and a network with other weights.

        Examples
        --------
        >>> import convscope
        >>> model = convscope.load("lite0")
        >>> photos = convscope.samples.photographs()
        >>> store = convscope.scan(model, photos, "store", layers=["logits"], workers=0)
        >>> store.search("lesser panda")[0].unit
        387
        >>> len(store.search(photos[0], n=3, model=model))
        3
        """
        if isinstance(query, str):
            return search.find_units(self, query, n, judge)
        return image_search.find_units_of_image(self, query, n, model)

    def dead(self) -> analysis.DeadUnits:
        """Find units that are never positive on any image, or constant."""
        return analysis.find_dead_units(self)

    def duplicates(self, threshold: float = 0.99) -> analysis.Duplicates:
        """Find pairs of units of a layer whose maxima on the sample correlate.

        Parameters
        ----------
        threshold : float
            The lowest Pearson's r of a pair, in [-1, 1].
        """
        return analysis.find_duplicates(self, threshold)

    def compare(self, other: Store) -> analysis.UnitChanges:
        """Compare every unit with the same unit in another scan, for example of another checkpoint.

        Parameters
        ----------
        other : Store
            A scan of the same layers on the same images.

        Raises
        ------
        ConvscopeError
            If data, layers or samples differ.
        """
        return analysis.compare_units(self, other)

    def save_result(self, result: StorableResult) -> Path:
        """Save concepts, an atlas or a diagnosis in the store, replacing those of the same layer and class.

        Parameters
        ----------
        result : Concepts, Atlas or Diagnosis

        Returns
        -------
        Path
            The folder of the result.

        Raises
        ------
        ConvscopeError
            For a model with other weights, and for a store that is not on this machine's disk.
        """
        return result.save(save_path(self, result))

    def concepts(self) -> list[SavedResult]:
        """List the concepts saved in the store, by class."""
        return self._concepts.items()

    def atlases(self) -> list[SavedResult]:
        """List the atlases saved in the store, by layer, then by class; those of all classes first."""
        return self._atlases.items()

    def diagnoses(self) -> list[SavedResult]:
        """List the diagnoses saved in the store, by layer."""
        return self._diagnoses.items()
