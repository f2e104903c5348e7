"""API: what the removal of units changes on an image."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from typing_extensions import TypedDict

from convscope.errors import ConvscopeError
from convscope.explorer.service.removals import How
from convscope.explorer.service.schemas import ExplanationRecord, LogitChange
from convscope.explorer.web.parameters import OptionalLayer, PathImage, PathNetwork, QueryLayer, Runner, Target
from convscope.explorer.web.responses import ERRORS

router = APIRouter(prefix="/api/models/{model}/images/{image}", responses=ERRORS)


class LogitChanges(TypedDict):
    """The classes whose logits fall most, and rise most, if a unit is removed."""

    layer: str
    unit: int
    how: How
    changes: list[LogitChange]


class UnitEffects(TypedDict):
    """How far the logit of a class falls if each unit of a layer is set to 0."""

    layer: str
    target: int
    effects: list[float]


@router.get("/logit-changes")
async def logit_changes(
    request: Request,
    runner: Runner,
    net: PathNetwork,
    image: PathImage,
    layer: QueryLayer,
    unit: Annotated[int, Query(ge=0)],
    how: Annotated[How, Query(description="what replaces the unit at all positions: 0, or its mean")] = "zero",
) -> LogitChanges:
    """Return the classes whose logits fall most, and rise most, if a unit is removed."""
    if unit >= layer.units:
        raise ConvscopeError(f"layer {layer.name!r} has {layer.units} units; there is no {unit}")
    rows = await runner.run(
        request, lambda client: runner.explorer.logit_changes(client, net, image, layer.name, unit, how)
    )
    return {"layer": layer.name, "unit": unit, "how": how, "changes": rows}


@router.get("/effects")
async def effects(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, target: Target, layer: QueryLayer
) -> UnitEffects:
    """Return how far the logit of a class falls if each unit of a layer is set to 0."""
    values = await runner.run(
        request, lambda client: runner.explorer.unit_effects(client, net, image, layer.name, target)
    )
    return {"layer": layer.name, "target": target, "effects": values.tolist()}


@router.get("/explanation")
async def explanation(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, target: Target, layer: OptionalLayer = None
) -> ExplanationRecord:
    """Return the few units of a layer that carry a class's logit, and the logit without them."""
    name = None if layer is None else net.layer(layer).name
    return await runner.run(request, lambda client: runner.explorer.explanation(client, net, image, target, name))
