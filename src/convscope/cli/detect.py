"""`convscope detect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.app import command
from convscope.cli.options import AsJson, ImageOptions, Images, ModelName, NetworkOptions, Out, Wide
from convscope.cli.output import finish, print_json, progress_bar
from convscope.cli.parsing import open_image_arguments
from convscope.cli.tables import Column, print_table
from convscope.names import BOX_EDGES

if TYPE_CHECKING:
    from convscope.detection.result import Detections


@command()
def detect(
    model: ModelName,
    images: Images,
    *,
    threshold: Annotated[float, typer.Option(metavar="X", min=0, max=1, help="Smallest score of a box.")] = 0.5,
    overlap: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Largest overlap (IoU) of two boxes of a class.")
    ] = 0.5,
    reading: ImageOptions,
    out: Out = Path("convscope-detections"),
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: NetworkOptions,
) -> None:
    """Detect objects in images, and draw their boxes.

    The numbers of the boxes are those that `convscope heatmap --box` takes.
    """
    import convscope

    inputs = open_image_arguments(images)
    network = network_options.load(model)
    with progress_bar("detect") as progress:
        detections = convscope.detect(
            network,
            inputs,
            threshold,
            overlap=overlap,
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    folder = detections.save(out)
    if as_json:
        print_json(detections.rows())
    else:
        print_table("", _columns(), _rows(detections), wide=wide)
    finish(detections, folder, as_json=False)


def _columns() -> tuple[Column, ...]:
    return (
        Column("image", overflow="path"),
        Column("box", right=True),
        Column("class", overflow="fold"),
        Column("score", right=True),
        *(Column(edge, right=True, priority=1) for edge in BOX_EDGES),
    )


def _rows(detections: Detections) -> list[tuple[str, ...]]:
    return [
        (
            row["image"],
            str(row["box"]),
            row["class"],
            f"{row['score']:.1%}",
            *(f"{row[edge]:.0f}" for edge in BOX_EDGES),
        )
        for row in detections.rows()
    ]
