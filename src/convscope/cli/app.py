"""The Typer application: groups and order of the commands, aliases, and the options that every command has."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from inspect import Parameter, Signature
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from convscope.cli import output
from convscope.cli.parsing import require_installed
from convscope.errors import ConvscopeWarning

PANELS: Mapping[str, tuple[str, ...]] = {
    "Look": ("demo", "layers", "predict", "detect", "activations"),
    "Explain": (
        "explain",
        "heatmap",
        "locate",
        "evaluate",
        "compare",
        "concepts",
        "dictionary",
        "effects",
        "patch",
    ),
    "Patterns": ("patterns", "story"),
    "Data sets": ("scan", "unit", "diagnose", "atlas", "name", "search"),
    "Explorer": ("serve", "publish"),
    "Agents": ("mcp", "skill"),
}
"""The commands, in the order and under the headings of ``convscope --help``."""

ALIASES: Mapping[str, str] = {
    "activation": "activations",
    "comparison": "compare",
    "concept": "concepts",
    "detections": "detect",
    "dictionaries": "dictionary",
    "evaluation": "evaluate",
    "effect": "effects",
    "explanation": "explain",
    "explore": "serve",
    "heatmaps": "heatmap",
    "layer": "layers",
    "locations": "locate",
    "name-units": "name",
    "names": "name",
    "pattern": "patterns",
    "predictions": "predict",
    "show": "serve",
}
"""Names that are accepted for commands but not listed."""

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "layers": ("layer",),
    "token_grid": ("grid",),
    "models": ("model",),
    "target": ("targets",),
    "compiled": ("compile",),
}
"""Parameters of commands, and what Python functions call the same where that differs."""

EPILOG = """Try: convscope explain lite0 photo.jpg

Options of a command: convscope explain --help"""

_CALLBACKS: dict[str, Callable[[], Callable[..., None]]] = {}
"""For each command a function that returns what Typer calls."""

_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}


class _Argument(TyperArgument):
    """An argument whose help does not name the type that Python has for it."""

    def display_type_rich(self, ctx: Any) -> None:
        """Return no type."""


def _without_types(parameters: list[Any]) -> list[Any]:
    """Let the help show flags without a value, and arguments without a type of Python."""
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):
            parameter.__class__ = _Argument
        elif parameter.is_flag:
            parameter.metavar = ""
    return parameters


class PlainCommand(TyperCommand):
    """A command whose parameters are built when they are first needed, so that ``convscope --help`` starts fast.

    Its own help reads like a manual page: no types, no braces around arguments.
    """

    @property
    def params(self) -> list[Any]:
        """Arguments and options."""
        parameters: list[Any] = self._complete.params
        return parameters

    @params.setter
    def params(self, _params: list[Any]) -> None:
        """Ignore those of the placeholder that Typer was given."""

    @cached_property
    def _complete(self) -> Any:
        """The command with its parameters."""
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(self.name)(_CALLBACKS[str(self.name)]())
        return typer.main.get_command(single)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        return self._complete.invoke(ctx)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments and options, for parsing and for the help."""
        return _without_types(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


class CommandGroup(TyperGroup):
    """Commands in the order of `PANELS`, also found by the names in `ALIASES`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options in front of a command."""
        return _without_types(super().get_params(ctx))

    def list_commands(self, _ctx: Any) -> list[str]:
        """Return the names that the help lists."""
        return [name for name in _PANEL_OF if name in self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name or an alias."""
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        import convscope

        typer.echo(f"convscope {convscope.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Show what a network for images predicts, and why: PyTorch, Keras, Hugging Face, ONNX or any function."""


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results, failures and errors only.", rich_help_panel="Output")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print details, and tracebacks of errors.", rich_help_panel="Output"),
]


def command(extra: str | None = None, package: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that registers a command, under the panel that `PANELS` names.

    A parameter whose type is a dataclass stands for the options that are its fields. Every command also has ``--quiet``
    and ``--verbose``.

    Parameters
    ----------
    extra : str, optional
        The extra of convscope that the command needs.
    package : str
        A package of the extra; without it the command is refused at once.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name, text = function.__name__, re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
        if extra is not None:
            text += f'\n\nNeeds: pip install "convscope[{extra}]"'
        _CALLBACKS[name] = partial(_with_shared_options, function, extra, package)
        app.command(name, cls=PlainCommand, help=text.replace("[", r"\["), rich_help_panel=_PANEL_OF[name])(
            lambda: None
        )
        return function

    return register


def _with_shared_options(function: Callable[..., None], extra: str | None, package: str) -> Callable[..., None]:
    """Return the function that Typer calls, whose parameters are single options."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = [_keyword("context", typer.Context, Parameter.empty)]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += _fields_as_parameters(groups[parameter.name])
        else:
            parameters.append(_keyword(parameter.name, hints[parameter.name], parameter.default))
    parameters += [_keyword("quiet", Quiet, False), _keyword("verbose", Verbose, False)]

    def call(context: typer.Context, quiet: bool, verbose: bool, **values: Any) -> None:
        names = _argument_names(context)
        with output.settings(quiet=quiet, verbose=verbose, argument_names=names), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvscopeWarning)  # `output.finish` prints notes and failures
            if extra is not None:
                require_installed(package, extra)
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
            function(**values)

    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return call


def _argument_names(context: typer.Context) -> dict[str, str]:
    """Return what users type for each parameter of the command: its option, or the name of its argument in the help."""
    names = {
        str(parameter.name): parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.metavar)
        for parameter in context.command.params
    }
    for flag in (parameter for parameter in context.command.params if getattr(parameter, "is_flag", False)):
        names |= {
            f"{flag.name}=True": flag.opts[0],
            f"{flag.name}=False": next(iter(flag.secondary_opts), flag.opts[0]),
        }
    arguments = {argument: names[name] for name in names for argument in ARGUMENTS.get(name, ())}
    return {**arguments, **names}


def _fields_as_parameters(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_keyword(field.name, hints[field.name], field.default) for field in fields(group)]


def _keyword(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
