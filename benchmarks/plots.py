"""Draw the ratios in the tables of benchmarks/README.md, and show each image below its table.

``run.py`` calls this; ``python benchmarks/plots.py`` draws the images of the present tables. Numbers are read from the
tables, so that an image cannot say anything else: a ratio may be followed by its spread, as in ``1.05 ±0.02``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

README = Path(__file__).with_name("README.md")
IMAGES = Path(__file__).with_name("images")
TABLE = re.compile(r"^\|.*\n(?:\|.*\n?)+", re.MULTILINE)
IMAGE_LINE = re.compile(r"\n!\[Bar chart: [^\n]*\]\(images/[^\n]*\)\n")
NUMBER = r"(\d+(?:\.\d+)?)(?: ±(\d+(?:\.\d+)?))?"
OURS = "#00796b"
OWN_COLORS = (OURS, "#4db6ac", "#b2dfdb")
PEER_COLORS = ("#5c6bc0", "#ef6c00", "#ad1457", "#6d4c41", "#7cb342", "#0288d1")
WIDTH = 7.2  # inches
FONT = 8
REFERENCES = ("bare forward", "plain", "plain torch")  # 1 by definition
MAX_LINEAR = 6.0  # larger quotients of the largest and the smallest value are drawn on a logarithmic axis


@dataclass(frozen=True)
class Bar:
    """A number of a table, what it is about, and half the distance between the quartiles if the table has it."""

    group: str
    name: str
    value: float
    text: str
    spread: float = 0.0


Rows = list[list[str]]  # the first one is the head


@dataclass(frozen=True)
class Plot:
    """An image: its file, its table by section and position, the function that reads the table, and the axis."""

    file: str
    section: str
    axis: str
    read: Callable[[Rows], list[Bar]]
    table: int = 0
    reference: float | None = 1.0


def bracketed(rows: Rows, labels: int = 1) -> list[Bar]:
    """Read cells such as ``49.2 (1.05)`` behind the first `labels` columns."""
    bars = []
    for row in rows[1:]:
        for name, cell in zip(rows[0][labels:], row[labels:], strict=True):
            match = re.search(rf"\({NUMBER}\)", cell)
            if match and name not in REFERENCES:
                bars.append(_bar(row[0], name, match))
    return bars


def named(rows: Rows, column: int) -> list[Bar]:
    """Read a column of cells such as ``Quantus 1.62, captum 1.11``: peers' ratios to convscope."""
    bars = []
    for row in rows[1:]:
        bars += [_bar(row[0], name, match) for name, match in _names_and_numbers(row[column])]
    return bars


def named_by_column(rows: Rows) -> list[Bar]:
    """Read cells such as ``1.04<br>captum 3.4``, where each column is a method: peers' ratios to convscope."""
    bars = []
    for row in rows[1:]:
        for method, cell in zip(rows[0][1:], row[1:], strict=True):
            peers = [pair for part in cell.split("<br>")[1:] for pair in _names_and_numbers(part)]
            if peers:
                group = f"{row[0].partition(' (')[0]}: {method}"
                bars += [_bar(group, name, match) for name, match in peers]
    return bars


def column(title: str, rows: Rows) -> list[Bar]:
    """Read a column of numbers; each row is a contender."""
    index = rows[0].index(title)
    found = [(row[0], re.match(NUMBER, row[index])) for row in rows[1:] if row[0] not in REFERENCES]
    return [_bar("", name, match) for name, match in found if match]


def pairs(title: str, rows: Rows) -> list[Bar]:
    """Read a column of numbers; the first column is the group and the second the contender."""
    index = rows[0].index(title)
    found = [(row[0], row[1], re.match(NUMBER, row[index])) for row in rows[1:]]
    return [_bar(group, name, match) for group, name, match in found if match]


def columns(rows: Rows) -> list[Bar]:
    """Read all columns of numbers, also negative ones; each row is a group."""
    return [
        Bar(row[0], name, float(cell), cell)
        for row in rows[1:]
        for name, cell in zip(rows[0][1:], row[1:], strict=True)
        if re.fullmatch(r"-?\d+\.\d+", cell)
    ]


def fractions(rows: Rows) -> list[Bar]:
    """Read cells such as ``Domino 1 of 2`` in the columns of convscope and of a peer."""
    bars = []
    for row in rows[1:]:
        cells = [re.match(r"(.*?) ?(\d+) of (\d+)", cell) for cell in row[1:]]
        if all(cells):
            bars += [Bar(row[0], m[1] or "convscope", int(m[2]) / int(m[3]), f"{m[2]} of {m[3]}") for m in cells if m]
    return bars


def _names_and_numbers(cell: str) -> Iterator[tuple[str, re.Match[str]]]:
    for part in cell.split(", "):
        if match := re.match(rf"(?P<name>\D*\S) {NUMBER}", part):
            number = re.match(NUMBER, part[match.end("name") + 1 :])
            assert number is not None
            yield match["name"], number


def _bar(group: str, name: str, match: re.Match[str]) -> Bar:
    return Bar(group, name, float(match[1]), match[1], float(match[2] or 0))


PLOTS = (
    Plot("grad-cam", "Grad-CAM", "time relative to a bare forward pass", bracketed),
    Plot("cam-family", "The CAM family", "time relative to convscope's", named_by_column),
    Plot("many-passes", "The CAM family", "time relative to convscope's", lambda rows: named(rows, 3), 1),
    Plot("faithfulness", "Faithfulness metrics", "time relative to convscope's", lambda rows: named(rows, 2)),
    Plot("patterns", "Patterns", "time relative to plain torch", lambda rows: column("ratio to plain torch", rows)),
    Plot("acceleration", "Acceleration", "time relative to a plain pass", bracketed, 1),
    Plot(
        "transfer", "Transfer to other models", "seconds per class", lambda rows: column("s per class", rows), 0, None
    ),
    Plot("scan", "Scan", "throughput relative to the forward pass", lambda rows: bracketed(rows, 3)),
    Plot("sanity", "Sanity checks", "rank correlation: 0 passes, 1 fails", columns, 0, None),
    Plot("localisation", "Localisation", "IoU with the object", lambda rows: column("IoU", rows), 0, None),
    Plot("effects", "Effects of units", "CPU time relative to convscope's", lambda rows: bracketed(rows, 3)),
    Plot(
        "dictionaries",
        "Sparse dictionaries",
        "r2 on images held out",
        lambda rows: pairs("r2, held out", rows),
        0,
        None,
    ),
    Plot("planted", "Planted causes of errors", "fraction of the worlds", fractions, 0, None),
    Plot(
        "detection",
        "Boxes of a detector",
        "CPU time of d-rise relative to the method's",
        lambda rows: column("d-rise's relative to it", rows),
    ),
)


def tables(section: str) -> list[Rows]:
    """Return the tables of a section, as rows of cells, the head first."""
    found = []
    for match in TABLE.finditer(section + "\n"):
        lines = [line.strip().strip("|") for line in match[0].splitlines()]
        found.append([[cell.strip() for cell in line.split("|")] for i, line in enumerate(lines) if i != 1])
    return found


def draw(plot: Plot, bars: Sequence[Bar]) -> Figure:
    """Draw one horizontal bar for each number; bars of a group stand together, colored by contender."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    colors = _colors(bars)
    has_legend = groups != [""] and len(colors) > 1
    positions, centers, y = [], [], 0.0
    for group in groups:
        count = sum(bar.group == group for bar in bars)
        positions += [y + i for i in range(count)]
        centers.append(y + (count - 1) / 2)
        y += count + (0.6 if group else 0)
    figure = Figure(figsize=(WIDTH, 0.6 + 0.17 * y + 0.25 * has_legend), layout="constrained")
    axes = figure.add_subplot()
    _draw_bars(axes, plot, bars, positions, [colors[bar.name] for bar in bars])
    if groups == [""]:
        axes.set_yticks(positions, [bar.name for bar in bars])
    else:
        axes.set_yticks(centers, [group.replace("`", "") for group in groups])
    if has_legend:
        handles = [Patch(color=color, label=name) for name, color in colors.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=FONT)
    axes.set_ylim(max(positions) + 0.8, -0.8)
    axes.tick_params(labelsize=FONT)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(plot.axis, fontsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_bars(axes: Axes, plot: Plot, bars: Sequence[Bar], positions: Sequence[float], colors: Sequence[str]) -> None:
    """Draw bars, spreads and numbers; on a logarithmic axis if the numbers differ much."""
    values, spreads = np.array([bar.value for bar in bars]), np.array([bar.spread for bar in bars])
    smallest, largest = (values - spreads).min(), (values + spreads).max()
    base = 0.0
    if smallest > 0 and largest / smallest > MAX_LINEAR:
        base = plot.reference or 1.0
        axes.set_xscale("log")
        axes.set_xlim(0.9 * min(smallest, base), 1.5 * largest)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(min(0, smallest - 0.08 * largest), 1.1 * largest)
    axes.barh(positions, values - base, left=base, height=0.8, color=colors)
    if (shown := spreads > 0).any():
        at = np.array(positions)[shown]
        axes.errorbar(values[shown], at, xerr=spreads[shown], fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for bar, position in zip(bars, positions, strict=True):
        is_left = bar.value < base
        end = bar.value - bar.spread if is_left else bar.value + bar.spread
        side: dict[str, Any] = {"xytext": (-3 if is_left else 3, 0), "ha": "right" if is_left else "left"}
        axes.annotate(bar.text, (end, position), textcoords="offset points", va="center", fontsize=FONT - 1, **side)
    if plot.reference is not None:
        axes.axvline(plot.reference, color="black", linewidth=0.8, linestyle=":", zorder=0)


def _colors(bars: Sequence[Bar]) -> dict[str, str]:
    """Return a color for each contender: one for convscope, or for all if they are no packages to compare with."""
    names = list(dict.fromkeys(bar.name for bar in bars))
    ours = [name for name in names if name.startswith("convscope")]
    if not ours and all(not bar.group for bar in bars):
        return dict.fromkeys(names, OURS)
    own = {name: OWN_COLORS[i % len(OWN_COLORS)] for i, name in enumerate(ours)}
    rest = [name for name in names if name not in own]
    return {**own, **{name: PEER_COLORS[i % len(PEER_COLORS)] for i, name in enumerate(rest)}}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file with few colors, which is small."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    with Image.open(path) as image:
        image.convert("RGB").quantize(48).save(path, optimize=True)


def update(readme: Path = README, images: Path = IMAGES) -> list[Path]:
    """Draw all plots whose tables exist, write them into `images`, and show each below its table."""
    head, *parts = IMAGE_LINE.sub("", readme.read_text(encoding="utf-8")).split("\n## ")
    written = []
    for plot in PLOTS:
        for index, part in enumerate(parts):
            found = list(TABLE.finditer(part))
            if not part.startswith(plot.section) or len(found) <= plot.table:
                continue
            bars = plot.read(tables(part)[plot.table])
            if "convscope's" in plot.axis:  # its own bar is 1 by definition
                bars = [bar for bar in bars if bar.name != "convscope"]
            if len(bars) < 2:
                continue
            path = images / f"{plot.file}.png"
            save(draw(plot, bars), path)
            written.append(path)
            names = ", ".join(dict.fromkeys(bar.name for bar in bars))
            line = f"\n![Bar chart: {plot.axis}, for {names}; the numbers of the table]({images.name}/{path.name})\n"
            # Behind the table; those of later tables of the section move, so that the section is searched anew.
            parts[index] = part[: found[plot.table].end()] + line + part[found[plot.table].end() :]
    readme.write_text("\n## ".join([head, *parts]), encoding="utf-8")
    return written


if __name__ == "__main__":
    update()
