"""The Typer application that commands register with."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Visualise what a PyTorch or Keras network for images has learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
