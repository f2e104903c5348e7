"""The line that a user would type for what is on the screen, in Python and in a shell."""

from __future__ import annotations

import shlex
from typing import Any

from convscope.engine.model import Model
from convscope.explorer.service.patterns import NUM_DIVERSE, PatternSpec

Lines = dict[str, str]


def heatmap(model: str, image: str, target: int, layer: str | None, method: str, against: int | None) -> Lines:
    given = _given(layer=layer, method=None if method == "grad-cam" else method, against=against)
    python = f"convscope.heatmaps({_load(model)}, {image!r}, {target}{_arguments(given)}).overlay()[0]"
    options = [f"--target {target}", *_options(given)]
    return {"python": python, "shell": f"convscope heatmap {_quoted(model, image)} {' '.join(options)}"}


def activations(model: str, image: str, layer: str) -> Lines:
    return {
        "python": f"convscope.activations({_load(model)}, {image!r}, {layer!r})",
        "shell": f"convscope activations {_quoted(model, image)} --layers {shlex.quote(layer)}",
    }


def pattern(model: str, what: PatternSpec, net: Model) -> Lines:
    layer, unit, look = what.layer, what.unit, what.variant
    given = _given(recipe=None if what.recipe == "robust" else what.recipe, seed=what.seed or None)
    python = f"convscope.patterns({_load(model)}, {layer!r}, [{unit}]{_arguments(given)})"
    if look != "positive":
        one = f"unit({layer!r}, {unit})"
        objective = f"-{one}" if look == "negative" else f"diverse({one}, {what.diversity_layer(net)!r}, {NUM_DIVERSE})"
        given_names = "unit" if look == "negative" else "diverse, unit"
        python = (
            f"from convscope.featurevis.objectives import {given_names}\n"
            f"convscope.patterns({_load(model)}, {objective}{_arguments(given)})"
        )
    lines = {"python": python}
    if look != "diverse":
        more = [*_options(given), *(["--negatives"] if look == "negative" else [])]
        shell = f"convscope patterns {shlex.quote(model)} --layer {shlex.quote(layer)} --units {unit} {' '.join(more)}"
        lines["shell"] = shell.strip()
    return lines


def scan(model: str) -> Lines:
    return {
        "python": f"convscope.scan({_load(model)}, PICTURES, 'STORE')",
        "shell": f"convscope scan {_quoted(model)} PICTURES -o STORE",
    }


def concepts(model: str, store: str, target: int | None, layer: str | None = None) -> Lines:
    asked = "CLASS" if target is None else str(target)
    given = _given(layer=layer)
    return {
        "python": f"found = convscope.concepts({_load(model)}, PICTURES, {asked}{_arguments(given)})\n{_keep(store)}",
        "shell": " ".join(
            [f"convscope concepts {_quoted(model)} PICTURES --target {asked}", *_options(given), "-o", _quoted(store)]
        ),
    }


def atlas(model: str, store: str, layer: str | None = None, target: int | None = None) -> Lines:
    given = _given(layer=layer, target=target)
    return {
        "python": f"found = convscope.atlas({_load(model)}, PICTURES{_arguments(given)})\n{_keep(store)}",
        "shell": " ".join([f"convscope atlas {_quoted(model)} PICTURES", *_options(given), "-o", _quoted(store)]),
    }


def _keep(store: str) -> str:
    return f"convscope.open_store({store!r}).keep(found)"


def _load(model: str) -> str:
    return f"convscope.load({model!r})"


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _arguments(given: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in given.items())


def _options(given: dict[str, Any]) -> list[str]:
    return [f"--{name} {shlex.quote(str(value))}" for name, value in given.items()]


def _quoted(*words: str) -> str:
    """Words of a command line; a file's name that looks like an option is no option."""
    return " ".join(shlex.quote(f"./{word}" if word.startswith("-") else word) for word in words)
