"""`convscope scan`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import AsJson, ImageOptions, ModelName, Out, Ray
from convscope.cli.output import log, log_error, log_note, print_json, progress_bar, report_failures
from convscope.cli.parsing import require_installed, split_commas

MAX_LISTED_FAILURES = 20


@command(extra="scan", package="pyarrow")
def scan(
    model: ModelName,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="A folder, glob, list of files (.txt, .csv), tar files, Parquet files, torchvision:NAME:ROOT or a "
            "Hugging Face folder; local, or at any address that fsspec supports.",
        ),
    ],
    layers: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="Layers, separated by commas, or all. Default: one per resolution."),
    ] = None,
    k: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of top and of bottom images stored per unit.")
    ] = 100,
    sample: Annotated[
        int, typer.Option(metavar="N", min=0, help="Number of images for which the maximum of every unit is stored.")
    ] = 1000,
    batch: Annotated[int | None, typer.Option(metavar="N", min=1, help="Batch size.")] = None,
    shard: Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of images per shard.")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Number of processes that decode images.")
    ] = None,
    ray: Ray = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the network first: takes a minute or more, worth it from about 10,000 images."
        ),
    ] = False,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-store"),
    as_json: AsJson = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Record top images and statistics of every unit over a data set.

    If interrupted, rerun the same command to resume.
    """
    import convscope

    if ray is not None:
        require_installed("ray", "ray")
    network = network_options.load(model)
    requested = None if layers is None else split_commas(layers)
    names = "all" if layers == "all" else network_options.default_layers(requested, network)
    start = time.perf_counter()
    with progress_bar("scan") as progress:
        store = convscope.scan(
            network,
            data[0] if len(data) == 1 else data,
            out,
            names,
            k,
            sample=sample,
            batch=batch,
            shard=shard,
            fit=reading.fit,
            workers=workers,
            ray=ray,
            compiled=compiled,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    num_images, num_failed = store.manifest["data"]["images"], store.manifest["failed"]
    log(f"{num_images:,} images, {time.perf_counter() - start:.1f} s; written to {out}")
    for note in store.manifest.get("notes", ()):
        log_note(note)
    report_failures(store.failures(MAX_LISTED_FAILURES))
    if num_failed > MAX_LISTED_FAILURES:
        log_error(f"failed: {num_failed - MAX_LISTED_FAILURES:,} more; all are listed in {out / 'images.parquet'}")
    if as_json:
        print_json(store.manifest)
    if num_failed:
        raise typer.Exit(1)
