"""Tests of candidates: screening counts as a test, images are loaded once, probabilities are those of `predict`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import convscope
from convscope.diagnosis.forward import scoring_forward
from convscope.diagnosis.interventions import frame_mask
from convscope.diagnosis.shortcut_candidates import ShortcutCandidate, propose
from convscope.diagnosis.shortcut_tests import SCREENED_IMAGES, InputCache, Outcome, ShortcutTests
from convscope.diagnosis.shortcuts import max_candidates
from tests.diagnosis.planted import MarkNetwork, context_of, make_images, make_mark

COUNT = 90


def run_test(weight: float) -> tuple[list[Outcome], int]:
    """Test the mark as a candidate; return the outcomes and the number of images that the network ran on."""
    labels = np.arange(COUNT) % 3
    x = make_images(labels, labels == 0, make_mark())
    context = context_of(MarkNetwork(make_mark(), weight), x, labels)
    candidates = propose(context.observations, [0], np.random.default_rng(0), lambda _: None)
    (candidate,) = (c for c in candidates if c.kind == "patch")
    count = 0

    def counted(scores: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(inputs: Tensor) -> Tensor:
            nonlocal count
            count += len(inputs)
            return scores(inputs)

        return run

    with scoring_forward(context.model, context.memory) as scores:
        outcomes = list(ShortcutTests(context, counted(scores)).outcomes(candidate))
    return outcomes, count


def test_a_candidate_without_effect_is_tested_on_few_images_and_counts():
    outcomes, count = run_test(0.0)
    (outcome,) = outcomes
    assert outcome.p_value == 1.0
    assert not outcome.is_causal
    assert count == 2 * SCREENED_IMAGES


def test_a_candidate_with_an_effect_is_tested_on_more():
    outcomes, count = run_test(30.0)
    (outcome,) = outcomes
    assert outcome.p_value < 0.01
    assert outcome.is_causal
    assert len(outcome.inserted.changes) > SCREENED_IMAGES
    assert count > 2 * SCREENED_IMAGES


def test_probabilities_are_those_of_predict():
    x = make_images(np.arange(6) % 3, np.zeros(6, bool), make_mark())
    context = context_of(MarkNetwork(make_mark(), 1.0), x, np.arange(6) % 3)
    predictions = convscope.predict(context.model, x, top=3, progress=False)
    with scoring_forward(context.model, context.memory) as scores:
        p = scores(x).numpy()
    assert np.allclose(np.take_along_axis(p, predictions.indices, 1), predictions.probabilities, atol=1e-5)


def test_inputs_are_loaded_once_while_they_are_kept():
    loaded: list[int] = []

    def load(positions):
        loaded.extend(positions)
        return torch.tensor(positions).view(-1, 1, 1, 1)

    cache = InputCache(load, 4)
    assert cache.load([3, 1, 2]).flatten().tolist() == [3, 1, 2]
    assert cache.load([2, 5]).flatten().tolist() == [2, 5]
    assert loaded == [3, 1, 2, 5]
    cache.load([7, 2])  # 3, the one that was used least recently, is dropped
    cache.load([1])
    assert loaded == [3, 1, 2, 5, 7]
    cache.load([3])
    assert loaded == [3, 1, 2, 5, 7, 3]


def test_few_images_allow_few_candidates():
    assert [max_candidates(n) for n in (10, 360, 600, 5000)] == [12, 15, 25, 40]


def test_carriers_reach_the_threshold():
    candidate = ShortcutCandidate("color", 0, np.array([0.1, 0.5, 0.9]), 0.5, 1.0)
    assert candidate.carriers.tolist() == [False, True, True]


def test_a_border_is_a_candidate_only_if_what_is_inside_does_not_separate_as_well():
    labels, rng = np.arange(COUNT) % 3, np.random.default_rng(0)
    x = make_images(labels, np.zeros(COUNT, bool), make_mark())
    context = context_of(MarkNetwork(make_mark(), 0.0), x, labels)
    kinds = []
    for width in (2, 16):  # a border, and the whole image
        thumbnails = rng.integers(100, 200, context.observations.thumbnails.shape, dtype=np.uint8)
        frame = frame_mask(thumbnails.shape[1:3], width / thumbnails.shape[1]).numpy()
        thumbnails[(labels == 0)[:, None, None] & frame] //= 2
        observations = replace(context.observations, thumbnails=thumbnails)
        candidates = propose(observations, [0], np.random.default_rng(0), lambda _: None)
        kinds.append({c.kind for c in candidates})
    assert "border" in kinds[0]
    assert "border" not in kinds[1]
    assert "background" in kinds[1]
