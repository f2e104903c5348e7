"""Tables of names, and names in any spelling."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

import convscope
from convscope.errors import find_name


@pytest.mark.parametrize("table", [convscope.methods(), convscope.recipes(), convscope.metrics()], ids=lambda t: t.kind)
def test_tables_print_one_line_each_within_80_columns(table):
    lines = str(table).splitlines()
    assert len(lines) == len(table)
    assert [line.split()[0] for line in lines] == list(table)
    assert max(map(len, lines)) <= 80
    assert len({line.index(table[name]) for name, line in zip(table, lines, strict=True)}) == 1, "aligned"
    assert table._repr_html_().count("<tr>") == len(table) + 1


def test_options_of_methods_are_those_of_the_registry():
    from convscope.attribution.registry import METHODS
    from convscope.names import METHOD_OPTIONS

    for name, method in METHODS.items():
        parameters = inspect.signature(method.function).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "reference"}
        texts = [key if value is None else f"{key}={json.dumps(value)}" for key, value in defaults.items()]
        assert METHOD_OPTIONS.get(name, "") == ", ".join(texts), name


def test_tables_need_no_pytorch():
    script = "import sys, convscope; convscope.methods(); convscope.metrics(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_direction_in_a_metrics_line_is_that_of_the_registry():
    from convscope.evaluation.registry import METRICS

    for name, line in convscope.metrics().items():
        assert line.startswith(f"{METRICS[name].better}: ")


@pytest.mark.parametrize("given", ["Grad-CAM++", "GradCAMPlusPlus", "gradcampp", "grad_cam_pp", "grad cam plus plus"])
def test_plus_plus_in_all_spellings(given):
    assert find_name("method", given, list(convscope.methods())) == "grad-cam++"


def test_any_spelling_gives_the_same_result(lite0, photos):
    maps = convscope.heatmaps(lite0, photos[3], method="HiResCAM")
    assert maps.method == "hirescam"
    assert np.array_equal(maps.values, convscope.heatmaps(lite0, photos[3], method="hirescam").values)
    scores = convscope.evaluate(lite0, photos[3], maps, ["Sparseness", "average_drop", "sparseness"], steps=2)
    assert scores.metrics == ["sparseness", "average-drop"]
    assert np.array_equal(scores["Average Drop"], scores["average-drop"])
    patterns = convscope.patterns(lite0, "conv_stem", [0], recipe="Plain", steps=1)
    assert patterns.recipe == "plain"
