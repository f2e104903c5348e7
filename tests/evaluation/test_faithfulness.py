"""Faithfulness, conciseness and localisation: known by hand, in closed form and against other programs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convscope
from convscope.evaluation.faithfulness import random_subsets
from convscope.evaluation.localisation import dilate
from convscope.evaluation.statistics import average_ranks, pearson, spearman
from tests.oracles.judged import SIDE, Weighted, gray, pictures, probability, random_maps, summing, usual

SHARED = Path(__file__).parents[3] / "shared" / "evalset"


def judged(model: convscope.Model, x: Any, heat: Any, metric: str, **more: Any) -> np.ndarray:
    return convscope.evaluate(model, x, heat, metric, **{"targets": 0, **more})[metric]


# --- what a subset's heat foretells ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [1000, 6, 3, 2])
def test_the_exact_answer_of_a_sum_of_pixels(cells):
    """Take away a subset, and a sum of pixels loses just their sum: the map "the pixel itself" foretells it."""
    x = pictures(3)
    heat = x[:, 0].numpy()
    assert judged(summing(), x, heat, "mu-fidelity", cells=cells) == pytest.approx(1, abs=1e-6)
    assert judged(summing(), x, heat, "mu-fidelity", cells=cells, targets=1) == pytest.approx(-1, abs=1e-6)
    assert judged(summing(), x, heat, "infidelity", cells=cells, scaled=False) == pytest.approx(0, abs=1e-10)
    assert judged(summing(), x, 7 * heat, "infidelity", cells=cells) == pytest.approx(0, abs=1e-10)
    assert (judged(summing(), x, 7 * heat, "infidelity", cells=cells, scaled=False) > 1).all()


def test_single_pixels_by_plain_loops():
    weights = torch.stack([torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)])
    model = gray(Weighted(weights))
    x, heat = pictures(2), random_maps(2, SIDE, SIDE)
    more = {"cells": 100, "subset": 0.25, "samples": 12, "seed": 3}
    chosen = random_subsets(torch.Size([SIDE, SIDE]), 12, 100, 0.25, torch.Generator().manual_seed(3)).numpy()
    for n in range(2):
        sums = np.array([heat[n][s].sum(dtype=np.float64) for s in chosen])
        drops = np.array([(weights[0] * x[n, 0]).double().numpy()[s].sum() for s in chosen])
        expected = np.corrcoef(sums, drops)[0, 1]
        assert judged(model, x, heat, "mu-fidelity", **more)[n, 0] == pytest.approx(expected, abs=1e-5)
        best = (sums * drops).mean() / (sums**2).mean()
        for scaled, b in ((True, best), (False, 1)):
            found = judged(model, x, heat, "infidelity", scaled=scaled, **more)[n, 0]
            assert found == pytest.approx(((b * sums - drops) ** 2).mean(), rel=1e-4)


def test_the_baseline_takes_the_subsets_place():
    x = pictures(2) + 5
    heat = (x - x.mean((2, 3), keepdim=True))[:, 0].numpy()
    assert judged(summing(), x, heat, "infidelity", scaled=False, baseline="mean") == pytest.approx(0, abs=1e-8)
    assert (judged(summing(), x, heat, "infidelity", scaled=False) > 1).all()


@pytest.mark.parametrize(("size", "cells"), [((12, 12), 4), ((13, 9), 4), ((10, 10), 50), ((7,), 3), ((4, 6, 5), 2)])
def test_subsets_hold_exactly_as_many_cells(size, cells):
    share = 0.3
    chosen = random_subsets(torch.Size(size), 40, cells, share, torch.Generator().manual_seed(0))
    assert chosen.shape == (40, *size)
    corners = [np.unique([i * min(cells, side) // side for i in range(side)], return_index=True)[1] for side in size]
    picked = chosen.numpy()[np.ix_(range(40), *corners)]
    count = picked[0].size
    assert picked.reshape(40, -1).sum(1).tolist() == [round(share * count)] * 40
    assert len({row.tobytes() for row in picked}) > 2


def test_correlations():
    a, b = torch.randn(4, 30), torch.randn(4, 30)
    b[1] = -a[1]
    b[2] = 3
    a[3] = torch.randint(4, (30,)).float()

    def ranked(values: torch.Tensor) -> list[float]:
        """The mean of the places that equal values take in the sorted list."""
        ordered = sorted(values.tolist())
        return [float(np.mean([i for i, other in enumerate(ordered) if other == v])) for v in values.tolist()]

    for n in (0, 1, 3):
        assert average_ranks(a)[n].tolist() == ranked(a[n])
        assert float(pearson(a, b)[n]) == pytest.approx(np.corrcoef(a[n], b[n])[0, 1], abs=1e-6)
        assert float(spearman(a, b)[n]) == pytest.approx(np.corrcoef(ranked(a[n]), ranked(b[n]))[0, 1], abs=1e-6)
    assert float(pearson(a, b)[2]) == float(spearman(a, b)[2]) == 0
    assert spearman(a, a).tolist() == spearman(b, b).tolist() == [1] * 4


# --- explanation maps ------------------------------------------------------------------------------------------------


def test_average_drop_gain_and_increase_are_their_definitions():
    model = usual(16)
    x, heat = pictures(4, 16, channels=3) * 4, random_maps(4, 5, 16, 16)
    classes = [[0, 1, 2, 3, 4]] * 4
    names = ("average-drop", "average-gain", "average-increase")
    found = convscope.evaluate(model, x, heat, names, targets=classes)
    for n in range(4):
        for t in range(5):
            m = (heat[n, t] - heat[n, t].min()) / (heat[n, t].max() - heat[n, t].min())
            y, o = (probability(model, t, p.astype(np.float32)) for p in (x[n].numpy(), x[n].numpy() * m))
            expected = (max(0, y - o) / y, max(0, o - y) / (1 - y), float(o > y))
            for name, value in zip(names, expected, strict=True):
                assert found[name][n, t] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert 0 < found["average-increase"].mean() < 1


def test_a_constant_map_hides_nothing():
    found = judged(usual(), pictures(2, 24, channels=3), np.full((2, 5, 5), 3.0), "average-drop")
    np.testing.assert_allclose(found, 0, atol=1e-6)


# --- conciseness -----------------------------------------------------------------------------------------------------


def test_sparseness_and_complexity_in_closed_form():
    n = SIDE * SIDE
    even, one, signed = np.full((1, SIDE, SIDE), 0.3), np.zeros((1, SIDE, SIDE)), np.zeros((1, SIDE, SIDE))
    one[0, 2, 2] = 5
    signed[0, 1, 1], signed[0, 4, 2] = -2, 2
    cases = {"even": (even, 0, np.log(n)), "one": (one, 1 - 1 / n, 0), "two": (signed, 1 - 2 / n, np.log(2))}
    nothing = {"nothing": (0 * even, 0, np.log(n))}
    for heat, gini, entropy in {**cases, **nothing}.values():
        assert judged(summing(), pictures(1), heat, "sparseness") == pytest.approx(gini, abs=1e-6)
        assert judged(summing(), pictures(1), heat, "complexity") == pytest.approx(entropy, abs=1e-6)


def test_sparseness_by_all_pairs():
    """The Gini index is half the mean absolute difference of all pairs, relative to the mean."""
    heat = random_maps(1, SIDE, SIDE)
    a = np.abs(heat.ravel().astype(np.float64))
    expected = np.abs(a[:, None] - a[None]).mean() / (2 * a.mean())
    assert judged(summing(), pictures(1), heat, "sparseness") == pytest.approx(expected, abs=1e-6)


# --- localisation ----------------------------------------------------------------------------------------------------


def located(heat: np.ndarray, mask: Any, metric: str, **more: Any) -> float:
    x = torch.zeros(1, 1, *heat.shape)
    model = summing(heat.shape[0])
    return float(judged(model, x, heat[None], metric, masks=[mask], **more)[0, 0])


def test_localisation_by_hand():
    heat = np.zeros((6, 6), np.float32)
    heat[1, 1], heat[1, 2], heat[4, 4], heat[5, 5] = 4, 3, 1, -9
    mask = np.zeros((6, 6), bool)
    mask[1, 1:3] = mask[2, 1:3] = True
    assert located(heat, mask, "pointing") == 1
    assert located(heat, ~mask, "pointing") == 0
    assert located(heat, mask, "energy") == pytest.approx(7 / 8)
    # The four hottest: both in the mask, (4, 4), and one of 32 pixels at 0, of which two are in the mask.
    both = 2 + 2 / 32
    assert located(heat, mask, "iou") == pytest.approx(both / (8 - both))
    assert located(mask.astype(np.float32), mask, "iou") == 1
    assert located(-heat.clip(0), mask, "energy") == 0
    assert [located(heat, mask | ~mask, name) for name in ("pointing", "energy", "iou")] == [1, 1, 1]


def test_several_hottest_pixels_count_in_proportion():
    heat = np.zeros((6, 6), np.float32)
    heat[0, :4] = 2
    mask = np.zeros((6, 6), bool)
    mask[0, 3] = mask[3, 3] = True
    assert located(heat, mask, "pointing") == 0.25
    assert located(0 * heat + 1, mask, "pointing") == pytest.approx(2 / 36)


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 40])
def test_the_mask_grows_by_a_disc(radius):
    masks = torch.rand((2, 23, 17), generator=torch.Generator().manual_seed(0)) > 0.98
    places = np.argwhere(np.ones((23, 17), bool))
    for mask, found in zip(masks.numpy(), dilate(masks, radius).numpy(), strict=True):
        nearest = ((places[:, None] - np.argwhere(mask)[None]) ** 2).sum(2).min(1)
        np.testing.assert_array_equal(found.ravel(), nearest <= radius**2)


def test_the_tolerance_counts_pixels():
    heat = np.zeros((9, 9), np.float32)
    heat[4, 4] = 1
    mask = np.zeros((9, 9), bool)
    mask[4, 7] = True
    assert [located(heat, mask, "pointing", tolerance=t) for t in range(5)] == [0, 0, 0, 1, 1]


def test_masks_in_each_pictures_own_size_and_for_each_target():
    photos = [np.zeros((30, 40, 3), np.uint8), np.zeros((50, 20, 3), np.uint8)]
    model = usual()
    heat = np.zeros((2, 2, 24, 24), np.float32)
    heat[:, 0, :12], heat[:, 1, :, :12] = 1, 1
    masks = [np.zeros((2, 30, 40), bool), np.zeros((2, 50, 20), bool)]
    for mask in masks:
        mask[0, : mask.shape[1] // 2], mask[1, :, mask.shape[2] // 2 :] = True, True
    found = convscope.evaluate(model, photos, heat, ["pointing", "energy", "iou"], targets=[[0, 1]] * 2, masks=masks)
    np.testing.assert_allclose(found["pointing"], [[1, 0]] * 2)
    np.testing.assert_allclose(found["energy"], [[1, 0]] * 2, atol=0.06)
    np.testing.assert_allclose(found["iou"], [[1, 0]] * 2, atol=0.06)
    np.testing.assert_allclose(found.chance_level["energy"], 0.5)
    np.testing.assert_allclose(found.chance_level["iou"], 1 / 3)
    for alike in ([m[0] for m in masks], [Image.fromarray(m[0]) for m in masks], [m[0] * 255 for m in masks]):
        same = convscope.evaluate(model, photos, heat, "energy", targets=[[0, 1]] * 2, masks=alike)
        np.testing.assert_array_equal(same["energy"][:, 0], found["energy"][:, 0])


@pytest.mark.skipif(not (SHARED / "score.py").exists(), reason="the evaluation set is not here")
def test_localisation_is_that_of_the_evaluation_sets_own_program():
    spec = importlib.util.spec_from_file_location("score", SHARED / "score.py")
    score = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(score)
    names = [f"{n:03d}" for n in range(5)]
    photos = [str(SHARED / f"{name}.jpg") for name in names]
    masks = [score.mask(str(SHARED / f"{name}_mask.png")) for name in names]
    heat = convscope.heatmaps(usual(), photos, 1, layer="conv2")
    rectified = heat.values.clip(0) if (heat.values > 0).any((1, 2, 3)).all() else heat.values
    for values in (heat.values, rectified, np.sign(heat.values)):
        model = heat.model
        found = convscope.evaluate(model, photos, values, ["pointing", "energy", "iou"], targets=1, masks=masks)
        near = convscope.evaluate(model, photos, values, "pointing", targets=1, masks=masks, tolerance=15)
        for n, mask in enumerate(masks):
            own = heat.geometry[n].to_original(torch.from_numpy(values[n]))[0].numpy()
            assert found["pointing"][n, 0] == pytest.approx(score.pointing(own, mask), abs=1e-6)
            assert found["energy"][n, 0] == pytest.approx(score.energy(own.astype(np.float64), mask), abs=1e-5)
            assert found["iou"][n, 0] == pytest.approx(score.iou_area(own, mask), abs=1e-6)
            assert near["pointing"][n, 0] == pytest.approx(score.pointing(own, score.grow(mask, 15)), abs=1e-6)
