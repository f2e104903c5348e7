"""Deletion and average drop: convscope, Quantus, torchcam and as many bare forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import quantus
import torch
from grad_cam import as_users_have_it, photographs
from timing import Timed, interleaved
from torchcam.methods import LayerCAM
from torchcam.metrics import ClassificationMetric

import convscope

BATCH, PIXELS = 8, 224 * 224


@dataclass(frozen=True)
class Comparison:
    """One comparison: all times, and the difference of the values."""

    metric: str
    times: dict[str, Timed]
    difference: float | None


def deletion(steps: int, rounds: int) -> Comparison:
    """Set the most relevant pixels to 0, an equal part per step; both programs evaluate the same images.

    Quantus counts every channel of a pixel separately, and accepts only divisors of the number of pixels.
    """
    model = convscope.load("lite0")
    x = photographs(model, BATCH)
    heatmaps = convscope.heatmaps(model, x)
    targets = heatmaps.targets[:, 0].tolist()
    # Distinct values everywhere, since the programs break ties differently.
    maps = np.stack(heatmaps.resized()) + 1e-6 * np.random.default_rng(0).random((BATCH, 1, 224, 224)).astype(
        np.float32
    )
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
        evaluation = convscope.evaluate(model, x, maps, "deletion", targets=targets, steps=steps, fill="zero")
        return evaluation.curves["deletion"][:, 0]

    def theirs() -> np.ndarray:
        attributions = maps.repeat(3, axis=1)
        values = peer(
            model=net, x_batch=inputs, y_batch=np.array(targets), a_batch=attributions, softmax=True, device="cpu"
        )
        return np.asarray(values)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(steps + 1):
                model.module(x)

    contenders: dict[str, Callable[[], object]] = {"convscope": ours, "Quantus": theirs, "bare forward passes": bare}
    times = interleaved(contenders, "convscope", rounds)
    our_curve, their_curve = ours(), theirs()
    return Comparison(f"deletion, {steps} steps", times, float(np.abs(our_curve[:, 1:] - their_curve).max()))


def average_drop(rounds: int) -> Comparison:
    """Compute LayerCAM maps and their average drop; torchcam processes one image at a time."""
    model = convscope.load("lite0")
    x = photographs(model, BATCH)
    net = as_users_have_it(model.module)
    cam = LayerCAM(net, net.get_submodule("bn2"))
    inputs = x.contiguous()

    def ours() -> float:
        heatmaps = convscope.heatmaps(model, x, method="layer-cam")
        return convscope.evaluate(model, x, heatmaps, ["average-drop", "average-increase"]).mean("average-drop")

    def theirs() -> float:
        metric = ClassificationMetric(cam, logits_fn=lambda logits: logits.softmax(1))
        metric.update(inputs)
        return metric.summary()["avg_drop"]

    times = interleaved({"convscope": ours, "torchcam": theirs}, "convscope", rounds)
    return Comparison("maps, average drop and increase", times, abs(ours() - theirs()))


def run(rounds: int) -> list[Comparison]:
    """Run on Lite0 and eight photographs."""
    warnings.filterwarnings("ignore", module="quantus")
    return [deletion(84, rounds), average_drop(rounds)]


def table(rows: list[Comparison]) -> list[str]:
    """Return the section of the README: text and tables."""
    lines = [
        "Lite0, eight photographs.",
        "",
        "| metric | convscope, ms | time relative to convscope | difference |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        peers = ", ".join(f"{peer} {timed.text()}" for peer, timed in row.times.items() if peer != "convscope")
        milliseconds = f"{1000 * row.times['convscope'].seconds:.0f}"
        lines.append(f"| {row.metric} | {milliseconds} | {peers} | {row.difference:.0e} |")
    return lines
