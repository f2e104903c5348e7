"""`convscope heatmap`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscope.cli.app import command
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.cli.options import (
    IMAGES_HELP,
    AsJson,
    HeatmapOptions,
    ImageOptions,
    ModelName,
    Out,
    OverlayOptions,
    Wide,
)
from convscope.cli.output import finish, log, progress_bar
from convscope.cli.parsing import open_image_arguments
from convscope.cli.tables import Column, print_table
from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from convscope.attribution.box_targets import BoxTarget
    from convscope.attribution.result import Heatmaps
    from convscope.engine.model import Model
    from convscope.images.lazy import LazyImages
    from convscope.images.video import VideoFrames


@command()
def heatmap(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help=f"{IMAGES_HELP} Or one video.")],
    *,
    heatmap_options: HeatmapOptions,
    frames: Annotated[int, typer.Option(metavar="N", min=1, help="Number of frames to sample from a video.")] = 16,
    box: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Explain a detected box, by its number in the output of convscope detect; repeatable.",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Smallest score of a detected box (--box).")
    ] = 0.5,
    reading: ImageOptions,
    out: Out = Path("convscope-heatmaps"),
    overlay: OverlayOptions,
    as_json: AsJson = False,
    wide: Wide = False,
    network_options: LayerNetworkOptions,
) -> None:
    """Compute heatmaps of the evidence for classes in images.

    From a video (pip install "convscope[video]"), frames are sampled, and their overlays are also written as an MP4
    file. The default target is then the class that is most probable over all frames.

    With --box the target is a box that a detector finds, by its number in the output of `convscope detect`.
    """
    import convscope

    heatmap_options.check()
    overlay.check()
    video = _read_video(images, frames)
    inputs = open_image_arguments(images) if video is None else video.as_images()
    network = network_options.load(model)
    default_layer = network_options.default_heatmap_layer(heatmap_options.layer, network)
    arguments = heatmap_options.arguments(network, len(inputs), default_layer)
    if box:
        if arguments["targets"] is not None:
            raise ConvscopeError("--target and --box are given; expected one of them")
        arguments["targets"] = _boxes(network, inputs, box, threshold, reading.fit)
    if video is not None and arguments["targets"] is None:
        arguments["targets"] = _most_probable_class(network, inputs, reading.fit)
    with progress_bar("heatmaps") as progress:
        heatmaps = convscope.heatmaps(
            network, inputs, fit=reading.fit, max_pixels=reading.max_pixels, progress=progress, **arguments
        )
    drawing = {**overlay.arguments(), "shared_scale": overlay.shared_scale or video is not None}
    folder = heatmaps.save(out, **drawing)
    if video is not None:
        _write_videos(heatmaps, video, folder, drawing)
    if not as_json:
        log(f"layer {heatmaps.layer}: {heatmaps.layer_reason}")
        print_table("", _columns(network), _rows(heatmaps), wide=wide)
    finish(heatmaps, folder, as_json)


def _read_video(images: list[str], frames: int) -> VideoFrames | None:
    """Read a video if it is the only file; refuse several files with a video among them."""
    from convscope.images.video import is_video, sample_frames

    videos = [name for name in images if is_video(name)]
    if not videos:
        return None
    if len(images) > 1:
        raise ConvscopeError(f"{videos[0]} is a video and one of {len(images)} files; give one video, or images")
    return sample_frames(videos[0], frames)


def _most_probable_class(network: Model, images: LazyImages, fit: str) -> int:
    """Return the class with the largest mean probability over all images."""
    import torch

    import convscope

    logits = torch.from_numpy(convscope.predict(network, images, 1, fit=fit, progress=False).logits)
    return int(network.probabilities(logits).mean(0).argmax())


def _boxes(network: Model, images: LazyImages, numbers: Sequence[int], threshold: float, fit: str) -> list[BoxTarget]:
    """Return the boxes of these numbers in the only image."""
    import convscope

    if len(images) != 1:
        raise ConvscopeError(f"--box numbers the boxes of one image; got {len(images)} images")
    detections = convscope.detect(network, images, threshold, fit=fit, progress=False)
    return [convscope.box_target(detections, number) for number in numbers]


def _write_videos(heatmaps: Heatmaps, video: VideoFrames, folder: Path, options: Mapping[str, Any]) -> None:
    """Write the overlays of each target as an MP4 file, as long as the video."""
    from convscope.images.animation import write_animation
    from convscope.results import atomic_write, unique_file_names

    overlays, num_targets = heatmaps.overlay(**options), heatmaps.targets.shape[1]
    names = unique_file_names(f"{video.name}_{t}_{target}" for t, target in enumerate(heatmaps.names[0]))
    for t, name in enumerate(names):
        with atomic_write(folder / f"{name}.mp4") as file:
            write_animation(file, overlays[t::num_targets], ".mp4", frame_ms=video.frame_ms, last_frame=1)
        log(f"{len(overlays[t::num_targets])} frames as a video: {folder / name}.mp4")


def _columns(model: Model) -> tuple[Column, ...]:
    return (
        Column("image", overflow="path"),
        Column(model.output_noun, overflow="fold"),
        Column(model.score_name, right=True),
        Column("logit", right=True, priority=1),
        Column("file", overflow="path"),
    )


def _rows(heatmaps: Heatmaps) -> list[tuple[str, ...]]:
    columns = (heatmaps.image_names, heatmaps.names, heatmaps.probabilities, heatmaps.logits)
    files = iter(heatmaps.file_names())
    return [
        (image, name, heatmaps.model.format_score(probability), f"{logit:.2f}", next(files))
        for image, names, probabilities, logits in zip(*columns, strict=True)
        for name, probability, logit in zip(names, probabilities, logits, strict=True)
    ]
