"""Pages say what the outputs of a network mean: values, independent probabilities, or two classes of one output."""

from __future__ import annotations

import re
from html import unescape

import pytest
import torch
from fastapi.testclient import TestClient
from torch import nn

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from tests.oracles.explorer import smooth_image


def network(outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
    ).eval()


def model_of(task: str, classes: list[str]) -> convscope.Model:
    outputs = 1 if task == "binary" else len(classes)
    return convscope.load(network(outputs), preprocessing={"size": 32}, task=task, classes=classes)


def visible_text(page: str) -> str:
    """Return the text of the main part of a page, without scripts, options and code."""
    main = re.search("<main.*?</main>", page, re.DOTALL)
    assert main is not None
    text = re.sub("<(script|select|pre|details).*?</\\1>|<[^>]+>", " ", main[0], flags=re.DOTALL)
    return " ".join(unescape(text).split())


def pages(model: convscope.Model) -> dict[str, str]:
    """Return the text of the pages of an image, a class and the network."""
    explorer = Explorer({"net": model})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    key = explorer.images.samples[0].key
    paths = {"image": f"/m/net/image/{key}", "class": f"/m/net/class/0?image={key}", "network": "/m/net"}
    with TestClient(create_app(explorer), base_url="http://localhost") as client:
        return {name: visible_text(client.get(path).text) for name, path in paths.items()}


def test_a_regression_has_values_and_outputs() -> None:
    model = model_of("regression", ["age", "height"])
    texts = pages(model)
    values = convscope.predict(model, [smooth_image(0)]).probabilities[0]
    assert f"age {values[0]:.4g} height {values[1]:.4g}" in texts["image"]
    assert "Heatmap of age" in texts["image"]
    assert "2 outputs." in texts["network"]
    assert "Output 0 of 2, a value." in texts["class"]
    for text in texts.values():
        assert not re.search(r"%|probability|evidence|\bclass(es)?\b(?! selectivity)", text, re.IGNORECASE), text


def test_a_single_value_is_not_selected_or_contrasted() -> None:
    text = pages(model_of("regression", ["age"]))["image"]
    assert "press 1 to" not in text
    assert "Contrast with" not in text


def test_classes_of_a_multilabel_network_have_probabilities_of_their_own() -> None:
    model = model_of("multilabel", ["outdoor", "animal", "red"])
    text = pages(model)["image"]
    assert "Each class has a probability of its own; they need not add up to 100 %." in text
    for name, score in zip(model.classes or (), convscope.predict(model, [smooth_image(0)]).logits[0], strict=True):
        assert f"{name} {1 / (1 + torch.tensor(-float(score)).exp()):.1%}" in text


@pytest.mark.parametrize("classes", [["healthy", "sick"], None])
def test_one_output_of_two_classes_has_both(classes: list[str] | None) -> None:
    model = convscope.load(network(1), preprocessing={"size": 32}, task="binary", classes=classes)
    text = pages(model)["image"]
    probability = convscope.predict(model, [smooth_image(0)]).probabilities[0]
    names = convscope.predict(model, [smooth_image(0)]).names[0]
    assert sorted(names) == (classes or ["class 0", "class 1"])
    assert f"{names[0]} {probability[0]:.1%} {names[1]} {probability[1]:.1%}" in text
    assert "of its own" not in text
    assert probability.sum() == pytest.approx(1)
