"""What all commands share: options, and how results are written and said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from convscope.engine.batching import Progress
    from convscope.engine.model import Model
    from convscope.results import Result
    from convscope.store.store import Store

app = typer.Typer(
    help="A microscope for convnets: see what a PyTorch or Keras network has learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = (
    "lite0 (bundled), torchvision:NAME, timm:NAME, keras:NAME, a .keras, .h5 or .pt2 file, package.module:factory"
)
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Images = Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Files of pictures.")]


def folder(out: Path) -> Path:
    """Before anything runs."""
    from convscope.results import local_folder

    return local_folder(out)


Out = Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where to write.", callback=folder)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Weights = Annotated[str | None, typer.Option(help="default, random, or a file of weights.")]
Classes = Annotated[Path | None, typer.Option(metavar="FILE", help="Names of the classes, one a line.")]
Prepare = Annotated[
    str | None, typer.Option("--preprocessing", metavar="JSON", help="What the network takes, as JSON or a JSON file.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps.")]
Fit = Annotated[str, typer.Option(help="squash: the whole picture; crop: the model's own evaluation crop.")]
MaxPixels = Annotated[int, typer.Option(help="Refuse pictures with more pixels.")]
MAX_PIXELS = 100_000_000


def load(name: str, weights: str | None, classes: Path | None, preprocessing: str | None, device: str | None) -> Model:
    import convscope

    labels = None if classes is None else read(classes).splitlines()
    settings = None
    if preprocessing is not None:
        text = preprocessing if preprocessing.lstrip().startswith("{") else read(Path(preprocessing))
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConvscopeError(f"--preprocessing is not JSON: {error}; expected e.g. '{{\"size\": 224}}'") from error
    net = convscope.load(name, weights=weights, preprocessing=settings, classes=labels, device=device)
    for note in net.notes:
        log(f"note: {note}")
    return net


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvscopeError(f"{path} cannot be read: {error}") from error


def split_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_units(text: str) -> list[int | str] | None:
    """Units as a user writes them: all, 0-63, 3,7,9, names."""
    if text == "all":
        return None
    found: list[int | str] = []
    for part in split_commas(text):
        first, dash, last = part.partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            if int(last) < int(first):
                raise ConvscopeError(f"--units {part}: the range ends before it begins")
            found += range(int(first), int(last) + 1)
        else:
            found.append(int(part) if part.isdecimal() else part)
    return found


def first(net: Model, layer: str) -> range:
    count = net.num_outputs if layer == "logits" else net.layers.find(layer).units
    return range(min(16, count or 16))


def store_at(out: Path, net: Model) -> Store | None:
    """The store that the folder is, if it is one. Raises ConvscopeError where it was made with other weights."""
    if not (out / "plan.json").exists() and not (out / "units.parquet").exists():
        return None
    import convscope

    store = convscope.open_store(out)
    store.check_weights(net)
    return store


def finish(result: Result, out: Path | None, as_json: bool, quiet: bool = False) -> None:
    """Write the result, say what is to be said, and end with the status that fits."""
    for note in result.notes:
        log(f"note: {note}")
    if out is not None:
        where = result.save(out)
        if as_json and not quiet:
            typer.echo((where / "manifest.json").read_text(encoding="utf-8"), nl=False)
        else:
            log(f"written to {where}")
    report(result.failed)
    if result.failed:
        raise typer.Exit(1)


def report(failed: Sequence[object]) -> None:
    for failure in failed:
        log(f"failed: {failure}")


def log(text: str) -> None:
    typer.echo(printable(text), err=True)


def printable(text: str) -> str:
    """A file's name need not be Unicode; what is printed must be."""
    return text.encode(errors="backslashreplace").decode()


def print_json(content: Any) -> None:
    typer.echo(printable(json.dumps(content, indent=1, ensure_ascii=False, default=list)))


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table for the eye, cells never broken; where nobody looks (a pipe), plain lines."""
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
    # Where the terminal is too narrow its own line breaks keep names whole, to be read and copied.
    natural = Console(width=10_000).measure(table).maximum
    Console(width=max(console.width, natural)).print(table, soft_wrap=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Progress | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:14}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
