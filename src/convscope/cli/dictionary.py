"""`convscope dictionary`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.option_checks import choice
from convscope.cli.options import AsJson, ImageOptions, Images, ModelName, NetworkOptions, Out, Seed
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import open_image_arguments, read_text
from convscope.cli.tables import Column, print_table
from convscope.names import DICTIONARY_DESCRIPTIONS


@command()
def dictionary(
    model: ModelName,
    images: Images,
    layer: Annotated[str, typer.Option(metavar="LAYER", help="The layer whose activations are decomposed.")],
    features: Annotated[int, typer.Option(metavar="N", min=2, help="Number of features.")] = 4096,
    method: Annotated[str, choice("How features are selected.", *DICTIONARY_DESCRIPTIONS)] = "topk",
    active: Annotated[int, typer.Option(metavar="N", min=1, help="Number of active features at each position.")] = 32,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Training steps of 1024 positions. Default: 40 passes over the data."),
    ] = None,
    seed: Seed = 0,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The correct class of each image, one per line: measures the accuracy that is kept."
        ),
    ] = None,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-dictionary"),
    as_json: AsJson = False,
    network_options: NetworkOptions,
) -> None:
    """Learn a sparse dictionary of a layer's activations.

    In Python, convscope.load_dictionary(FOLDER).attach(model) gives a network in which the features are a layer.
    If interrupted, rerun the same command to resume.
    """
    import convscope

    inputs = open_image_arguments(images)
    network = network_options.load(model)
    with progress_bar("dictionary") as progress:
        result = convscope.dictionary(
            network,
            inputs,
            layer,
            features=features,
            method=method,
            active=active,
            steps=steps,
            seed=seed,
            labels=None
            if labels is None
            else [line.strip() for line in read_text(labels).splitlines() if line.strip()],
            checkpoint=out.with_name(f"{out.name}.checkpoint"),
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    if not as_json:
        columns = [Column("metric"), Column("value", right=True), Column("meaning", overflow="fold")]
        rows = [(row["metric"], row["value"], row["meaning"]) for row in result.metric_rows()]
        print_table(str(result).splitlines()[0], columns, rows)
    finish(result, result.save(out), as_json)
