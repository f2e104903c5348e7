"""`convscope compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import (
    Against,
    AsJson,
    Fuse,
    ImageOptions,
    Images,
    ListMethods,
    ListMetrics,
    Masks,
    Methods,
    Metrics,
    ModelName,
    Out,
    Scale,
    Seed,
    Smooth,
    Targets,
    Wide,
)
from convscope.cli.output import finish, progress_bar
from convscope.cli.parsing import (
    open_image_arguments,
    parse_classes,
    parse_scales,
    read_masks,
    require_masks,
    split_commas,
)
from convscope.cli.tables import Column, print_table


@command()
def compare(
    model: ModelName,
    images: Images,
    methods: Methods = None,
    layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers, separated by commas. Default: chosen automatically.")
    ] = None,
    metrics: Metrics = "deletion,insertion",
    masks: Masks = None,
    targets: Targets = None,
    against: Against = None,
    smooth: Smooth = None,
    scale: Scale = "1",
    fuse: Fuse = "mean",
    seed: Seed = 0,
    _list_methods: ListMethods = False,
    _list_metrics: ListMetrics = False,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-comparison"),
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Compare methods and layers: heatmaps, faithfulness and time of each."""
    import convscope
    from convscope.evaluation.comparison import METHODS

    metric_names = split_commas(metrics)
    require_masks(metric_names, masks)
    inputs = open_image_arguments(images)
    image_masks = read_masks(masks, inputs.names)
    network = network_options.load(model)
    with progress_bar("compare") as progress:
        result = convscope.compare(
            network,
            inputs,
            parse_classes(network, targets, len(inputs)),
            methods=METHODS if methods is None else split_commas(methods),
            layers=network_options.default_layers(None if layers is None else split_commas(layers), network),
            metrics=metric_names,
            masks=image_masks,
            against=parse_classes(network, against, len(inputs)),
            smooth=smooth,
            scale=parse_scales(scale),
            fuse=fuse,
            seed=seed,
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    if not as_json:
        rows = [
            (r["method"], r["layer"], f"{r['ms']:.0f}", *(f"{r[metric]:.3f}" for metric in result.metrics))
            for r in result.rows()
        ]
        columns = (
            Column("method"),
            Column("layer", overflow="fold"),
            Column("ms per image", right=True, priority=len(result.metrics) + 1),
            *(Column(metric, right=True, priority=i) for i, metric in enumerate(result.metrics)),
        )
        print_table("", columns, rows, wide=wide)
    finish(result, result.save(out), as_json)
