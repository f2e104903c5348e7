"""Worlds with planted causes of errors: what `diagnose` reports of shortcuts, weak slices and wrong labels.

``python benchmarks/planted.py --split dev`` measures on the seeds that thresholds were chosen on; the table in the
README is of the split "final", whose seeds took no part in that. Results are appended to a file as they come, and
worlds that are in it are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import planted_peers as peers
import torch
from planted_observations import observe
from planted_repairs import repair
from planted_worlds import CHECKED, Spec, World, as_input, make_world, predict, specs

from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.label_errors import find_label_errors
from convscope.diagnosis.shortcuts import find_shortcuts
from convscope.diagnosis.slices import find_slices
from convscope.diagnosis.statistics import poisson_interval, wilson_interval

FIRST = 5  # findings that are looked at
OVERLAP = 0.6  # precision and recall from which a finding's images are the planted ones
USED = 0.1  # answers that what is planted must turn, or accuracy it must cost, for the network to have the weakness
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
RESULTS = Path(gettempdir()) / "convscope-planted.jsonl"

Result = dict[str, object]


def measure(spec: Spec, cleanlab: Path | None, cache: Path | None = None) -> Result:
    """Make a world, diagnose its network, and compare with what was planted."""
    start = time.process_time()
    world = make_world(spec, cache)
    trained = time.process_time()
    context = observe(world)
    observed = time.process_time()
    shortcuts, slices = find_shortcuts(context).findings, find_slices(context).findings
    diagnosed = time.process_time()
    observations, carriers = context.observations, world.checked.carriers
    result: Result = {
        "name": spec.name,
        "kind": spec.kind,
        "plant": spec.plant,
        "make": spec.make,
        "network": spec.network,
    }
    result |= {"strength": spec.strength, "accuracy": float(observations.is_correct.mean())}
    result |= {"weakness": weakness(world, context), "shortcuts": len(shortcuts), "slices": len(slices)}
    result["features"] = [f"{f.evidence['feature']} of {f.classes[0]}: {f.effect:.2f}" for f in shortcuts]
    if spec.kind == "shortcut":
        result["rank"] = rank([f.images for f in shortcuts if f.classes[0] == world.main_class], carriers)
        result["spray"] = rank(peers.spray(observations), carriers)
        result |= repair(world, context, shortcuts)
    if spec.kind == "slice":
        result["rank"] = rank([f.images for f in slices], carriers)
        result["domino"] = rank(peers.domino(observations), carriers)
    if spec.kind == "labels":
        quality = {"convscope": find_label_errors(context)[1], **peers.label_scores(observations, cleanlab)}
        result["precision"] = {name: peers.average_precision(carriers, q) for name, q in quality.items()}
    seconds = trained - start, observed - trained, diagnosed - observed
    result["seconds"] = dict(zip(("make", "observe", "diagnose"), seconds, strict=True))
    return result


def weakness(world: World, context: DiagnosisContext) -> float:
    """Return how much what is planted matters: answers it turns to the class, or accuracy it costs the class."""
    if world.spec.kind == "shortcut":
        sample = world.test
        is_main = predict(world.model, as_input(sample.images)) == world.main_class
        other = sample.labels != world.main_class
        return float(is_main[other & sample.carriers].mean() - is_main[other & ~sample.carriers].mean())
    if world.spec.kind == "slice":
        correct, members = context.observations.is_correct, world.checked.carriers
        rest = (world.checked.labels == world.main_class) & ~members
        return float(correct[rest].mean() - correct[members].mean())
    return 0.0


def rank(groups: list[object], planted: np.ndarray) -> int:
    """Return the number, from 1, of the first group of images that is the planted one, among the first; 0 if none."""
    for number, group in enumerate(groups[:FIRST], start=1):
        images = np.isin(np.arange(len(planted)), group)
        common = np.count_nonzero(images & planted)
        if common >= OVERLAP * max(np.count_nonzero(images), np.count_nonzero(planted)):
            return number
    return 0


def run(
    split: str, worlds: int | None, timeout: float, results: Path, cleanlab: Path | None, cache: Path | None
) -> None:
    """Measure the worlds of a split that are not in the results yet, until `timeout` seconds have passed."""
    torch.set_num_threads(1)
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    start = time.monotonic()
    # In an order in which all kinds are among the first ones.
    ordered = sorted(enumerate(specs(split)), key=lambda pair: pair[0] * GOLDEN_RATIO % 1)
    for _, spec in ordered[worlds]:
        if spec.name in done:
            continue
        if time.monotonic() - start > timeout:
            break
        line = json.dumps(measure(spec, cleanlab, cache))
        with results.open("a") as file:
            file.write(line + "\n")


def table(results: Path = RESULTS) -> list[str]:
    """Measure the worlds of the final split that are not in the results yet, and return the table."""
    run("final", slice(None), float("inf"), results, None, None)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return summary([row for row in rows if row["name"].startswith("final")])


REPAIRS = {
    "masked": "removing it from the images (blur cannot be)",
    "edited": "setting its units to their means",
    "without units": "a new linear head without its units",
    "balanced": "a new linear head, with it put into and taken out of the diagnosed images",
    "refitted": "control: a new linear head on the diagnosed images as they are",
}


def summary(rows: list[Result]) -> list[str]:
    """Return the figures of some worlds as lines of Markdown."""
    shortcuts, slices = ([r for r in rows if r["kind"] == kind] for kind in ("shortcut", "slice"))
    used, weak = ([r for r in part if r["weakness"] >= USED] for part in (shortcuts, slices))
    clean = [r for r in rows if r["kind"] in ("clean", "labels")]
    lite0 = sum(r["network"] == "lite0" for r in rows)
    lines = [
        "A world is a network with a known cause of errors, and labelled images for the diagnosis.",
        f"{len(rows)} worlds: {len(rows) - lite0} networks of four convolutions, and {lite0} of Lite0 with a linear",
        "head, trained on rendered shapes, photographs on textures and crops of photographs, 48 x 48 pixels. Planted",
        "are: a mark, tint, border, background, low resolution or blur in 80 to 100 % of the training images of one",
        "class; a group of a class that is missing in training; wrong labels; or nothing. Diagnosed are",
        f"{CHECKED} images with the same bias. A finding is right if its images are the planted ones with precision",
        f"and recall of {OVERLAP}; a world counts if the planted cause changes at least a tenth of the predictions, or",
        f"costs a tenth of the accuracy ({len(shortcuts) - len(used)} and {len(slices) - len(weak)} worlds do not). In",
        "parentheses: 95 % intervals.",
        "",
        "| | convscope | peer |",
        "| --- | --- | --- |",
        f"| planted shortcut among the first {FIRST} findings | {share(used, 'rank')} | SpRAy {share(used, 'spray')} |",
        f"| planted slice among the first {FIRST} findings | {share(weak, 'rank')} | Domino {share(weak, 'domino')} |",
    ]
    if clean:
        reported = sum(int(r["shortcuts"]) for r in clean)
        low, high = (value / len(clean) for value in poisson_interval(reported))
        lines.append(
            f"| shortcuts reported per world in {len(clean)} without any | {reported / len(clean):.2f} ({low:.2f} to "
            f"{high:.2f}) | |"
        )
    lines += ["", *_labels_table([r for r in rows if r["kind"] == "labels"])]
    lines += ["", *_repairs_table([r for r in used if "refitted" in r])]
    parts = {
        plant: [r for r in used + weak if r["plant"] == plant]
        for plant in dict.fromkeys(r["plant"] for r in used + weak)
    }
    by_plant = ", ".join(
        f"{plant} {sum(bool(r['rank']) for r in part)} of {len(part)}" for plant, part in parts.items()
    )
    seconds = {key: np.mean([r["seconds"][key] for r in rows]) for key in rows[0]["seconds"]}
    cost = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return [*lines, "", f"By what is planted: {by_plant}.", "", f"CPU seconds per world: {cost}."]


def share(part: list[Result], name: str) -> str:
    """Return "7 of 9 (0.45 to 0.94)": the rows in which a value is not 0, with Wilson's interval."""
    if not part:
        return "none measured"
    count = sum(bool(r[name]) for r in part)
    low, high = wilson_interval(count, len(part))
    return f"{count} of {len(part)} ({low:.2f} to {high:.2f})"


def _labels_table(rows: list[Result]) -> list[str]:
    """Return the mean average precision of the rankings by label quality, by the fraction of wrong labels."""
    if not rows:
        return []
    names = list(rows[0]["precision"])
    lines = [f"| wrong labels | worlds | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for strength in sorted({r["strength"] for r in rows}):
        part = [r for r in rows if r["strength"] == strength]
        values = " | ".join(f"{np.mean([r['precision'][name] for r in part]):.3f}" for name in names)
        lines.append(f"| {strength:.0%} | {len(part)} | {values} |")
    values = " | ".join(f"{np.mean([r['precision'][name] for r in rows]):.3f}" for name in names)
    return ["Average precision of low label quality, means of worlds:", "", *lines, f"| all | {len(rows)} | {values} |"]


def _repairs_table(rows: list[Result]) -> list[str]:
    """Return how often, and by how much, repairs by the first finding raise the accuracy on unbiased images."""
    lines = [
        "| repair by the first finding | raises the accuracy on unbiased images | mean change |",
        "| --- | --- | --- |",
    ]
    for name, words in REPAIRS.items():
        gains = [(r[name] - r["before"]) for r in rows if name in r]
        if gains:
            better = share([{"better": gain > 0} for gain in gains], "better")
            lines.append(f"| {words} | {better} | {100 * np.mean(gains):+.0f} points |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("dev", "final"), default="dev")
    parser.add_argument("--worlds", type=int, help="the first N worlds; all if omitted")
    parser.add_argument(
        "--part", default="0/1", help="I/N: every Nth of them from the Ith on, from 0; for processes side by side"
    )
    parser.add_argument("--timeout", type=float, default=float("inf"), help="seconds after which no world is started")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cleanlab", type=Path, help="a Python interpreter that has cleanlab, for the comparison")
    parser.add_argument("--cache", type=Path, help="a folder for the weights of the networks")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    worlds = slice(part, arguments.worlds, parts)
    run(arguments.split, worlds, arguments.timeout, arguments.results, arguments.cleanlab, arguments.cache)
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    sys.stdout.write("\n".join(summary([row for row in rows if row["name"].startswith(arguments.split)])) + "\n")


if __name__ == "__main__":
    main()
