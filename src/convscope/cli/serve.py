"""Commands that open a network in the browser: `serve`, live, and `publish`, as files."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.options import Classes, Device, Out, Prepare, Weights, app, load, log, progress_bar, report
from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from convscope.engine.model import Model
    from convscope.store.store import Store

StoreFolder = Annotated[str | None, typer.Option(metavar="STORE", help="What convscope scan wrote for this network.")]
Keep = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where patterns are kept. Default: the user's cache folder.")
]


@app.command()
def serve(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL...]", help="Default: lite0.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Pictures to begin with; several times.")
    ] = None,
    store: StoreFolder = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; other than this machine alone needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8420,
    token: Annotated[
        str | None, typer.Option(envvar="CONVSCOPE_TOKEN", help="What visitors have to know; auto: a fresh one.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Names under which visitors reach this host; several times.")
    ] = None,
    keep: Keep = None,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """Walk through networks in the browser."""
    from convscope.explorer import server
    from convscope.explorer.web import security

    secret = security.new_token() if token == "auto" else token
    security.require_token(host, secret)
    opened = None if store is None else _opened(store)
    nets = {m: load(m, weights, classes, preprocessing, device) for m in models or ["lite0"]}
    names = [n.lower() for n in name or ()]
    hosts = [*security.LOCAL_HOSTS, host, f"[{host}]", *names] if names or security.is_loopback(host) else ["*"]
    built = server.build_app(
        nets, images=image or (), store=opened, cache_dir=keep or cache_folder(), hosts=hosts, token=secret
    )
    listening = server.bind_socket(host, port)
    at = names[0] if names else f"[{host}]" if ":" in host else host
    log(f"open http://{at}:{listening.getsockname()[1]}/{'' if secret is None else f'?token={secret}'}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve(built, listening)


@app.command()
def publish(
    store: Annotated[str, typer.Argument(metavar="STORE", help="What convscope scan wrote.")],
    out: Out = Path("convscope-site"),
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The network. Default: by the name in the store.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Pictures to walk with; several times.")
    ] = None,
    keep: Keep = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that cut out examples.")] = os.cpu_count() or 1,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """Write the explorer's pages as files, for any web server or none."""
    from convscope.explorer import server

    server.require_packages()
    from convscope.explorer.publish import publish as write

    opened = _opened(store)
    named = model or str(opened.manifest["model"]["name"])
    net: Model = load(named, weights, classes, preprocessing, device)
    with progress_bar("pages") as progress:
        failed = write(
            {named: net},
            opened,
            out,
            images=image or (),
            cache_dir=keep or cache_folder(),
            workers=workers,
            progress=progress,
        )
    log(f"open {(out / 'index.html').resolve().as_uri()}")
    report(failed)
    if failed:
        raise typer.Exit(1)


def cache_folder() -> Path:
    """Where patterns are kept unless told otherwise."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "convscope" / "patterns"


def _opened(address: str) -> Store:
    try:
        from convscope.store.store import open_store
    except ImportError as error:
        raise ConvscopeError(f"stores need {error.name}; pip install 'convscope[scan]'") from error
    return open_store(address)
