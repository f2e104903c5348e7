"""Run all benchmarks and write their tables into benchmarks/README.md."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

import heatmaps
import memory
import patterns
import torch
from timing import THREADS

PEERS = ("captum", "grad-cam", "torchcam", "torch-lucent", "torch", "torchvision", "timm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which contenders take turns")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    text = "\n".join(
        [
            "# Benchmarks",
            "",
            "Made by `make benchmarks`. All contenders run in one process and take turns; every time is the median of",
            f"{rounds} rounds, every ratio the median of the ratios within a round. {THREADS} threads, float32, the",
            "same weights and the same input for all, 224 x 224, channels last for all but the model in hand, which",
            "comes as users have it. Peers get the network without in-place activations, which their hooks need.",
            "",
            f"Machine: {_processor()}. " + ", ".join(f"{p} {version(p)}" for p in PEERS) + ".",
            "",
            "## Grad-CAM",
            "",
            *_heatmaps(heatmaps.run(rounds)),
            "",
            "## Patterns",
            "",
            *_patterns(patterns.run(max(3, rounds // 3))),
            "",
            "## Memory",
            "",
            *_memory(memory.run()),
            "",
        ]
    )
    Path(__file__).with_name("README.md").write_text(text)


def _heatmaps(rows: list[heatmaps.Row]) -> list[str]:
    names = list(rows[0].times)
    lines = [
        "Milliseconds per picture, and in brackets the ratio to the bare forward pass. Weights: Lite0's own, random",
        "for the others. Below it, how far the map is from convscope's, relative to its largest value.",
        "",
        "| network, batch | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for row in rows:
        cells = []
        for name in names:
            cell = f"{1000 * row.times[name].seconds / row.batch:.1f} ({row.times[name].ratio:.2f})"
            cells.append(cell + (f"<br>{row.apart[name]:.0e}" if name in row.apart else ""))
        lines.append(f"| {row.network}, {row.batch} (`{row.layer}`) | " + " | ".join(cells) + " |")
    return lines


def _patterns(result: patterns.Patterns) -> list[str]:
    ours, lucent = result.times["convscope"], result.times["lucent"]
    rate = result.flops / ours.seconds
    finished = lucent.seconds * patterns.LUCENT_STEPS / (ours.seconds * patterns.TEXTBOOK_STEPS)
    return [
        f"VGG16 `{patterns.LAYER}`, {patterns.SIZE} x {patterns.SIZE}, the plain recipe for {patterns.UNITS} filters",
        "at once; plain torch draws one filter after the other with the network cut off behind the layer and frozen;",
        "lucent by its defaults, which run the whole network at 224 x 224.",
        "",
        "| | ms per step and filter | ratio to plain torch |",
        "| --- | --- | --- |",
        *[f"| {name} | {1000 * t.seconds:.1f} | {t.ratio:.2f} |" for name, t in result.times.items()],
        "",
        f"The losses differ from plain torch's by {result.apart:.0e} of the largest at most. A step for one filter is",
        f"{result.flops / 1e9:.1f} GFLOP (forward, backward to the input): convscope does {rate / 1e9:.0f} GFLOP/s,",
        f"beside {result.peak / 1e9:.0f} GFLOP/s of torch's product of two large matrices here. In convscope's time is",
        f"also the score of the finished picture: half a step's work, shared by {patterns.STEPS} steps here.",
        f"Per step and filter lucent takes {lucent.ratio / ours.ratio:.1f} times as long; for a finished picture",
        f"({patterns.LUCENT_STEPS} steps by its default, {patterns.TEXTBOOK_STEPS} of the textbook's)",
        f"{finished:.0f} times.",
    ]


def _memory(peaks: list[memory.Peak]) -> list[str]:
    return [
        "Peak memory of a whole process, with torch and the weights in it, for a stated budget (`memory=`).",
        "",
        "| | pictures or units | budget, MiB | peak, MiB |",
        "| --- | --- | --- | --- |",
        *[f"| {p.what} | {p.count} | {p.budget} | {p.megabytes:.0f} |" for p in peaks],
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
