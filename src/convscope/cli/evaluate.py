"""`convscope evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.option_checks import choice
from convscope.cli.options import (
    AsJson,
    HeatmapOptions,
    ImageOptions,
    Images,
    ListMetrics,
    Masks,
    Metrics,
    ModelName,
    Out,
    Wide,
)
from convscope.cli.output import finish, log, progress_bar
from convscope.cli.parsing import open_image_arguments, read_masks, require_masks, split_commas
from convscope.cli.tables import Column, print_table

COLUMNS = (
    Column("metric"),
    Column("mean", right=True),
    Column("95 % interval"),
    Column("better"),
    Column("description", overflow="fold"),
)


@command()
def evaluate(
    model: ModelName,
    images: Images,
    metrics: Metrics = "deletion,insertion",
    masks: Masks = None,
    fill: Annotated[str, choice("What replaces removed pixels.", "blur", "mean", "zero", "noise")] = "blur",
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Steps of the metrics deletion, insertion and road.")
    ] = 28,
    *,
    heatmap_options: HeatmapOptions,
    _list_metrics: ListMetrics = False,
    reading: ImageOptions,
    out: Out = Path("convscope-evaluation"),
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Compute heatmaps and measure their faithfulness."""
    import convscope

    heatmap_options.check()
    metric_names = split_commas(metrics)
    require_masks(metric_names, masks)
    inputs = open_image_arguments(images)
    image_masks = read_masks(masks, inputs.names)
    network = network_options.load(model)
    default_layer = network_options.default_heatmap_layer(heatmap_options.layer, network)
    with progress_bar("heatmaps") as progress:
        heatmaps = convscope.heatmaps(
            network,
            inputs,
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
            **heatmap_options.arguments(network, len(inputs), default_layer),
        )
    with progress_bar("evaluate") as progress:
        evaluation = convscope.evaluate(
            network,
            inputs,
            heatmaps,
            metric_names,
            masks=image_masks,
            fill=fill,
            steps=steps,
            seed=heatmap_options.seed,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    if not as_json:
        from convscope.evaluation.result import format_interval

        log(f"layer {heatmaps.layer}: {heatmaps.layer_reason}")
        rows = [
            (r["metric"], f"{r['mean']:.3f}", format_interval(r["low"], r["high"]), r["better"], r["description"])
            for r in evaluation.rows()
        ]
        print_table("", COLUMNS, rows, wide=wide)
    finish(evaluation, evaluation.save(out), as_json)
