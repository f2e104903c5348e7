"""`convscope mcp`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions, read_dictionary
from convscope.cli.options import MODEL_HELP
from convscope.errors import ConvscopeError

LIMITS = "Limits of one call"  # panel of the help


@command(extra="mcp", package="mcp")
def mcp(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=f"Networks that clients may use: {MODEL_HELP} Default: lite0."),
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="A folder whose images clients may use; repeatable. Default: this folder."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The only folder in which files are written.")
    ] = Path("convscope-mcp"),
    time_limit: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Time limit of a call.", rich_help_panel=LIMITS)
    ] = 300,
    image_size: Annotated[
        int, typer.Option(metavar="N", min=32, help="Longer side of returned images.", rich_help_panel=LIMITS)
    ] = 768,
    max_images: Annotated[int, typer.Option(metavar="N", min=1, help="Images.", rich_help_panel=LIMITS)] = 32,
    max_units: Annotated[int, typer.Option(metavar="N", min=1, help="Patterns.", rich_help_panel=LIMITS)] = 64,
    max_steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Steps of gradient ascent.", rich_help_panel=LIMITS)
    ] = 512,
    *,
    network_options: LayerNetworkOptions,
) -> None:
    """Serve convscope's functions as tools for agents (MCP).

    The server speaks the Model Context Protocol over standard input and output; the agent's program starts it. Clients
    choose among the networks that are named here, read images in the given folders only, and write into the output
    folder only. Networks are loaded when they are first used.
    """
    from convscope.tool_server.app import build_server
    from convscope.tool_server.limits import Limits

    if network_options.dictionary and len(models or ()) > 1:
        raise ConvscopeError(f"--dictionary is of one network; {len(models or ())} are given: serve them separately")
    for folder in network_options.dictionary or ():
        read_dictionary(folder)  # networks are loaded later; what is no dictionary is refused now
    limits = Limits(seconds=time_limit, image_size=image_size, images=max_images, units=max_units, steps=max_steps)
    loaders = {name: partial(network_options.load, name) for name in models or ["lite0"]}
    build_server(loaders, roots=root or [Path.cwd()], out=out, limits=limits).run("stdio")
