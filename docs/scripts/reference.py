"""Pages of the reference: every public name by topic, and every command with its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

import convscope
from convscope import objectives
from convscope.attribution.registry import METHODS
from convscope.cli.app import PANELS, app

DOCS = Path(__file__).parents[1]
DISAGREEMENTS = "## Where implementations disagree"

TOPICS: Mapping[str, tuple[str, str]] = {
    "sources": ("models", "Models"),
    "engine": ("models", "Models"),
    "engine.text_targets": ("heatmaps", "Heatmaps"),
    "images": ("models", "Models"),
    "feature_maps": ("activations", "Predictions and activations"),
    "predictions": ("activations", "Predictions and activations"),
    "attribution": ("heatmaps", "Heatmaps"),
    "evaluation": ("evaluation", "Evaluation"),
    "explanations": ("explain", "Explanations"),
    "editing": ("editing", "Edits of units"),
    "featurevis": ("patterns", "Patterns"),
    "decomposition": ("concepts", "Concepts and atlases"),
    "dictionaries": ("dictionaries", "Sparse dictionaries"),
    "saved.load_dictionary": ("dictionaries", "Sparse dictionaries"),
    "detection": ("detection", "Detection"),
    "scanning": ("scan", "Scans and stores"),
    "store": ("scan", "Scans and stores"),
    "naming": ("scan", "Scans and stores"),
    "diagnosis": ("diagnosis", "Diagnosis"),
    "explorer": ("explorer", "Explorer"),
}
"""Page and title of the names that a package, a module of it, or one line of a module defines."""

GUIDES: Mapping[str, str] = {
    "models": "models.md",
    "heatmaps": "methods.md",
    "activations": "tour.md",
    "evaluation": "faithfulness.md",
    "explain": "explain.md",
    "editing": "editing.md",
    "patterns": "patterns.md",
    "concepts": "concepts.md",
    "dictionaries": "dictionaries.md",
    "detection": "detection.md",
    "scan": "scan.md",
    "diagnosis": "diagnosis.md",
    "explorer": "explorer.md",
    "objectives": "patterns.md",
    "other": "results.md",
}
"""The guide that belongs to each page."""

OTHER = ("other", "Results, names and errors")
OBJECTIVES = ("objectives", "Objectives")
MODULES = ("objectives", "samples")
HIDDEN = (
    "show_root_heading",
    "show_root_toc_entry",
    "show_docstring_parameters",
    "show_docstring_returns",
    "show_docstring_raises",
)
"""What is left out where only formula and source of a function are shown."""


def topic(name: str) -> tuple[str, str]:
    """Return page and title of a public name."""
    if name == "objectives":
        return OBJECTIVES
    module = convscope._TARGETS[name].partition(":")[0].partition(".")[2]
    return TOPICS.get(f"{module}.{name}") or TOPICS.get(module) or TOPICS.get(module.partition(".")[0], OTHER)


def topics() -> dict[tuple[str, str], list[str]]:
    """Return the public names of each page: functions first, then classes."""
    pages: dict[tuple[str, str], list[str]] = {key: [] for key in dict.fromkeys([*TOPICS.values(), OBJECTIVES, OTHER])}
    for name in sorted(convscope.__all__, key=lambda name: (not name[0].islower(), name)):
        pages[topic(name)].append(name)
    return {key: names for key, names in pages.items() if names}


def objective_names() -> list[str]:
    """Return the public names of `convscope.objectives`: functions first, then the class."""
    return sorted(objectives.__all__, key=lambda name: (not name[0].islower(), name))


def pages() -> dict[str, str]:
    """Return the reference: addresses and Markdown."""
    out = {"reference/index.md": _index()}
    for (page, title), names in topics().items():
        out[f"reference/{page}.md"] = _page(page, title, names)
    return {**out, "reference/command-line.md": _command_line()}


def _page(page: str, title: str, names: Iterable[str]) -> str:
    entries = [entry for name in names for entry in _members(name)]
    return f"# {title}\n\n{_guide(page)}\n\n" + "\n\n".join(f"::: convscope.{entry}" for entry in entries) + "\n"


def _guide(page: str) -> str:
    """Return a sentence with a link to the guide of a page."""
    guide = GUIDES[page]
    title = (DOCS / guide).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return f"Guide with examples: [{title}](../{guide})."


def _members(name: str) -> list[str]:
    """Return what stands for a public name: the name itself, or a module's functions."""
    if name == "objectives":
        return [f"objectives.{function}" for function in objective_names()]
    return ["samples.photographs"] if name == "samples" else [name]


def _summary(value: object) -> str:
    """Return the first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())


def _index() -> str:
    lines = ["# Reference", "", "All public functions and classes, by topic. All are attributes of `convscope`.", ""]
    for (page, title), names in topics().items():
        lines += [f"## {title}", "", "| name | description |", "| --- | --- |"]
        lines += [_row(page, entry) for name in names for entry in _members(name)] + [""]
    lines += ["## Command line", "", "[Commands and their options](command-line.md).", ""]
    return "\n".join(lines)


def _row(page: str, entry: str) -> str:
    value: Any = convscope
    for part in entry.split("."):
        value = getattr(value, part)
    return f"| [`{entry}`]({page}.md#convscope.{entry}) | {_plain(_summary(value))} |"


def _command_line() -> str:
    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", "All commands and their options. `convscope COMMAND --help` prints the same."]
    for panel, names in PANELS.items():
        lines += ["", f"## {panel}"]
        for name in names:
            lines += _command(name, group.commands[name])
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> list[str]:
    context = typer.Context(command, info_name=f"convscope {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    text = inspect.cleandoc(command.help or "").replace("\\[", "[").replace("\b", "")
    lines = [
        "",
        f"### convscope {name}",
        "",
        text,
        "",
        f"    convscope {name} {usage}",
        "",
        "| option | description |",
        "| --- | --- |",
    ]
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            flags, description = (_plain(part) for part in record)
            lines.append(f"| `{flags}` | {description} |")
    return lines


def _plain(text: str) -> str:
    """Return text as it stands in the cell of a table."""
    return " ".join(text.replace("\\[", "[").split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def other_packages() -> dict[str, str]:
    """Return what other packages do with each method, from the table in ``methods.md``."""
    table = (DOCS / "methods.md").read_text(encoding="utf-8").partition(DISAGREEMENTS)[2]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines() if "|" in line]
    lines: dict[str, list[str]] = {}
    for method, package, does, paper, difference in rows:
        if method.strip("`") in METHODS:
            text = f"- {package}: {does}; difference {difference}." + f" Paper: {paper}." * bool(paper)
            lines.setdefault(method.strip("`"), []).append(text)
    return {method: "**Other packages**\n\n" + "\n".join(texts) for method, texts in lines.items()}


def add_formulas(page: str) -> str:
    """Add formula, source and other packages to the sections of a page that are named like methods."""
    others = other_packages()
    return "".join(_section(part, others) for part in re.split(r"^(?=##)", page, flags=re.MULTILINE))


def _section(part: str, others: Mapping[str, str]) -> str:
    """Add a method's formula after its heading, and what other packages do at the end of its section."""
    heading, _, text = part.partition("\n")
    name = heading.removeprefix("### ")
    if heading == name or name not in METHODS:
        return part
    method: Any = METHODS[name]
    function = method.score if name == "finer-cam" else method.function
    lines = [heading, "", f"::: {function.__module__}.{function.__qualname__}", "    options:"]
    lines += [f"      {option}: false" for option in HIDDEN]
    text = text.replace("\n**Not**", "\n\n**Not**").strip("\n")
    return "\n".join([*lines, "", text, "", others.get(name, ""), "", ""])
