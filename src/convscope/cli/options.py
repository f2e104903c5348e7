"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer


def _local_folder(out: Path) -> Path:
    """Refuse an output folder at a remote address before anything runs."""
    from convscope.results import local_folder

    return local_folder(out)


MODEL_HELP = (
    "lite0 (bundled), torchvision:NAME, timm:NAME, keras:NAME, a .keras, .h5 or .pt2 file, package.module:factory"
)
MAX_PIXELS = 100_000_000

# Input
ModelName: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Images: TypeAlias = Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Image files.")]
Weights: TypeAlias = Annotated[str | None, typer.Option(help="default, random, or a file of weights.")]
Classes: TypeAlias = Annotated[Path | None, typer.Option(metavar="FILE", help="File of class names, one per line.")]
PreprocessingJson: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--preprocessing", metavar="JSON", help="Preprocessing: size, mean, std, ..., as JSON or a JSON file."
    ),
]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Device: cpu, cuda or mps.")]
Fit: TypeAlias = Annotated[str, typer.Option(help="squash: the whole image; crop: the model's evaluation crop.")]
MaxPixels: TypeAlias = Annotated[int, typer.Option(help="Refuse images with more pixels.")]

# Output
Out: TypeAlias = Annotated[
    Path, typer.Option("-o", "--out", metavar="FOLDER", help="Output folder.", callback=_local_folder)
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Random seed: the same seed gives the same result.")]

# Heatmaps
Target: TypeAlias = Annotated[
    list[str] | None, typer.Option(help="A class, by index or name; repeatable. Default: the predicted class.")
]
Against: TypeAlias = Annotated[list[str] | None, typer.Option(help="A class to contrast the target with; repeatable.")]
LayerNames: TypeAlias = Annotated[
    str, typer.Option(metavar="LAYER", help="A layer, auto, or several separated by commas, which are fused.")
]
Method: TypeAlias = Annotated[
    str, typer.Option(help="grad-cam, layer-cam, integrated-gradients, rise, ...: see docs/methods.md.")
]
Smooth: TypeAlias = Annotated[str | None, typer.Option(help="flips or noise: average over augmented images.")]
Scale: TypeAlias = Annotated[
    str, typer.Option(help="Multiples of the input size, separated by commas; for localisation: 1,2,3 --fuse product.")
]
Fuse: TypeAlias = Annotated[str, typer.Option(help="How several layers or scales are fused: mean, max or product.")]
MethodOptions: TypeAlias = Annotated[
    list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of the method; repeatable.")
]
Metrics: TypeAlias = Annotated[str, typer.Option(help="Metrics, separated by commas: see docs/faithfulness.md.")]
Masks: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Masks of the targets: NAME.png or NAME_mask.png for each image, white on the target."
    ),
]

# Explorer
StoreAddress: TypeAlias = Annotated[
    str | None, typer.Option(metavar="STORE", help="A store written by `convscope scan` for this network.")
]
CacheDir: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Cache of patterns. Default: in the user's cache folder.")
]
StartImages: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help="An image to show instead of the sample photographs; repeatable."),
]
