"""How many units end with a pattern at which they fire: of all filters of VGG16's trunk and of Lite0.

Always by the default recipe, first as little of it as wakes most: every unit on 48 x 48 pixels, with 8 steps from one
start. Those that are silent there are drawn on 96 x 96, with 16 steps from one start; those that are silent there too
in full: with all steps, eight starts and the sample photographs. In full is on the recipe's own size, but for VGG16's
blocks 4 and 5, where it is 96 x 96 and only what is silent there without being dead is drawn on the recipe's own size.
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
from trunk import trunk

import convscope
from convscope.featurevis.recipes import RECIPES

DEAD = " looks dead: no activation on the sample images"
ONCE = replace(RECIPES["robust"], starts=1, max_restarts=1)
FIRST, SECOND = (48, 8), (96, 16)  # pixels and steps
DEEP = 96  # pixels of VGG16's blocks 4 and 5 in full: on 224 a unit that is dead takes six times as long
# The layers that are done, for a run that is cut short; gone when the table is made of them.
KEPT = Path(__file__).parents[1] / "build" / "stuck.jsonl"


@dataclass(frozen=True)
class Stuck:
    """Units, those that fire at their pattern (`late`: of these, not at the first; `last`: only in full), those said to
    be dead, and the layers and numbers of the others."""

    what: str
    units: int
    fire: int
    late: int
    last: int
    dead: int
    others: tuple[str, ...]

    def __add__(self, other: Stuck) -> Stuck:
        return Stuck(
            self.what,
            self.units + other.units,
            self.fire + other.fire,
            self.late + other.late,
            self.last + other.last,
            self.dead + other.dead,
            self.others + other.others,
        )


def count(what: str, model: convscope.Model, layers: Mapping[str, int | None], kept: Path) -> Stuck:
    """Over all units of the layers, each with the size in full, None for the recipe's own; layers found in `kept` are
    not done again."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {(row["what"], row.pop("layer")): row for row in map(json.loads, lines)}
    total = Stuck(what, 0, 0, 0, 0, 0, ())
    for layer, size in layers.items():
        if (what, layer) in done:
            row = done[what, layer]
            found = Stuck(**{**row, "others": tuple(row["others"])})
        else:
            found = _layer(what, model, layer, size)
            kept.parent.mkdir(exist_ok=True)
            with kept.open("a") as file:
                file.write(json.dumps({"layer": layer, **asdict(found)}) + "\n")
        total += found
        sys.stderr.write(f"{what} {layer}: {total.fire} of {total.units} fire, {total.dead} are dead\n")
    return total


def _layer(what: str, model: convscope.Model, layer: str, size: int | None) -> Stuck:
    units = model.layers.find(layer).units
    waiting, left = list(range(units)), []
    for side, steps in (FIRST, SECOND):
        waiting = _silent(convscope.patterns(model, layer, waiting, recipe=ONCE, size=side, steps=steps))
        left.append(len(waiting))
        if not waiting:
            return Stuck(what, units, units, left[0], 0, 0, ())
    dead: set[int] = set()
    for side in dict.fromkeys((size, None)):
        found = convscope.patterns(model, layer, waiting, size=side)
        said = {note.split(DEAD)[0] for note in found.notes if DEAD in note}
        silent = _silent(found)
        dead |= {u for u in silent if f"unit {u}" in said}
        waiting = [u for u in silent if u not in dead]
        if not waiting:
            break
    still = len(dead) + len(waiting)
    others = tuple(f"{layer} {u}" for u in waiting)
    return Stuck(what, units, units - still, left[0] - still, left[1] - still, len(dead), others)


def _silent(found: convscope.Patterns) -> list[int]:
    return [int(unit) for unit, score in zip(found.units, found.scores, strict=True) if score <= 0]


def vgg16() -> Stuck:
    """Each filter where its rectifier lets it through."""
    model = trunk()
    rectifiers = [row.name for row in model.layers if row.kind == "ReLU"]
    shallow = 7  # in blocks 1 to 3
    sizes = {name: None if place < shallow else DEEP for place, name in enumerate(rectifiers)}
    return count("VGG16's trunk", model, sizes, KEPT)


def lite0() -> Stuck:
    """Also the blocks' ends, which have no rectifier."""
    model = convscope.load("lite0")
    ends = [row.name for row in model.layers if row.kind == "ReLU6" or re.fullmatch(r"blocks\.\d+\.\d+", row.name)]
    return count("Lite0", model, dict.fromkeys(ends), KEPT)


NETWORKS: dict[str, Callable[[], Stuck]] = {"vgg16": vgg16, "lite0": lite0}


def run() -> list[Stuck]:
    """All networks, for the table; what `main` has counted before is not counted again, and is gone behind."""
    rows = [network() for network in NETWORKS.values()]
    KEPT.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; all if none is named")
    parser.add_argument("--threads", type=int, default=THREADS, help="two processes of one thread each take less time")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.networks or NETWORKS:
        sys.stdout.write(f"{NETWORKS[name]()}\n")


if __name__ == "__main__":
    main()
