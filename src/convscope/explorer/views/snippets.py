"""The Python and shell code that reproduces what a page shows."""

from __future__ import annotations

import shlex

from convscope.dictionaries.attachment import SUFFIX
from convscope.engine.model import Model
from convscope.explorer.service.compute import HeatmapOptions
from convscope.explorer.service.patterns import NUM_DIVERSE, PatternSpec

Snippet = dict[str, str]
"""Code by language: "python" and, where the command line can do it, "shell"."""

Arguments = dict[str, str | int]


def heatmap(model: str, image: str, target: int, settings: HeatmapOptions) -> Snippet:
    """Return the code that computes a heatmap of a class, or of a detected box, and lays it over the image."""
    default = "grad-cam" if settings.box is None else "odam"
    method = None if settings.method == default else settings.method
    arguments = _not_none(layer=settings.layer, method=method, against=settings.against)
    network = _load(model, settings.layer)
    if settings.box is None:
        python = f"convscope.heatmaps({network}, {image!r}, {target}{_keywords(arguments)})"
        options = [f"--target {target}", *_options(arguments)]
    else:
        box = f"convscope.box_target(convscope.detect(model, {image!r}), {settings.box})"
        python = f"model = {network}\nconvscope.heatmaps(model, {image!r}, {box}{_keywords(arguments)})"
        options = [f"--box {settings.box}", *_options(arguments)]
    return {
        "python": f"{python}.overlay()[0]",
        "shell": f"convscope heatmap {_quote(model, image)} {' '.join([*options, *_dictionary(settings.layer)])}",
    }


def activations(model: str, image: str, layer: str) -> Snippet:
    """Return the code that computes a layer's activations on an image."""
    return {
        "python": f"convscope.activations({_load(model, layer)}, {image!r}, {layer!r})",
        "shell": " ".join(
            [f"convscope activations {_quote(model, image)} --layers {shlex.quote(layer)}", *_dictionary(layer)]
        ),
    }


def pattern(source: str, spec: PatternSpec, model: Model) -> Snippet:
    """Return the code that generates a pattern; the command line has no diverse patterns."""
    arguments = _not_none(recipe=None if spec.recipe == "robust" else spec.recipe, seed=spec.seed or None)
    network = _load(source, spec.layer)
    if spec.variant == "positive":
        python = f"convscope.patterns({network}, {spec.layer!r}, [{spec.unit}]{_keywords(arguments)})"
    else:
        channel = f"convscope.objectives.channel({spec.layer!r}, {spec.unit})"
        objective = f"-{channel}"
        if spec.variant == "diverse":
            objective = f"convscope.objectives.diversity({channel}, {spec.diversity_layer(model)!r}, {NUM_DIVERSE})"
        python = f"convscope.patterns({network}, {objective}{_keywords(arguments)})"
    if spec.variant == "diverse":
        return {"python": python}
    options = [*_options(arguments), *(["--negatives"] if spec.variant == "negative" else [])]
    layer, unit = shlex.quote(spec.layer), spec.unit
    words = [f"convscope patterns {_quote(source)} --layer {layer} --units {unit}", *options, *_dictionary(spec.layer)]
    return {"python": python, "shell": " ".join(words)}


def scan(model: str) -> Snippet:
    """Return the code that scans images into a store."""
    return {
        "python": f"convscope.scan({_load(model)}, IMAGES, 'STORE')",
        "shell": f"convscope scan {_quote(model)} IMAGES -o STORE",
    }


def concepts(model: str, store: str, target: int | None, layer: str | None = None) -> Snippet:
    """Return the code that finds the concepts of a class and saves them in a store."""
    class_argument = "CLASS" if target is None else str(target)
    arguments = _not_none(layer=layer)
    call = f"convscope.concepts({_load(model, layer)}, IMAGES, {class_argument}{_keywords(arguments)})"
    command = f"convscope concepts {_quote(model)} IMAGES --target {class_argument}"
    return {
        "python": f"concepts = {call}\n{_save(store, 'concepts')}",
        "shell": " ".join([command, *_options(arguments), "-o", _quote(store)]),
    }


def atlas(model: str, store: str, layer: str | None = None, target: int | None = None) -> Snippet:
    """Return the code that computes an atlas and saves it in a store."""
    arguments = _not_none(layer=layer, target=target)
    call = f"convscope.atlas({_load(model, layer)}, IMAGES{_keywords(arguments)})"
    return {
        "python": f"atlas = {call}\n{_save(store, 'atlas')}",
        "shell": " ".join([f"convscope atlas {_quote(model)} IMAGES", *_options(arguments), "-o", _quote(store)]),
    }


def diagnose(model: str, store: str) -> Snippet:
    """Return the code that diagnoses a network on labelled images, and saves the report in a store."""
    call = f"convscope.diagnose({_load(model)}, IMAGES, store={store!r})"
    return {
        "python": f"diagnosis = {call}\n{_save(store, 'diagnosis')}",
        "shell": f"convscope diagnose {_quote(model)} IMAGES --store {_quote(store)} -o report",
    }


def _save(store: str, name: str) -> str:
    return f"convscope.open_store({store!r}).save_result({name})"


def _load(model: str, layer: str | None = None) -> str:
    """Return the code that loads a network, with the dictionary whose features are the layer."""
    load = f"convscope.load({model!r})"
    return f"convscope.load_dictionary('DICTIONARY').attach({load})" if _is_of_features(layer) else load


def _dictionary(layer: str | None) -> list[str]:
    """Return the option that makes the layer one of the network; of a store's network, commands find it there."""
    return ["--dictionary DICTIONARY"] * _is_of_features(layer)


def _is_of_features(layer: str | None) -> bool:
    return layer is not None and layer.endswith(SUFFIX)


def _not_none(**values: str | int | None) -> Arguments:
    return {name: value for name, value in values.items() if value is not None}


def _keywords(arguments: Arguments) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


def _options(arguments: Arguments) -> list[str]:
    return [f"--{name} {shlex.quote(str(value))}" for name, value in arguments.items()]


def _quote(*words: str) -> str:
    """Quote words for a shell; a file name that starts with a hyphen gets './' so that it is no option."""
    return " ".join(shlex.quote(f"./{word}" if word.startswith("-") else word) for word in words)
