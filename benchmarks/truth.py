"""Deletion and average drop: convscope beside Quantus, torchcam and as many bare forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import quantus
import torch
from heatmaps import as_users_have_it, photographs
from timing import Timed, interleaved
from torchcam.methods import LayerCAM
from torchcam.metrics import ClassificationMetric

import convscope

BATCH, PIXELS = 8, 224 * 224


@dataclass(frozen=True)
class Truth:
    """One comparison: what, how many evaluations a picture, all times; how far the figures are apart."""

    what: str
    times: dict[str, Timed]
    apart: float | None


def deletion(steps: int, rounds: int) -> Truth:
    """The same states for both, but for one pixel: the hottest are set to 0, an equal part at each step.

    Quantus counts every channel of a pixel by itself, and takes none but whole divisors of the pixels.
    """
    model = convscope.load("lite0")
    x = photographs(model, BATCH)
    heat = convscope.heatmaps(model, x)
    targets = heat.targets[:, 0].tolist()
    # Different values everywhere: how ties are broken is each program's own.
    maps = np.stack(heat.resized()) + 1e-6 * np.random.default_rng(0).random((BATCH, 1, 224, 224)).astype(np.float32)
    peer = quantus.PixelFlipping(
        features_in_step=3 * PIXELS // steps,
        perturb_baseline=0.0,
        abs=False,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    net, inputs = as_users_have_it(model.module), x.contiguous().numpy()

    def ours() -> np.ndarray:
        found = convscope.evaluate(model, x, maps, "deletion", targets=targets, steps=steps, fill="zero")
        return found.curves["deletion"][:, 0]

    def theirs() -> np.ndarray:
        attributions = maps.repeat(3, axis=1)
        found = peer(
            model=net, x_batch=inputs, y_batch=np.array(targets), a_batch=attributions, softmax=True, device="cpu"
        )
        return np.asarray(found)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(steps + 1):
                model.module(x)

    contenders: dict[str, Callable[[], object]] = {"convscope": ours, "Quantus": theirs, "bare forward passes": bare}
    times = interleaved(contenders, "convscope", rounds)
    own, other = ours(), theirs()
    return Truth(f"deletion, {steps} steps", times, float(np.abs(own[:, 1:] - other).max()))


def average_drop(rounds: int) -> Truth:
    """With the maps each program makes by LayerCAM; torchcam judges them one picture after the other."""
    model = convscope.load("lite0")
    x = photographs(model, BATCH)
    net = as_users_have_it(model.module)
    cam = LayerCAM(net, net.get_submodule("bn2"))
    inputs = x.contiguous()

    def ours() -> float:
        heat = convscope.heatmaps(model, x, method="layer-cam")
        return convscope.evaluate(model, x, heat, ["average-drop", "average-increase"]).mean("average-drop")

    def theirs() -> float:
        metric = ClassificationMetric(cam, logits_fn=lambda logits: logits.softmax(1))
        metric.update(inputs)
        return metric.summary()["avg_drop"]

    times = interleaved({"convscope": ours, "torchcam": theirs}, "convscope", rounds)
    return Truth("maps, average drop and increase", times, abs(ours() - theirs()))


def run(rounds: int) -> list[Truth]:
    """On Lite0, eight photographs."""
    warnings.filterwarnings("ignore", module="quantus")
    return [deletion(84, rounds), average_drop(rounds)]
