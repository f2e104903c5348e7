"""The command line: parse, call, print. Exit status 0: all done, 1: some inputs failed, 2: nothing could be done."""

from __future__ import annotations

import os
import sys

from convscope.cli import collect, concepts, draw, heat, look, serve
from convscope.cli.options import app, log
from convscope.errors import ConvscopeError

__all__ = ["app", "collect", "concepts", "draw", "heat", "look", "main", "serve"]


def main() -> None:
    """Entry point of the `convscope` command."""
    sys.path.append(os.getcwd())  # where a user's package.module:factory lies
    try:
        app()
    except ConvscopeError as error:
        log(f"convscope: {error}")
        sys.exit(2)
