"""API: patterns and stories, computed while the client listens to server-sent events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from convscope.explorer.service.patterns import RECIPES, VARIANTS, PatternSpec
from convscope.explorer.service.schemas import PatternRecord
from convscope.explorer.web.event_stream import stream_job
from convscope.explorer.web.parameters import LayerName, PathNetwork, Runner
from convscope.explorer.web.responses import ERRORS
from convscope.featurevis.layer_story import Story

NUM_REFERENCES = 8  # sample images that a pattern's score is compared with

router = APIRouter(prefix="/api/models/{model}", responses=ERRORS)


@router.get("/pattern/events", response_class=Response)
async def pattern(
    request: Request,
    runner: Runner,
    net: PathNetwork,
    layer: LayerName,
    unit: Annotated[int, Query(ge=0)],
    variant: Annotated[str, Query(json_schema_extra={"enum": list(VARIANTS)})] = "positive",
    recipe: Annotated[str, Query(json_schema_extra={"enum": list(RECIPES)})] = "robust",
    seed: Annotated[int, Query(ge=0, le=9999)] = 0,
) -> Response:
    """Compute a unit's pattern: server-sent events `progress` and `frame`, then `done` or `failed`.

    The computation is cancelled when no client listens any more.
    """
    net.require_unit(layer, unit)
    spec = PatternSpec(layer, unit, variant, recipe, seed)
    samples = runner.explorer.images.samples[:NUM_REFERENCES] if net.takes_images else []
    references = [image.pixels for image in samples]
    job = runner.explorer.start_pattern(runner.client_id(request), net, spec, references)
    return stream_job(request, job, _pattern_figures)


@router.get("/story/events", response_class=Response)
async def story(request: Request, runner: Runner, net: PathNetwork) -> Response:
    """Compute the story of a model, with events as of a pattern."""
    job = runner.explorer.start_story(runner.client_id(request), net)
    return stream_job(request, job, _story_size)


def _pattern_figures(record: PatternRecord) -> Mapping[str, object]:
    return {name: value for name, value in record.items() if name != "image"}


def _story_size(story: Story) -> Mapping[str, object]:
    return {"chapters": len(story.chapters)}
