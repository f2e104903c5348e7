"""Faithfulness, conciseness and localisation: by hand, in closed form and against a reference script."""

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
from tests.oracles.synthetic_models import (
    SIDE,
    Weighted,
    grayscale_model,
    pixel_sum,
    probability,
    random_images,
    random_maps,
    small_model,
)

SHARED = Path(__file__).parents[3] / "shared" / "evalset"


def metric_values(model: convscope.Model, x: Any, heatmap: Any, metric: str, **options: Any) -> np.ndarray:
    return convscope.evaluate(model, x, heatmap, metric, **{"targets": 0, **options})[metric]


# --- correlation of attributions with score changes ---


@pytest.mark.parametrize("cells", [1000, 6, 3, 2])
def test_exact_values_for_a_sum_of_pixels(cells):
    """Removing a subset from a sum of pixels lowers it by their sum: the map of pixel values predicts this exactly."""
    x = random_images(3)
    heatmap = x[:, 0].numpy()
    assert metric_values(pixel_sum(), x, heatmap, "mu-fidelity", cells=cells) == pytest.approx(1, abs=1e-6)
    assert metric_values(pixel_sum(), x, heatmap, "mu-fidelity", cells=cells, targets=1) == pytest.approx(-1, abs=1e-6)
    assert metric_values(pixel_sum(), x, heatmap, "infidelity", cells=cells, scaled=False) == pytest.approx(
        0, abs=1e-10
    )
    assert metric_values(pixel_sum(), x, 7 * heatmap, "infidelity", cells=cells) == pytest.approx(0, abs=1e-10)
    assert (metric_values(pixel_sum(), x, 7 * heatmap, "infidelity", cells=cells, scaled=False) > 1).all()


def test_single_pixels_by_plain_loops():
    weights = torch.stack([torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)])
    model = grayscale_model(Weighted(weights))
    x, heatmap = random_images(2), random_maps(2, SIDE, SIDE)
    options = {"cells": 100, "subset": 0.25, "samples": 12, "seed": 3}
    subsets = random_subsets(torch.Size([SIDE, SIDE]), 12, 100, 0.25, torch.Generator().manual_seed(3)).numpy()
    for n in range(2):
        sums = np.array([heatmap[n][s].sum(dtype=np.float64) for s in subsets])
        drops = np.array([(weights[0] * x[n, 0]).double().numpy()[s].sum() for s in subsets])
        expected = np.corrcoef(sums, drops)[0, 1]
        assert metric_values(model, x, heatmap, "mu-fidelity", **options)[n, 0] == pytest.approx(expected, abs=1e-5)
        best_scale = (sums * drops).mean() / (sums**2).mean()
        for scaled, b in ((True, best_scale), (False, 1)):
            result = metric_values(model, x, heatmap, "infidelity", scaled=scaled, **options)[n, 0]
            assert result == pytest.approx(((b * sums - drops) ** 2).mean(), rel=1e-4)


def test_baseline_replaces_the_subset():
    x = random_images(2) + 5
    heatmap = (x - x.mean((2, 3), keepdim=True))[:, 0].numpy()
    assert metric_values(pixel_sum(), x, heatmap, "infidelity", scaled=False, baseline="mean") == pytest.approx(
        0, abs=1e-8
    )
    assert (metric_values(pixel_sum(), x, heatmap, "infidelity", scaled=False) > 1).all()


@pytest.mark.parametrize(("size", "cells"), [((12, 12), 4), ((13, 9), 4), ((10, 10), 50), ((7,), 3), ((4, 6, 5), 2)])
def test_subsets_have_the_same_number_of_cells(size, cells):
    fraction = 0.3
    subsets = random_subsets(torch.Size(size), 40, cells, fraction, torch.Generator().manual_seed(0))
    assert subsets.shape == (40, *size)
    corners = [np.unique([i * min(cells, side) // side for i in range(side)], return_index=True)[1] for side in size]
    selected = subsets.numpy()[np.ix_(range(40), *corners)]
    count = selected[0].size
    assert selected.reshape(40, -1).sum(1).tolist() == [round(fraction * count)] * 40
    assert len({row.tobytes() for row in selected}) > 2


def test_correlations():
    a, b = torch.randn(4, 30), torch.randn(4, 30)
    b[1] = -a[1]
    b[2] = 3
    a[3] = torch.randint(4, (30,)).float()

    def loop_ranks(values: torch.Tensor) -> list[float]:
        """Rank with ties averaged."""
        ordered = sorted(values.tolist())
        return [float(np.mean([i for i, other in enumerate(ordered) if other == v])) for v in values.tolist()]

    for n in (0, 1, 3):
        assert average_ranks(a)[n].tolist() == loop_ranks(a[n])
        assert float(pearson(a, b)[n]) == pytest.approx(np.corrcoef(a[n], b[n])[0, 1], abs=1e-6)
        assert float(spearman(a, b)[n]) == pytest.approx(
            np.corrcoef(loop_ranks(a[n]), loop_ranks(b[n]))[0, 1], abs=1e-6
        )
    assert float(pearson(a, b)[2]) == float(spearman(a, b)[2]) == 0
    assert spearman(a, a).tolist() == spearman(b, b).tolist() == [1] * 4


# --- explanation maps ---


def test_average_drop_gain_and_increase_equal_their_definitions():
    model = small_model(16)
    x, heatmap = random_images(4, 16, channels=3) * 4, random_maps(4, 5, 16, 16)
    classes = [[0, 1, 2, 3, 4]] * 4
    names = ("average-drop", "average-gain", "average-increase")
    result = convscope.evaluate(model, x, heatmap, names, targets=classes)
    for n in range(4):
        for t in range(5):
            m = (heatmap[n, t] - heatmap[n, t].min()) / (heatmap[n, t].max() - heatmap[n, t].min())
            y, o = (probability(model, t, p.astype(np.float32)) for p in (x[n].numpy(), x[n].numpy() * m))
            expected = (max(0, y - o) / y, max(0, o - y) / (1 - y), float(o > y))
            for name, value in zip(names, expected, strict=True):
                assert result[name][n, t] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert 0 < result["average-increase"].mean() < 1


def test_constant_map_has_no_average_drop():
    result = metric_values(small_model(), random_images(2, 24, channels=3), np.full((2, 5, 5), 3.0), "average-drop")
    np.testing.assert_allclose(result, 0, atol=1e-6)


# --- conciseness ---


def test_sparseness_and_complexity_in_closed_form():
    n = SIDE * SIDE
    constant, single, signed = np.full((1, SIDE, SIDE), 0.3), np.zeros((1, SIDE, SIDE)), np.zeros((1, SIDE, SIDE))
    single[0, 2, 2] = 5
    signed[0, 1, 1], signed[0, 4, 2] = -2, 2
    cases = {"even": (constant, 0, np.log(n)), "one": (single, 1 - 1 / n, 0), "two": (signed, 1 - 2 / n, np.log(2))}
    zero = {"nothing": (0 * constant, 0, np.log(n))}
    for heatmap, gini, entropy in {**cases, **zero}.values():
        assert metric_values(pixel_sum(), random_images(1), heatmap, "sparseness") == pytest.approx(gini, abs=1e-6)
        assert metric_values(pixel_sum(), random_images(1), heatmap, "complexity") == pytest.approx(entropy, abs=1e-6)


def test_sparseness_by_all_pairs():
    """The Gini index is half the mean absolute difference of all pairs, relative to the mean."""
    heatmap = random_maps(1, SIDE, SIDE)
    a = np.abs(heatmap.ravel().astype(np.float64))
    expected = np.abs(a[:, None] - a[None]).mean() / (2 * a.mean())
    assert metric_values(pixel_sum(), random_images(1), heatmap, "sparseness") == pytest.approx(expected, abs=1e-6)


# --- localisation ---


def localisation_score(heatmap: np.ndarray, mask: Any, metric: str, **options: Any) -> float:
    x = torch.zeros(1, 1, *heatmap.shape)
    model = pixel_sum(heatmap.shape[0])
    return float(metric_values(model, x, heatmap[None], metric, masks=[mask], **options)[0, 0])


def test_localisation_by_hand():
    heatmap = np.zeros((6, 6), np.float32)
    heatmap[1, 1], heatmap[1, 2], heatmap[4, 4], heatmap[5, 5] = 4, 3, 1, -9
    mask = np.zeros((6, 6), bool)
    mask[1, 1:3] = mask[2, 1:3] = True
    assert localisation_score(heatmap, mask, "pointing") == 1
    assert localisation_score(heatmap, ~mask, "pointing") == 0
    assert localisation_score(heatmap, mask, "energy") == pytest.approx(7 / 8)
    # The four highest values: two in the mask, (4, 4), and one of 32 pixels at 0, of which two are in the mask.
    both = 2 + 2 / 32
    assert localisation_score(heatmap, mask, "iou") == pytest.approx(both / (8 - both))
    assert localisation_score(mask.astype(np.float32), mask, "iou") == 1
    assert localisation_score(-heatmap.clip(0), mask, "energy") == 0
    assert [localisation_score(heatmap, mask | ~mask, name) for name in ("pointing", "energy", "iou")] == [1, 1, 1]


def test_tied_maxima_count_in_proportion():
    heatmap = np.zeros((6, 6), np.float32)
    heatmap[0, :4] = 2
    mask = np.zeros((6, 6), bool)
    mask[0, 3] = mask[3, 3] = True
    assert localisation_score(heatmap, mask, "pointing") == 0.25
    assert localisation_score(0 * heatmap + 1, mask, "pointing") == pytest.approx(2 / 36)


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 40])
def test_masks_are_dilated_by_a_disc(radius):
    masks = torch.rand((2, 23, 17), generator=torch.Generator().manual_seed(0)) > 0.98
    positions = np.argwhere(np.ones((23, 17), bool))
    for mask, result in zip(masks.numpy(), dilate(masks, radius).numpy(), strict=True):
        nearest = ((positions[:, None] - np.argwhere(mask)[None]) ** 2).sum(2).min(1)
        np.testing.assert_array_equal(result.ravel(), nearest <= radius**2)


def test_pointing_tolerance_in_pixels():
    heatmap = np.zeros((9, 9), np.float32)
    heatmap[4, 4] = 1
    mask = np.zeros((9, 9), bool)
    mask[4, 7] = True
    assert [localisation_score(heatmap, mask, "pointing", tolerance=t) for t in range(5)] == [0, 0, 0, 1, 1]


def test_masks_of_different_sizes_and_per_target():
    photos = [np.zeros((30, 40, 3), np.uint8), np.zeros((50, 20, 3), np.uint8)]
    model = small_model()
    heatmap = np.zeros((2, 2, 24, 24), np.float32)
    heatmap[:, 0, :12], heatmap[:, 1, :, :12] = 1, 1
    masks = [np.zeros((2, 30, 40), bool), np.zeros((2, 50, 20), bool)]
    for mask in masks:
        mask[0, : mask.shape[1] // 2], mask[1, :, mask.shape[2] // 2 :] = True, True
    result = convscope.evaluate(
        model, photos, heatmap, ["pointing", "energy", "iou"], targets=[[0, 1]] * 2, masks=masks
    )
    np.testing.assert_allclose(result["pointing"], [[1, 0]] * 2)
    np.testing.assert_allclose(result["energy"], [[1, 0]] * 2, atol=0.06)
    np.testing.assert_allclose(result["iou"], [[1, 0]] * 2, atol=0.06)
    np.testing.assert_allclose(result.chance_level["energy"], 0.5)
    np.testing.assert_allclose(result.chance_level["iou"], 1 / 3)
    for equivalent in ([m[0] for m in masks], [Image.fromarray(m[0]) for m in masks], [m[0] * 255 for m in masks]):
        same = convscope.evaluate(model, photos, heatmap, "energy", targets=[[0, 1]] * 2, masks=equivalent)
        np.testing.assert_array_equal(same["energy"][:, 0], result["energy"][:, 0])


@pytest.mark.skipif(not (SHARED / "score.py").exists(), reason="the evaluation set is not available")
def test_localisation_equals_the_reference_script():
    spec = importlib.util.spec_from_file_location("score", SHARED / "score.py")
    score = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(score)
    names = [f"{n:03d}" for n in range(5)]
    photos = [str(SHARED / f"{name}.jpg") for name in names]
    masks = [score.mask(str(SHARED / f"{name}_mask.png")) for name in names]
    heatmap = convscope.heatmaps(small_model(), photos, 1, layer="conv2")
    rectified = heatmap.values.clip(0) if (heatmap.values > 0).any((1, 2, 3)).all() else heatmap.values
    for values in (heatmap.values, rectified, np.sign(heatmap.values)):
        model = heatmap.model
        result = convscope.evaluate(model, photos, values, ["pointing", "energy", "iou"], targets=1, masks=masks)
        tolerant = convscope.evaluate(model, photos, values, "pointing", targets=1, masks=masks, tolerance=15)
        for n, mask in enumerate(masks):
            upsampled = heatmap.geometry[n].to_original(torch.from_numpy(values[n]))[0].numpy()
            assert result["pointing"][n, 0] == pytest.approx(score.pointing(upsampled, mask), abs=1e-6)
            assert result["energy"][n, 0] == pytest.approx(score.energy(upsampled.astype(np.float64), mask), abs=1e-5)
            assert result["iou"][n, 0] == pytest.approx(score.iou_area(upsampled, mask), abs=1e-6)
            assert tolerant["pointing"][n, 0] == pytest.approx(
                score.pointing(upsampled, score.grow(mask, 15)), abs=1e-6
            )
