"""`convscope predict`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from convscope.cli.app import command
from convscope.cli.options import AsJson, ImageOptions, Images, ModelName, NetworkOptions, OptionalOut, Wide
from convscope.cli.output import finish, print_json, progress_bar
from convscope.cli.parsing import open_image_arguments
from convscope.cli.tables import Column, print_table

if TYPE_CHECKING:
    from convscope.engine.model import Model
    from convscope.predictions import Predictions


@command()
def predict(
    model: ModelName,
    images: Images,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Number of classes per image.")] = 5,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="TEXT",
            help="A text to compare the images with, for networks such as CLIP; repeatable. Default: the classes.",
        ),
    ] = None,
    *,
    reading: ImageOptions,
    out: OptionalOut = None,
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: NetworkOptions,
) -> None:
    """Print the most probable classes of images."""
    import convscope

    inputs = open_image_arguments(images)
    network = network_options.load(model)
    with progress_bar("predict") as progress:
        predictions = convscope.predict(
            network,
            inputs,
            top,
            targets=[convscope.text_target(text) for text in targets] if targets else None,
            fit=reading.fit,
            max_pixels=reading.max_pixels,
            progress=progress,
        )
    folder = None if out is None else predictions.save(out)
    if as_json:
        print_json(_as_json(predictions))
    else:
        print_table("", _columns(predictions.model), _rows(predictions), wide=wide)
    finish(predictions, folder, as_json=False)


def _columns(model: Model) -> tuple[Column, ...]:
    return (
        Column("image", overflow="path"),
        Column(model.score_name, right=True),
        Column(model.output_noun, overflow="fold"),
        Column("index", right=True, priority=1),
    )


def _rows(predictions: Predictions) -> list[tuple[str, str, str, str]]:
    columns = (predictions.image_names, predictions.probabilities, predictions.names, predictions.indices)
    return [
        (image, predictions.model.format_score(probability), name, str(index))
        for image, probabilities, names, indices in zip(*columns, strict=True)
        for probability, name, index in zip(probabilities, names, indices, strict=True)
    ]


def _as_json(predictions: Predictions) -> list[dict[str, object]]:
    columns = (predictions.image_names, predictions.indices, predictions.names, predictions.probabilities)
    score = predictions.model.score_name
    return [
        {
            "image": image,
            "classes": [
                {"index": int(index), "name": name, score: float(probability), "logit": float(logits[index])}
                for index, name, probability in zip(indices, names, probabilities, strict=True)
            ],
        }
        for image, indices, names, probabilities, logits in zip(*columns, predictions.logits, strict=True)
    ]
