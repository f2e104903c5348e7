"""`convscope demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.options import MODEL_HELP, AsJson, NetworkOptions, Out, Seed
from convscope.cli.output import log, print_manifest, progress_bar, report_failures


@command()
def demo(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = "lite0",
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGES", help="Images. Default: four sample photographs.")
    ] = None,
    seed: Seed = 0,
    *,
    out: Out = Path("convscope-demo"),
    as_json: AsJson = False,
    network_options: NetworkOptions,
) -> None:
    """Write one page with predictions, heatmaps, activations and patterns of a network."""
    with progress_bar("load") as progress:  # the import takes seconds, too
        from convscope.reports.demo import write_demo
        from convscope.samples import photographs

        network = network_options.load(model)
        progress(1, 1)
    failures = write_demo(network, images or photographs(), out, seed=seed, progress_bar=progress_bar)
    report_failures(failures)
    if as_json:
        print_manifest(out)
    log(f"Done. Open {(out / 'index.html').resolve()}")
    if failures:
        raise typer.Exit(1)
