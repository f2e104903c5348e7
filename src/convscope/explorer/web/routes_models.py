"""API: models, and uploads of images."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from typing_extensions import TypedDict

from convscope.explorer.service.schemas import JsonObject
from convscope.explorer.web.parameters import PathNetwork, Runner
from convscope.explorer.web.responses import ERRORS

MAX_CLASSES = 20  # in a search

router = APIRouter(prefix="/api", responses=ERRORS)

UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class ModelRecord(TypedDict):
    """A model; `version` changes with its weights."""

    key: str
    name: str
    version: str
    takes_images: bool


class QueueLengths(TypedDict):
    """Number of queued jobs."""

    interactive: int
    background: int


class ModelList(TypedDict):
    """All models, and the load of the explorer."""

    models: list[ModelRecord]
    queued_jobs: QueueLengths


class ClassRecord(TypedDict):
    """A class."""

    index: int
    name: str


class ImageRecord(TypedDict):
    """An image."""

    key: str
    name: str
    height: int
    width: int


@router.get("/models")
async def models(runner: Runner) -> ModelList:
    """List the models, and the numbers of queued jobs."""
    explorer = runner.explorer
    records: list[ModelRecord] = [
        {"key": net.key, "name": net.model.name, "version": net.version, "takes_images": net.takes_images}
        for net in explorer.networks.values()
    ]
    lengths: QueueLengths = {
        "interactive": len(explorer.interactive_queue),
        "background": len(explorer.background_queue),
    }
    return {"models": records, "queued_jobs": lengths}


@router.get("/models/{model}")
def model(net: PathNetwork) -> JsonObject:
    """Describe a model: preprocessing, notes and layers. `edges` are pairs of indices of layers."""
    layers = [
        {"name": layer.name, "kind": layer.kind, "shape": list(layer.shape), "units": layer.units}
        for layer in net.layers
    ]
    return {
        **net.model.describe(),
        "version": net.version,
        "num_outputs": net.model.num_outputs,
        "layers": layers,
        "edges": net.edges,
    }


@router.get("/models/{model}/classes")
def classes(net: PathNetwork, search: Annotated[str, Query(max_length=100)] = "") -> dict[str, list[ClassRecord]]:
    """Find up to twenty classes by part of a name, or by index. Exact matches come first."""
    query = search.replace("_", " ").strip().casefold()
    records: list[ClassRecord] = [{"index": k, "name": net.model.class_name(k)} for k in range(net.num_classes)]
    matches = [
        record
        for record in records
        if str(record["index"]) == query or query in record["name"].replace("_", " ").casefold()
    ]
    exact = [record for record in matches if query in (str(record["index"]), record["name"].casefold())]
    return {"classes": [*exact, *(record for record in matches if record not in exact)][:MAX_CLASSES]}


@router.post("/images", openapi_extra=UPLOAD_SCHEMA)
async def upload(
    request: Request, runner: Runner, name: Annotated[str, Query(max_length=1000)] = "image"
) -> ImageRecord:
    """Upload an image; the body is the file. The same pixels always get the same key."""
    image = await runner.upload(request, name)
    return {"key": image.key, "name": image.name, "height": image.height, "width": image.width}
