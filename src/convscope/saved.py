"""Open what a result's `save` has written, without the model."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from convscope.arguments import check_arguments
from convscope.attribution.location_result import Locations
from convscope.attribution.result import Heatmaps
from convscope.attribution.targets import SavedTargets
from convscope.decomposition.result import Atlas, Concepts
from convscope.detection.result import Detections
from convscope.diagnosis.changed_images import ChangedImages
from convscope.diagnosis.flat import restore
from convscope.diagnosis.overview import Overview
from convscope.diagnosis.result import CHANGED, OVERVIEW, Diagnosis
from convscope.diagnosis.saved_searches import finding_from_json, search_from_json
from convscope.dictionaries.files import read_weights
from convscope.dictionaries.foreign import dictionary_from_file
from convscope.dictionaries.result import Dictionary
from convscope.editing.result import Effects, Patching
from convscope.engine.model import Model
from convscope.engine.model_description import ModelDescription
from convscope.errors import ConvscopeError
from convscope.evaluation.comparison import Comparison
from convscope.evaluation.result import Evaluation
from convscope.explanations.result import Explanation
from convscope.feature_maps import Activations
from convscope.featurevis.layer_story import Chapter, Story, array_name
from convscope.featurevis.result import Patterns
from convscope.images.copies import ImageCopy
from convscope.images.failures import Failure
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.predictions import Predictions
from convscope.results import COPIES_FILE, Result
from convscope.store.store import Store, open_store
from convscope.store.unit_names import UnitNames

R = TypeVar("R", bound=Result)
H = TypeVar("H", bound=Heatmaps)

NOT_SETTINGS = ("image_names", "targets", "classes", "geometry", "against", "metrics", "results")


@dataclass(frozen=True)
class SavedData:
    """The content of a folder.

    Attributes
    ----------
    model : Model
        A description in its place.
    folder : Path
    arrays : mapping of str to ndarray
    parameters : mapping
        The settings in the manifest.
    remarks : dict
        `notes` and `failed`.
    """

    model: Model
    folder: Path
    arrays: Mapping[str, np.ndarray]
    parameters: Mapping[str, Any]
    remarks: dict[str, Any]

    def make(self, kind: type[R], **values: Any) -> R:
        """Make a result of `values`, and for its other fields of arrays and settings of the same name."""
        names = [f.name for f in fields(cast(Any, kind)) if f.name not in ("model", "notes", "failed", *values)]
        saved = {name: self.arrays.get(name, self.parameters.get(name)) for name in names}
        known = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if v is not None}
        make: Callable[..., R] = kind
        return make(self.model, **known, **values, **self.remarks)

    def settings(self, kind: type[R]) -> dict[str, Any]:
        """Return the parameters that are no fields of the result and do not follow from them."""
        omitted = {*(f.name for f in fields(cast(Any, kind))), *NOT_SETTINGS}
        return {name: value for name, value in self.parameters.items() if name not in omitted}

    def part(self, prefix: str, parameters: Mapping[str, Any]) -> SavedData:
        """Return the part of the arrays whose names begin with `prefix`, with settings of its own."""
        arrays = {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}
        return SavedData(self.model, self.folder, arrays, parameters, {})

    def geometry(self) -> tuple[Geometry, ...]:
        """Return where the network's input lies in each image."""
        return tuple(Geometry(tuple(size), tuple(box)) for size, box in self.parameters["geometry"])

    def image_source(self, copied: Sequence[int] | None = None) -> ImageBatchLoader:
        """Return the images: the files where they are unchanged, else their copies in the folder.

        `copied` says which images have copies; by default all.
        """
        names = [str(name) for name in self.parameters["image_names"]]
        copied_names = names if copied is None else [names[i] for i in copied]
        loader = ImageBatchLoader(names, self.model.preprocessing, fit=self.parameters["fit"], keep_copies=True)
        path = self.folder / COPIES_FILE
        if loader.copies is not None and path.is_file():
            with zipfile.ZipFile(path) as archive:
                for name, geometry, file in zip(copied_names, self.geometry(), sorted(archive.namelist()), strict=True):
                    height, width = geometry.image_size
                    loader.copies[name] = ImageCopy(archive.read(file), height, width)
        return loader


@check_arguments
def open(folder: str | os.PathLike[str]) -> Result | Store:
    """Open a result that was saved, without its model, or the store of a scan.

    Figures, printing, overlays and saving again work; what needs the network says so. Images are read from their files
    where these are unchanged, else from the copies that were saved.

    Parameters
    ----------
    folder : path
        What ``result.save(folder)`` or `convscope.scan` has written. A store may be at an fsspec address.

    Returns
    -------
    Result or Store
        The same class as what was saved, for instance `Heatmaps`.

    Raises
    ------
    ConvscopeError
        If there is no finished result, or one of another version.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> folder = convscope.predict(model, convscope.samples.photographs()).save("predictions")
    >>> convscope.open(folder)
    <convscope predictions: top 5 classes of 4 images>
    """
    path = Path(folder)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        kind = manifest["kind"]
    except FileNotFoundError:
        if "://" in os.fspath(folder):
            return open_store(folder)
        lack = "has no manifest.json" if path.is_dir() else "does not exist"
        expected = "expected a folder written by save(), or by a scan that is finished"
        raise ConvscopeError(f"{path} {lack}; {expected}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConvscopeError(f"{path} is not a saved result: manifest.json cannot be read ({error})") from error
    if kind not in RESTORE:
        return open_store(folder)
    try:
        with np.load(path / "arrays.npz", allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return RESTORE[kind](_read(path, manifest, arrays))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ConvscopeError(f"{path} cannot be opened: {error}; it is damaged or of another version") from error


@check_arguments
def load_dictionary(
    path: str | os.PathLike[str],
    *,
    layer: str | None = None,
    active: int | None = None,
    threshold: float | None = None,
) -> Dictionary:
    """Load a sparse dictionary. Nothing is unpickled.

    Parameters
    ----------
    path : path
        A folder that ``dictionary.save(folder)`` has written. Or a file of another package: safetensors with W_enc,
        b_enc, W_dec and b_dec (z = (x - b_dec) W_enc + b_enc), or a state dict of overcomplete with a linear encoder,
        as safetensors or written by ``torch.save``.
    layer : str, optional
        Of a file, the layer that the dictionary is of.
    active : int, optional
        Of a file, the number of features that are active at a position, where the largest are selected.
    threshold : float, optional
        Of a file, the value below which features are 0; by default its own "threshold", or 0.

    Returns
    -------
    Dictionary
        Its `model` is a description in place of the network: give the network to `Dictionary.encode` and
        `Dictionary.attach`.

    Raises
    ------
    ConvscopeError
        If there is no dictionary, or one that cannot be read.

    Examples
    --------
    >>> import convscope
    >>> photos = convscope.samples.photographs()
    >>> dictionary = convscope.dictionary("lite0", photos, "blocks.6", features=64, active=8, steps=5)
    >>> convscope.load_dictionary(dictionary.save("dictionary")).layer
    'blocks.6'
    """
    if Path(path).is_file():
        return dictionary_from_file(Path(path), layer, active, threshold)
    if (layer, active, threshold) != (None, None, None):
        raise ConvscopeError("layer=, active= and threshold= are for files; a folder written by save() says them")
    result = open(path)
    if not isinstance(result, Dictionary):
        raise ConvscopeError(f"{path} holds {type(result).__name__}; expected a folder written by dictionary.save()")
    return result


def _read(path: Path, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> SavedData:
    names = {int(index): name for index, name in manifest["class_names"].items()}
    failed = tuple(Failure(**failure) for failure in manifest["failed"])
    remarks = {"notes": tuple(manifest["notes"]), "failed": failed}
    model = cast(Model, ModelDescription(manifest["model"], names, manifest["task"], manifest["final_activation"]))
    return SavedData(model, path, arrays, manifest["parameters"], remarks)


def _heatmaps(data: SavedData, kind: type[H]) -> H:
    names, against = data.parameters["classes"], data.parameters["against"] or ()
    known = {f.name for f in fields(kind)}
    return data.make(
        kind,
        geometry=data.geometry(),
        image_source=data.image_source(),
        image_indices=tuple(range(len(names))),
        target_spec=SavedTargets(data.model, labels=dict(enumerate(names)), contrasts=dict(enumerate(against))),
        settings=data.settings(kind),
        extras={name: array for name, array in data.arrays.items() if name not in known},
    )


def _activations(data: SavedData) -> Activations:
    return data.make(Activations, maps=dict(data.arrays))


def _patterns(data: SavedData) -> Patterns:
    optional = {name: data.arrays.get(name) for name in ("noise_scores", "reference_scores", "alpha", "frames")}
    return data.make(Patterns, **optional)


def _evaluation(data: SavedData) -> Evaluation:
    def ending(suffix: str) -> dict[str, np.ndarray]:
        return {name.removesuffix(suffix): a for name, a in data.arrays.items() if name.endswith(suffix)}

    return data.make(
        Evaluation,
        values={metric: data.arrays[metric] for metric in data.parameters["metrics"]},
        curves=ending("_curve"),
        chance_level=ending("_chance"),
        names=data.parameters["classes"],
        settings=data.settings(Evaluation),
    )


def _comparison(data: SavedData) -> Comparison:
    heatmaps, evaluations = [], []
    for part in data.parameters["parts"]:
        prefix = f"{part['heatmaps']['method']}/{part['heatmaps']['layer']}/"
        evaluation = data.part(prefix, part["evaluation"])
        metrics = part["evaluation"]["metrics"]
        of_metrics = {n for n in evaluation.arrays if n.removesuffix("_curve").removesuffix("_chance") in metrics}
        maps = data.part(prefix, part["heatmaps"])
        selected = {name: array for name, array in maps.arrays.items() if name not in of_metrics}
        heatmaps.append(_heatmaps(SavedData(maps.model, maps.folder, selected, maps.parameters, {}), Heatmaps))
        evaluations.append(_evaluation(evaluation))
    return data.make(Comparison, heatmaps=tuple(heatmaps), evaluations=tuple(evaluations))


def _story(data: SavedData) -> Story:
    chapters = (
        Chapter(
            layer=chapter["layer"],
            receptive_field=chapter["receptive_field"] and tuple(chapter["receptive_field"]),
            units=data.arrays[f"{i}_units"],
            names=tuple(chapter["names"]),
            images=data.arrays[f"{i}_images"],
            statistics={name: data.arrays[array_name(i, name)] for name in chapter["statistics"]},
        )
        for i, chapter in enumerate(data.parameters["chapters"])
    )
    return data.make(Story, chapters=tuple(chapters))


def _concepts(data: SavedData) -> Concepts:
    indices = tuple(range(len(data.parameters["image_names"])))
    images = data.image_source(copied=data.arrays["evaluated_indices"].tolist())
    return data.make(Concepts, geometry=data.geometry(), image_source=images, image_indices=indices)


def _detections(data: SavedData) -> Detections:
    indices = tuple(range(len(data.parameters["image_names"])))
    return data.make(Detections, geometry=data.geometry(), image_source=data.image_source(), image_indices=indices)


def _effects(data: SavedData) -> Effects:
    return data.make(Effects, target_names=tuple(map(tuple, data.parameters["target_names"])))


def _dictionary(data: SavedData) -> Dictionary:
    weights = read_weights(data.folder).tensors()
    return data.make(Dictionary, **{name: tensor.numpy() for name, tensor in weights.items()})


def _explanation(data: SavedData) -> Explanation:
    indices = tuple(range(len(data.parameters["image_names"])))
    return data.make(
        Explanation,
        geometry=data.geometry(),
        image_source=data.image_source(),
        image_indices=indices,
        unit_names=tuple(map(tuple, data.parameters["unit_names"])),
    )


def _patching(data: SavedData) -> Patching:
    images = data.image_source()
    return data.make(Patching, geometry=data.geometry(), image_sources=(images, images), image_indices=(0, 1))


def _diagnosis(data: SavedData) -> Diagnosis:
    findings = [finding_from_json(values) for values in data.parameters["findings"]]
    searches = tuple(
        search_from_json(values | {"findings": [f for f in data.parameters["findings"] if f["kind"] == values["kind"]]})
        for values in data.parameters["searches"]
    )
    return data.make(
        Diagnosis,
        findings=findings,
        searches=searches,
        overview=restore(Overview, data.arrays, data.parameters["overview"], OVERVIEW),
        changed_images=restore(ChangedImages, data.arrays, {}, CHANGED),
    )


def _atlas(data: SavedData) -> Atlas:
    return data.make(Atlas, target=data.parameters["target"])


RESTORE: Mapping[str, Callable[[SavedData], Result]] = {
    "activations": _activations,
    "atlas": _atlas,
    "comparison": _comparison,
    "concepts": _concepts,
    "detections": _detections,
    "diagnosis": _diagnosis,
    "dictionary": _dictionary,
    "effects": _effects,
    "evaluation": _evaluation,
    "explanation": _explanation,
    "heatmaps": partial(_heatmaps, kind=Heatmaps),
    "locations": partial(_heatmaps, kind=Locations),
    "patching": _patching,
    "patterns": _patterns,
    "predictions": lambda data: data.make(Predictions),
    "story": _story,
    "unitnames": lambda data: data.make(UnitNames),
}
"""How each kind of result is made of what was saved."""
