"""The command that shows a network a whole data set, and keeps what its units make of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.options import (
    MAX_PIXELS,
    AsJson,
    Classes,
    Device,
    Fit,
    MaxPixels,
    ModelName,
    Out,
    Prepare,
    Weights,
    app,
    load,
    log,
    print_json,
    progress_bar,
    split_commas,
)


@app.command()
def scan(
    model: ModelName,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="A folder, glob, list (.txt), tars, Parquet, torchvision:NAME:ROOT or a Hugging Face folder; any "
            "address that fsspec knows.",
        ),
    ],
    out: Out = Path("convscope-store"),
    layers: Annotated[
        str | None, typer.Option("--layers", help="Names, separated by commas; all. Default: one for each resolution.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Pictures kept for each unit, at either end.")] = 100,
    sample: Annotated[int, typer.Option(min=0, help="Pictures on which every unit's value is kept.")] = 1000,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures that go through the network together.")] = None,
    shard: Annotated[int | None, typer.Option(min=1, help="Pictures that are written together.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode ahead of the network.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Work on a Ray cluster; local: start one here.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile first: a minute or more, worth it for ten thousand pictures.")
    ] = False,
    fit: Fit = "squash",
    max_pixels: MaxPixels = MAX_PIXELS,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """Every unit's best pictures and statistics, from one pass over a data set. Killed, it goes on when called anew."""
    import convscope

    net = load(model, weights, classes, preprocessing, device)
    chosen = "all" if layers == "all" else None if layers is None else split_commas(layers)
    begin = time.perf_counter()
    with progress_bar("scan") as progress:
        store = convscope.scan(
            net, data[0] if len(data) == 1 else data, out, chosen, k, sample=sample, batch=batch, shard=shard, fit=fit,
            workers=workers, ray=ray, compiled=compiled, max_pixels=max_pixels, progress=progress,
        )  # fmt: skip
    images, failed = store.manifest["data"]["pictures"], store.manifest["failed"]
    seconds = time.perf_counter() - begin
    log(f"{images:,} pictures, {seconds:.1f} s; written to {out}")
    for note in store.manifest.get("notes", ()):
        log(f"note: {note}")
    for failure in store.failures(FEW):
        log(f"failed: {failure}")
    if failed > FEW:
        log(f"failed: {failed - FEW:,} more; all of them in {out / 'pictures.parquet'}")
    if as_json:
        print_json(store.manifest)
    if failed:
        raise typer.Exit(1)


FEW = 20  # pictures that are named one by one
