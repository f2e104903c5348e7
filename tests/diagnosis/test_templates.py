"""Normalised cross-correlation agrees with Pearson's correlation of each box with the patch."""

from __future__ import annotations

import torch

from convscope.diagnosis.templates import Correlations, Template, box_sums, grow, refine


def test_box_sums_agree_with_pooling():
    x = torch.rand((2, 3, 13, 11), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.nn.functional.avg_pool2d(x, (4, 5), stride=1) * 20
    assert torch.allclose(box_sums(x, (4, 5)), expected)


def test_correlation_agrees_with_brute_force():
    generator = torch.Generator().manual_seed(1)
    images, patches = torch.rand((2, 3, 9, 10), generator=generator), torch.rand((4, 3, 5, 5), generator=generator)
    maps = Correlations(images).maps(patches)
    assert maps.shape == (2, 4, 5, 6)
    for n, m, y, x in [(0, 0, 0, 0), (1, 3, 4, 5), (1, 2, 2, 3)]:
        box, patch = images[n, :, y : y + 5, x : x + 5], patches[m]
        a, b = ((v - v.mean((1, 2), keepdim=True)).flatten().double() for v in (box, patch))
        assert abs(float(maps[n, m, y, x]) - float(a @ b / a.norm() / b.norm())) < 1e-5


def test_a_patch_grows_to_the_mark_that_it_is_part_of():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((20, 3, 40, 40), generator=generator)
    mark = torch.rand((3, 9, 9), generator=generator)
    corners = torch.randint(2, 29, (20, 2), generator=generator)
    for image, (top, left) in zip(images, corners.tolist(), strict=True):
        image[:, top : top + 9, left : left + 9] = mark
    correlations, variance = Correlations(images), images.var()
    part = refine(correlations, mark[:, 2:7, 2:7], variance)
    assert part.constancy == 1
    whole = grow(correlations, part, variance)
    assert whole.patch.shape == (3, 9, 9)
    assert torch.allclose(whole.patch, mark, atol=1e-6)
    assert correlations.best_matches(whole.patch)[1].tolist() == corners.tolist()


def test_a_patch_at_the_rim_does_not_grow_beyond_it():
    images = torch.rand((20, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    images[:, :, :6, :6] = torch.rand((3, 6, 6), generator=torch.Generator().manual_seed(1))
    whole = grow(Correlations(images), Template(images[0, :, 1:5, 1:5], 1.0), images.var())
    assert torch.allclose(whole.patch, images[0, :, :6, :6], atol=1e-6)
