"""Print results, notes, tables and progress."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from convscope.engine.batching import Progress
    from convscope.results import Result


def log(text: str) -> None:
    """Print a line to standard error."""
    typer.echo(printable(text), err=True)


def printable(text: str) -> str:
    """Escape what cannot be printed, such as file names that are not Unicode."""
    return text.encode(errors="backslashreplace").decode()


def print_json(content: object) -> None:
    """Print JSON to standard output."""
    typer.echo(printable(json.dumps(content, indent=1, ensure_ascii=False, default=list)))


def print_manifest(folder: Path) -> None:
    """Print the manifest of a saved result."""
    typer.echo((folder / "manifest.json").read_text(encoding="utf-8"), nl=False)


def report_failures(failures: Sequence[object]) -> None:
    """Name each input that failed."""
    for failure in failures:
        log(f"failed: {failure}")


def finish(result: Result, out: Path | None, as_json: bool, print_saved: bool = True) -> None:
    """Print the result's notes, save it, report failures; exit status 1 if any input failed."""
    for note in result.notes:
        log(f"note: {note}")
    if out is not None:
        folder = result.save(out)
        if as_json and print_saved:
            print_manifest(folder)
        else:
            log(f"written to {folder}")
    report_failures(result.failed)
    if result.failed:
        raise typer.Exit(1)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print a table on a terminal, tab-separated lines elsewhere; cells are never broken.

    Parameters
    ----------
    right : sequence of int
        Columns that are aligned to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        typer.echo("\t".join(headings))
        for row in rows:
            typer.echo(printable("\t".join(row)))
        return
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # On a narrow terminal, its own line breaks keep names whole, so that they can be copied.
    natural = Console(width=10_000).measure(table).maximum
    Console(width=max(console.width, natural)).print(table, soft_wrap=True)


@contextmanager
def progress_bar(label: str) -> Iterator[Progress | None]:
    """Show a progress bar on a terminal; yield its callback, or None elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:14}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
