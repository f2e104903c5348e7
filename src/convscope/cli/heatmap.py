"""`convscope heatmap`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convscope.cli.app import command
from convscope.cli.options import (
    AsJson,
    HeatmapOptions,
    ImageOptions,
    Images,
    ModelName,
    NetworkOptions,
    Out,
    OverlayOptions,
    Wide,
)
from convscope.cli.output import finish, log, progress_bar
from convscope.cli.tables import Column, print_table

if TYPE_CHECKING:
    from convscope.attribution.result import Heatmaps

COLUMNS = (
    Column("image", overflow="path"),
    Column("class", overflow="fold"),
    Column("probability", right=True),
    Column("logit", right=True, priority=1),
    Column("file", overflow="path"),
)


@command()
def heatmap(
    model: ModelName,
    images: Images,
    *,
    heatmap_options: HeatmapOptions,
    reading: ImageOptions,
    out: Out = Path("convscope-heatmaps"),
    overlay: OverlayOptions,
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: NetworkOptions,
) -> None:
    """Compute heatmaps of the evidence for classes in images."""
    import convscope

    heatmap_options.check()
    overlay.check()
    network = network_options.load(model)
    with progress_bar("heatmaps") as progress:
        heatmaps = convscope.heatmaps(
            network,
            images,
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
            **heatmap_options.arguments(network, len(images)),
        )
    folder = heatmaps.save(out, **overlay.arguments())
    if not as_json:
        log(f"layer {heatmaps.layer}: {heatmaps.layer_reason}")
        print_table("", COLUMNS, _rows(heatmaps, folder), wide=wide)
    finish(heatmaps, folder, as_json)


def _rows(heatmaps: Heatmaps, folder: Path) -> list[tuple[str, ...]]:
    columns = (heatmaps.image_names, heatmaps.names, heatmaps.probabilities, heatmaps.logits)
    files = iter(heatmaps.file_names())
    return [
        (image, name, f"{probability:.1%}", f"{logit:.2f}", str(folder / next(files)))
        for image, names, probabilities, logits in zip(*columns, strict=True)
        for name, probability, logit in zip(names, probabilities, logits, strict=True)
    ]
