"""What the options of commands are made of: checks of their values, and options that print tables of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from convscope.cli.parsing import split_commas
from convscope.cli.tables import Column, print_table
from convscope.errors import ConvscopeError, find_name
from convscope.names import METHOD_OPTIONS


def one_of(choices: Sequence[str]) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """Return a callback that refuses values that are not among the choices."""

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and value not in choices:
            expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ConvscopeError(f"{param.opts[0]} is {value!r}; expected {expected}")
        return value

    return check


def choice(help_text: str, *choices: str, panel: str | None = None) -> Any:
    """Return a Typer option that takes one of a few words."""
    return typer.Option(
        help=help_text,
        metavar="|".join(choices),
        callback=one_of(choices),
        autocompletion=lambda: list(choices),
        rich_help_panel=panel,
    )


def names_of(kind: str, known: Sequence[str]) -> Callable[[str | None], str | None]:
    """Return a callback that finds the names in a list separated by commas, in any case."""

    def check(value: str | None) -> str | None:
        return None if value is None else ",".join(find_name(kind, name, known) for name in split_commas(value))

    return check


def one_name_of(kind: str, known: Sequence[str]) -> Callable[[str | None], str | None]:
    """Return a callback that finds a name, in any case."""
    return lambda value: None if value is None else find_name(kind, value, known)


def check_output_folder(out: Path | None) -> Path | None:
    """Refuse a file or a remote address as output folder before anything runs; a photograph would be overwritten."""
    if out is None or not (out.suffix or out.is_file() or ":/" in str(out)):
        return out
    from convscope.results import FILE_SUFFIXES, OTHER_SUFFIXES, TABLE_SUFFIX, local_folder

    if out.is_file() or out.suffix.lower() in (*FILE_SUFFIXES, *OTHER_SUFFIXES, TABLE_SUFFIX):
        kind = "an existing file" if out.is_file() else "the name of a file"
        raise ConvscopeError(f"--out is {str(out)!r}, {kind}; expected a folder, in which files are named after images")
    return local_folder(out)


def between(minimum: float, maximum: float) -> Callable[[typer.CallbackParam, float | None], float | None]:
    """Return a callback that refuses numbers outside of a range."""

    def check(param: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not minimum <= value <= maximum:
            raise ConvscopeError(f"{param.opts[0]} is {value:g}; expected a number from {minimum:g} to {maximum:g}")
        return value

    return check


def _list_names(table: str) -> Callable[[bool], None]:
    """Return a callback that prints the table of names that ``convscope.TABLE()`` returns, and exits."""

    def print_names(requested: bool) -> None:
        if requested:
            import convscope

            columns = (Column(table.removesuffix("s")), Column("description", overflow="fold"))
            options = METHOD_OPTIONS if table == "methods" else {}
            rows = [
                (name, f"{line}; options: {options[name]}" if name in options else line)
                for name, line in getattr(convscope, table)().items()
            ]
            print_table("", columns, rows)
            raise typer.Exit

    return print_names


def list_option(table: str) -> Any:
    """Return an option that prints a table of names and exits."""
    return typer.Option(
        f"--list-{table}",
        is_eager=True,
        callback=_list_names(table),
        help=f"Print all {table}, with one line on each{' and its options' if table == 'methods' else ''}.",
    )
