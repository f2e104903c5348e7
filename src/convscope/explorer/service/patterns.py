"""Patterns computed on request, and a folder that caches them and stories."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from convscope.attribution.default_layer import choose_layer
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.explorer.service.images import encode_image
from convscope.explorer.service.jobs import Job
from convscope.explorer.service.schemas import PatternRecord
from convscope.featurevis.api import patterns
from convscope.featurevis.image_set_objectives import diversity
from convscope.featurevis.layer_story import Story, read_story
from convscope.featurevis.objectives import Objective, channel
from convscope.featurevis.result import Patterns
from convscope.plotting.grids import tile, to_rgb
from convscope.results import atomic_write

VARIANTS = ("positive", "negative", "diverse")
RECIPES = ("robust", "maco", "plain")
NUM_DIVERSE = 4  # images of a diverse pattern
PREVIEW_INTERVAL = 6  # steps between two previews
PREVIEW_SIZE = 160  # pixels of a preview's height


@dataclass(frozen=True)
class PatternSpec:
    """What a pattern shows, and how it is computed.

    Attributes
    ----------
    layer, unit : str, int
        The unit; a class for the layer "logits".
    variant : {"positive", "negative", "diverse"}
        Maximise the unit, minimise it, or maximise it in several images that differ.
    recipe : {"robust", "maco", "plain"}
        As in `convscope.patterns`.
    seed : int
        Random seed.

    Raises
    ------
    ConvscopeError
        For an unknown variant or recipe.
    """

    layer: str
    unit: int
    variant: str = "positive"
    recipe: str = "robust"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConvscopeError(f"variant is {self.variant!r}; expected {', '.join(VARIANTS)}")
        if self.recipe not in RECIPES:
            raise ConvscopeError(f"recipe is {self.recipe!r}; expected {', '.join(RECIPES)}")

    def objective(self, model: Model) -> Objective:
        """Return the objective of the variant."""
        objective = channel(self.layer, self.unit)
        if self.variant == "negative":
            return -objective
        if self.variant == "diverse":
            return diversity(objective, self.diversity_layer(model), NUM_DIVERSE)
        return objective

    def diversity_layer(self, model: Model) -> str:
        """Return the layer at which images are made to differ: the one of heatmaps for classes, else the unit's."""
        return choose_layer(model)[0].name if self.layer == LOGITS else self.layer


def compute_pattern(
    model: Model, spec: PatternSpec, references: list[np.ndarray], job: Job[PatternRecord]
) -> PatternRecord:
    """Compute a pattern; report progress and previews to its job.

    Parameters
    ----------
    references : list of ndarray
        Images (H, W, 3) uint8 whose best score the pattern's score is compared with.
    """

    def set_preview(step: int, images: np.ndarray) -> None:
        if step % PREVIEW_INTERVAL == 1:
            image = Image.fromarray(_side_by_side(images))
            image.thumbnail((PREVIEW_SIZE * image.width // image.height, PREVIEW_SIZE))
            job.set_preview(encode_image(image, quality=70))

    positive = spec.variant == "positive"
    result = patterns(
        model,
        spec.layer if positive else spec.objective(model),
        [spec.unit] if positive else None,
        recipe=spec.recipe,
        seed=spec.seed,
        callback=set_preview,
        reference=(references or None) if positive else None,
        progress=job.report_progress,
    )
    return _record(result, spec)


def _record(result: Patterns, spec: PatternSpec) -> PatternRecord:
    """Describe a computed pattern."""
    score = float(result.scores.mean())
    noise_score = None if result.noise_scores is None else float(result.noise_scores.mean())
    reference_score = None if result.reference_scores is None else float(result.reference_scores[0])
    notes = list(result.notes)
    if reference_score is not None and reference_score > score:
        notes.append("a sample image activates this unit more than the pattern does: trust the images more")
    image = _side_by_side(result.images)
    return {
        "image": encode_image(Image.fromarray(image), "PNG"),
        "height": image.shape[0],
        "width": image.shape[1],
        "score": score,
        "noise_score": None if noise_score is None or np.isnan(noise_score) else noise_score,
        "reference_score": reference_score,
        "notes": notes,
        "steps": result.steps,
        "layer": spec.layer,
        "unit": spec.unit,
        "variant": spec.variant,
        "recipe": spec.recipe,
        "seed": spec.seed,
    }


def _side_by_side(images: np.ndarray) -> np.ndarray:
    return tile(to_rgb(images), len(images), margin=4, background=(128, 128, 128))


class PatternCache:
    """Finished patterns and stories in a folder. Without a folder nothing is stored."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, version: str, spec: PatternSpec) -> PatternRecord | None:
        """Return the pattern for a version of a model; None if there is none."""
        if self._folder is None:
            return None
        image, record = _paths(self._folder, version, spec)
        try:
            figures = json.loads(record.read_text(encoding="utf-8"))
            return cast(PatternRecord, {**figures, "image": image.read_bytes()})
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConvscopeError(f"cannot read the cached pattern {record} ({error}); remove it") from error

    def put(self, version: str, spec: PatternSpec, pattern: PatternRecord) -> None:
        """Store a pattern. Raises ConvscopeError if the folder cannot be written."""
        if self._folder is None:
            return
        image, record = _paths(self._folder, version, spec)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(image) as file:
                file.write(pattern["image"])
            with atomic_write(record) as file:  # last: whoever reads it finds the image
                file.write(json.dumps({k: v for k, v in pattern.items() if k != "image"}).encode())
        except OSError as error:
            raise ConvscopeError(f"cannot store patterns in {self._folder}: {error.strerror or error}") from error

    def get_story(self, version: str, model: Model) -> Story | None:
        """Return the story of a version of a model; None if there is none. Raises ConvscopeError if it is damaged."""
        folder = self._folder and self._folder / f"story-{version}"
        if folder is None or not (folder / "manifest.json").exists():
            return None
        return read_story(model, lambda name: (folder / name).read_bytes())

    def put_story(self, version: str, story: Story) -> None:
        """Store a story. Raises ConvscopeError if the folder cannot be written."""
        if self._folder is not None:
            story.save(self._folder / f"story-{version}")


def _paths(folder: Path, version: str, spec: PatternSpec) -> tuple[Path, Path]:
    """Return the paths of a pattern's image and record; their names are a hash of what the pattern depends on."""
    key = json.dumps([version, asdict(spec)], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return folder / f"{name}.png", folder / f"{name}.json"
