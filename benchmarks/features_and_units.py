"""Whether the features of a dictionary are easier to tell apart than a layer's units, and what they keep of the logits.

Needs a folder with about a thousand photographs of different things: crops of a few photographs are told apart by the
photograph that they are from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from tables import header
from torch import Tensor

import convscope
from convscope.datasets.image_inputs import open_images
from convscope.dictionaries.fidelity import logits_compared
from convscope.dictionaries.interpretability import Interpretability, compare
from convscope.dictionaries.result import Dictionary
from convscope.engine.batching import MEMORY
from convscope.engine.model import Model
from convscope.images.loading import ImageBatchLoader

LAYER = "blocks.4"
JUDGES = ("blocks.4", "blocks.5", "bn2")  # of Lite2, from local to semantic
SETTINGS = ((512, 16, 1500), (2048, 64, 1500))  # features, active, steps: to look through, to account for the logits
TRAINING, REPORT = 0.75, 0.25  # fractions of the photographs
RESAMPLES = 2000
EXAMPLES, COUNT = 16, 256
HEADINGS = {"features": "features", "units": "units", "directions": "random directions"}


Kept: TypeAlias = tuple[float, float, float]  # share of the logits, with its interval


@dataclass(frozen=True)
class Setting:
    """One dictionary, and what is measured on photographs that it was not trained on."""

    dictionary: Dictionary
    kept: Kept
    top1: float
    judged: dict[str, Interpretability]  # by the judge's layer


@dataclass(frozen=True)
class Results:
    """All measurements, and how many photographs they are from."""

    training: int
    report: int
    settings: list[Setting]


def split(folder: Path, seed: int = 0) -> tuple[list[Path], list[Path]]:
    """Return the photographs of a folder to train on, and those to report on."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    shuffled = [files[n] for n in np.random.default_rng(seed).permutation(len(files))]
    first, second = round(TRAINING * len(files)), round((1 - REPORT) * len(files))
    return shuffled[:first], shuffled[second:]


def logits_kept(dictionary: Dictionary, model: Model, files: list[Path], mean: Tensor) -> tuple[Kept, float]:
    """Return `logits_kept` with its 95 % bootstrap interval over photographs, and the share of top classes kept."""
    loader = ImageBatchLoader(open_images(files), model.preprocessing)
    x = torch.cat([batch.x for batch in loader.batches(16)])
    encoder = dictionary.feature_encoder
    plain, rebuilt, ablated = logits_compared(model, model.layers[LAYER], encoder, x, mean, MEMORY)
    top = plain.argmax(1, keepdim=True)
    y, y_rebuilt, y_ablated = (logits.gather(1, top)[:, 0].double().numpy() for logits in (plain, rebuilt, ablated))
    lost, possible = np.abs(y - y_rebuilt), np.abs(y - y_ablated)
    rows = np.random.default_rng(0).integers(0, len(y), (RESAMPLES, len(y)))
    low, high = np.percentile(1 - lost[rows].sum(1) / possible[rows].sum(1), (2.5, 97.5))
    top1 = float((rebuilt.argmax(1) == top[:, 0]).double().mean())
    return (float(1 - lost.sum() / possible.sum()), float(low), float(high)), top1


def run(folder: Path) -> Results:
    """Train on one part of the photographs, and measure on another."""
    model, judge = convscope.load("lite0"), convscope.load("lite2")
    training, report = split(folder)
    maps = torch.from_numpy(convscope.activations(model, report, LAYER)[LAYER])
    seen = convscope.activations(judge, report, JUDGES)
    settings = []
    for features, active, steps in SETTINGS:
        dictionary = convscope.dictionary(
            model, training, LAYER, features=features, active=active, steps=steps, progress=False
        )
        encoder = dictionary.feature_encoder
        judged = {
            name: compare(encoder, maps, torch.from_numpy(seen[name]), EXAMPLES, COUNT, seed=0) for name in JUDGES
        }
        settings.append(Setting(dictionary, *logits_kept(dictionary, model, report, maps.mean((0, 2, 3))), judged))
    return Results(len(training), len(report), settings)


def table(results: Results) -> list[str]:
    lines = [
        f"Dictionaries of Lite0's `{LAYER}`, trained on {results.training} photographs and measured on",
        f"{results.report} others, of a thousand classes, one of each (https://github.com/EliSchwartz/imagenet-sample-images).",
        "In brackets 95 % bootstrap intervals, over photographs for the logits, over features or units for the areas.",
        "",
        f"| setting | logits kept | top class kept | features with {EXAMPLES} examples |",
        "| --- | --- | --- | --- |",
    ]
    for setting in results.settings:
        enough = next(iter(setting.judged.values())).features.judged
        lines.append(f"| {_name(setting)} | {_text(setting.kept)} | {setting.top1:.3f} | {enough:.1%} |")
    for measure, against in (("from_others", "examples of others of their kind"), ("from_random", "random positions")):
        lines += [
            "",
            f"Area under the ROC curve with which layers of Lite2 tell {EXAMPLES} examples from {against}:",
            "",
            *header("", *(f"`{name}`" for name in JUDGES)),
        ]
        for setting in results.settings:
            lines.append(_row(f"features, {_name(setting)}", setting, "features", measure))
        lines += [_row(HEADINGS[kind], results.settings[0], kind, measure) for kind in ("units", "directions")]
    return lines


def _row(name: str, setting: Setting, kind: str, measure: str) -> str:
    cells = [_text(getattr(judged, kind).summary()[measure]) for judged in setting.judged.values()]
    return f"| {name} | " + " | ".join(cells) + " |"


def _name(setting: Setting) -> str:
    d = setting.dictionary
    return f"{d.features} features, {d.active} active, {d.steps} steps"


def _text(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"
