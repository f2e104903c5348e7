"""Copies of models: weights are shared, hooks are not."""

from __future__ import annotations

import threading

import pytest
import torch

import convscope
from convscope.engine import capture
from convscope.explorer.service import compute
from convscope.explorer.service.compute import HeatmapOptions
from convscope.explorer.service.model_copy import copy_model
from convscope.explorer.service.state import Explorer
from tests.oracles.explorer import smooth_image
from tests.oracles.nets import SmallConvNet, randomized


@pytest.fixture(scope="module")
def x(tiny):
    return compute.preprocess(tiny, smooth_image())


def test_copy_shares_weights_and_freezes_them(tiny, x):
    copied = copy_model(tiny)
    assert copied.module is not tiny.module
    for weight, shared in zip(tiny.module.parameters(), copied.module.parameters(), strict=True):
        assert weight.data_ptr() == shared.data_ptr()
        assert not shared.requires_grad
    assert convscope.predict(copied, x).logits == pytest.approx(convscope.predict(tiny, x).logits)


def test_copy_follows_changes_in_place_and_leaves_the_original_trainable(x):
    net = randomized(SmallConvNet())
    model = convscope.load(net, preprocessing={"size": 32})
    copied = copy_model(model)
    with torch.no_grad():
        net.fc.bias += 1
    assert all(weight.requires_grad for weight in net.parameters())
    assert convscope.predict(copied, x).logits == pytest.approx(convscope.predict(model, x).logits)


def test_background_model_has_no_hooks_of_a_running_computation(tiny, x):
    net = Explorer({"tiny": tiny}).first
    counts: list[tuple[int, int]] = []

    def count_hooks(*_: object) -> None:
        modules = net.background_model.module.modules()
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
        counts.append((len(net.model.module.relu2._forward_hooks), hooks))

    with capture.capture_layers(net.model, ["relu2"], on_output=count_hooks) as run:
        run(x)
    assert counts == [(1, 0)]


def test_two_threads_do_not_disturb_each_other(tiny, x):
    copied, options = copy_model(tiny), HeatmapOptions(layer="relu2")
    expected = compute.heatmap(tiny, x, [1], options)[0]["map"]
    finished = threading.Event()

    def run_beside():
        while not finished.is_set():
            compute.relevance(copied, x, "relu1", 2)

    thread = threading.Thread(target=run_beside)
    thread.start()
    try:
        maps = [compute.heatmap(tiny, x, [1], options)[0]["map"] for _ in range(30)]
    finally:
        finished.set()
        thread.join()
    assert all(packed == expected for packed in maps)
