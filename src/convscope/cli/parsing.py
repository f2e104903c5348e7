"""Parse what users type: models, units, classes, masks, options."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscope.cli.output import log_detail, log_note
from convscope.errors import ConvscopeError, require_number

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from convscope.engine.model import Model
    from convscope.images.lazy import LazyImages
    from convscope.store.store import Store


PYTHON_CONSTANTS = {"True": "true", "False": "false", "None": "null"}  # of --option, as JSON


def load_model(name: str, weights: str | None, classes: str | None, preprocessing: str | None, **options: Any) -> Model:
    """Load the network that the options describe, and print its notes; further options are those of `load`."""
    import convscope

    labels = None if classes is None else read_class_names(classes)
    settings = None
    if preprocessing is not None:
        text = preprocessing if preprocessing.lstrip().startswith("{") else read_text(Path(preprocessing))
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConvscopeError(f"--preprocessing is not JSON: {error}; expected e.g. '{{\"size\": 224}}'") from error
    start = time.perf_counter()
    network = convscope.load(name, weights=weights, preprocessing=settings, classes=labels, **options)
    log_detail(f"{network.name}: {len(network.layers)} layers on {network.device}, {time.perf_counter() - start:.1f} s")
    for note in network.notes:
        log_note(note)
    missing = [] if settings is None else [name for name in ("mean", "std") if name not in settings]
    if missing:
        log_note(f"--preprocessing does not give {' and '.join(missing)}; assumed: {network.preprocessing}")
    return network


def read_class_names(text: str) -> list[str]:
    """Return names that are separated by commas, or the lines of a file."""
    if os.path.isfile(text):  # False also for a text that is too long for a path
        return read_text(Path(text)).splitlines()
    if "," in text:
        return split_commas(text)
    raise ConvscopeError(
        f"--classes {text}: there is no such file; expected a file with one class name on each line, or the names "
        "themselves, separated by commas"
    )


def read_text(path: Path) -> str:
    """Read a text file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvscopeError(f"{path} cannot be read: {error}") from error


def split_commas(text: str) -> list[str]:
    """Split at commas; white space and empty parts are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_units(text: str) -> list[int | str] | None:
    """Parse ``all`` (None), ``0-63``, ``3,7,9`` or names."""
    if text == "all":
        return None
    units: list[int | str] = []
    for part in split_commas(text):
        first, dash, last = part.partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            if int(last) < int(first):
                raise ConvscopeError(f"--units {part}: the end of the range is smaller than its start")
            units += range(int(first), int(last) + 1)
        else:
            units.append(int(part) if part.isdecimal() else part)
    return units


def parse_classes(network: Model, names: list[str] | None, num_images: int) -> list[list[int]] | None:
    """Return the classes' indices for each image, or None if no class is named."""
    return [[network.class_index(name) for name in names]] * num_images if names else None


def parse_targets(network: Model, names: list[str] | None, num_images: int) -> object:
    """Return the targets for each image, or None: classes, or texts if the network has image embeddings instead."""
    from convscope.engine.text_targets import parse_names

    return parse_names(network, names, num_images)


def parse_layers(text: str) -> str | list[str]:
    """Return one layer's name, or the list of several."""
    names = split_commas(text)
    return names if len(names) > 1 else text


def parse_grid(text: str) -> tuple[int, int]:
    """Parse the height and width of a grid, such as 14x14."""
    height, _, width = text.lower().partition("x")
    if not (height.strip().isdecimal() and width.strip().isdecimal()):
        raise ConvscopeError(f"--token-grid is {text!r}; expected height and width, such as 14x14")
    return int(height), int(width)


def parse_scales(text: str) -> list[float]:
    """Parse magnifications separated by commas."""
    try:
        return [require_number("--scale", float(part), above=0) for part in split_commas(text)]
    except ConvscopeError:
        raise
    except ValueError as error:
        raise ConvscopeError(f"--scale {text}: expected a number, or several separated by commas") from error


def parse_method_options(texts: Sequence[str] | None) -> dict[str, Any]:
    """Parse NAME=VALUE; the value is JSON where possible, text otherwise."""
    options: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise ConvscopeError(f"--option {text}: expected NAME=VALUE")
        try:
            options[name.strip().replace("-", "_")] = json.loads(PYTHON_CONSTANTS.get(value, value))
        except json.JSONDecodeError:
            options[name.strip().replace("-", "_")] = value
    return options


def open_image_arguments(arguments: Sequence[str]) -> LazyImages:
    """Open the images that arguments name: files, folders, globs, lists and data sets; none is decoded yet.

    An argument that cannot be opened becomes one image that fails when it is read.

    Raises
    ------
    ConvscopeError
        If none of the arguments can be opened.
    """
    from convscope.images.lazy import LazyImages

    parts = [_open_image_argument(argument) for argument in arguments]
    errors = [part for part in parts if isinstance(part, ConvscopeError)]
    if len(errors) == len(parts):
        reason = str(errors[0])
        raise ConvscopeError(reason if reason.startswith(arguments[0]) else f"{arguments[0]}: {reason}")
    names: list[str] = []
    readers: list[tuple[Callable[[int], object], int]] = []
    notes: list[str] = []
    for argument, part in zip(arguments, parts, strict=True):
        images = part if isinstance(part, LazyImages) else LazyImages([argument], partial(_read_argument, part))
        names += images.names
        readers += [(images.read, i) for i in range(len(images))]
        notes += images.notes
    return LazyImages(names, lambda index: readers[index][0](readers[index][1]), tuple(notes))


def _open_image_argument(argument: str) -> LazyImages | ConvscopeError | str:
    """Return several images, the error if there are none, or the path of one image."""
    from convscope.datasets.image_inputs import open_images
    from convscope.images.lazy import LazyImages

    try:
        opened = open_images(argument)
    except ConvscopeError as error:
        return error
    if isinstance(opened, LazyImages):
        return opened
    return argument if os.path.exists(argument) else ConvscopeError("No such file or directory")


def _read_argument(value: ConvscopeError | str, _index: int) -> str:
    if isinstance(value, ConvscopeError):
        raise value
    return value


def read_masks(folder: Path | None, images: Sequence[str]) -> list[npt.NDArray[np.bool_]] | None:
    """Read the mask of each image, bool (H, W), from the file with the image's name."""
    if folder is None:
        return None
    import numpy as np
    from PIL import Image

    masks = []
    for name in images:
        stem = Path(name).stem
        file = next((f for f in (folder / f"{stem}.png", folder / f"{stem}_mask.png") if f.is_file()), None)
        if file is None:
            raise ConvscopeError(f"there is no mask for {name}: neither {stem}.png nor {stem}_mask.png in {folder}")
        try:
            with Image.open(file, formats=["PNG"]) as image:
                masks.append(np.asarray(image.convert("L")) > 127)
        except OSError as error:
            raise ConvscopeError(f"mask {file} cannot be read: {error}") from error
    return masks


def require_masks(metrics: Sequence[str], masks: Path | None) -> None:
    """Refuse metrics that need masks where none are given."""
    from convscope.evaluation.registry import get_metric

    for name in metrics:
        if masks is None and "masks" in get_metric(name).needs:
            raise ConvscopeError(f"metric {name!r} needs masks=: a folder with the mask of each image's target")


def require_installed(package: str, extra: str) -> None:
    """Refuse a command whose extra is not installed, before anything is imported or loaded."""
    if find_spec(package) is None:
        raise ConvscopeError(f'{package} is not installed; pip install "convscope[{extra}]"')


def open_store_in(folder: Path) -> Store | None:
    """Open the store in an output folder, if it is one."""
    if not (folder / "plan.json").exists() and not (folder / "units.parquet").exists():
        return None
    import convscope

    return convscope.open_store(folder)


def open_store_at(address: str) -> Store:
    """Open the store at a path or address."""
    try:
        from convscope.store.store import open_store
    except ImportError as error:
        raise ConvscopeError(f"stores need {error.name}; pip install 'convscope[scan]'") from error
    return open_store(address)


def default_cache_dir() -> Path:
    """Return the user's cache folder of patterns."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "convscope" / "patterns"
