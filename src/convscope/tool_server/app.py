"""The server: registers the tools, and runs each call in a thread, with progress, a time limit and cancellation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, ToolAnnotations

from convscope.errors import ConvscopeError
from convscope.tool_server.explanation_tools import ExplanationTools
from convscope.tool_server.files import AllowedFiles
from convscope.tool_server.limits import Limits, Task
from convscope.tool_server.model_tools import ModelTools, package_version
from convscope.tool_server.pattern_tools import PatternTools
from convscope.tool_server.responses import Answer
from convscope.tool_server.store_tools import StoreTools
from convscope.tool_server.workspace import Workspace

if TYPE_CHECKING:
    from convscope.engine.model import Model

INSTRUCTIONS = """Look inside networks for images with convscope: which layers there are, what they compute, which
pixels are evidence for a class and whether that is to be trusted, what each unit responds to.

Call `overview` first: it lists networks, folders and limits. Images are named by paths. Notes in answers say what
cannot be trusted; report them. Layers are named as `layers` lists them; units are numbers from 0."""


def build_server(
    loaders: Mapping[str, Callable[[], Model]],
    *,
    roots: Sequence[Path],
    out: Path,
    limits: Limits | None = None,
) -> MCPServer[Any]:
    """Return a server of the Model Context Protocol with convscope's functions as tools.

    Parameters
    ----------
    loaders : mapping of str to callable
        For each network that clients may use a function that loads it; the first is the default.
    roots : sequence of Path
        Folders whose images clients may use.
    out : Path
        The only folder in which files are written, when a client asks to save a result.
    limits : Limits, optional
        Bounds of each call.

    Raises
    ------
    ConvscopeError
        If there is no network, and for a root that is not a folder.
    """
    if not loaders:
        raise ConvscopeError("there are no networks; give at least one")
    workspace = Workspace(loaders, AllowedFiles(roots, out), limits or Limits())
    server: MCPServer[Any] = MCPServer(
        "convscope", version=package_version(), instructions=INSTRUCTIONS, log_level="WARNING"
    )
    inspecting, explaining = ModelTools(workspace), ExplanationTools(workspace)
    patterns, stores = PatternTools(workspace), StoreTools(workspace)
    for tool in (
        inspecting.overview, inspecting.list_images, inspecting.layers, inspecting.predict, inspecting.activations,
        inspecting.strongest_units, inspecting.detect, explaining.heatmap, explaining.locate, explaining.evaluate,
        explaining.explain, explaining.effects, explaining.patch, patterns.patterns, stores.scan, stores.diagnose,
        stores.store_summary,
        stores.store_units, stores.store_unit, stores.store_image,
    ):  # fmt: skip
        writes = {"save", "name"} & set(inspect.signature(tool).parameters)
        annotations = ToolAnnotations(read_only_hint=not writes, destructive_hint=False, open_world_hint=False)
        server.add_tool(as_tool(tool, workspace), annotations=annotations, structured_output=False)
    return server


def as_tool(method: Callable[..., Answer], workspace: Workspace) -> Callable[..., Coroutine[Any, Any, CallToolResult]]:
    """Return a coroutine function that runs a method in a thread, one call at a time.

    The method's parameter ``progress``, if it has one, is filled by the server.
    """

    async def call(context: Context[Any, Any], **arguments: Any) -> CallToolResult:
        def notify(done: float, total: int) -> None:
            anyio.from_thread.run(context.report_progress, done, total)

        task = Task(workspace.limits.seconds, notify)
        try:
            return await anyio.to_thread.run_sync(
                partial(_run, method, arguments, task, workspace), abandon_on_cancel=True
            )
        except ConvscopeError as error:
            raise ToolError(str(error)) from error
        finally:
            task.cancel()  # of a thread that goes on after the request was cancelled

    signature = inspect.signature(method, eval_str=True)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "progress"]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=Context[Any, Any])
    call.__name__, call.__doc__ = method.__name__, inspect.getdoc(method)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, context], return_annotation=CallToolResult
    )
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, context]}
    return call


def _run(method: Callable[..., Answer], arguments: Mapping[str, Any], task: Task, workspace: Workspace) -> Any:
    with workspace.lock:
        task.check()
        progress = {"progress": task} if "progress" in inspect.signature(method).parameters else {}
        return method(**arguments, **progress).to_result(workspace.limits)
