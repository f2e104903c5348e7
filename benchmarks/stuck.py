"""How many units end with a pattern at which they fire: of all filters of VGG16's trunk and of Lite0."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timing import THREADS
from trunk import trunk

import convscope

SIZE, STEPS = 64, 16  # as little as wakes most; the others are drawn again in full
# The layers that are done, for a run that is cut short; gone when all are.
KEPT = Path(__file__).parents[1] / "build" / "stuck.jsonl"


@dataclass(frozen=True)
class Stuck:
    """Units, those whose pattern they fire at (`late`: of these, not at the small one), those said to be dead, and the
    layers and numbers of the others."""

    what: str
    units: int
    fire: int
    late: int
    dead: int
    others: tuple[str, ...]

    def __add__(self, other: Stuck) -> Stuck:
        return Stuck(
            self.what,
            self.units + other.units,
            self.fire + other.fire,
            self.late + other.late,
            self.dead + other.dead,
            self.others + other.others,
        )


def count(what: str, model: convscope.Model, layers: Iterable[str], kept: Path) -> Stuck:
    """Over all units of the layers; layers found in `kept` are not done again."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {(row["what"], row.pop("layer")): row for row in map(json.loads, lines)}
    total = Stuck(what, 0, 0, 0, 0, ())
    for layer in layers:
        if (what, layer) in done:
            row = done[what, layer]
            found = Stuck(**{**row, "others": tuple(row["others"])})
        else:
            found = _layer(what, model, layer)
            kept.parent.mkdir(exist_ok=True)
            with kept.open("a") as file:
                file.write(json.dumps({"layer": layer, **asdict(found)}) + "\n")
        total += found
        sys.stderr.write(f"{what} {layer}: {total.fire} of {total.units} fire, {total.dead} are dead\n")
    return total


def _layer(what: str, model: convscope.Model, layer: str) -> Stuck:
    small = convscope.patterns(model, layer, size=SIZE, steps=STEPS)
    silent = _silent(small)
    if not silent:
        return Stuck(what, len(small.units), len(small.units), 0, 0, ())
    full = convscope.patterns(model, layer, silent)
    still = _silent(full)
    dead = {note.split(" is stuck at 0: dead")[0] for note in full.notes if " is stuck at 0: dead" in note}
    others = tuple(f"{layer} {u}" for u in still if f"unit {u}" not in dead)
    fire = len(small.units) - len(still)
    return Stuck(what, len(small.units), fire, len(silent) - len(still), len(dead), others)


def _silent(found: convscope.Patterns) -> list[int]:
    return [int(unit) for unit, score in zip(found.units, found.scores, strict=True) if score <= 0]


def run() -> list[Stuck]:
    """Each filter where its rectifier lets it through; in Lite0 also the blocks' ends, which have none."""
    vgg, lite = trunk(), convscope.load("lite0")
    ends = [row.name for row in lite.layers if row.kind == "ReLU6" or re.fullmatch(r"blocks\.\d+\.\d+", row.name)]
    rows = [
        count("VGG16's trunk", vgg, [row.name for row in vgg.layers if row.kind == "ReLU"], KEPT),
        count("Lite0", lite, ends, KEPT),
    ]
    KEPT.unlink()
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(THREADS)
    for found in run():
        sys.stdout.write(f"{found}\n")


if __name__ == "__main__":
    main()
