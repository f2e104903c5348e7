"""Run the benchmarks and write their tables into benchmarks/README.md.

``python benchmarks/run.py`` measures all sections except those of `LONG`, which take an hour or more, or need
photographs, and run with ``--only``. A run that was interrupted goes on with the first section that it has not
finished, if versions and rounds are the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import acceleration
import dead_units
import detection
import dictionaries
import faithfulness
import features_and_units
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
from timing import THREADS

ROUNDS = 9
PHOTOGRAPHS = "Features and units"  # the section that needs them
LONG = ("Dead units", PHOTOGRAPHS, "Planted causes of errors")
PEERS = (
    "captum",
    "grad-cam",
    "torchcam",
    "quantus",
    "torch-lucent",
    "dreamlens",
    "overcomplete",
    "torch",
    "torchvision",
    "timm",
)
README = Path(__file__).with_name("README.md")
UNFINISHED = Path(__file__).parents[1] / "build" / "benchmarks.json"

Sections = Mapping[str, Callable[[], list[str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of timing")
    parser.add_argument("--only", help="a section's title, or its beginning; the other sections stay as they are")
    parser.add_argument("--photographs", type=Path, help=f"a folder of photographs, for the section {PHOTOGRAPHS!r}")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    few = max(3, rounds // 3)
    torch.set_num_threads(THREADS)
    sections = _sections(rounds, few, arguments.photographs)
    head, bodies = _read_sections(README)
    if arguments.only:
        chosen = [title for title in sections if title.startswith(arguments.only)]
        if not chosen:
            parser.error(f"no section begins with {arguments.only!r}: choose one of {', '.join(sections)}")
        if PHOTOGRAPHS in chosen and arguments.photographs is None:
            parser.error(f"{PHOTOGRAPHS!r} needs --photographs FOLDER")
        for title in chosen:
            bodies[title] = _measure(sections[title], f"Run separately, {rounds} rounds ({few} for long ones). ")
            _write(head, bodies, sections)
    else:
        bodies |= _measure_all({title: run for title, run in sections.items() if title not in LONG}, rounds)
        _write(_head(rounds, few), bodies, sections)


def _sections(rounds: int, few: int, photographs: Path | None) -> Sections:
    return {
        "Grad-CAM": lambda: grad_cam.table(grad_cam.run(rounds)),
        "The CAM family, many targets, and methods of many passes": lambda: methods.table(*methods.run(rounds)),
        "Faithfulness metrics": lambda: faithfulness.table(faithfulness.run(few)),
        "Patterns": lambda: filter_patterns.table(filter_patterns.run(few), filter_patterns.equal_scores()),
        "Acceleration": lambda: acceleration.table(acceleration.run(few)),
        "Transfer to other models": lambda: transfer.table(*transfer.run()),
        "Dead units": lambda: dead_units.table(dead_units.run()),
        "Scan": lambda: scanning.table(scanning.passes(few), scanning.decoding(), list(scanning.peaks())),
        "Memory": lambda: memory.table(memory.run()),
        "Sanity checks": lambda: sanity.table(sanity.run()),
        "Localisation": lambda: localisation.table(localisation.run(), localisation.cost(few)),
        "Effects of units": lambda: unit_effects.table(unit_effects.run(few)),
        "Sparse dictionaries": lambda: dictionaries.table(dictionaries.run(few)),
        PHOTOGRAPHS: lambda: features_and_units.table(features_and_units.run(photographs)),
        "Names of units": lambda: unit_names.table(*unit_names.run()),
        "Planted causes of errors": planted.table,
        "Boxes of a detector": lambda: detection.table(detection.run()),
    }


def _measure(section: Callable[[], list[str]], note: str = "") -> str:
    """Return the text of a section, and how long it took."""
    start = time.perf_counter()
    lines = section()
    return "\n".join([*lines, "", f"{note}Time: {(time.perf_counter() - start) / 60:.1f} minutes."])


def _measure_all(sections: Sections, rounds: int) -> dict[str, str]:
    """Measure all sections, going on where an interrupted run of the same versions and rounds has stopped."""
    conditions = {"rounds": rounds, "processor": _processor(), **{peer: version(peer) for peer in PEERS}}
    bodies: dict[str, str] = {}
    if UNFINISHED.exists():
        unfinished = json.loads(UNFINISHED.read_text())
        bodies = unfinished["sections"] if unfinished["conditions"] == conditions else {}
    UNFINISHED.parent.mkdir(exist_ok=True)
    for title, section in sections.items():
        if title not in bodies:
            bodies[title] = _measure(section)
            partial = UNFINISHED.with_suffix(".tmp")
            partial.write_text(json.dumps({"conditions": conditions, "sections": bodies}))
            partial.replace(UNFINISHED)
    UNFINISHED.unlink()
    return bodies


def _write(head: str, bodies: Mapping[str, str], sections: Sections) -> None:
    parts = [f"## {title}\n\n{bodies[title]}\n" for title in sections if title in bodies]
    README.write_text("\n".join([head, *parts]))
    plots.update(README)


def _read_sections(path: Path) -> tuple[str, dict[str, str]]:
    """Return the head and the sections of an earlier run."""
    head, *parts = path.read_text().split("\n## ")
    return head, {title: body.strip() for title, body in (part.split("\n", 1) for part in parts)}


def _head(rounds: int, few: int) -> str:
    device = "and a GPU in sections that name it" if torch.cuda.is_available() else "no GPU"
    lines = [
        "# Benchmarks",
        "",
        "Speed, memory and quality of convscope, measured next to other packages.",
        "Written by `make benchmarks`; an interrupted run resumes. Sections that take longer or need photographs are",
        f"measured by `python benchmarks/run.py --only TITLE`: {', '.join(LONG)}.",
        "",
        "All packages are timed in turn in one process; every time is the median of",
        f"{rounds} rounds ({few} for long ones), every ratio the median of the ratios within a round,",
        "followed by half the distance between their quartiles where it does not round to 0. Images below the tables",
        "show their ratios, with that distance as a line. Each section ends with the time that it took.",
        f"{THREADS} threads, float32, the same weights and input for all, 224 x 224, memory format channels_last",
        "unless a section says otherwise. Other packages get the network without in-place activations,",
        "as their hooks require.",
        "",
        f"Machine: {_processor()}, {device}. " + ", ".join(f"{p} {version(p)}" for p in PEERS) + ".",
        "",
    ]
    return "\n".join(lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
