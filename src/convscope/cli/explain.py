"""`convscope explain`."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.option_checks import choice
from convscope.cli.options import AsJson, ImageOptions, Images, ModelName, Out, Seed
from convscope.cli.output import finish, log, print_json, printable, progress_bar
from convscope.cli.parsing import open_image_arguments, open_store_at, parse_targets
from convscope.cli.tables import Column, print_table

if TYPE_CHECKING:
    from convscope.explanations.result import Explanation


@command()
def explain(
    model: ModelName,
    images: Images,
    layer: Annotated[
        str | None,
        typer.Option(metavar="LAYER", help="The layer whose units are listed. Default: the layer of heatmaps."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="CLASS", help="A class, by index or name. Default: each image's top class.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Explain the target rather than this class.")
    ] = None,
    features: Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of units.")] = 8,
    share: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Stop when the units carry this share of the logit.")
    ] = 0.5,
    how: Annotated[str, choice("What replaces a removed unit: 0, or its mean.", "zero", "mean")] = "zero",
    reference: Annotated[
        list[str] | None, typer.Option(metavar="IMAGES", help="Images that the means are taken over; repeatable.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="A scan with the layer: names of units, and patches that excite them."),
    ] = None,
    seed: Seed = 0,
    *,
    reading: ImageOptions,
    out: Out = Path("convscope-explanation"),
    as_json: AsJson = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Find the few units that carry a prediction, and test them by removing them.

    The test: the logit without these units, next to the logit without as many other units of similar activation.
    """
    import convscope

    inputs = open_image_arguments(images)
    opened = None if store is None else open_store_at(store)
    network = network_options.load(model, opened)
    with progress_bar("explain") as progress:
        result = convscope.explain(
            network,
            inputs,
            parse_targets(network, None if target is None else [target], len(inputs)),  # type: ignore[arg-type]
            layer=network_options.default_layer(layer, network),
            features=features,
            share=share,
            how=how,
            reference=None if reference is None else open_image_arguments(reference),
            against=against,
            store=opened,
            fit=reading.fit,
            seed=seed,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    folder = result.save(out)
    if as_json:
        print_json(result.rows())
    else:
        log(f"layer {result.layer}: {result.layer_reason}")
        for n in range(len(result)):
            _print(result[n])
    finish(result, folder, as_json=False)


def _print(one: Explanation) -> None:
    """Print the sentence for one image, and a table of its units."""
    rows = one.rows()
    has_names = any(row["name"] for row in rows)
    columns = [
        Column("unit", right=True),
        *([Column("name", overflow="fold")] if has_names else []),
        Column("effect", right=True),
        Column("share", right=True),
        Column("alone", right=True, priority=1),
        Column("position"),
    ]
    cells = [
        (
            str(row["unit"]),
            *([row["name"]] if has_names else []),
            f"{row['effect']:+.2f}",
            "" if isnan(row["share"]) else f"{row['share']:.1%}",
            f"{row['alone']:+.2f}",
            row["position"],
        )
        for row in rows
    ]
    typer.echo(printable(f"{one.image_names[0]}: {one.sentences[0]}"))
    print_table("", columns, cells)
