"""`convscope layers`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import AsJson, ModelName, Wide
from convscope.cli.output import log, print_json
from convscope.cli.tables import Column, print_table

PRIORITIES = {"units": 3, "stride": 2, "parameters": 1, "alias of": 4}  # of columns that a narrow terminal may lack


@command()
def layers(
    model: ModelName,
    every: Annotated[
        bool,
        typer.Option("--all", help="Print every layer, including identities, aliases and the layers inside blocks."),
    ] = False,
    *,
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: LayerNetworkOptions,
) -> None:
    """List the main layers: output shape, receptive field, stride, parameters."""
    from convscope.engine.layer_table import HEADINGS

    network = network_options.load(model)
    if as_json:
        print_json([{**dataclasses.asdict(layer), "units": layer.units} for layer in network.layers])
        return
    columns = [
        Column(
            heading,
            right=heading in ("units", "parameters"),
            overflow="fold" if heading == HEADINGS[0] else "keep",
            priority=PRIORITIES.get(heading, 0),
        )
        for heading in HEADINGS
    ]
    total = len(network.layers)
    table = network.layers if every else network.layers.main
    title = f"{network.name}: {total} layers" if every else f"{network.name}: {len(table)} of {total} layers"
    print_table(title, columns, table.format_rows(), wide=wide)
    if len(table) < total:
        log(f"{total - len(table)} layers are not shown: --all prints every layer")
