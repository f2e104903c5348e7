"""Patterns drawn on demand, frame by frame; they and stories are kept under names made of what went into them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.explorer.service.images import encode_image
from convscope.explorer.service.jobs import Job
from convscope.featurevis.api import patterns
from convscope.featurevis.layer_story import Story, read_story
from convscope.featurevis.objectives import Objective, channel, diversity
from convscope.plotting.figures import coloured, tile
from convscope.results import atomic_write

VARIANTS = ("positive", "negative", "diverse")
RECIPES = ("robust", "maco", "plain")
NUM_DIVERSE = 4  # pictures of a diverse pattern
PREVIEW_INTERVAL = 6  # steps between two frames
PREVIEW_SIZE = 160  # pixels of a frame, at most


@dataclass(frozen=True)
class PatternSpec:
    """Which pattern: of a unit ("logits": a class), what it wants, what it does not want, or several ways to please it.

    Raises ConvscopeError for a look or recipe that there is not.
    """

    layer: str
    unit: int
    variant: str = "positive"
    recipe: str = "robust"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConvscopeError(f"look is {self.variant!r}; expected {', '.join(VARIANTS)}")
        if self.recipe not in RECIPES:
            raise ConvscopeError(f"recipe is {self.recipe!r}; expected {', '.join(RECIPES)}")

    def objective(self, model: Model) -> Objective:
        one = channel(self.layer, self.unit)
        if self.variant == "negative":
            return -one
        return diversity(one, self.diversity_layer(model), NUM_DIVERSE) if self.variant == "diverse" else one

    def diversity_layer(self, model: Model) -> str:
        """The layer at which several pictures are kept apart: a class's last with places, else the unit's own."""
        return model.layers.last_spatial().name if self.layer == LOGITS else self.layer


def compute_pattern(model: Model, spec: PatternSpec, references: list[np.ndarray], job: Job) -> dict[str, Any]:
    """The pattern: `image`, a PNG; its `score`, that of noise and of the best reference; `notes` in words.

    `work` is shown a picture every few steps, and told of every one.
    """

    def watch(step: int, images: np.ndarray) -> None:
        if step % PREVIEW_INTERVAL == 1:
            image = Image.fromarray(side_by_side(images))
            image.thumbnail((PREVIEW_SIZE * image.width // image.height, PREVIEW_SIZE))
            job.set_preview(encode_image(image, quality=70))

    plain = spec.variant == "positive"
    made = patterns(
        model,
        spec.layer if plain else spec.objective(model),
        [spec.unit] if plain else None,
        recipe=spec.recipe,
        seed=spec.seed,
        callback=watch,
        reference=(references or None) if plain else None,
        progress=job.report_progress,
    )
    score = float(made.scores.mean())
    best = None if made.reference_scores is None else float(made.reference_scores[0])
    notes = list(made.notes)
    if best is not None and best > score:
        notes.append(
            "a photograph excites this unit more than the pattern does: believe the photographs rather than the pattern"
        )
    page = side_by_side(made.images)
    return {
        "image": encode_image(Image.fromarray(page), "PNG"),
        "height": page.shape[0],
        "width": page.shape[1],
        "score": score,
        "noise": None
        if made.noise_scores is None or np.isnan(made.noise_scores).any()
        else float(made.noise_scores.mean()),
        "reference": best,
        "notes": notes,
        "steps": made.steps,
        **asdict(spec),
    }


def side_by_side(images: np.ndarray) -> np.ndarray:
    return tile(coloured(images), len(images), margin=4, background=(128, 128, 128))


class PatternCache:
    """Finished patterns and stories in a folder; without one, nothing is kept here."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, version: str, spec: PatternSpec) -> dict[str, Any] | None:
        """The pattern that was kept; None if it is not there."""
        if self._folder is None:
            return None
        image, told = self._files(version, spec)
        try:
            found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
            return {**found, "image": image.read_bytes()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConvscopeError(f"the kept pattern {told} cannot be read ({error}); remove it") from error

    def put(self, version: str, spec: PatternSpec, pattern: dict[str, Any]) -> None:
        """Keep it. Raises ConvscopeError if the folder cannot be written."""
        if self._folder is None:
            return
        image, told = self._files(version, spec)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(image) as file:
                file.write(pattern["image"])
            with atomic_write(told) as file:  # last: what it tells of is there
                file.write(json.dumps({k: v for k, v in pattern.items() if k != "image"}).encode())
        except OSError as error:
            raise ConvscopeError(f"cannot keep patterns in {self._folder}: {error.strerror or error}") from error

    def get_story(self, version: str, model: Model) -> Story | None:
        """The story that was kept; None if it is not there. Raises ConvscopeError if it cannot be read."""
        folder = self._folder and self._folder / f"story-{version}"
        if folder is None or not (folder / "manifest.json").exists():
            return None
        return read_story(model, lambda name: (folder / name).read_bytes())

    def put_story(self, version: str, story: Story) -> None:
        """Keep it. Raises ConvscopeError if the folder cannot be written."""
        if self._folder is not None:
            story.save(self._folder / f"story-{version}")

    def _files(self, version: str, what: PatternSpec) -> tuple[Path, Path]:
        assert self._folder is not None
        words = json.dumps([version, asdict(what)], sort_keys=True)
        name = hashlib.sha256(words.encode()).hexdigest()[:32]
        return self._folder / f"{name}.png", self._folder / f"{name}.json"
