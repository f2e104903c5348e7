"""Shortcuts: a watermark that a constructed network uses is found; one that it does not use, and noise, are not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from convscope.diagnosis.search import Search
from convscope.diagnosis.shortcuts import find_shortcuts
from tests.diagnosis.planted import MARK, SIZE, MarkNetwork, context_of, make_images, make_mark

COUNT = 120


@pytest.fixture(scope="module")
def planted():
    """Return labels, which images carry the mark (nearly all of the first class), and the images."""
    labels = np.arange(COUNT) % 3
    carries = (labels == 0) & (np.arange(COUNT) % 10 != 0)
    return labels, carries, make_images(labels, carries, make_mark())


@pytest.fixture(scope="module")
def search(planted) -> Search:
    labels, _, x = planted
    return find_shortcuts(context_of(MarkNetwork(make_mark(), 30.0), x, labels))


def test_a_mark_that_the_network_uses_is_found(planted, search):
    _, carries, _ = planted
    (finding,) = search.findings
    assert finding.kind == "shortcut"
    assert finding.classes == (0,)
    assert finding.evidence["feature"] == "patch"
    assert set(finding.images) == set(np.flatnonzero(carries).tolist())
    assert finding.effect > 0.8
    assert finding.interval[0] > 0.7
    assert finding.p_value < 0.01
    assert finding.evidence["has one position"]
    x0, y0, x1, y1 = (v * SIZE for v in finding.evidence["boxes"][0])
    overlap = max(0, min(x1, 1 + MARK) - max(x0, 1)) * max(0, min(y1, 1 + MARK) - max(y0, 1))
    assert overlap > 0.4 * MARK**2
    assert finding.evidence["units"][0]["unit"] == 3  # the mark's channel
    json.dumps(dict(finding.evidence))


def test_the_same_mark_without_influence_is_not_reported(planted):
    labels, _, x = planted
    search = find_shortcuts(context_of(MarkNetwork(make_mark(), 0.0), x, labels))
    assert search.num_candidates > 0
    assert search.findings == ()


def test_noise_has_no_shortcuts():
    x = torch.rand((90, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(3, 6, 5, stride=2))
    network.add_module("relu", nn.ReLU())
    network.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))
    context = context_of(network, x, np.zeros(90, np.int64))
    scores = context.observations.logits - context.observations.logits.mean(0)
    labels = np.where(np.arange(90) % 2, scores.argmax(1), np.arange(90) % 3)
    observations = replace(context.observations, labels=labels, logits=scores)
    assert find_shortcuts(replace(context, observations=observations)).findings == ()


def test_same_seed_same_findings(planted, search):
    labels, _, x = planted
    again = find_shortcuts(context_of(MarkNetwork(make_mark(), 30.0), x, labels))
    assert again == search


def test_an_exception_in_progress_cancels(planted):
    labels, _, x = planted
    context = context_of(MarkNetwork(make_mark(), 30.0), x, labels)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    hooks = len(context.model.module.relu._forward_hooks)
    with pytest.raises(KeyboardInterrupt):
        find_shortcuts(replace(context, report_progress=stop))
    assert len(context.model.module.relu._forward_hooks) == hooks
