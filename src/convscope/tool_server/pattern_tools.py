"""The tool that computes the patterns of units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from convscope.featurevis.api import patterns
from convscope.progress import Progress
from convscope.tool_server.parameters import ModelName, SaveName, Seed
from convscope.tool_server.responses import Answer, describe, figure_image
from convscope.tool_server.workspace import Workspace


@dataclass(frozen=True)
class PatternTools:
    """The tool patterns.

    Attributes
    ----------
    workspace : Workspace
    """

    workspace: Workspace

    def patterns(
        self,
        layer: Annotated[str, Field(description='A layer, or "logits" for the classes themselves.')],
        units: Annotated[
            list[int | str], Field(description="Numbers of units; of logits also names of classes.", min_length=1)
        ],
        recipe: Annotated[str, Field(description="A recipe that `overview` lists.")] = "robust",
        steps: Annotated[int | None, Field(description="Steps. Default: the recipe's.", ge=1)] = None,
        size: Annotated[int | None, Field(description="Side in pixels. Default: the recipe's.", ge=8, le=512)] = None,
        seed: Seed = 0,
        save: SaveName = None,
        model: ModelName = None,
        *,
        progress: Progress,
    ) -> Answer:
        """Compute the image that maximises each unit (feature visualisation).

        Scores are the units' activations on the finished images; a pattern is trustworthy if its score is well above
        noise_score, its score on noise. The status says what is wrong with a pattern, such as "dead".
        """
        limits = self.workspace.limits
        limits.check("the number of units", len(units), limits.units)
        limits.check("steps", steps or 0, limits.steps)
        result = patterns(
            self.workspace.model(model),
            layer,
            units,
            recipe=recipe,
            size=size,
            steps=steps,
            seed=seed,
            progress=progress,
        )
        return describe(result, limits, images=figure_image(result), saved=self.workspace.save(result, save))
