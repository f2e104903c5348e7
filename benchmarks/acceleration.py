"""Acceleration: each piece switched off in turn, and the public ways to the same end."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from scanning import photograph_crops
from tables import header
from timing import Timed, interleaved
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval

import convscope
from convscope.engine.acceleration import ENVIRONMENT_VARIABLE, accelerate, conv_fusion
from convscope.engine.acceleration.conv_fusion import MAX_CHANNELS_PER_GROUP
from convscope.engine.model import Model
from convscope.samples import photographs

SETTINGS = {"all": ("1", MAX_CHANNELS_PER_GROUP), "without padding": ("1", 0), "none": ("0", 0)}
"""Values of the environment variable, and of the constant that lets convolutions absorb the padding before them."""

REMOVED = """\
Pieces that were removed. CPU time without the piece relative to all pieces, one thread, interleaved, 5 to 15 rounds:

| | Grad-CAM, 1 | Grad-CAM, 8 | class | 8 classes | filter | 16 filters | occlusion | scan |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| memory retained by mallopt | 1.02 | 1.02 | 1.00 | 0.96 | 0.99 | 0.93 | 0.99 | 0.98 |
| replay of recorded calls | 1.02 | 1.01 | 1.03 | 0.98 | 1.09 | 0.94 | 1.00 | 0.98 |
| in-place clamp | 1.03 | 0.99 | 0.97 | 0.97 | 1.01 | 0.95 | 1.00 | 0.99 |
| fused Adam | 1.02 | 1.02 | 1.01 | 1.03 | 1.01 | 0.96 | 0.99 | 0.99 |
| sparse rows for one image | 1.02 | 0.96 | | | | | 1.00 | |

The column of a single filter is from a run with less other load; a loaded run gave 1.16 for replay and 1.12 for the
clamp. Retained memory cannot be undone for the process and was removed in any case. Removed later were weights laid out
for oneDNN in advance: without them occlusion takes 1.04 times as long, and a scan 1.00 times.
"""


@dataclass(frozen=True)
class Ablation:
    """One workload: times by setting."""

    workload: str
    times: dict[str, Timed]


@dataclass(frozen=True)
class Public:
    """One kind of pass: times by way, and seconds to prepare each way."""

    name: str
    times: dict[str, Timed]
    setup: dict[str, float]


@contextmanager
def setting(name: str) -> Iterator[None]:
    """Switch pieces off for the duration of the block."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE], conv_fusion.MAX_CHANNELS_PER_GROUP = SETTINGS[name]
    try:
        yield
    finally:
        conv_fusion.MAX_CHANNELS_PER_GROUP = MAX_CHANNELS_PER_GROUP
        del os.environ[ENVIRONMENT_VARIABLE]
        if before is not None:
            os.environ[ENVIRONMENT_VARIABLE] = before


def ablations(rounds: int) -> Iterator[Ablation]:
    """Time each workload with all pieces, without each, and without any."""
    model, images = convscope.load("lite0"), [str(path) for path in photographs()]
    with tempfile.TemporaryDirectory() as folder:
        for i, crop in enumerate(photograph_crops(64)):
            crop.save(Path(folder) / f"{i:03d}.png")
        workloads: dict[str, Callable[[], object]] = {
            "Grad-CAM, 1 image": lambda: convscope.heatmaps(model, images[0], 281),
            "Grad-CAM, 8 images": lambda: convscope.heatmaps(model, images * 2, 281),
            "pattern of a class, 48 steps": lambda: convscope.patterns(model, "logits", [387], steps=48),
            "patterns of 8 classes, 12 steps": lambda: convscope.patterns(model, "logits", range(8), steps=12),
            "pattern of a filter, 48 steps": lambda: convscope.patterns(model, "blocks.3", [5], steps=48),
            "occlusion, 25 windows": lambda: convscope.heatmaps(
                model, images[0], 281, method="occlusion", window=64, stride=40
            ),
            "scan of 64 images": lambda: _scan(model, folder),
        }
        for name, workload in workloads.items():
            contenders = {piece: partial(_with_setting, piece, workload) for piece in SETTINGS}
            yield Ablation(name, _cpu_times(contenders, "all", rounds))


def _cpu_times(contenders: dict[str, Callable[[], object]], reference: str, rounds: int) -> dict[str, Timed]:
    """Measure the CPU time of one thread: differences are small, and other processes disturb it least."""
    return interleaved(contenders, reference, rounds, threads=1, clock=time.process_time)


def _with_setting(name: str, workload: Callable[[], object]) -> object:
    with setting(name):
        return workload()


def _scan(model: Model, folder: str) -> None:
    with tempfile.TemporaryDirectory() as out:
        convscope.scan(model, folder, f"{out}/store", workers=0)


def public_ways(rounds: int) -> Iterator[Public]:
    """Time passes of Lite0: its own, accelerated, and by what PyTorch offers."""
    network = convscope.load("lite0").module.requires_grad_(False)
    for batch, side, gradients in ((8, 224, False), (1, 224, False), (8, 160, True), (1, 160, True)):
        x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=torch.channels_last)
        ways: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "plain": lambda: network,
            "convscope": partial(accelerate, _run_network, network, x[:1], gradients=gradients),
            "fuse_conv_bn_eval on a copy": partial(fused_copy, network),
            "make_fx": partial(_traced, network, x),
            "torch.compile": partial(_compiled, network, x, gradients),
        }
        runs, setup = {}, {}
        for name, prepare in ways.items():
            start = time.perf_counter()
            runs[name] = partial(_run, prepare(), x, gradients)
            setup[name] = time.perf_counter() - start
        kind = "forward and backward" if gradients else "forward"
        yield Public(f"{kind}, {batch} x {side} x {side}", _cpu_times(runs, "plain", rounds), setup)
        torch.compiler.reset()


def _run(network: Callable[[Tensor], Tensor], x: Tensor, gradients: bool) -> Tensor:
    with torch.set_grad_enabled(gradients):
        leaf = x.clone().requires_grad_(gradients)
        output = network(leaf)
        return torch.autograd.grad(output[:, 7].sum(), leaf)[0] if gradients else output


def _run_network(x: Tensor, network: nn.Module) -> Tensor:
    output: Tensor = network(x)
    return output


def fused_copy(network: nn.Module) -> nn.Module:
    """Fold batch normalisation into the convolutions of a copy, where the modules follow each other in their parent."""
    network = copy.deepcopy(network)
    for parent in network.modules():
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                # timm's batch normalisation contains the activation.
                rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
                setattr(parent, norm_name, rest)
    return network


def _traced(network: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    traced: Callable[[Tensor], Tensor] = make_fx(network)(x)
    return traced


def _compiled(network: nn.Module, x: Tensor, gradients: bool) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(network, options=None if gradients else {"freezing": True})
    _run(compiled, x, gradients)
    return compiled


def run(rounds: int) -> tuple[list[Ablation], list[Public]]:
    """Run both comparisons."""
    return list(ablations(rounds)), list(public_ways(rounds))


def table(results: tuple[list[Ablation], list[Public]]) -> list[str]:
    """Return the lines of the section in the README."""
    rows, passes = results
    lines = [
        "CPU time of Lite0 on one thread with all accelerations, and relative to it the time without one or all of",
        "them. `CONVSCOPE_ACCELERATE` and `load(..., accelerate=False)` switch them off.",
        "",
        *header("workload", "ms", *list(SETTINGS)[1:]),
    ]
    for row in rows:
        ratios = [row.times[name].text() for name in list(SETTINGS)[1:]]
        lines.append(f"| {row.workload} | {1000 * row.times['all'].seconds:.0f} | " + " | ".join(ratios) + " |")
    names = list(passes[0].times)
    lines += [
        "",
        "Single passes of Lite0: milliseconds, in brackets the ratio to the plain pass, and the seconds of",
        "preparation. Of the accelerated passes, only convscope's calls the network's hooks and accepts inputs of",
        "any size.",
        "",
        *header("pass", *names),
    ]
    for row in passes:
        cells = [f"{1000 * t.seconds:.0f} ({t.text()})<br>{row.setup[name]:.1f} s" for name, t in row.times.items()]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return [*lines, "", REMOVED]
