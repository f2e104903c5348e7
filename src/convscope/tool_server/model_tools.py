"""Tools that show a network and what it computes for images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from convscope.detection.api import detect
from convscope.engine.layer_table import Layer
from convscope.feature_maps import activations
from convscope.names import methods, metrics, recipes
from convscope.predictions import predict
from convscope.progress import Progress
from convscope.results import versions
from convscope.tool_server.parameters import Fit, ImagePaths, LayerName, ModelName, SaveName
from convscope.tool_server.responses import Answer, describe, figure_image
from convscope.tool_server.workspace import Workspace


@dataclass(frozen=True)
class ModelTools:
    """The tools overview, list_images, layers, predict, activations and detect.

    Attributes
    ----------
    workspace : Workspace
    """

    workspace: Workspace

    def overview(self) -> Answer:
        """Describe this server: networks, folders it reads, output folder, limits, methods, metrics and recipes.

        Call it first.
        """
        files = self.workspace.files
        return Answer(
            {
                "version": package_version(),
                "models": self.workspace.model_names,
                "reads": files.roots,
                "writes": files.out,
                "limits": asdict(self.workspace.limits),
                "heatmap_methods": methods(),
                "evaluation_metrics": metrics(),
                "pattern_recipes": recipes(),
            }
        )

    def list_images(
        self,
        folder: Annotated[str | None, Field(description="A folder; all that may be read if omitted.")] = None,
        *,
        progress: Progress,
    ) -> Answer:
        """List image files that the other tools may read."""
        files, limit = self.workspace.files, self.workspace.limits.rows
        folders = files.roots if folder is None else [files.existing(folder)]
        paths: list[str] = []
        for root in folders:
            for path in files.images_in(root):
                if len(paths) == limit:
                    return Answer({"images": paths, "more": f"only the first {limit} are listed; name a folder"})
                paths.append(str(path))
                progress(len(paths), limit)
        return Answer({"images": paths})

    def layers(
        self,
        every: Annotated[bool, Field(description="Every layer, also identities and the layers inside blocks.")] = False,
        start: Annotated[int, Field(description="First row.", ge=0)] = 0,
        model: ModelName = None,
    ) -> Answer:
        """List a network's layers: name, kind, output shape, units, receptive field, stride, parameters."""
        network = self.workspace.model(model)
        table = network.layers if every else network.layers.main
        end = start + self.workspace.limits.rows
        content: dict[str, Any] = {
            "model": network.name,
            "task": network.task,
            "outputs": network.num_outputs,
            "input_size": network.preprocessing.size,
            "notes": network.notes,
            "layers": [_layer_row(layer) for layer in list(table)[start:end]],
        }
        if len(table) > end:
            content["more"] = f"{len(table) - end} more layers: start={end}"
        return Answer(content)

    def predict(
        self,
        images: ImagePaths,
        top: Annotated[int, Field(description="Number of classes for each image.", ge=1, le=20)] = 5,
        fit: Fit = "squash",
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Classify images: the most probable classes, with probabilities and logits."""
        result = predict(self.workspace.model(model), self.workspace.images(images), top, fit=fit, progress=progress)
        return describe(result, self.workspace.limits)

    def activations(
        self,
        images: ImagePaths,
        layers: Annotated[
            list[str] | None, Field(description="Layers. Default: the last of each resolution.", max_length=16)
        ] = None,
        fit: Fit = "squash",
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Compute feature maps: statistics of each layer, and a figure of the strongest maps for each image."""
        result = activations(
            self.workspace.model(model), self.workspace.images(images), layers, fit=fit, progress=progress
        )
        positions = range(min(len(result), self.workspace.limits.returned_images))
        figures = [(result.image_names[n], image) for n in positions for _, image in figure_image(result, image=n)]
        return describe(result, self.workspace.limits, images=figures, saved=self.workspace.save(result, save))

    def strongest_units(
        self,
        images: ImagePaths,
        layer: LayerName,
        count: Annotated[int, Field(description="Number of units for each image.", ge=1, le=50)] = 10,
        fit: Fit = "squash",
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """List the units of a layer that each image activates most, by the maximum over positions."""
        result = activations(
            self.workspace.model(model), self.workspace.images(images), layer, fit=fit, progress=progress
        )
        summary = result.summary(layer)
        rows = [
            {
                "image": name,
                "unit": int(unit),
                "maximum": float(summary["max"][n, unit]),
                "mean": float(summary["mean"][n, unit]),
                "active": float(summary["active"][n, unit]),
            }
            for n, name in enumerate(result.image_names)
            for unit in (-summary["max"][n]).argsort(kind="stable")[:count]
        ]
        return describe(result, self.workspace.limits, rows=rows)

    def detect(
        self,
        images: ImagePaths,
        threshold: Annotated[float, Field(description="Smallest score of a box.", ge=0, le=1)] = 0.5,
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Find objects with a network that detects: boxes in pixels, classes and scores."""
        result = detect(self.workspace.model(model), self.workspace.images(images), threshold, progress=progress)
        return self.workspace.answer(result, save)


def package_version() -> str:
    """Return the installed version of convscope."""
    return versions().get("convscope", "unknown")


def _layer_row(layer: Layer) -> dict[str, Any]:
    values = {
        "name": layer.name,
        "kind": layer.kind,
        "shape": layer.shape,
        "units": layer.units,
        "receptive_field": layer.receptive_field,
        "stride": layer.stride,
        "parameters": layer.parameters,
        "alias_of": layer.alias_of,
    }
    return {name: value for name, value in values.items() if value is not None}
