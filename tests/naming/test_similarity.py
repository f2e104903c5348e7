"""Soft WPMI, areas and bounds against their equations, written out with loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from convscope.naming.assignment import num_top
from convscope.naming.significance import benjamini_hochberg, p_values, rank_evidence
from convscope.naming.similarity import memberships, midranks, soft_auc, soft_wpmi, top_images


def test_soft_wpmi_is_the_papers_sum():
    probabilities = torch.rand(30, 70)  # more words than are summed at a time
    images = torch.stack([torch.randperm(30)[:10] for _ in range(4)])
    result = soft_wpmi(probabilities, images)
    membership = memberships(10).tolist()
    for unit, word in itertools.product(range(4), (0, 63, 64, 69)):
        expected = 0.0
        for rank, p in enumerate(membership):
            random = np.mean([math.log(1 + p * (float(q) - 1)) for q in probabilities[:, word]])
            expected += math.log(1 + p * (float(probabilities[images[unit, rank], word]) - 1)) - random
        assert float(result[unit, word]) == pytest.approx(expected, abs=0.05)


def test_soft_wpmi_agrees_with_the_authors_program():
    """Its similarity.py: p(x in B) falls linearly, and 1e-7 is added; only the prior p(t) is defined otherwise."""
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(400, 50, generator=generator)).softmax(1)
    images = torch.stack([torch.randperm(400, generator=generator)[:100] for _ in range(20)])
    p_in_examples = 0.998 - np.arange(100) / 100 * (0.998 - 0.97)
    of_examples = probabilities.double().numpy()[images]  # (units, images, words)
    theirs = np.log(1 + p_in_examples[:, None] * (of_examples - 1) + 1e-7).sum(1)
    ours = soft_wpmi(probabilities, images, weight=0).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=5e-4)
    assert (ours.argmax(1) == theirs.argmax(1)).all()
    prior = np.log(np.exp(theirs).mean(0))  # over the units of the layer
    with_prior = soft_wpmi(probabilities, images).numpy()
    assert np.corrcoef((theirs - prior).ravel(), with_prior.ravel())[0, 1] > 0.85


def test_soft_wpmi_of_all_images_is_chance():
    probabilities = torch.rand(8, 5)
    everywhere = torch.stack([torch.arange(8).roll(n) for n in range(8)])  # every image once at each rank
    assert soft_wpmi(probabilities, everywhere).sum(0).abs().max() < 1e-4


def test_soft_wpmi_skips_empty_slots():
    probabilities = torch.rand(12, 3)
    full = torch.tensor([[3, 12, 12, 12, 5, 12, 12, 12]])
    expected = sum(
        torch.log(1 + p * (probabilities[i] - 1)) - torch.log(1 + p * (probabilities - 1)).mean(0)
        for i, p in zip((3, 5), memberships(8)[[0, 4]].tolist(), strict=True)
    )
    torch.testing.assert_close(soft_wpmi(probabilities, full)[0], expected, rtol=0, atol=0.02)


def test_top_images_leave_out_a_shared_minimum():
    activations = torch.tensor([[0.0, 2.0, 0.0, 5.0], [1.0, 2.0, 3.0, 2.0], [7.0, 7.0, 7.0, 7.0]])
    assert top_images(activations, 3).tolist() == [[3, 1, 4], [2, 1, 3], [4, 4, 4]]


def test_ranks_of_negative_values_and_both_zeros():
    activations = torch.tensor([[-1.5, 0.0, 3.0, -0.0, -7.0, 3.0]])
    assert midranks(activations).tolist() == [[2, 3.5, 5.5, 3.5, 1, 5.5]]
    assert top_images(activations, 4).tolist() == [[2, 5, 1, 3]]


def test_soft_auc_is_the_mean_over_pairs_of_images():
    activations = torch.tensor(np.random.default_rng(0).integers(0, 4, (3, 20)).astype(np.float32))
    p = torch.rand(3, 20, dtype=torch.float64)
    result = soft_auc(midranks(activations), p)
    for unit in range(3):
        above = total = 0.0
        for i, j in itertools.product(range(20), repeat=2):
            weight = float(p[unit, i] * (1 - p[unit, j]))
            higher = float(activations[unit, i] > activations[unit, j])
            above += weight * (higher + 0.5 * float(activations[unit, i] == activations[unit, j]))
            total += weight
        assert float(result[unit]) == pytest.approx(above / total, rel=1e-9)


def test_soft_auc_of_labels_is_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    activations, labels = np.maximum(rng.normal(size=200), 0).astype(np.float32), rng.random(200) < 0.2
    expected = metrics.roc_auc_score(labels, activations)
    ranks = midranks(torch.tensor(activations)[None])
    assert float(soft_auc(ranks, torch.tensor(labels)[None])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("positive", [1, 2, 3])
def test_evidence_bounds_the_exact_probability(positive):
    """All positions of few images among 12: how often is their sum of ranks as high?"""
    subsets = np.array(list(itertools.combinations(range(1, 13), positive)))
    sums = subsets.sum(1)
    labels = torch.zeros(1, 12)
    labels[0, :positive] = 1
    for subset in subsets[:: max(1, len(subsets) // 20)]:
        rest = [rank for rank in range(1, 13) if rank not in subset]
        evidence = float(rank_evidence(torch.tensor([[*subset, *rest]]), labels))
        assert np.mean(sums >= subset.sum()) <= math.exp(-evidence) + 1e-12


def test_evidence_grows_with_the_images_and_is_scale_free():
    def top(count):
        p = torch.zeros(1, 400)
        p[0, -count:] = 0.3
        return p

    ranks = torch.arange(1, 401)[None]
    values = [float(rank_evidence(ranks, top(count))) for count in (1, 2, 4, 8)]
    assert values == sorted(values)
    exact = [math.log(math.comb(400, count)) for count in (1, 2, 4, 8)]
    assert all(0.7 * e < v <= e for v, e in zip(values, exact, strict=True))
    torch.testing.assert_close(rank_evidence(ranks, top(4)), rank_evidence(ranks, top(4) / 1000))
    assert float(rank_evidence(ranks.flip(1), top(4))) == 0


def test_shuffled_units_reach_a_level_no_more_often_than_it_says():
    generator = torch.Generator().manual_seed(3)
    ranks = torch.rand(4000, 60, generator=generator).argsort(1) + 1
    word = torch.rand(60, generator=generator) ** 4
    evidence = rank_evidence(ranks, word.expand(4000, -1))
    for level in (0.3, 0.1, 0.01):
        assert float((evidence >= -math.log(level)).float().mean()) <= level


def test_p_values_count_shuffled_units_and_never_exceed_the_bound():
    chance = np.linspace(0, 5, 999)
    p = p_values(np.array([0.0, 2.5, 4.999, 30.0]), chance)
    assert p[0] == 1
    assert p[1] == pytest.approx(501 / 1000, abs=2e-3)
    assert p[2] == pytest.approx(min(0.011, math.exp(-4.999)))
    assert p[3] == pytest.approx(math.exp(-30))


def test_benjamini_hochberg_by_hand():
    p = np.array([0.9, 0.01, 0.02, 0.04, 0.5])
    # 0.01 <= 0.05 / 5, 0.02 <= 2 * 0.05 / 5, 0.04 > 3 * 0.05 / 5
    assert benjamini_hochberg(p, 0.05).tolist() == [False, True, True, False, False]
    assert not benjamini_hochberg(np.array([0.9, 0.8]), 0.05).any()
    assert benjamini_hochberg(np.zeros(0), 0.05).shape == (0,)


def test_a_fiftieth_of_the_images_chooses_a_name():
    assert [num_top(count) for count in (20, 250, 2000, 5000, 50_000)] == [5, 5, 40, 100, 100]
