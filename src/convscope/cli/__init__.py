"""The command line: parse, call, print. Exit status 0: all done, 1: some inputs failed, 2: nothing could be done."""

from __future__ import annotations

import os
import sys
import traceback
import warnings

from convscope.cli import (
    activations,
    atlas,
    compare,
    concepts,
    demo,
    detect,
    diagnose,
    dictionary,
    effects,
    evaluate,
    explain,
    heatmap,
    layers,
    locate,
    mcp,
    name,
    patch,
    patterns,
    predict,
    publish,
    scan,
    search,
    serve,
    skill,
    story,
    unit,
)
from convscope.cli.app import app
from convscope.cli.output import is_verbose, log_error
from convscope.errors import ConvscopeError, ConvscopeWarning

__all__ = [
    "activations",
    "app",
    "atlas",
    "compare",
    "concepts",
    "demo",
    "detect",
    "diagnose",
    "dictionary",
    "effects",
    "evaluate",
    "explain",
    "heatmap",
    "layers",
    "locate",
    "main",
    "mcp",
    "name",
    "patch",
    "patterns",
    "predict",
    "publish",
    "scan",
    "search",
    "serve",
    "skill",
    "story",
    "unit",
]


def main() -> None:
    """Run the `convscope` command."""
    sys.path.append(os.getcwd())  # where a user's package.module:factory is found
    warnings.simplefilter("ignore", ConvscopeWarning)  # commands print notes and failures themselves
    try:
        app(prog_name="convscope")
    except ConvscopeError as error:
        if is_verbose():
            traceback.print_exc()
        log_error(f"convscope: {error}")
        sys.exit(2)
