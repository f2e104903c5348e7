"""Tools that explain outputs of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from convscope.attribution.api import heatmaps
from convscope.attribution.locations import locate
from convscope.attribution.result import Heatmaps
from convscope.editing.activation_patching import patch
from convscope.editing.unit_effects import effects
from convscope.engine.text_targets import parse_names
from convscope.evaluation.api import evaluate
from convscope.explanations.api import explain
from convscope.progress import Progress
from convscope.tool_server.parameters import (
    Against,
    Fit,
    ImagePaths,
    LayerName,
    ModelName,
    OneImage,
    OptionalStore,
    SaveName,
    Seed,
    TargetNames,
    Units,
)
from convscope.tool_server.responses import Answer, describe
from convscope.tool_server.workspace import Workspace, parse_class

Method = Annotated[
    str | None, Field(description="A method that `overview` lists. Default: one that suits the network.")
]
Options = Annotated[
    dict[str, Any] | None,
    Field(description='Options of the method, such as {"samples": 500} for rise; an unknown one is refused by name.'),
]


@dataclass(frozen=True)
class ExplanationTools:
    """The tools heatmap, locate, evaluate, effects, explain and patch.

    Attributes
    ----------
    workspace : Workspace
    """

    workspace: Workspace

    def heatmap(
        self,
        images: ImagePaths,
        targets: TargetNames = None,
        against: Against = None,
        layer: Annotated[str | None, Field(description="A layer. Default: one that is proven to matter.")] = None,
        method: Method = None,
        options: Options = None,
        fit: Fit = "squash",
        seed: Seed = 0,
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Compute heatmaps of the evidence for classes, as overlays over the images.

        Each map is scaled by its own maximum, so colors of two maps are not comparable; the table has the raw extremes.
        Whether a map is faithful to the network: `evaluate` with the same arguments.
        """
        maps = self._heatmaps(images, targets, against, layer, method, options, fit, seed, model, progress)
        rows = [
            {**row, "probability": float(probability)}
            for row, probability in zip(maps.rows(), maps.probabilities.ravel(), strict=True)
        ]
        return describe(
            maps,
            self.workspace.limits,
            rows=rows,
            images=self._overlays(maps),
            saved=self.workspace.save(maps, save),
            layer=maps.layer,
            layer_reason=maps.layer_reason,
        )

    def locate(
        self,
        images: ImagePaths,
        targets: TargetNames = None,
        against: Against = None,
        threshold: Annotated[
            float, Field(description="Fraction of a map's maximum inside the box.", gt=0, lt=1)
        ] = 0.35,
        fit: Fit = "squash",
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Find where targets are in images: a box in pixels for each, and maps that follow the object."""
        network, paths = self.workspace.model(model), self.workspace.images(images)
        locations = locate(
            network,
            paths,
            parse_names(network, targets, len(paths)),
            threshold=threshold,
            fit=fit,
            against=parse_class(network, against),
            progress=progress,
        )
        saved = self.workspace.save(locations, save)
        return describe(locations, self.workspace.limits, images=self._overlays(locations), saved=saved)

    def evaluate(
        self,
        images: ImagePaths,
        metrics: Annotated[
            list[str], Field(description="Metrics that `overview` lists, without those that need masks.", min_length=1)
        ] = ["deletion", "insertion", "randomisation"],  # noqa: B006 - only read
        targets: TargetNames = None,
        against: Against = None,
        layer: Annotated[str | None, Field(description="A layer. Default: as in `heatmap`.")] = None,
        method: Method = None,
        options: Options = None,
        steps: Annotated[int, Field(description="Points of curves.", ge=2, le=100)] = 28,
        fit: Fit = "squash",
        seed: Seed = 0,
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Measure whether heatmaps are faithful to the network: compute them and score them by metrics.

        Trust a map if insertion is above deletion and above chance, and if randomisation is low: the map changes when
        the weights do. Notes say which metrics make the maps suspicious.
        """
        maps = self._heatmaps(images, targets, against, layer, method, options, fit, seed, model, progress)
        evaluation = evaluate(
            maps.model, list(maps.image_names), maps, metrics, steps=steps, seed=seed, progress=progress
        )
        return self.workspace.answer(evaluation, save)

    def effects(
        self,
        images: ImagePaths,
        layer: LayerName,
        units: Units = None,
        how: Annotated[str, Field(description="What replaces a unit: zero, mean or resample.")] = "zero",
        targets: TargetNames = None,
        store: OptionalStore = None,
        seed: Seed = 0,
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Measure what the removal of each unit of a layer changes in the targets' logits, largest effects first."""
        network, paths = self.workspace.model(model), self.workspace.images(images)
        result = effects(
            network,
            paths,
            layer,
            units,
            how=how,
            targets=parse_names(network, targets, len(paths)),
            store=self.workspace.optional_store(store),
            seed=seed,
            progress=progress,
        )
        return self.workspace.answer(result, save)

    def explain(
        self,
        images: ImagePaths,
        targets: TargetNames = None,
        against: Against = None,
        layer: Annotated[str | None, Field(description="A layer. Default: that of heatmaps.")] = None,
        features: Annotated[int, Field(description="Number of units for each image.", ge=1, le=32)] = 8,
        store: OptionalStore = None,
        fit: Fit = "squash",
        seed: Seed = 0,
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Find the few units that carry a prediction: their effects, their positions, and the proof by removal."""
        network, paths = self.workspace.model(model), self.workspace.images(images)
        explanation = explain(
            network,
            paths,
            parse_names(network, targets, len(paths)),
            layer=layer,
            features=features,
            against=parse_class(network, against),
            store=self.workspace.optional_store(store),
            fit=fit,
            seed=seed,
            progress=progress,
        )
        return self.workspace.answer(explanation, save)

    def patch(
        self,
        source: OneImage,
        destination: OneImage,
        layer: LayerName,
        by: Annotated[str, Field(description="Move single units, positions, or both: unit, position, both.")] = "unit",
        units: Units = None,
        target: Annotated[str | int | None, Field(description="A class. Default: the source's top class.")] = None,
        against: Against = None,
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Move activations of one image into the pass of another, and measure how far each moves the target's score."""
        network = self.workspace.model(model)
        (source_file,), (destination_file,) = (self.workspace.images([path]) for path in (source, destination))
        result = patch(
            network,
            source_file,
            destination_file,
            layer,
            by=by,  # type: ignore[arg-type]  # other words are refused
            units=units,
            targets=parse_class(network, target),
            against=parse_class(network, against),
            progress=progress,
        )
        return self.workspace.answer(result, save)

    def _heatmaps(
        self,
        images: list[str],
        targets: list[str | int] | None,
        against: str | int | None,
        layer: str | None,
        method: str | None,
        options: dict[str, Any] | None,
        fit: str,
        seed: int,
        model: str | None,
        progress: Progress,
    ) -> Heatmaps:
        network, paths = self.workspace.model(model), self.workspace.images(images)
        return heatmaps(
            network,
            paths,
            parse_names(network, targets, len(paths)),
            layer=layer,
            method=method,
            fit=fit,
            against=parse_class(network, against),
            seed=seed,
            progress=progress,
            **(options or {}),
        )

    def _overlays(self, maps: Heatmaps) -> list[Any]:
        """Return the overlays with captions, in the size in which they are sent."""
        if maps.values.ndim != 4:
            return []
        captions = [
            f"{target} in {name}" for name, names in zip(maps.image_names, maps.names, strict=True) for target in names
        ]
        return list(zip(captions, maps.overlay(size=(1, self.workspace.limits.image_size)), strict=True))
