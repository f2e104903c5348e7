"""Code as a user writes it, with the types that a type checker must see; it is checked, not run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import assert_type

import numpy as np
import numpy.typing as npt
from torch import nn

import convscope
from convscope.explorer.jupyter.widget import ExplorerWidget
from convscope.explorer.notebook import ExplorerFrame


def look(images: list[str]) -> None:
    model = convscope.load("lite0")
    assert_type(model, convscope.Model)
    assert_type(model.layers.names, list[str])
    assert_type(model.layers[0].shape, tuple[int, ...])
    assert_type(model.classes, tuple[str, ...] | None)
    assert_type(model.preprocessing, convscope.Preprocessing)

    predictions = convscope.predict(model, images, top=3)
    assert_type(predictions, convscope.Predictions)
    assert_type(predictions.names, list[list[str]])

    activations = convscope.activations(model, images, ["blocks.0"])
    assert_type(activations, convscope.Activations)
    assert_type(activations["blocks.0"], np.ndarray)
    assert_type(activations.save("folder"), Path)

    names: list[str] = [*convscope.methods(), *convscope.recipes(), *convscope.metrics()]
    assert_type(names, list[str])
    assert_type(convscope.show(model), ExplorerFrame | ExplorerWidget)


def explain(model: convscope.Model, images: list[str]) -> None:
    heatmaps = convscope.heatmaps(model, images, ["tabby", "Persian cat"], method="grad-cam")
    assert_type(heatmaps, convscope.Heatmaps)
    assert_type(heatmaps.values, np.ndarray)
    scores = convscope.evaluate(model, images, heatmaps)
    assert_type(scores, convscope.Evaluation)
    assert_type(scores["deletion"], npt.NDArray[np.float32])
    assert_type(convscope.compare(model, images), convscope.Comparison)
    region = convscope.segmentation_target(3, np.ones((4, 4), bool))
    assert_type(convscope.heatmaps(model, images, [region]).targets, np.ndarray)
    assert_type(convscope.heatmaps(model, images, [convscope.output_target("out", 3)]).logits, np.ndarray)
    text = convscope.text_target("a striped cat")
    assert_type(convscope.heatmaps(model, images, text).values, np.ndarray)
    assert_type(convscope.heatmaps(model, images, [text, text]).names, list[list[str]])
    assert_type(convscope.predict(model, images, targets=[text, text]).logits, np.ndarray)
    assert_type(convscope.patterns(model, text).images, np.ndarray)


def locate(model: convscope.Model, images: list[str]) -> None:
    locations = convscope.locate(model, images, "tabby", threshold=0.4)
    assert_type(locations, convscope.Locations)
    assert_type(locations[0].boxes, np.ndarray)
    assert_type(locations.heatmaps, convscope.Heatmaps)


def detect(model: convscope.Model, image: str) -> None:
    detections = convscope.detect(model, image, threshold=0.5)
    assert_type(detections, convscope.Detections)
    assert_type(detections[0].boxes, np.ndarray)
    assert_type(detections.names, list[str])
    targets = [convscope.box_target(detections[0], 1), convscope.box_target("dog", (0, 0, 10, 20))]
    assert_type(convscope.heatmaps(model, image, targets), convscope.Heatmaps)
    assert_type(convscope.heatmaps(model, image, convscope.box_target(3, (0, 0, 10, 20))), convscope.Heatmaps)


def pass_modules(net: nn.Module, images: list[str]) -> None:
    layer = convscope.load(net).layers["features"]
    assert_type(convscope.predict(net, images), convscope.Predictions)
    assert_type(convscope.predict("lite0", images), convscope.Predictions)
    assert_type(convscope.heatmaps(net, images, layer=layer), convscope.Heatmaps)
    assert_type(convscope.heatmaps(net, images, layer=[net, layer, "features"]), convscope.Heatmaps)
    assert_type(convscope.patterns(net, layer, [3]), convscope.Patterns)


def edit(model: convscope.Model, images: list[str]) -> None:
    edited = convscope.edit(
        model, {"blocks.4": {17: 0.0, 31: "mean"}, "blocks.2": lambda maps: 2 * maps}, reference=images
    )
    assert_type(edited, convscope.Model)
    dictionary = convscope.dictionary(model, images, "blocks.4", features=512)
    assert_type(dictionary, convscope.Dictionary)
    assert_type(dictionary.encode(model, images), np.ndarray)
    assert_type(convscope.load_dictionary(dictionary.save("dictionary")).attach(model), convscope.Model)
    effects = convscope.effects(edited, images, "blocks.4", how="mean", labels=[0, 1])
    assert_type(effects, convscope.Effects)
    assert_type(effects.logits, np.ndarray)
    patched = convscope.patch(model, images[0], images[1], "blocks.4", by="both", units=[3])
    assert_type(patched, convscope.Patching)
    explanation = convscope.explain(model, images, how="mean", reference=images)
    assert_type(explanation, convscope.Explanation)
    assert_type(explanation[0].shares, np.ndarray)


def visualize(model: convscope.Model) -> None:
    objective = convscope.objectives.channel("blocks.4", 7) - 0.5 * convscope.objectives.neuron("blocks.3", 4)
    assert_type(objective, convscope.objectives.Objective)
    patterns = convscope.patterns(model, objective, steps=8)
    assert_type(patterns, convscope.Patterns)
    assert_type(patterns.images, np.ndarray)
    assert_type(convscope.story(model), convscope.Story)


def collect(model: convscope.Model, images: list[str]) -> None:
    store = convscope.scan(model, images, "store")
    assert_type(store, convscope.Store)
    assert_type(convscope.open_store("store"), convscope.Store)
    names = convscope.name_units(store, ["striped", "dotted"], np.eye(2))
    assert_type(names, convscope.UnitNames)
    assert_type(names.named, np.ndarray)
    assert_type(store.names(), convscope.UnitNames | None)
    assert isinstance(convscope.open("store"), convscope.Store)
    assert_type(convscope.concepts(model, images, "tabby"), convscope.Concepts)
    assert_type(convscope.atlas(model, images), convscope.Atlas)
    diagnosis = convscope.diagnose(model, "animals")
    assert_type(diagnosis, convscope.Diagnosis)
    assert_type(diagnosis.label_quality, np.ndarray)
    assert_type(diagnosis.findings[0].images, tuple[int, ...])
    assert_type(convscope.samples.photographs(), list[str])


def refuse() -> None:
    try:
        convscope.load("no such model")
    except convscope.ConvscopeError as error:
        assert_type(error, convscope.ConvscopeError)
    warnings.simplefilter("error", convscope.ConvscopeWarning)
