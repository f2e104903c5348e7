"""Option types of the commands that read a store."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

StoreArgument: TypeAlias = Annotated[str, typer.Argument(metavar="STORE", help="A store written by `convscope scan`.")]
Judge: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="A network that compares images with text (open_clip:..., hf:...), or a classifier."
    ),
]
