"""Arguments and options that several commands share.

The dataclasses are groups of options: a command that takes one as a parameter has all of its options. Options that need
no network are checked while the command line is parsed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from convscope.cli.option_checks import between, check_output_folder, choice, list_option, names_of, one_name_of, one_of
from convscope.cli.parsing import (
    load_model,
    parse_classes,
    parse_grid,
    parse_layers,
    parse_method_options,
    parse_scales,
    parse_targets,
)
from convscope.names import METHOD_NAMES, METRIC_NAMES, RECIPE_NAMES, TASKS

if TYPE_CHECKING:
    from convscope.engine.model import Model

NETWORK, IMAGES, OUTPUT = "Network", "Images", "Output"  # panels of the help


MODEL_HELP = (
    "lite0 (bundled), torchvision:NAME, timm:NAME, keras:NAME, hf:ORG/NAME, hf:FOLDER, open_clip:NAME, a file (.onnx, "
    ".pt2, .keras, .h5, .pt of TorchScript) or package.module:factory."
)
IMAGES_HELP = "Image files, folders, globs such as '*.jpg', or lists of files (.txt)."
MAX_PIXELS = 100_000_000

# Input
ModelName: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Images: TypeAlias = Annotated[list[str], typer.Argument(metavar="IMAGES", help=IMAGES_HELP)]


@dataclass(frozen=True)
class NetworkOptions:
    """What a network is loaded with."""

    weights: Annotated[
        str | None,
        typer.Option(metavar="WEIGHTS", help="default, random, or a file of weights.", rich_help_panel=NETWORK),
    ] = None
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Class names, separated by commas, or a file with one on each line.",
            rich_help_panel=NETWORK,
        ),
    ] = None
    preprocessing: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Size, mean, std, ...: JSON such as {"size": 224}, or a JSON file.',
            rich_help_panel=NETWORK,
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or mps. Default: cpu.", rich_help_panel=NETWORK)
    ] = None

    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help=f"What the outputs mean: {', '.join(TASKS[:-1])} or {TASKS[-1]}. Default: inferred.",
            callback=one_of(TASKS),
            autocompletion=lambda: list(TASKS),
            rich_help_panel=NETWORK,
        ),
    ] = None
    output: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="If there are several outputs: key or position of the one with the scores.",
            rich_help_panel=NETWORK,
        ),
    ] = None
    token_grid: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Grid of a transformer's tokens, such as 14x14. Default: inferred.",
            rich_help_panel=NETWORK,
        ),
    ] = None
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help='Text for a class, such as "a photo of a {}", for networks that compare images with text.',
            rich_help_panel=NETWORK,
        ),
    ] = None

    def load(self, name: str) -> Model:
        """Load a network, and print its notes."""
        return load_model(
            name,
            self.weights,
            self.classes,
            self.preprocessing,
            device=self.device,
            task=self.task,
            output=None if self.output is None else int(self.output) if self.output.isdecimal() else self.output,
            grid=None if self.token_grid is None else parse_grid(self.token_grid),
            template=self.template,
        )


@dataclass(frozen=True)
class ImageOptions:
    """How images are read."""

    fit: Annotated[
        str,
        choice(
            "What the network gets: the whole image, squashed (squash) or with a gray border (pad), or the centre crop "
            "of its usual evaluation (crop).",
            "squash",
            "crop",
            "pad",
            panel=IMAGES,
        ),
    ] = "squash"
    max_pixels: Annotated[
        int, typer.Option(metavar="N", min=1, help="Refuse images with more pixels.", rich_help_panel=IMAGES)
    ] = MAX_PIXELS


# Output
Out: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="FOLDER", help="Output folder.", callback=check_output_folder, rich_help_panel=OUTPUT
    ),
]
OptionalOut: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FOLDER",
        help="Also save the result in this folder.",
        callback=check_output_folder,
        rich_help_panel=OUTPUT,
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)]
Wide: TypeAlias = Annotated[
    bool, typer.Option("--wide", help="Print all columns, even if the terminal is too narrow.", rich_help_panel=OUTPUT)
]
Seed: TypeAlias = Annotated[int, typer.Option(metavar="N", help="Random seed: the same seed gives the same result.")]

# Long runs
Ray: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="Run on a Ray cluster: its address; auto: the running one; local: one on this machine."
    ),
]

# Heatmaps
Targets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="CLASS", help="A class, by index or name; repeatable. Default: the predicted class."
    ),
]
Against: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="CLASS", help="Show evidence for the target rather than for this class; repeatable."),
]
Smooth: TypeAlias = Annotated[
    str | None, choice("Average over the mirrored image, or over noisy copies.", "flips", "noise")
]
Scale: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="FACTORS",
        help="Input sizes, as multiples of the network's own.",
        callback=lambda value: parse_scales(value) and value,
    ),
]
Fuse: TypeAlias = Annotated[str, choice("How maps of several layers or scales are combined.", "mean", "max", "product")]
Refine: TypeAlias = Annotated[bool, typer.Option("--refine", help="Make the maps follow the edges of the images.")]
Metrics: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="METRICS",
        help="Metrics, separated by commas: see --list-metrics.",
        callback=names_of("metric", METRIC_NAMES),
    ),
]
Methods: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="METHODS",
        help="Methods, separated by commas: see --list-methods. Default: common ones and two baselines.",
        callback=names_of("method", METHOD_NAMES),
    ),
]
Recipe: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="RECIPE",
        help="robust, plain, maco, dream or caricature: see --list-recipes.",
        callback=one_name_of("recipe", RECIPE_NAMES),
    ),
]
Masks: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Folder of masks: NAME.png or NAME_mask.png for each image, white on the target."
    ),
]
ListMethods: TypeAlias = Annotated[bool, list_option("methods")]
ListMetrics: TypeAlias = Annotated[bool, list_option("metrics")]
ListRecipes: TypeAlias = Annotated[bool, list_option("recipes")]


@dataclass(frozen=True)
class HeatmapOptions:
    """The arguments of `convscope.heatmaps`."""

    targets: Targets = None
    layer: Annotated[
        str,
        typer.Option(
            metavar="LAYER",
            help="A layer, or several, separated by commas, whose maps are combined (--fuse). auto chooses one.",
        ),
    ] = "auto"
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="grad-cam (default; for boxes: odam), layer-cam, rise, ...: see --list-methods.",
            callback=one_name_of("method", METHOD_NAMES),
            autocompletion=lambda: list(METHOD_NAMES),
        ),
    ] = None
    against: Against = None
    smooth: Smooth = None
    scale: Scale = "1"
    fuse: Fuse = "mean"
    refine: Refine = False
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of the method, such as samples=100 of rise: --list-methods names them; repeatable.",
        ),
    ] = None
    seed: Seed = 0
    list_methods: ListMethods = False

    def check(self) -> None:
        """Refuse invalid options of the method, before a network is loaded."""
        from convscope.attribution.registry import get_method, method_options

        name = self.method or "grad-cam"
        method_options(name, get_method(name), parse_method_options(self.option))

    def arguments(self, network: Model, num_images: int, default_layer: str = "auto") -> dict[str, Any]:
        """Return the keyword arguments of `convscope.heatmaps`; methods that take no layer get no default one."""
        from convscope.attribution.registry import get_method

        takes_layer = not get_method(self.method or "grad-cam").at_input
        layer = default_layer if self.layer == "auto" and takes_layer else self.layer
        return {
            "targets": parse_targets(network, self.targets, num_images),
            "layer": parse_layers(layer),
            "method": self.method,
            "against": parse_classes(network, self.against, num_images),
            "smooth": self.smooth,
            "scale": parse_scales(self.scale),
            "fuse": self.fuse,
            "refine": self.refine,
            "seed": self.seed,
            **parse_method_options(self.option),
        }


@dataclass(frozen=True)
class OverlayOptions:
    """How heatmaps are drawn over images."""

    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Opacity of the colors, 0 to 1. Default: 0.4.",
            callback=between(0, 1),
            rich_help_panel=OUTPUT,
        ),
    ] = None
    colormap: Annotated[
        str | None, typer.Option(metavar="NAME", help="A colormap of matplotlib. Default: jet.", rich_help_panel=OUTPUT)
    ] = None
    size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Longer side of the saved overlays in pixels. Default: the image's.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    shared_scale: Annotated[
        bool,
        typer.Option(
            "--shared-scale", help="Use one color scale for all maps; videos always do.", rich_help_panel=OUTPUT
        ),
    ] = False

    def check(self) -> None:
        """Refuse an unknown colormap, before a network is loaded."""
        from convscope.images.colormap import lookup_table

        if self.colormap is not None:
            lookup_table(self.colormap)

    def arguments(self) -> dict[str, Any]:
        """Return the options that were given, as keyword arguments of `Heatmaps.save`."""
        options = {"alpha": self.alpha, "colormap": self.colormap, "size": self.size}
        return {name: value for name, value in options.items() if value is not None}


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
