"""Figures of results: the option names, and the lookup of the function that draws a result.

A result knows nothing of plotting. For a result of class ``UnitRecord`` the figure is drawn by
``draw_unit_record(result, **options)`` in the module that `PLOTTING_MODULES` names, and the image files that
`Result.save` writes are made by ``render_unit_record(result)``.
"""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from PIL import Image

from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RenderedFile = Image.Image | Sequence[Image.Image] | str
"""Content of a saved file: an image (PNG), the frames of an animation (WebP), or text."""

MAX_PNG, MAX_JPEG = 200_000, 700_000  # bytes of a figure in a notebook
DISPLAY_MODULE = "convscope.plotting.display"

PLOTTING_MODULES: Mapping[str, str] = {
    "Activations": "convscope.plotting.activations",
    "Atlas": "convscope.plotting.atlas",
    "Comparison": "convscope.plotting.comparison",
    "Concepts": "convscope.plotting.concepts",
    "DeadUnits": "convscope.plotting.store",
    "Detections": "convscope.plotting.detections",
    "Diagnosis": "convscope.plotting.diagnosis",
    "Dictionary": "convscope.plotting.dictionaries",
    "Duplicates": "convscope.plotting.store",
    "Effects": "convscope.plotting.effects",
    "Evaluation": "convscope.plotting.evaluation",
    "Examples": "convscope.plotting.store",
    "Explanation": "convscope.plotting.explanation",
    "Heatmaps": "convscope.plotting.heatmaps",
    "ImageRecord": "convscope.plotting.store",
    "Matches": "convscope.plotting.store",
    "Patching": "convscope.plotting.effects",
    "Patterns": "convscope.plotting.patterns",
    "Predictions": "convscope.plotting.predictions",
    "Story": "convscope.plotting.story",
    "UnitChanges": "convscope.plotting.store",
    "UnitNames": "convscope.plotting.names",
    "UnitRecord": "convscope.plotting.store",
}
"""The module that draws each class of results; subclasses are drawn as their base class is."""


class FigureOptions(TypedDict, total=False):
    """Options of `convscope.results.HasFigure.figure`; each kind of figure takes some of them."""

    ax: Axes | None
    figsize: tuple[float, float] | None
    cmap: str | None
    signed: bool | None
    shared_scale: bool
    alpha: float | None
    image: int


def encode(figure: Figure) -> tuple[str, bytes]:
    """Return a figure as an image for a notebook, with its format: "png", or "jpeg" where a PNG image is large.

    A figure that is too large as JPEG too is reduced.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    if buffer.tell() <= MAX_PNG:
        return "png", buffer.getvalue()
    image, reduction = Image.open(buffer).convert("RGB"), 1
    while True:
        buffer = io.BytesIO()
        image.reduce(reduction).save(buffer, format="jpeg", quality=85)
        if buffer.tell() <= MAX_JPEG:
            return "jpeg", buffer.getvalue()
        reduction += 1


def draw(result: object, **options: Unpack[FigureOptions]) -> Figure:
    """Draw the figure of a result with the ``draw_*`` function of its class.

    Raises ConvscopeError for an option that the function does not take.
    """
    function = plotting_function("draw", type(result))
    known = list(inspect.signature(function).parameters)[1:]
    for name in options:
        if name not in known:
            kind = type(result).__name__
            raise ConvscopeError(f"the figure of {kind} has no option {name!r}; its options are {', '.join(known)}")
    figsize = options.get("figsize")
    if figsize is not None and not (isinstance(figsize, Sequence) and len(figsize) == 2):
        raise ConvscopeError(f"figsize is {figsize!r}; expected width and height in inches, such as (8, 6)")
    figure: Figure = function(result, **options)
    return figure


def draw_displayed(result: object, **options: Unpack[FigureOptions]) -> Figure:
    """Draw the figure of a result, and let ``pyplot.show()`` show it unless it is drawn in axes of the user's."""
    figure = draw(result, **options)
    if options.get("ax") is None:
        import_module(DISPLAY_MODULE).attach_to_pyplot(figure)
    return figure


def render(result: object, **options: object) -> Iterable[tuple[str, RenderedFile]]:
    """Yield names and contents of the files that show a result, from the ``render_*`` function of its class."""
    files: Iterable[tuple[str, RenderedFile]] = plotting_function("render", type(result))(result, **options)
    return files


def plotting_function(prefix: str, kind: type) -> Callable[..., Any]:
    """Return the plotting function of a class of results; raise TypeError if there is none for it or a base class."""
    for base in kind.__mro__:
        if base.__name__ in PLOTTING_MODULES:
            snake_case = re.sub(r"(?<!^)(?=[A-Z])", "_", base.__name__).lower()
            function: Callable[..., Any] = getattr(
                import_module(PLOTTING_MODULES[base.__name__]), f"{prefix}_{snake_case}"
            )
            return function
    raise TypeError(f"no plotting function is known for {kind.__name__}")
