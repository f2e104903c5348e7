"""`convscope predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.app import app
from convscope.cli.options import (
    MAX_PIXELS,
    AsJson,
    Classes,
    Device,
    Fit,
    Images,
    MaxPixels,
    ModelName,
    PreprocessingJson,
    Weights,
)
from convscope.cli.output import finish, print_json, print_table, progress_bar
from convscope.cli.parsing import load_model

if TYPE_CHECKING:
    from convscope.feature_maps import Predictions


@app.command()
def predict(
    model: ModelName,
    images: Images,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FOLDER", help="Also save the result in this folder.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes per image.")] = 5,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: PreprocessingJson = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Print the most probable classes of images."""
    import convscope

    network = load_model(model, weights, classes, preprocessing, device)
    with progress_bar("predict") as progress:
        predictions = convscope.predict(network, images, top, fit=fit, max_pixels=max_pixels, progress=progress)
    if as_json:
        print_json(_as_json(predictions))
    else:
        print_table("", ("image", "probability", "class", "index"), _rows(predictions), right=(1, 3))
    finish(predictions, out, as_json, print_saved=False)


def _rows(predictions: Predictions) -> list[tuple[str, str, str, str]]:
    columns = (predictions.image_names, predictions.probabilities, predictions.names, predictions.indices)
    return [
        (image, f"{probability:.1%}", name, str(index))
        for image, probabilities, names, indices in zip(*columns, strict=True)
        for probability, name, index in zip(probabilities, names, indices, strict=True)
    ]


def _as_json(predictions: Predictions) -> list[dict[str, object]]:
    columns = (predictions.image_names, predictions.indices, predictions.names, predictions.probabilities)
    return [
        {
            "image": image,
            "classes": [
                {"index": int(index), "name": name, "probability": float(probability), "logit": float(logits[index])}
                for index, name, probability in zip(indices, names, probabilities, strict=True)
            ],
        }
        for image, indices, names, probabilities, logits in zip(*columns, predictions.logits, strict=True)
    ]
