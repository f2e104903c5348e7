"""`convscope publish`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import CacheDir, Out, StartImages
from convscope.cli.output import log, progress_bar, report_failures
from convscope.cli.parsing import default_cache_dir, open_store_at


@command(extra="serve", package="fastapi")
def publish(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store written by `convscope scan`.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The network. Default: the one named in the store.")
    ] = None,
    image: StartImages = None,
    cache_dir: CacheDir = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of processes that crop patches. Default: one per CPU."),
    ] = None,
    *,
    out: Out = Path("convscope-site"),
    network_options: LayerNetworkOptions,
) -> None:
    """Write the explorer's pages as static files."""
    from convscope.explorer import server

    server.require_packages()
    from convscope.explorer.publish import publish as publish_site

    opened = open_store_at(store)
    name = model or str(opened.manifest["model"]["name"])
    network = network_options.load(name, opened)
    with progress_bar("pages") as progress:
        failures = publish_site(
            {name: network},
            opened,
            out,
            images=image or (),
            cache_dir=cache_dir or default_cache_dir(),
            workers=workers or os.cpu_count() or 1,
            progress=progress,
        )
    log(f"open {(out / 'index.html').resolve().as_uri()}")
    report_failures(failures)
    if failures:
        raise typer.Exit(1)
