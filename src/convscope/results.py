"""What all results share: data, notes, printing, saving to a folder, and figures."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import platform
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from html import escape
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy.lib.format import write_array
from PIL import Image

from convscope.engine.model import Model
from convscope.engine.model_description import ModelDescription
from convscope.errors import ConvscopeError
from convscope.figures import FigureOptions, RenderedFile, draw, draw_displayed, encode, render
from convscope.formatting import MAX_ROWS, Row, count_of, format_table
from convscope.images.animation import write_animation
from convscope.images.failures import Failure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")  # of names that `Result.save` takes as a file
TABLE_SUFFIX = ".csv"
OTHER_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".mp4", ".json", ".npy", ".npz", ".zip", ".pkl", ".txt", ".html")
PNG_LEVEL = 3  # of zlib: photographs are 4 % larger than at its default and written in less than a third of the time
COPIES_FILE = "images.zip"  # small copies of the images, in the folder of a saved result


class HasFigure:
    """Anything with a figure, which is also its display in Jupyter."""

    def figure(self, **options: Unpack[FigureOptions]) -> Figure:
        """Draw a matplotlib figure.

        In Jupyter the figure is displayed where it is the last line of a cell. If pyplot has been imported and shows
        figures, ``pyplot.show()`` shows it too.

        Parameters
        ----------
        **options
            Each kind of figure takes some of these, and refuses the others by name:

            - ``ax``: axes of your own to draw in, for figures with one panel;
            - ``figsize``: width and height in inches;
            - ``cmap``: name of a matplotlib colormap;
            - ``signed``: draw negative values too, in a diverging colormap. By default as the method of the values is
              defined;
            - ``shared_scale``: one color scale for all maps, so that they can be compared;
            - ``alpha``: opacity of the colors over an image, 0 to 1;
            - ``image``: number of the image that is drawn, from 0.

        Returns
        -------
        matplotlib.figure.Figure
            With ``ax``, the figure that contains it.

        Raises
        ------
        ConvscopeError
            For options that this figure does not take.
        """
        return draw_displayed(self, **options)

    def rows(self) -> list[dict[str, Any]]:
        """Return the result as a table, one dictionary per row, as ``pandas.DataFrame`` takes it."""
        return []

    def _title(self) -> str:
        """Say in a few words what this is."""
        return ""

    def _display_rows(self) -> Sequence[Row]:
        """Return the rows that are printed: fewer or shorter ones than `rows`, where that helps."""
        return self.rows()

    def _remarks(self) -> list[str]:
        """Return the lines that stand under every display."""
        return []

    def __repr__(self) -> str:
        return f"<convscope {_kind(self)}: {self._title()}>"

    def __str__(self) -> str:
        title = f"{_kind(self).capitalize()}: {self._title()}"
        table = format_table(self._display_rows(), max_rows=MAX_ROWS)
        return "\n".join(filter(None, [title, table, *self._remarks()]))

    def _repr_html_(self) -> str:
        """Return the figure as an image, with the remarks under it."""
        title = escape(f"{_kind(self).capitalize()}: {self._title()}")
        try:
            content = f'<img alt="{title}" style="max-width: 100%" src="{_data_url(draw(self))}">'
        except ConvscopeError as error:  # signals and volumes have no figure
            content = f"<p>{title}</p><p>no figure: {escape(str(error))}</p>"
        return f"<div>{content}{_html_list(self._remarks())}</div>"


def _data_url(figure: Figure) -> str:
    """Return a figure as an address that contains it."""
    kind, content = encode(figure)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _kind(result: object) -> str:
    """Return the name of a result's class as words, such as "dead units"."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", type(result).__name__).lower()


def _html_list(lines: Sequence[str]) -> str:
    """Return lines as an HTML list; nothing for no lines."""
    items = "".join(
        f'<li style="border-left: 3px solid #d9822b; padding-left: 8px">{escape(line)}</li>' for line in lines
    )
    return f'<ul style="list-style: none; margin: 4px 0; padding: 0">{items}</ul>' if items else ""


@dataclass(frozen=True, eq=False, repr=False)
class Result(HasFigure):
    """Base class of all results: a frozen dataclass whose data are numpy arrays.

    Attributes
    ----------
    model : Model
        The model that the result is about.
    notes : tuple of str
        What the numbers alone do not show: dead units, maps without positive values, assumptions that were made.
    failed : tuple of Failure
        The images that could not be used, with the reasons.
    """

    model: Model
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    failed: tuple[Failure, ...] = field(default=(), kw_only=True)

    def _remarks(self) -> list[str]:
        return [*(f"note: {note}" for note in self.notes), *(f"failed: {failure}" for failure in self.failed)]

    def __repr__(self) -> str:
        counts = {"note": len(self.notes), "failed input": len(self.failed)}
        remarks = [count_of(count, noun) for noun, count in counts.items() if count]
        return f"<convscope {_kind(self)}: {'; '.join([self._title(), *remarks])}>"

    def class_indices(self) -> Iterable[int]:
        """Return the classes whose names the result needs."""
        return ()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: a description in place of the network."""
        return {**self.__dict__, "model": ModelDescription.of(self.model, self.class_indices())}

    def image_copies(self) -> Sequence[bytes]:
        """Return small copies of the images, as JPEG files, which are saved along with the result."""
        return ()

    def _is_one_image(self) -> bool:
        """Return whether the first rendered file shows all of the result."""
        return False

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all data, under the names by which they are saved."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), np.ndarray)}

    def parameters(self) -> dict[str, object]:
        """Return all settings of the call that made the result, as JSON-compatible values."""
        json_types = (str, int, float, bool, tuple, list, type(None))
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "notes", "failed")}
        return {name: value for name, value in values.items() if isinstance(value, json_types)}

    def text_files(self) -> Mapping[str, str]:
        """Return the tables that are saved along with the images: file names and contents."""
        return {}

    def save(self, folder: str | os.PathLike[str], **options: object) -> Path:
        """Save images, tables, arrays and settings into a folder, or a single image into a file.

        A name that ends in .png, .jpg, .webp, .pdf or .svg is a file: a single overlay or pattern at its own size, and
        the figure of any other result; one that ends in .csv is the table of `rows`. Everything else is a folder, which
        `convscope.open` reads again.

        Writes PNG images, animated WebP images, tables, ``arrays.npz`` and, last, ``manifest.json``. Each file is
        written under a temporary name and renamed when complete; a folder without a manifest is incomplete.

        Parameters
        ----------
        folder : path
            A local folder, created if it does not exist, or a file's name.
        **options
            How images are drawn: of heatmaps `alpha`, `colormap` and the other arguments of `Heatmaps.overlay`.

        Returns
        -------
        pathlib.Path
            The folder or file.

        Raises
        ------
        ConvscopeError
            If the folder is a URL or cannot be written.
        """
        path = local_folder(folder)
        try:
            if path.suffix.lower() in (*FILE_SUFFIXES, TABLE_SUFFIX) and not path.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                return self._save_file(path, **options)
            if path.suffix.lower() in OTHER_SUFFIXES and not path.is_dir():
                raise ConvscopeError(
                    f"{path.name} has the suffix of a file that is not written here; give a folder, or a name that "
                    f"ends in {', '.join((*FILE_SUFFIXES, TABLE_SUFFIX))}"
                )
            path.mkdir(parents=True, exist_ok=True)
            (path / "manifest.json").unlink(missing_ok=True)  # of an earlier save, which the new files do not match
            names = []
            for name, content in chain(render(self, **options), self.text_files().items()):
                with atomic_write(path / name) as file:
                    _write_rendered(file, content)
                names.append(name)
            if copies := self.image_copies():
                with atomic_write(path / COPIES_FILE) as file, zipfile.ZipFile(file, "w") as archive:
                    for n, jpeg in enumerate(copies):
                        archive.writestr(zipfile.ZipInfo(f"{n:04d}.jpg"), jpeg)
                names.append(COPIES_FILE)
            with atomic_write(path / "arrays.npz") as file:
                write_npz(file, self.arrays())
            write_json(path / "manifest.json", self.manifest([*names, "arrays.npz"]))
        except OSError as error:
            raise ConvscopeError(f"cannot write into {path}: {error.strerror or error}") from error
        return path

    def _save_file(self, path: Path, **options: object) -> Path:
        """Write the table of the result, its only image, or its figure."""
        if path.suffix.lower() == TABLE_SUFFIX:
            return self._save_table(path)
        image = next(iter(render(self, **options)))[1] if self._is_one_image() else None
        suffix = path.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
        with atomic_write(path) as file:
            if isinstance(image, Image.Image) and suffix not in ("pdf", "svg"):
                image.save(file, format=suffix)
            else:
                self.figure().savefig(file, format=suffix, bbox_inches="tight", dpi=150)
        return path

    def _save_table(self, path: Path) -> Path:
        rows = self.rows()
        if not rows:
            raise ConvscopeError(f"{_kind(self)} has no table to write as {path.name}; give a folder")
        with atomic_write(path) as file:
            file.write(format_csv({key: [row[key] for row in rows] for key in rows[0]}).encode())
        return path

    def manifest(self, files: Iterable[str] = ()) -> dict[str, object]:
        """Return what ``manifest.json`` holds: model, settings, notes, failures, `files` and package versions."""
        return {
            "kind": type(self).__name__.lower(),
            "model": self.model.describe(),
            "task": self.model.task,
            "final_activation": self.model.final_activation,
            "class_names": {i: self.model.class_name(i) for i in sorted(set(self.class_indices())) if i >= 0},
            "parameters": self.parameters(),
            "notes": list(self.notes),
            "failed": [{"name": f.name, "reason": f.reason} for f in self.failed],
            "files": list(files),
            "versions": versions(),
        }


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """Return a folder to write into; raise ConvscopeError for a URL, also where a Path has collapsed its slashes."""
    if re.match(r"\w[\w+.-]+:/", os.fspath(folder)):
        url = re.sub(r":/+", "://", os.fspath(folder), count=1)  # a Path has one slash
        raise ConvscopeError(
            f"{url} is a URL; output is written to a local folder: give one, and upload it when it is "
            "complete (stores can be read from URLs)"
        )
    return Path(folder)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_names(layers: Iterable[str]) -> dict[str, str]:
    """Map layers to file names that every file system accepts and that differ by more than case."""
    distinct = list(dict.fromkeys(layers))
    return dict(zip(distinct, unique_file_names(distinct), strict=True))


def unique_file_names(texts: Iterable[str]) -> list[str]:
    """Return a file name for each text that every file system accepts; they differ by more than case."""
    names: list[str] = []
    used: set[str] = set()
    for text in texts:
        plain = name = "".join(c if c.isalnum() or c in "._-" else "-" for c in text)[:100]
        count = 1
        while name.casefold() in used:
            count += 1
            name = f"{plain}~{count}"
        used.add(name.casefold())
        names.append(name)
    return names


def format_csv(columns: Mapping[str, Iterable[object]]) -> str:
    """Return a table as the text of a CSV file; `columns` are equally long."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return table.getvalue()


def pattern_folders(layers: Iterable[str]) -> dict[str, str]:
    """Map the layers of a store to the folders of their patterns, relative to the store."""
    return {layer: f"patterns/{name}" for layer, name in file_names(layers).items()}


def pattern_file(layer: str, unit: int | str) -> str:
    """Name the PNG file of a unit's pattern, as `Patterns.save` writes it."""
    return f"{file_names([layer])[layer]}_{unit}.png"


def _write_rendered(file: IO[bytes], content: RenderedFile) -> None:
    if isinstance(content, str):
        file.write(content.encode(errors="backslashreplace"))
    elif isinstance(content, Image.Image):
        content.save(file, format="PNG", compress_level=PNG_LEVEL)
    else:
        write_animation(file, content)


def write_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as ``numpy.savez_compressed`` does, but under any name ("file", say) and never with a pickle."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write_array(member, np.asanyarray(array), allow_pickle=False)


def map_json(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a value with lists for tuples and arrays, names as keys, and `leaf` of every number, text and object."""
    if isinstance(value, Mapping):
        return {str(key): map_json(item, leaf) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_json(item, leaf) for item in value]
    return map_json(value.tolist(), leaf) if isinstance(value, np.ndarray | np.generic) else leaf(value)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
        file.write(text.encode(errors="backslashreplace"))  # file names need not be Unicode


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    numbers = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for package in ("convscope", "torchvision", "timm", "keras"):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers
