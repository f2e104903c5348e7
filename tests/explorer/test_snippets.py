"""Code snippets on pages reproduce what the pages show."""

from __future__ import annotations

import shlex

import pytest

import convscope
from convscope.explorer.service.compute import HeatmapOptions
from convscope.explorer.service.patterns import VARIANTS, PatternSpec
from convscope.explorer.views import snippets

HOSTILE_FILE = "it's; rm -rf $HOME.png"


class RecordingLibrary:
    """Stands for the package; records the calls of its functions."""

    objectives = convscope.objectives

    def __init__(self):
        self.calls = []

    def load(self, name):
        return name

    def load_dictionary(self, folder):
        self.folder = folder
        return self

    def attach(self, name):
        return f"{name} with {self.folder}"

    def heatmaps(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self

    def overlay(self):
        return [0]

    patterns = heatmaps


def test_snippets_quote_hostile_names():
    code = snippets.heatmap("lite0", HOSTILE_FILE, 3, HeatmapOptions(method="layer-cam", against=7))
    assert shlex.split(code["shell"]) == [
        "convscope", "heatmap", "lite0", HOSTILE_FILE, "--target", "3", "--method", "layer-cam", "--against", "7",
    ]  # fmt: skip
    library = RecordingLibrary()
    exec(code["python"], {"convscope": library})
    assert library.calls == [(("lite0", HOSTILE_FILE, 3), {"method": "layer-cam", "against": 7})]
    assert shlex.split(snippets.activations("m", "-x.png", "a b")["shell"])[3] == "./-x.png"


def test_snippets_of_features_attach_their_dictionary(tiny):
    library, layer = RecordingLibrary(), "conv1/dictionary"
    codes = [
        snippets.pattern("lite0", PatternSpec(layer, 3), tiny),
        snippets.heatmap("lite0", "a.png", 3, HeatmapOptions(layer=layer)),
    ]
    for code in codes:
        exec(code["python"], {"convscope": library})
        assert code["shell"].endswith("--dictionary DICTIONARY")
    assert [args[0] for args, _ in library.calls] == ["lite0 with DICTIONARY"] * 2
    activations = snippets.activations("lite0", "a.png", layer)
    assert activations["python"].startswith("convscope.activations(convscope.load_dictionary('DICTIONARY').attach(")
    assert activations["shell"].endswith(f"--layers {layer} --dictionary DICTIONARY")


def test_snippets_of_all_pattern_variants_run(tiny):
    library = RecordingLibrary()
    for variant in VARIANTS:
        code = snippets.pattern("lite0", PatternSpec("conv1", 3, variant, "maco", 1), tiny)
        exec(code["python"], {"convscope": library})
    assert len(library.calls) == len(VARIANTS)


@pytest.mark.parametrize("variant", ["negative", "diverse"])
@pytest.mark.parametrize("layer", ["relu2", "logits"])
def test_snippets_of_patterns_compute_what_the_page_shows(tiny, monkeypatch, layer, variant):
    spec, patterns = PatternSpec(layer, 3, variant), convscope.patterns
    results = []

    def record_patterns(*args, **kwargs):
        results.append(patterns(*args, **kwargs, steps=2))

    monkeypatch.setattr(convscope, "load", lambda name: tiny)
    monkeypatch.setattr(convscope, "patterns", record_patterns)
    exec(snippets.pattern("tiny", spec, tiny)["python"], {"convscope": convscope})
    expected = patterns(tiny, spec.objective(tiny), steps=2)
    assert (results[0].images == expected.images).all()
