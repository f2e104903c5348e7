"""Worlds with planted causes of errors: what `diagnose` reports of shortcuts, weak slices and wrong labels.

``python benchmarks/planted.py --split dev`` measures on the seeds that thresholds were chosen on; the table in the
README is of the split "final", whose seeds took no part in that. Results are appended to a file as they come, and
worlds that are in it are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import planted_peers as peers
import torch
from planted_images import SIZE
from planted_observations import observe
from planted_worlds import LAYER, Spec, World, as_input, make_world, specs
from torch import Tensor

import convscope
from convscope.diagnosis import interventions, templates
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.label_errors import find_label_errors
from convscope.diagnosis.shortcut_candidates import FRAMES
from convscope.diagnosis.shortcuts import find_shortcuts
from convscope.diagnosis.slices import find_slices

FIRST = 5  # findings that are looked at
OVERLAP = 0.6  # precision and recall from which a finding's images are the planted ones
USED = 0.1  # answers that what is planted must turn, or accuracy it must cost, for the network to have the weakness
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
    result: Result = {"name": spec.name, "kind": spec.kind, "plant": spec.plant, "make": spec.make}
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
        is_main = predict(world, as_input(sample.images)) == world.main_class
        other = sample.labels != world.main_class
        return float(is_main[other & sample.carriers].mean() - is_main[other & ~sample.carriers].mean())
    if world.spec.kind == "slice":
        correct, members = context.observations.is_correct, world.checked.carriers
        rest = (world.checked.labels == world.main_class) & ~members
        return float(correct[rest].mean() - correct[members].mean())
    return 0.0


def predict(world: World, x: Tensor, model: convscope.Model | None = None) -> np.ndarray:
    """Return the predicted class of each input."""
    return convscope.predict(model or world.model, x, top=1, progress=False).indices[:, 0]


def rank(groups: list[object], planted: np.ndarray) -> int:
    """Return the number, from 1, of the first group of images that is the planted one, among the first; 0 if none."""
    for number, group in enumerate(groups[:FIRST], start=1):
        images = np.isin(np.arange(len(planted)), group)
        common = np.count_nonzero(images & planted)
        if common >= OVERLAP * max(np.count_nonzero(images), np.count_nonzero(planted)):
            return number
    return 0


def repair(world: World, context: DiagnosisContext, findings: tuple[Finding, ...]) -> Result:
    """Return the accuracy on unbiased images before, with what was found masked, and with its units at their means."""
    labels = world.test.labels
    x = as_input(world.test.images)
    before = float((predict(world, x) == labels).mean())
    if not findings:
        return {"before": before}
    masked = mask(findings[0], context, x)
    means = context.observations.features.astype(float).mean(0)
    units = {int(unit["unit"]): float(means[int(unit["unit"])]) for unit in findings[0].evidence["units"]}
    edited = convscope.edit(world.model, {LAYER: units})
    return {
        "before": before,
        "masked": float((predict(world, masked) == labels).mean()),
        "edited": float((predict(world, x, edited) == labels).mean()),
    }


def mask(finding: Finding, context: DiagnosisContext, x: Tensor) -> Tensor:
    """Remove the feature of a finding from inputs, using only what the finding says."""
    feature = str(finding.evidence["feature"])
    if feature in FRAMES:
        return interventions.remove_region(x, interventions.frame_mask((SIZE, SIZE), FRAMES[feature])[None])
    if feature == "color":
        means, deviations = interventions.color_statistics(x)
        scale = deviations.median(0).values / deviations.clamp(min=1e-6)
        return interventions.shift_colors(
            x, means.median(0).values - means, scale, (x.amin((0, 2, 3)), x.amax((0, 2, 3)))
        )
    if feature == "blur":
        typical = context.load_inputs(list(finding.images[:40]))
        target = float(interventions.detail(typical).median())
        sharp = interventions.detail(x) > target
        sigma = interventions.blur_to_match(x[sharp], target)
        return torch.where(sharp[:, None, None, None], interventions.gaussian_blur(x, sigma), x)
    images = list(finding.images[:40])
    boxes = torch.tensor(finding.evidence["boxes"][: len(images)]) * SIZE
    corners, side = boxes[:, [1, 0]].round().long(), int((boxes[0, 2] - boxes[0, 0]).round())
    inside = context.load_inputs(images) * 0.25 + 0.5
    patch = interventions.cut_boxes(inside, corners, (side, side)).mean(0)
    limit = templates.Correlations(inside).best_matches(patch)[0].quantile(0.1)
    values, positions = templates.Correlations(x * 0.25 + 0.5).best_matches(patch)
    boxes = interventions.box_masks(positions - 2, (side + 4, side + 4), (SIZE, SIZE))
    return interventions.remove_region(x, boxes & (values >= limit)[:, None, None])


def run(
    split: str, worlds: int | None, timeout: float, results: Path, cleanlab: Path | None, cache: Path | None
) -> None:
    """Measure the worlds of a split that are not in the results yet, until `timeout` seconds have passed."""
    torch.set_num_threads(1)
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    start = time.monotonic()
    for spec in specs(split)[worlds]:
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


def summary(rows: list[Result]) -> list[str]:
    """Return the figures of some worlds as lines of Markdown."""
    shortcuts, slices = ([r for r in rows if r["kind"] == kind] for kind in ("shortcut", "slice"))
    used, weak = ([r for r in part if r["weakness"] >= USED] for part in (shortcuts, slices))
    clean = [r for r in rows if r["kind"] in ("clean", "labels")]
    labels = [r for r in rows if r["kind"] == "labels"]
    repaired = [r for r in used if "masked" in r]
    reported = sum(int(r["shortcuts"]) for r in clean)

    def share(part: list[Result], name: str) -> str:
        return f"{sum(bool(r[name]) for r in part)} of {len(part)}"

    def gain(name: str) -> str:
        gains = [r[name] - r["before"] for r in repaired]
        better = sum(g > 0 for g in gains)
        return f"{better} of {len(gains)}, mean change {100 * np.mean(gains):+.0f} points" if gains else "none"

    lines = [
        f"{len(rows)} worlds: networks of four convolutions, trained on rendered shapes, photographs on textures and",
        "crops of photographs, 48 x 48 pixels. Planted are: a mark, tint, border, background, low resolution or blur",
        "in 80 to 100 % of the training images of one class; a group of a class that is missing in training; wrong",
        "labels; or nothing. Diagnosed are 360 images with the same bias. A finding is right if its images are the",
        f"planted ones with precision and recall of {OVERLAP}; worlds count in which what is planted turns at least a",
        f"tenth of the answers, or costs a tenth of the accuracy ({len(shortcuts) - len(used)} and "
        f"{len(slices) - len(weak)} worlds do not).",
        "",
        "| | convscope | peer |",
        "| --- | --- | --- |",
        f"| planted shortcut among the first {FIRST} findings | {share(used, 'rank')} | SpRAy {share(used, 'spray')} |",
        f"| planted slice among the first {FIRST} findings | {share(weak, 'rank')} | Domino {share(weak, 'domino')} |",
        *([f"| shortcuts reported in {len(clean)} worlds without any | {reported} | |"] if clean else []),
        f"| masking the first finding raises the accuracy on unbiased images | {gain('masked')} | |",
        f"| setting its units to their means does | {gain('edited')} | |",
    ]
    for row in labels:
        ours, *others = (f"{name} {value:.2f}" for name, value in row["precision"].items())
        lines.append(
            f"| average precision of {row['strength']:.0%} wrong labels, accuracy {row['accuracy']:.2f} |"
            f" {ours.removeprefix('convscope ')} | {', '.join(others)} |"
        )
    by_plant = {
        plant: [r for r in used + weak if r["plant"] == plant]
        for plant in dict.fromkeys(r["plant"] for r in used + weak)
    }
    by_kind = ", ".join(f"{plant} {share(part, 'rank')}" for plant, part in by_plant.items())
    seconds = {key: np.mean([r["seconds"][key] for r in rows]) for key in rows[0]["seconds"]}
    cost = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return [*lines, "", f"By what is planted: {by_kind}.", "", f"CPU seconds per world: {cost}."]


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
