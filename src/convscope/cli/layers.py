"""`convscope layers`."""

from __future__ import annotations

import dataclasses

from convscope.cli.app import app
from convscope.cli.options import AsJson, Classes, Device, ModelName, PreprocessingJson, Weights
from convscope.cli.output import print_json, print_table
from convscope.cli.parsing import load_model


@app.command()
def layers(
    model: ModelName,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
) -> None:
    """List the layers: output shape, receptive field, stride, parameters."""
    from convscope.engine.layer_table import HEADINGS

    network = load_model(model, weights, classes, preprocessing, device)
    if as_json:
        print_json([{**dataclasses.asdict(layer), "units": layer.units} for layer in network.layers])
    else:
        title = f"{network.name}: {len(network.layers)} layers"
        print_table(title, HEADINGS, network.layers.format_rows(), right=(3, 6))
