"""Help texts and tables in a terminal of 80 columns, as text files that were read.

After a change that is meant, write them anew with ``CONVSCOPE_UPDATE_SNAPSHOTS=1 pytest tests/cli``, and read the
difference.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import convscope
from convscope.cli import app
from convscope.cli.app import ALIASES, PANELS

FOLDER = Path(__file__).parent / "snapshots"
COMMANDS = [name for names in PANELS.values() for name in names]
TYPER = "0.29"  # other versions lay out the help in other ways
TERMINAL = {"COLUMNS": "80", "FORCE_COLOR": "1", "TERM": "xterm", "TERMINAL_WIDTH": "80"}


def in_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Return what a command prints on a terminal of 80 columns, without colors."""
    for name, value in TERMINAL.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, list(arguments), color=True, prog_name="convscope")
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in _plain(result.stdout).splitlines()) <= 80
    plain = _plain(result.output)
    return "\n".join(line.rstrip() for line in plain.splitlines()) + "\n"


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def check_snapshot(name: str, text: str) -> None:
    """Compare a text with the file of a name."""
    file = FOLDER / f"{name}.txt"
    if os.environ.get("CONVSCOPE_UPDATE_SNAPSHOTS"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.skipif(not version("typer").startswith(TYPER), reason=f"laid out by typer {TYPER}")
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [command] if command else []
    check_snapshot(f"help_{command or 'convscope'}", in_terminal(monkeypatch, *arguments, "--help"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("layers", ("layers", "lite0")),
        ("predict", ("predict", "lite0", "PHOTOS", "--top", "2")),
        ("heatmap", ("heatmap", "lite0", "PHOTOS", "--target", "lesser panda", "--target", "277", "-o", "maps")),
        ("evaluate", ("evaluate", "lite0", "PANDA", "--metrics", "sparseness,complexity,deletion", "--steps", "4")),
        ("compare", ("compare", "lite0", "PANDA", "--methods", "grad-cam,random", "--metrics", "sparseness")),
        ("list_methods", ("heatmap", "--list-methods")),
        ("list_metrics", ("evaluate", "--list-metrics")),
        ("list_recipes", ("patterns", "--list-recipes")),
    ],
)
def test_table(
    name: str,
    arguments: tuple[str, ...],
    photos: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lite0: object,
) -> None:
    """Numbers are replaced by #, since the last digits differ from machine to machine."""
    monkeypatch.chdir(tmp_path)
    for photo in photos:
        (tmp_path / Path(photo).name).symlink_to(photo)
    files = {"PHOTOS": sorted(Path(p).name for p in photos), "PANDA": ["red_panda.jpg"]}
    text = in_terminal(monkeypatch, *(part for a in arguments for part in files.get(a, [a])))
    if name in ("evaluate", "compare"):
        text = re.sub(r"\d+\.\d+", lambda match: re.sub(r"\d", "#", match[0]), text)
        text = re.sub(r" +\d+(?=  +#)", "  ##", text)  # milliseconds, which have two digits or three
    check_snapshot(name, text)


def test_every_command_is_in_a_panel_and_every_alias_leads_to_one() -> None:
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)
    assert set(ALIASES.values()) <= set(COMMANDS)
    assert not set(ALIASES) & set(COMMANDS)


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"convscope {convscope.__version__}\n"
    assert re.match(r"\d+\.\d+", convscope.__version__)
