"""A wrong call is answered with what was meant, in one line."""

from __future__ import annotations

import inspect
import pydoc

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope.arguments import ArgumentError, check_arguments
from convscope.errors import ConvscopeError

NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
X = torch.zeros(1, 3, 8, 8)
MODEL = convscope.load(NET, preprocessing={"size": 8})
IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: convscope.activations(MODEL, X, layer="0"),
            "activations() has no argument layer=; did you mean layers=?",
        ),
        (lambda: convscope.heatmaps(MODEL, X, target=1), "heatmaps() has no argument target=; did you mean targets=?"),
        (lambda: convscope.heatmaps(MODEL, X, layers="0"), "heatmaps() has no argument layers=; did you mean layer=?"),
        (lambda: convscope.predict(MODEL, X, top_k=3), "predict() has no argument top_k=; did you mean top=?"),
        (lambda: convscope.predict(MODEL, X, Fit="crop"), "predict() has no argument Fit=; did you mean fit=?"),
        (lambda: convscope.predict(MODEL, image=X), "predict() has no argument image=; did you mean images=?"),
        (lambda: convscope.patterns(MODEL, "0", unit=1), "patterns() has no argument unit=; did you mean units=?"),
        (
            lambda: convscope.patterns(MODEL, "0", [1], stepsize=1),
            "has no argument stepsize=; did you mean step_size=?",
        ),
        (
            lambda: convscope.compare(MODEL, X, method="cam"),
            "compare() has no argument method=; did you mean methods=?",
        ),
        (
            lambda: convscope.evaluate(MODEL, X, X, metric="iou"),
            "evaluate() has no argument metric=; did you mean metrics",
        ),
        (lambda: convscope.load(NET, class_names=["a"]), "load() has no argument class_names=; did you mean classes=?"),
        (
            lambda: convscope.predict(MODEL, X, xyzzy=3),
            "predict() has no argument xyzzy=; its arguments: model, images",
        ),
        (lambda: convscope.objectives.channel("0", units=1), "channel() has no argument units=; did you mean unit=?"),
        (lambda: convscope.heatmaps(X, NET), "heatmaps() got the model in the wrong place; the model comes first: "),
        (
            lambda: convscope.evaluate(MODEL, convscope.heatmaps(MODEL, X), X),
            "evaluate() got Heatmaps, a result, for images; expected images: evaluate(model, images, heatmaps, ...)",
        ),
        (
            lambda: convscope.heatmaps(MODEL, "red fox", "a.JPG"),
            "heatmaps() got the image file 'a.JPG' for targets; the order is heatmaps(model, images, targets, ...)",
        ),
        (lambda: convscope.activations(MODEL, ["0"], "a.png"), "got the image file 'a.png' for layers; the order is"),
        (lambda: convscope.predict("a.jpg", MODEL), "the model comes first: predict(model, images, ...)"),
        (lambda: convscope.patterns("0", MODEL), "the model comes first: patterns(model, layer, ...)"),
        (
            lambda: convscope.heatmaps(MODEL, X, 1, "0"),
            "takes 3 arguments without a name (model, images, targets); give",
        ),
        (lambda: convscope.predict(MODEL), "predict(): missing a required argument: 'images'"),
        (lambda: convscope.predict(MODEL, X, model=MODEL), "predict(): multiple values for argument 'model'"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ConvscopeError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convscope.load("a.png"), "a.png is an image file; expected a model's name or file"),
        (lambda: convscope.activations(MODEL, X, []), "layers is empty; omit it"),
        (lambda: convscope.activations(MODEL, X, "logits"), "layers has 'logits', the classes, which have no maps"),
        (lambda: convscope.evaluate(MODEL, X, convscope.predict(MODEL, X)), "heatmaps is a Predictions; expected what"),
        (lambda: convscope.evaluate(MODEL, X, None), "heatmaps is a NoneType; expected what convscope.heatmaps"),
    ],
)
def test_wrong_values(call, message):
    with pytest.raises(ConvscopeError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_options_of_methods_still_have_their_own_message():
    with pytest.raises(ConvscopeError, match="has no option 'windows'; its options: window, stride"):
        convscope.heatmaps(MODEL, X, method="occlusion", windows=3)


def test_errors_inside_the_function_are_not_touched():
    @check_arguments
    def fails(a: int, *, b: int = 2) -> None:
        raise TypeError("inside")

    with pytest.raises(TypeError, match=r"^inside$") as raised:
        fails(1)
    assert not isinstance(raised.value, ArgumentError)


def test_signature_and_help_are_those_of_the_function():
    assert list(inspect.signature(convscope.predict).parameters)[:3] == ["model", "images", "top"]
    text = pydoc.render_doc(convscope.predict)
    assert "images: 'object'" in text
    assert "A DataLoader" in text or "DataLoader" in text
    assert convscope.predict.__module__ == "convscope.predictions"


def test_every_public_function_is_checked():
    functions = [
        function
        for name in convscope.__all__
        if inspect.isfunction(function := getattr(convscope, name)) and inspect.signature(function).parameters
    ]
    assert len(functions) >= 14
    assert [function.__name__ for function in functions if not hasattr(function, "__wrapped__")] == []
