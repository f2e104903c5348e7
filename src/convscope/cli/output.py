"""Print results, notes, tables and progress."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from convscope.errors import rename_arguments

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from convscope.progress import Progress
    from convscope.results import Result


@dataclass(frozen=True)
class _Settings:
    """How much is printed, and what messages call the arguments of functions."""

    quiet: bool = False
    verbose: bool = False
    argument_names: Mapping[str, str] = field(default_factory=dict)


_settings = _Settings()


@contextmanager
def settings(*, quiet: bool, verbose: bool, argument_names: Mapping[str, str]) -> Iterator[None]:
    """Apply a command's settings inside the block; after an error they stay, for its message.

    Parameters
    ----------
    quiet : bool
        Print results, failures and errors only.
    verbose : bool
        Print details.
    argument_names : mapping
        For each argument of a Python function its option on the command line.
    """
    global _settings
    _settings = _Settings(quiet, verbose, argument_names)
    yield
    _settings = _Settings()


def is_verbose() -> bool:
    """Return whether details are printed."""
    return _settings.verbose


def log_error(text: str) -> None:
    """Print an error or a failure to standard error, with arguments as options."""
    typer.echo(printable(rename_arguments(text, _settings.argument_names)), err=True)


def log_note(text: str) -> None:
    """Print a note to standard error, with arguments as options, unless the command is quiet."""
    if not _settings.quiet:
        log_error(f"note: {text}")


def log(text: str) -> None:
    """Print a line to standard error as it is, unless the command is quiet."""
    if not _settings.quiet:
        typer.echo(printable(text), err=True)


def log_detail(text: str) -> None:
    """Print a line to standard error as it is, if the command is verbose."""
    if _settings.verbose:
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
        log_error(f"failed: {failure}")


def finish(result: Result, folder: Path | None, as_json: bool) -> None:
    """Print a result's notes, where it was saved, and its failures; exit status 1 if there are some.

    `folder` is None if it was not saved. With `as_json` its manifest is printed.
    """
    for note in result.notes:
        log_note(note)
    if folder is not None and as_json:
        print_manifest(folder)
    elif folder is not None:
        log(f"written to {folder}")
    report_failures(result.failed)
    if result.failed:
        raise typer.Exit(1)


def progress_bar(label: str) -> AbstractContextManager[Progress]:
    """Show a progress bar on a terminal; the block reports with the callback."""
    import convscope.progress

    return convscope.progress.progress_bar(not _settings.quiet, label)
