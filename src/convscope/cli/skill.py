"""`convscope skill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convscope.cli.app import command
from convscope.cli.output import log
from convscope.errors import ConvscopeError
from convscope.skill import FILE_NAME, skill_text


@command()
def skill(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder of skills: writes convscope/SKILL.md in it."),
    ] = None,
) -> None:
    """Print instructions for agents that use convscope in a shell, or install them.

    Agents read skills from a folder of their project or of their user, such as .claude/skills.
    """
    if out is None:
        typer.echo(skill_text(), nl=False)
        return
    from convscope.results import atomic_write, local_folder

    folder = local_folder(out) / "convscope"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / FILE_NAME) as file:
            file.write(skill_text().encode())
    except OSError as error:
        raise ConvscopeError(f"cannot write into {folder}: {error.strerror or error}") from error
    log(f"written to {folder / FILE_NAME}")
