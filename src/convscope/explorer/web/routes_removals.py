"""API: what the removal of units changes on an image."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from typing_extensions import TypedDict

from convscope.errors import ConvscopeError
from convscope.explorer.service.schemas import ExplanationRecord, LogitChange
from convscope.explorer.web.parameters import LayerName, OptionalLayer, PathImage, PathNetwork, Runner, Target
from convscope.explorer.web.responses import ERRORS

router = APIRouter(prefix="/api/models/{model}/images/{image}", responses=ERRORS)


class LogitChanges(TypedDict):
    """The classes whose logits change most if a unit is set to 0."""

    layer: str
    unit: int
    changes: list[LogitChange]


@router.get("/logit-changes")
async def logit_changes(
    request: Request,
    runner: Runner,
    net: PathNetwork,
    image: PathImage,
    layer: LayerName,
    unit: Annotated[int, Query(ge=0)],
) -> LogitChanges:
    """Return the classes whose logits change most if a unit is set to 0 at all positions."""
    entry = net.layer(layer)
    if unit >= entry.units:
        raise ConvscopeError(f"layer {layer!r} has {entry.units} units; there is no {unit}")
    rows = await runner.run(request, lambda client: runner.explorer.logit_changes(client, net, image, entry.name, unit))
    return {"layer": entry.name, "unit": unit, "changes": rows}


@router.get("/explanation")
async def explanation(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, target: Target, layer: OptionalLayer = None
) -> ExplanationRecord:
    """Return the few units of a layer that carry a class's logit, and the logit without them."""
    name = None if layer is None else net.layer(layer).name
    return await runner.run(request, lambda client: runner.explorer.explanation(client, net, image, target, name))
