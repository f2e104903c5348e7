"""Filter patterns: convscope beside the same loop in plain torch, and beside lucent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from lucent.optvis import param, render
from timing import Timed, interleaved
from torch import Tensor, nn
from trunk import BLOCK3_CONV1, trunk

import convscope

LAYER, UNITS, SIZE = "features.11", 64, 150  # VGG16's block3_conv1 with its ReLU
STEPS = 10  # of each contender in a round: enough that one more pass for the score hardly counts
LUCENT_STEPS, TEXTBOOK_STEPS = 512, 40  # what a finished picture takes by each one's default


@dataclass(frozen=True)
class Patterns:
    """Times per step and filter, the difference of the losses, and the machine's limit."""

    times: dict[str, Timed]
    apart: float
    flops: float
    peak: float


def textbook(network: nn.Module, unit: int, start: Tensor, steps: int) -> list[float]:
    """The notebook's loop, in plain torch: one filter at a time, the network cut off behind the layer."""
    x, losses = start.clone(), []
    for _ in range(steps):
        x.requires_grad_()
        loss = network(x)[0, unit].mean()
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() + gradient / (gradient.pow(2).mean().sqrt() + 1e-5)
        losses.append(loss.item())
    return losses


def run(rounds: int) -> Patterns:
    """Time the plain recipe for 64 filters; the peers, slower, for a few filters of the same layer."""
    settings = {"size": SIZE, "range": 255, "mean": (103.939, 116.779, 123.68), "std": 1.0, "channel_order": "BGR"}
    model = convscope.load("torchvision:vgg16", weights="random", preprocessing=settings)
    # Frozen, cut off and channels last: the textbook's loop at its best.
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
    shares = {"plain torch": few, "convscope": UNITS, "lucent": 1}
    raw = interleaved(contenders, "plain torch", rounds)
    each = {name: t.seconds / shares[name] / STEPS for name, t in raw.items()}
    ratios = {name: t.ratio * few / shares[name] for name, t in raw.items()}
    times = {name: Timed(each[name], ratios[name]) for name in raw}
    own = ours().history[:, :few]  # type: ignore[attr-defined]
    theirs = np.array([textbook(cut, unit, pixel, STEPS) for unit in range(few)]).T
    apart = np.abs(own - theirs).max() / np.abs(theirs).max()
    return Patterns(times, float(apart), _flops(cut, first), _peak())


@dataclass(frozen=True)
class Sooner:
    """Of the plain recipe's 64 pictures after 40 steps, how many the default recipe equals or beats within a share of
    the time: by the score of the finished 8-bit picture, and by what plain had climbed to before it was finished."""

    seconds: float
    share: float
    steps: int
    finished: int
    climbed: int


def sooner() -> Sooner:
    """The 64 first filters of the trunk's `block3_conv1`, each recipe as it is; the default cut off at a quarter."""
    model = trunk()
    convscope.patterns(model, BLOCK3_CONV1, range(2), steps=1)
    plain, seconds = _timed(lambda: convscope.patterns(model, BLOCK3_CONV1, range(UNITS), recipe="plain"))
    whole, taken = _timed(lambda: convscope.patterns(model, BLOCK3_CONV1, range(UNITS)))
    steps = min(whole.steps, int(whole.steps * seconds / 4 / taken))
    ours, taken = _timed(lambda: convscope.patterns(model, BLOCK3_CONV1, range(UNITS), steps=steps))
    return Sooner(
        seconds,
        taken / seconds,
        steps,
        int((ours.scores >= plain.scores).sum()),
        int((ours.scores >= plain.history[-1]).sum()),
    )


def _timed(draw: Callable[[], convscope.Patterns]) -> tuple[convscope.Patterns, float]:
    begin = time.perf_counter()
    return draw(), time.perf_counter() - begin


def _flops(network: nn.Module, x: Tensor) -> float:
    """Of one step for one filter: forward, and backward to the input, which costs the same."""
    total = 0.0
    for layer in network:
        y = layer(x)
        if isinstance(layer, nn.Conv2d):
            total += 2 * y.numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
        x = y
    return 2 * total


def _peak() -> float:
    """The machine's matrix-multiply rate, FLOP/s, by measurement."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    taken = interleaved({"matmul": lambda: a @ b}, "matmul", 20)["matmul"].seconds
    return 2 * 2048**3 / taken
