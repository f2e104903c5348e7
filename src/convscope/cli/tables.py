"""Print tables that fit the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import typer

from convscope.cli.output import log, printable

MIN_FLEXIBLE_WIDTH = 16
READABLE_PATH = 28  # characters of a path for which other columns are left out
GAP = 2  # between columns


@dataclass(frozen=True)
class Column:
    """A column of a table, and what becomes of it on a narrow terminal.

    Attributes
    ----------
    heading : str
    right : bool
        Whether cells are aligned to the right.
    overflow : {"keep", "fold", "path"}
        Cells that do not fit stay whole, are folded, or lose their beginning, of which a path needs least.
    priority : int
        Columns with the highest numbers are left out first; those with 0 never are.
    """

    heading: str
    right: bool = False
    overflow: Literal["keep", "fold", "path"] = "keep"
    priority: int = 0


def print_table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, wide: bool = False) -> None:
    """Print a table that fits the terminal; tab-separated lines with all columns where the output is no terminal.

    Parameters
    ----------
    title : str
        May be empty.
    columns : sequence of Column
    rows : sequence of sequence of str
        The cells, one per column.
    wide : bool
        Print all columns and whole cells; the terminal may break the lines.
    """
    from rich.console import Console

    console = Console()
    cells = [[printable(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for line in ([column.heading for column in columns], *cells):
            typer.echo("\t".join(line))
        return
    widths = _natural_widths(columns, cells)
    if not wide:
        widths = fit_widths(columns, widths, console.width)
    _print_rich(title, columns, cells, widths)
    hidden = [column.heading for column, width in zip(columns, widths, strict=True) if width == 0]
    if hidden:
        log(f"not shown: {', '.join(hidden)}; --wide prints all columns")


def fit_widths(columns: Sequence[Column], natural: Sequence[int], available: int) -> list[int]:
    """Return the width of each column in a table of at most `available` characters, 0 for those left out.

    Parameters
    ----------
    columns : sequence of Column
    natural : sequence of int
        The widths of the columns' widest cells.
    available : int
    """
    limits = [{"path": READABLE_PATH}.get(column.overflow, MIN_FLEXIBLE_WIDTH) for column in columns]
    readable = [
        width if column.overflow == "keep" else min(width, limit)
        for column, width, limit in zip(columns, natural, limits, strict=True)
    ]
    optional = sorted((i for i, column in enumerate(columns) if column.priority), key=lambda i: columns[i].priority)
    while _table_width(readable) > available and optional:
        readable[optional.pop()] = 0
    widths = [
        width if column.overflow == "keep" else min(width, MIN_FLEXIBLE_WIDTH)
        for column, width in zip(columns, readable, strict=True)
    ]
    while _table_width(widths) < available:
        cut = [i for i, width in enumerate(widths) if 0 < width < natural[i]]
        if not cut:
            break
        widths[min(cut, key=widths.__getitem__)] += 1
    return widths


def _natural_widths(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> list[int]:
    from rich.cells import cell_len

    lines = [[column.heading for column in columns], *cells]
    return [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]


def _table_width(widths: Sequence[int]) -> int:
    visible = [width for width in widths if width]
    return sum(visible) + GAP * (len(visible) - 1)


def _print_rich(title: str, columns: Sequence[Column], cells: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    spacing: dict[str, Any] = {"padding": (0, GAP - 1, 0, 0), "pad_edge": False}  # the box adds one space
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, **spacing)
    visible = [i for i, width in enumerate(widths) if width]
    for i in visible:
        justify: Literal["left", "right"] = "right" if columns[i].right else "left"
        table.add_column(
            columns[i].heading, justify=justify, width=widths[i], no_wrap=columns[i].overflow != "fold", overflow="fold"
        )
    for row in cells:
        table.add_row(
            *(Text(_shorten_path(row[i], widths[i]) if columns[i].overflow == "path" else row[i]) for i in visible)
        )
    Console(width=_table_width(widths)).print(table, soft_wrap=True)


def _shorten_path(path: str, width: int) -> str:
    """Leave out the beginning of a path that is longer than `width` characters."""
    return path if len(path) <= width else f"…{path[len(path) - width + 1 :]}"
