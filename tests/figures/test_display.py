"""Figures display themselves: once in notebooks, under ``pyplot.show()``, and never when only files are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SETUP = """
import numpy as np, convscope
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
model = convscope.load(net.eval(), preprocessing={"size": 16})
result = convscope.predict(model, np.zeros((20, 20, 3), np.uint8))
"""


@pytest.mark.slow
def test_a_figure_is_displayed_once_in_a_notebook(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = {
        SETUP: 0,
        "result.figure()": 1,
        "figure = result.figure(); None": 0,
        "figure": 1,
        "import matplotlib.pyplot as plt": 0,
        "result.figure() ": 1,
        "result.figure(); plt.show()": 1,
        "result.figure(figsize=(4, 2));": 1,  # at the end of the cell, as any figure of pyplot
        "figure  # made before pyplot was imported": 1,
        "figure, axes = plt.subplots(); result.figure(ax=axes); plt.show()": 1,
        "assert not plt.get_fignums()": 0,
    }
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    counts = {cell.source: sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in notebook.cells}
    assert counts == cells


FAKE_BACKEND = """
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

shown = []

class FigureManager(FigureManagerBase):
    @classmethod
    def pyplot_show(cls, *, block=None):
        from matplotlib import pyplot
        shown.extend(pyplot.get_fignums())

class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager
"""


def run(script: str, tmp_path: Path, **environment: str) -> None:
    (tmp_path / "fake_backend.py").write_text(FAKE_BACKEND)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SETUP}\n{script}"
    variables = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 0, done.stderr


def test_pyplot_shows_figures_in_a_script_with_a_display(tmp_path: Path) -> None:
    script = """
import threading, fake_backend
from matplotlib import pyplot as plt
first = result.figure()
assert plt.get_fignums() == [1] and plt.gcf() is first
figure, axes = plt.subplots()
assert result.figure(ax=axes) is figure
result._repr_html_(), first._repr_png_()
thread = threading.Thread(target=result.figure); thread.start(); thread.join()  # windows belong to the main thread
assert plt.get_fignums() == [1, 2]
plt.show()
assert fake_backend.shown == [1, 2]
plt.close("all")
first.savefig("figure.png")
"""
    run(f"import os; os.chdir({str(tmp_path)!r})\n{script}", tmp_path, MPLBACKEND="module://fake_backend")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_no_figure_is_kept_where_only_files_are_written(tmp_path: Path) -> None:
    script = """
import gc, sys, weakref
assert "torch._dynamo" not in sys.modules  # PyTorch's compiler, whose import takes two seconds
from matplotlib import pyplot as plt
figure = weakref.ref(result.figure())
gc.collect()
assert figure() is None and not plt.get_fignums()
"""
    run(script, tmp_path, MPLBACKEND="agg")


def test_a_figure_has_a_canvas() -> None:
    namespace: dict[str, Any] = {}
    exec(SETUP, namespace)
    figure = namespace["result"].figure()
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    assert figure.canvas.buffer_rgba().shape[:2] == (height, width)
    assert figure._repr_png_().startswith(b"\x89PNG")
