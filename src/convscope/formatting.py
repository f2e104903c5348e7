"""Format rows as text tables that fit a terminal."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import PurePath

Row = Mapping[str, object]

MAX_ROWS = 20  # of a result, when it is printed
MIN_COLUMN = 12  # columns are not shortened further
GAP = "  "


def terminal_width() -> int:
    """Return the number of columns of the terminal, 80 or more; 80 where there is none."""
    return max(80, shutil.get_terminal_size().columns)


def format_cell(value: object) -> str:
    """Format a value for a table: numbers with four digits, None as nothing, text on one line."""
    if value is None:
        return ""
    if isinstance(value, bool | Integral):
        return str(value)
    if isinstance(value, Real):
        return f"{float(value):.4g}"
    return " ".join(str(value).split())


def _format_column(values: Sequence[object]) -> list[str]:
    """Format the values of a column: real numbers with as many decimals as the largest needs for four digits."""
    numbers = [abs(float(v)) for v in values if isinstance(v, Real) and not isinstance(v, Integral)]
    largest = max((n for n in numbers if math.isfinite(n)), default=0.0)
    if not 1e-3 <= largest < 1e6:
        return [format_cell(v) for v in values]
    decimals = max(0, 3 - math.floor(math.log10(largest)))
    return [
        f"{float(v):.{decimals}f}" if isinstance(v, Real) and not isinstance(v, Integral) else format_cell(v)
        for v in values
    ]


def shorten(text: str, width: int) -> str:
    """Replace the middle of `text` by an ellipsis if it is longer than `width`."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def count_of(count: int, noun: str) -> str:
    """Return "1 image" or "4 images"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("ss") else "s")


def base_name(name: str) -> str:
    """Return the file name of a path; other names as they are."""
    return PurePath(name).name or name


def format_table(rows: Sequence[Row], width: int | None = None, max_rows: int | None = None) -> str:
    """Format rows, whose keys are the headings, as a table.

    Parameters
    ----------
    rows : sequence of mapping
        Columns are the keys of the first row; those without any value are left out.
    width : int, optional
        Characters per line; the terminal's if omitted. Columns other than the first are shortened to fit; what still
        does not fit goes, from the right.
    max_rows : int, optional
        Rows that are shown; all if omitted.
    """
    if not rows:
        return ""
    visible = rows[:max_rows]
    headings = [heading for heading in rows[0] if any(row.get(heading) not in (None, "") for row in visible)]
    columns = [[heading, *_format_column([row.get(heading) for row in visible])] for heading in headings]
    right = [all(isinstance(row.get(heading), Real | None) for row in visible) for heading in headings]
    widths = _fit([max(map(len, column)) for column in columns], width or terminal_width())
    cells = [
        [shorten(cell, size).rjust(size) if is_right else shorten(cell, size).ljust(size) for cell in column]
        for column, size, is_right in zip(columns, widths, right, strict=False)
    ]
    lines = [GAP.join(line).rstrip() for line in zip(*cells, strict=True)]
    if len(widths) < len(headings):
        lines.append(f"(not shown: {', '.join(headings[len(widths) :])})")
    if len(visible) < len(rows):
        lines.append(f"... {len(rows) - len(visible)} more rows")
    return "\n".join(lines)


def _fit(widths: list[int], total: int) -> list[int]:
    """Shorten the widest columns but the first until they fit into `total`; drop columns that still do not fit."""
    widths = list(widths)
    while (excess := sum(widths) + len(GAP) * (len(widths) - 1) - total) > 0:
        others = widths[1:]
        if not others:
            break
        widest = max(others)
        if widest <= MIN_COLUMN:
            widths.pop()
            continue
        second = max([w for w in others if w < widest] + [MIN_COLUMN])
        widths[1 + others.index(widest)] -= min(excess, max(1, widest - second))
    return widths
