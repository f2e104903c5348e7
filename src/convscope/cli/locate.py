"""`convscope locate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import (
    Against,
    AsJson,
    ImageOptions,
    Images,
    ModelName,
    Out,
    OverlayOptions,
    Targets,
    Wide,
)
from convscope.cli.output import finish, log, progress_bar
from convscope.cli.parsing import open_image_arguments, parse_classes, parse_layers, parse_targets
from convscope.cli.tables import Column, print_table
from convscope.names import BOX_EDGES

if TYPE_CHECKING:
    from convscope.attribution.location_result import Locations
    from convscope.engine.model import Model


@command()
def locate(
    model: ModelName,
    images: Images,
    *,
    targets: Targets = None,
    threshold: Annotated[
        float,
        typer.Option(
            metavar="X", min=0, max=1, help="Fraction of a map's maximum above which positions are in the box."
        ),
    ] = 0.35,
    layer: Annotated[
        str, typer.Option(metavar="LAYER", help="A layer, auto, or several separated by commas, which are multiplied.")
    ] = "auto",
    against: Against = None,
    reading: ImageOptions,
    out: Out = Path("convscope-locations"),
    overlay: OverlayOptions,
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Find where classes are in images: a map and a box for each.

    The score of a box is the fraction of the map's evidence that lies in it: low where the evidence is scattered.
    """
    import convscope

    overlay.check()
    inputs = open_image_arguments(images)
    network = network_options.load(model)
    arguments: dict[str, Any] = {
        "targets": parse_targets(network, targets, len(inputs)),
        "layer": parse_layers(network_options.default_heatmap_layer(layer, network)),
        "against": parse_classes(network, against, len(inputs)),
        "threshold": threshold,
    }
    with progress_bar("locate") as progress:
        locations = convscope.locate(
            network, inputs, fit=reading.fit, max_pixels=reading.max_pixels, progress=progress, **arguments
        )
    folder = locations.save(out, **overlay.arguments(), shared_scale=overlay.shared_scale)
    if not as_json:
        log(f"layer {locations.layer}: {locations.layer_reason}")
        print_table("", _columns(network), _rows(locations), wide=wide)
    finish(locations, folder, as_json)


def _columns(model: Model) -> tuple[Column, ...]:
    return (
        Column("image", overflow="path"),
        Column(model.output_noun, overflow="fold"),
        Column(model.score_name, right=True),
        Column("score", right=True),
        *(Column(edge, right=True) for edge in BOX_EDGES),
        Column("file", overflow="path", priority=1),
    )


def _rows(locations: Locations) -> list[tuple[str, ...]]:
    return [
        (
            row["image"],
            row["target"],
            locations.model.format_score(row["probability"]),
            f"{row['score']:.0%}",
            *(f"{row[edge]:.0f}" if row["score"] else "" for edge in BOX_EDGES),
            file,
        )
        for row, file in zip(locations.rows(), locations.file_names(), strict=True)
    ]
