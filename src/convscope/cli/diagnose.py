"""`convscope diagnose`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import AsJson, ImageOptions, ModelName, Out, Ray, Seed
from convscope.cli.output import finish, log, print_json
from convscope.cli.parsing import open_store_at, require_installed
from convscope.cli.tables import Column, print_table

if TYPE_CHECKING:
    from convscope.diagnosis.result import Diagnosis


@command(extra="scan", package="pyarrow")
def diagnose(
    model: ModelName,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Labelled images: a folder with a subfolder per class, a list (.csv with the columns image and label, "
            ".txt), tar or Parquet files, torchvision:NAME:ROOT or a Hugging Face folder.",
        ),
    ],
    layer: Annotated[
        str | None, typer.Option(metavar="LAYER", help="The layer to record. Default: the layer of heatmaps.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="A scan of the same images with the same weights: findings name its units, and the explorer shows the "
            "report with it.",
        ),
    ] = None,
    folds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Check labels by a linear head on the layer, cross-validated in N parts: for networks that were "
            "trained on these images. Default: check them by the network itself.",
        ),
    ] = 0,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Number of processes that decode images.")
    ] = None,
    ray: Ray = None,
    seed: Seed = 0,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-diagnosis"),
    as_json: AsJson = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Find reasons for the errors of a classifier on labelled images.

    If interrupted, rerun the same command to resume.
    """
    import convscope

    if ray is not None:
        require_installed("ray", "ray")
    opened = None if store is None else open_store_at(store)
    network = network_options.load(model, opened)
    diagnosis = convscope.diagnose(
        network,
        data[0] if len(data) == 1 else data,
        layer=network_options.default_layer(layer, network),
        store=opened,
        out=out,
        seed=seed,
        folds=folds,
        fit=reading.fit,
        workers=workers,
        ray=ray,
        max_pixels=reading.max_pixels,
    )
    if opened is not None and opened.folder.local_path is not None:
        opened.save_result(diagnosis)
    if as_json:
        print_json(_content(diagnosis))
    else:
        _print(diagnosis)
    finish(diagnosis, out, as_json=False)


def _print(diagnosis: Diagnosis) -> None:
    """Print the scores, and the findings as a table of sentences."""
    overview = diagnosis.overview
    low, high = overview.accuracy_interval
    typer.echo(
        f"accuracy {overview.accuracy:.1%} ({low:.1%} to {high:.1%}) on {overview.num_labelled:,} labelled images; "
        f"balanced {overview.balanced_accuracy:.1%}; calibration error {overview.calibration_error:.3f}"
    )
    rows = [(finding.kind, finding.summary) for finding in diagnosis.findings]
    if rows:
        print_table("", [Column("kind"), Column("finding", overflow="fold")], rows)
    for search in diagnosis.searches:
        if not search.findings:
            log(f"{search.kind}: nothing found. {search.detectable}")


def _content(diagnosis: Diagnosis) -> dict[str, object]:
    """Return the findings and scores as JSON values."""
    overview = diagnosis.overview
    scores = ("num_images", "num_labelled", "accuracy", "accuracy_interval", "balanced_accuracy", "calibration_error")
    return {
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "overview": {name: getattr(overview, name) for name in scores},
        "layer": diagnosis.layer,
        "notes": diagnosis.notes,
    }
