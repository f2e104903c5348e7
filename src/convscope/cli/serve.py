"""`convscope serve`."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import MODEL_HELP, CacheDir, StartImages, StoreAddress
from convscope.cli.output import log
from convscope.cli.parsing import default_cache_dir, open_store_at


@command(extra="serve", package="fastapi")
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=f"Networks: {MODEL_HELP} Default: lite0."),
    ] = None,
    image: StartImages = None,
    store: StoreAddress = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; any other than loopback requires --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="Port; 0 selects a free one.")] = 8420,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", envvar="CONVSCOPE_TOKEN", help="Access token that clients must send; auto: generate one."
        ),
    ] = None,
    hostname: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Host name by which visitors reach the server; repeatable.")
    ] = None,
    cache_dir: CacheDir = None,
    *,
    network_options: LayerNetworkOptions,
) -> None:
    """Explore networks in the browser."""
    from convscope.explorer import server

    server.require_packages()
    from convscope.explorer.web import security

    secret = security.new_token() if token == "auto" else token  # noqa: S105 - not a password
    security.require_token(host, secret)
    opened = None if store is None else open_store_at(store)
    networks = network_options.load_several(models or ["lite0"], opened)
    names = [name.lower() for name in hostname or ()]
    hosts = [*security.LOCAL_HOSTS, host, f"[{host}]", *names] if names or security.is_loopback(host) else ["*"]
    application = server.build_app(
        networks,
        images=image or (),
        store=opened,
        cache_dir=cache_dir or default_cache_dir(),
        hosts=hosts,
        token=secret,
    )
    socket = server.bind_socket(host, port)
    address = names[0] if names else f"[{host}]" if ":" in host else host
    log(f"open http://{address}:{socket.getsockname()[1]}/{'' if secret is None else f'?token={secret}'}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve(application, socket)
