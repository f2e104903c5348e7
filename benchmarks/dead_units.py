"""Count the units that are active on their finished pattern: all filters of a VGG16 trunk and of Lite0.

Always with the default recipe, cheapest setting first: every unit on 48 x 48 pixels, 8 steps from one start. Inactive
units on 96 x 96, 16 steps from one start; units inactive there in full: all steps, eight starts and the sample
photographs. In full means the recipe's own size, except for VGG16's blocks 4 and 5, where it is 96 x 96 and only units
that are inactive there without being dead are computed at the recipe's own size.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from timing import THREADS
from vgg16_trunk import trunk

import convscope
from convscope.featurevis.recipes import RECIPES

DEAD_NOTE = " looks dead: no activation on the sample images"
SINGLE_START = replace(RECIPES["robust"], starts=1, max_restarts=1)
FIRST, SECOND = (48, 8), (96, 16)  # pixels and steps
DEEP = 96  # pixels for VGG16's blocks 4 and 5 in full: at 224 a dead unit takes six times as long
# Finished layers of an interrupted run; deleted when the table is written.
PROGRESS_FILE = Path(__file__).parents[1] / "build" / "dead_units.jsonl"


@dataclass(frozen=True)
class UnitCounts:
    """Units: active (`late`: not in the first pass; `last`: only in full), dead, and other inactive ones."""

    network: str
    units: int
    active: int
    late: int
    last: int
    dead: int
    others: tuple[str, ...]

    def __add__(self, other: UnitCounts) -> UnitCounts:
        return UnitCounts(
            self.network,
            self.units + other.units,
            self.active + other.active,
            self.late + other.late,
            self.last + other.last,
            self.dead + other.dead,
            self.others + other.others,
        )


def count(network: str, model: convscope.Model, layers: Mapping[str, int | None], progress_file: Path) -> UnitCounts:
    """Count all units of the layers.

    `layers` gives the size of each layer's full run, None for the recipe's own. Layers in `progress_file` are skipped.
    """
    lines = progress_file.read_text().splitlines() if progress_file.exists() else []
    done = {(row["network"], row.pop("layer")): row for row in map(json.loads, lines)}
    total = UnitCounts(network, 0, 0, 0, 0, 0, ())
    for layer, size in layers.items():
        if (network, layer) in done:
            row = done[network, layer]
            counts = UnitCounts(**{**row, "others": tuple(row["others"])})
        else:
            counts = _layer(network, model, layer, size)
            progress_file.parent.mkdir(exist_ok=True)
            with progress_file.open("a") as file:
                file.write(json.dumps({"layer": layer, **asdict(counts)}) + "\n")
        total += counts
        sys.stderr.write(f"{network} {layer}: {total.active} of {total.units} active, {total.dead} dead\n")
    return total


def _layer(network: str, model: convscope.Model, layer: str, size: int | None) -> UnitCounts:
    units = model.layers.find(layer).units
    waiting, remaining = list(range(units)), []
    for side, steps in (FIRST, SECOND):
        waiting = _silent(convscope.patterns(model, layer, waiting, recipe=SINGLE_START, size=side, steps=steps))
        remaining.append(len(waiting))
        if not waiting:
            return UnitCounts(network, units, units, remaining[0], 0, 0, ())
    dead: set[int] = set()
    for side in dict.fromkeys((size, None)):
        patterns = convscope.patterns(model, layer, waiting, size=side)
        dead_notes = {note.split(DEAD_NOTE)[0] for note in patterns.notes if DEAD_NOTE in note}
        silent = _silent(patterns)
        dead |= {u for u in silent if f"unit {u}" in dead_notes}
        waiting = [u for u in silent if u not in dead]
        if not waiting:
            break
    inactive = len(dead) + len(waiting)
    others = tuple(f"{layer} {u}" for u in waiting)
    return UnitCounts(
        network, units, units - inactive, remaining[0] - inactive, remaining[1] - inactive, len(dead), others
    )


def _silent(patterns: convscope.Patterns) -> list[int]:
    return [int(unit) for unit, score in zip(patterns.units, patterns.scores, strict=True) if score <= 0]


def vgg16() -> UnitCounts:
    """Count VGG16's filters after their ReLUs."""
    model = trunk()
    relus = [row.name for row in model.layers if row.kind == "ReLU"]
    shallow = 7  # in blocks 1 to 3
    sizes = {name: None if position < shallow else DEEP for position, name in enumerate(relus)}
    return count("VGG16's trunk", model, sizes, PROGRESS_FILE)


def lite0() -> UnitCounts:
    """Count Lite0's filters after their ReLUs and at the ends of blocks."""
    model = convscope.load("lite0")
    ends = [row.name for row in model.layers if row.kind == "ReLU6" or re.fullmatch(r"blocks\.\d+\.\d+", row.name)]
    return count("Lite0", model, dict.fromkeys(ends), PROGRESS_FILE)


NETWORKS: dict[str, Callable[[], UnitCounts]] = {"vgg16": vgg16, "lite0": lite0}


def run() -> list[UnitCounts]:
    """Count all networks; layers that `main` has counted are reused, and the progress file is deleted."""
    rows = [network() for network in NETWORKS.values()]
    PROGRESS_FILE.unlink()
    return rows


def table(rows: list[UnitCounts]) -> list[str]:
    """Return the section of the README: text and tables."""
    (first, first_steps), (second, second_steps) = FIRST, SECOND
    deep = DEEP
    return [
        f"The default recipe for every filter: first on {first} x {first} pixels, {first_steps} steps from one start;",
        f"inactive ones on {second} x {second}, {second_steps} steps from one start; those inactive there in full: all",
        "steps, eight starts and the sample photographs, at the recipe's own size. For VGG16's blocks 4 and 5, in full",
        f"means {deep} x {deep}, and filters that are inactive there without being dead are computed once more at the",
        "recipe's own size. Columns: `active`, filters that are active on their finished pattern; of these, how",
        "many not in the first pass, and how many only in full; `dead`, filters without activation on the sample",
        "photographs and from eight starts; other inactive filters.",
        "",
        "| | filters | active | not in the first pass | only in full | dead | others |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *[
            f"| {r.network} | {r.units} | {r.active} ({r.active / r.units:.2%}) | {r.late} | {r.last} | {r.dead} "
            f"| {', '.join(r.others[:8]) or 'none'} |"
            for r in rows
        ],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; all if none is named")
    parser.add_argument("--threads", type=int, default=THREADS, help="two processes of one thread each take less time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.networks or NETWORKS:
        sys.stdout.write(f"{NETWORKS[name]()}\n")


if __name__ == "__main__":
    main()
