"""The command line: parse, call, print. Exit status 0: all done, 1: some inputs failed, 2: nothing could be done."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from convscope.budget import Progress
    from convscope.model import Model
    from convscope.results import Result

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
Out = Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where to write.")]
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


def main() -> None:
    """Entry point of the `convscope` command."""
    sys.path.append(os.getcwd())  # where a user's package.module:factory lies
    try:
        app()
    except ConvscopeError as error:
        _say(f"convscope: {error}")
        sys.exit(2)


@app.command()
def layers(
    model: ModelName,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """The table of layers: what each gives, how far it sees."""
    import dataclasses

    from convscope.model import HEADINGS

    net = _load(model, weights, classes, preprocessing, device)
    if as_json:
        return _print_json([{**dataclasses.asdict(row), "units": row.units} for row in net.layers])
    return _table(f"{net.name}: {len(net.layers)} layers", HEADINGS, net.layers.cells(), right=(3, 6))


@app.command()
def predict(
    model: ModelName,
    images: Images,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FOLDER", help="Also write here.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes.")] = 5,
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """What the network says about pictures."""
    import convscope

    net = _load(model, weights, classes, preprocessing, device)
    with _bar("predict") as progress:
        result = convscope.predict(net, images, top, fit=fit, max_pixels=max_pixels, progress=progress)
    rows = [
        (name, f"{share:.1%}", label, str(index))
        for name, shares, labels, indices in zip(
            result.pictures, result.probabilities, result.names, result.indices, strict=True
        )
        for share, label, index in zip(shares, labels, indices, strict=True)
    ]
    if as_json:
        _print_json(
            [
                {
                    "picture": name,
                    "classes": [
                        {"index": int(i), "name": label, "probability": float(p), "logit": float(logits[i])}
                        for i, label, p in zip(indices, labels, shares, strict=True)
                    ],
                }
                for name, indices, labels, shares, logits in zip(
                    result.pictures, result.indices, result.names, result.probabilities, result.logits, strict=True
                )
            ]
        )
    else:
        _table("", ("picture", "share", "class", "index"), rows, right=(1, 3))
    _finish(result, out, as_json, quiet=True)


@app.command()
def activations(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-activations"),
    layer: Annotated[str, typer.Option("--layers", help="Names, separated by commas; all: every one.")] = "all",
    scaling: Annotated[str, typer.Option(help="Of each map: standard, as the chapter does, or minmax.")] = "standard",
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """What layers make of pictures: a grid of feature maps each."""
    import convscope

    net = _load(model, weights, classes, preprocessing, device)
    wanted = None if layer == "all" else _listed(layer)
    with _bar("activations") as progress:
        result = convscope.activations(
            net, images, wanted, fit=fit, scaling=scaling, max_pixels=max_pixels, progress=progress
        )
    _finish(result, out, as_json)


@app.command()
def patterns(
    model: ModelName,
    layer: Annotated[str, typer.Option(help="A layer's name, or logits for the classes.")],
    units: Annotated[
        str | None, typer.Option(help="0-63, 3,7,9, all; for logits also names. Default: the first 16.")
    ] = None,
    out: Out = Path("convscope-patterns"),
    recipe: Annotated[str, typer.Option(help="robust, or plain: the textbook's.")] = "robust",
    size: Annotated[int | None, typer.Option(help="Pixels a side.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the ascent.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """The pictures that units of a layer want to see."""
    import convscope

    net = _load(model, weights, classes, preprocessing, device)
    chosen: Any = _first(net, layer) if units is None else _numbers(units)
    with _bar("patterns") as progress:
        result = convscope.patterns(
            net, layer, chosen, recipe=recipe, size=size, steps=steps, seed=seed, progress=progress
        )
    _finish(result, out, as_json)


@app.command()
def heatmap(
    model: ModelName,
    images: Images,
    out: Out = Path("convscope-heatmaps"),
    target: Annotated[
        list[str] | None, typer.Option(help="A class, by index or name; may be given several times. Default: the top.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Default: the last one with spatial extent.")] = None,
    method: Annotated[str, typer.Option(help="grad-cam.")] = "grad-cam",
    fit: Fit = "squash",
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Which places of pictures speak for a class."""
    import convscope

    net = _load(model, weights, classes, preprocessing, device)
    wanted = [net.class_index(t) for t in target] if target else None
    with _bar("heatmaps") as progress:
        result = convscope.heatmaps(
            net,
            images,
            None if wanted is None else [wanted] * len(images),
            layer=layer,
            method=method,
            fit=fit,
            max_pixels=max_pixels,
            progress=progress,
        )
    if not as_json:
        _say(f"layer {result.layer}")
    _finish(result, out, as_json)


@app.command()
def demo(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = "lite0",
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGES]...", help="Default: four sample photographs.")
    ] = None,
    out: Out = Path("convscope-demo"),
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
    as_json: AsJson = False,
    weights: Weights = None,
    classes: Classes = None,
    preprocessing: Prepare = None,
    device: Device = None,
) -> None:
    """Everything at once, on a page: predictions, heatmaps, activations and patterns of a network."""
    from convscope.demo import make, samples

    with _bar("load") as progress:
        net = _load(model, weights, classes, preprocessing, device)
        if progress is not None:
            progress(1, 1)
    failed = make(net, images or samples(), out, seed=seed, bar=_bar)
    _report(failed)
    if as_json:
        typer.echo((out / "manifest.json").read_text(encoding="utf-8"), nl=False)
    _say(f"Done. Open {(out / 'index.html').resolve()}")
    if failed:
        raise typer.Exit(1)


def _load(name: str, weights: str | None, classes: Path | None, preprocessing: str | None, device: str | None) -> Model:
    import convscope

    labels = None if classes is None else _read(classes).splitlines()
    settings = None
    if preprocessing is not None:
        text = preprocessing if preprocessing.lstrip().startswith("{") else _read(Path(preprocessing))
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConvscopeError(f"--preprocessing is not JSON: {error}; expected e.g. '{{\"size\": 224}}'") from error
    net = convscope.load(name, weights=weights, preprocessing=settings, classes=labels, device=device)
    for note in net.notes:
        _say(f"note: {note}")
    return net


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvscopeError(f"{path} cannot be read: {error}") from error


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int | str] | None:
    """Units as a user writes them: all, 0-63, 3,7,9, names."""
    if text == "all":
        return None
    found: list[int | str] = []
    for part in _listed(text):
        first, dash, last = part.partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            if int(last) < int(first):
                raise ConvscopeError(f"--units {part}: the range ends before it begins")
            found += range(int(first), int(last) + 1)
        else:
            found.append(int(part) if part.isdecimal() else part)
    return found


def _first(net: Model, layer: str) -> range:
    count = net.outputs if layer == "logits" else net.layers.find(layer).units
    return range(min(16, count or 16))


def _finish(result: Result, out: Path | None, as_json: bool, quiet: bool = False) -> None:
    """Write the result, say what is to be said, and end with the status that fits."""
    for note in result.notes:
        _say(f"note: {note}")
    if out is not None:
        where = result.save(out)
        if as_json and not quiet:
            typer.echo((where / "manifest.json").read_text(encoding="utf-8"), nl=False)
        else:
            _say(f"written to {where}")
    _report(result.failed)
    if result.failed:
        raise typer.Exit(1)


def _report(failed: Sequence[object]) -> None:
    for failure in failed:
        _say(f"failed: {failure}")


def _say(text: str) -> None:
    typer.echo(_printable(text), err=True)


def _printable(text: str) -> str:
    """A file's name need not be Unicode; what is printed must be."""
    return text.encode(errors="backslashreplace").decode()


def _print_json(content: Any) -> None:
    typer.echo(_printable(json.dumps(content, indent=1, ensure_ascii=False, default=list)))


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table for the eye, cells never broken; where nobody looks (a pipe), plain lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        typer.echo("\t".join(headings))
        for row in rows:
            typer.echo(_printable("\t".join(row)))
        return
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    # Where the terminal is too narrow its own line breaks keep names whole, to be read and copied.
    natural = Console(width=10_000).measure(table).maximum
    Console(width=max(console.width, natural)).print(table, soft_wrap=True)


@contextmanager
def _bar(what: str) -> Iterator[Progress | None]:
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
