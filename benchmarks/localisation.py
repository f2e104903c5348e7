"""Localisation: every method on composites with exact masks, scored by the data set's program, and its faithfulness."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import Timed, interleaved

import convscope

SET = Path(__file__).parents[2] / "shared" / "evalset"


@dataclass(frozen=True)
class Setting:
    """A row of the table: its name, and a function that returns heatmaps, with its arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., convscope.Heatmaps] = convscope.heatmaps


def _methods(*names: str, **arguments: Any) -> list[Setting]:
    options = ", ".join(f"{key} {value}" for key, value in arguments.items())
    return [Setting(f"{name}, {options}" if options else name, {"method": name, **arguments}) for name in names]


SETTINGS = [
    *_methods("random", "centred"),
    *_methods("grad-cam", "grad-cam++", "xgrad-cam", "layer-cam", "eigen-cam", "eigen-grad-cam", "finer-cam"),
    *_methods("grad-cam", "hirescam", "layer-cam", layer="blocks.4"),
    Setting("layer-cam, bn2 x blocks.4", {"method": "layer-cam", "layer": ["blocks.4", "bn2"], "fuse": "product"}),
    Setting("grad-cam, mirrored", {"smooth": "flips"}),
    Setting("grad-cam, scale 2", {"scale": 2}),
    Setting("grad-cam, scale 1 x 2", {"scale": (1, 2), "fuse": "product"}),
    Setting("grad-cam, scale 1 x 2 x 3", {"scale": (1, 2, 3), "fuse": "product"}),
    Setting("grad-cam, refined", {"refine": True}),
    Setting("locate", {}, convscope.locate),
    *_methods("saliency", "smooth-grad", "input-x-gradient", "integrated-gradients", "guided-backprop", "full-grad"),
    *_methods("guided-grad-cam", "lrp-epsilon", "lrp-zplus", "ablation-cam", "score-cam", "occlusion"),
    Setting("rise, 1000 masks", {"method": "rise", "samples": 1000}),
]


@dataclass(frozen=True)
class Row:
    """One setting: scores of the data set's program, deletion and insertion, seconds per image."""

    name: str
    single: dict[str, float]
    double: dict[str, float]
    deletion: float
    insertion: float
    seconds: float


def evaluate_setting(model: convscope.Model, entries: list[dict[str, Any]], setting: Setting) -> Row:
    """Compute all maps of one setting and score them."""
    paths = [str(SET / entry["file"]) for entry in entries]
    # Two targets per image; the same one twice for images with one object.
    targets = [
        [o["class_index"] for o in entry["objects"]] if entry["kind"] == "double" else [entry["class_index"]] * 2
        for entry in entries
    ]
    start = time.perf_counter()
    heatmaps = setting.function(model, paths, targets, **setting.arguments)
    seconds = (time.perf_counter() - start) / len(paths)
    evaluation = convscope.evaluate(model, paths, heatmaps)
    with tempfile.TemporaryDirectory() as folder:
        for entry, maps in zip(entries, heatmaps.resized(), strict=True):
            if entry["kind"] == "double":
                for key, values in zip("ab", maps, strict=True):
                    np.save(f"{folder}/{entry['id']}_{key}.npy", values)
            else:
                np.save(f"{folder}/{entry['id']}.npy", maps[0])
        command = [sys.executable, str(SET / "score.py"), folder, "--set", str(SET), "--no-ci"]
        scores = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return Row(
        setting.name,
        scores["single"],
        scores["double"],
        evaluation.mean("deletion"),
        evaluation.mean("insertion"),
        seconds,
    )


def run() -> list[Row]:
    """Run all settings on Lite0; nothing if the data set is not available."""
    if not SET.is_dir():
        return []
    entries = json.loads((SET / "index.json").read_text(encoding="utf-8"))["images"]
    model = convscope.load("lite0")
    return [evaluate_setting(model, entries, setting) for setting in SETTINGS]


def cost(rounds: int) -> dict[str, Timed]:
    """Time one image on one thread, in CPU time, relative to a bare forward pass."""
    model = convscope.load("lite0")
    image = np.asarray(Image.open(convscope.samples.photographs()[0]).convert("RGB").resize((448, 448)))
    x = torch.randn(1, 3, *model.preprocessing.size).contiguous(memory_format=torch.channels_last)
    contenders: dict[str, Callable[[], object]] = {
        "forward": lambda: _forward(model, x),
        "grad-cam": lambda: convscope.heatmaps(model, image, progress=False),
        "locate": lambda: convscope.locate(model, image, progress=False),
        "scale 1 x 2": lambda: convscope.heatmaps(model, image, scale=(1, 2), fuse="product", progress=False),
        "scale 1 x 2 x 3": lambda: convscope.heatmaps(model, image, scale=(1, 2, 3), fuse="product", progress=False),
    }
    return interleaved(contenders, "forward", rounds, threads=1, clock=time.thread_time)


def _forward(model: convscope.Model, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.module(x)


def _markdown(rows: list[Row]) -> list[str]:
    """Format the rows as Markdown."""
    lines = [
        "| method | pointing | with 15 px | energy | IoU | share own | deletion | insertion | ms |",
        "| --- |" + " ---: |" * 8,
    ]
    for row in rows:
        single = (row.single[key] for key in ("pointing", "pointing_tol15", "energy", "iou_global"))
        figures = [f"{value:.2f}" for value in (*single, row.double["share_own"], row.deletion, row.insertion)]
        lines.append(f"| {row.name} | " + " | ".join(figures) + f" | {1000 * row.seconds:.0f} |")
    return lines


def table(rows: list[Row], costs: dict[str, Timed]) -> list[str]:
    """Return the section of the README: text and tables."""
    if not rows:
        return ["The composites were not available."]
    return [
        "Lite0 on twenty composites with exact masks (16 with one object, 4 with two), scored by the data set's own",
        "program: `pointing`, maximum on the object; `energy`, positive relevance on it; `IoU` at the best common",
        "threshold; `share own`, fraction of the relevance on the requested one of two objects. `docs/faithfulness.md`",
        "describes how the recommended setting was chosen. Milliseconds for two targets.",
        "",
        *_markdown(rows),
        "",
        "CPU time of one image on one thread, relative to a bare forward pass: "
        + ", ".join(f"{name} {timed.text()}" for name, timed in costs.items() if name != "forward")
        + ".",
    ]
