"""Figures that display themselves in Jupyter and under ``pyplot.show()``."""

from __future__ import annotations

import base64
import io
import sys
import threading
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from convscope.figures import encode

INLINE_BACKENDS = ("module://matplotlib_inline.backend_inline", "inline")
FILE_BACKENDS = ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template")
WIDGET_BACKENDS = ("nbagg", "notebook", "ipympl", "widget", "module://ipympl.backend_nbagg")


class TwoPassLayout(ConstrainedLayoutEngine):
    """The constrained layout, executed twice.

    The first pass places titles and labels around images before their aspect ratio has changed their size; the second
    one finds the sizes that it expects.
    """

    def execute(self, fig: Figure) -> None:
        """Arrange the panels of a figure."""
        super().execute(fig)
        super().execute(fig)


class DisplayFigure(Figure):
    """A figure with a canvas, which Jupyter displays as an image, also where pyplot is not imported."""

    def __init__(self, *args: Any, padding: float = 0.04, **kwargs: Any) -> None:
        super().__init__(*args, layout=TwoPassLayout(h_pad=padding, w_pad=padding), **kwargs)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        """Return the figure as a PNG image, for programs other than Jupyter."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue()

    def _ipython_display_(self) -> None:
        """Display the figure as an image in Jupyter; close it in pyplot, which would display it again."""
        from IPython.display import display

        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None and _backend() in INLINE_BACKENDS:
            pyplot.close(self)
        kind, content = encode(self)
        data = {f"image/{kind}": base64.b64encode(content).decode(), "text/plain": repr(self)}
        display(data, raw=True)  # type: ignore[no-untyped-call]


def attach_to_pyplot(figure: Figure) -> None:
    """Let ``pyplot.show()`` show a figure, if pyplot has been imported and its backend shows and closes figures.

    Nothing is attached where figures are only written to files, since nothing would close them, nor under notebook
    widgets, which show a figure at once.
    """
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or threading.current_thread() is not threading.main_thread():
        return
    if _backend() not in (*FILE_BACKENDS, *WIDGET_BACKENDS):
        pyplot.figure(FigureClass=lambda *_args, **_kwargs: figure)


def _backend() -> str:
    return str(matplotlib.get_backend()).lower()
