"""Normalised cross-correlation agrees with Pearson's correlation of each box with the patch."""

from __future__ import annotations

import torch

from convscope.diagnosis.templates import Correlations, box_sums


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
