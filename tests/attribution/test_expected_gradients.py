"""Expected gradients: closed forms, completeness, and captum on the same draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from tests.attribution.helpers import heatmap_values, load_module, random_images, relative_error
from tests.oracles.nets import SmallConvNet, diff_snapshots, randomized, snapshot

SIZE = 16
TARGETS = [2, 0]
TINY = 1e-5
METHOD = "expected-gradients"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return randomized(SmallConvNet())


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(3, SIZE)


@pytest.fixture(scope="module")
def references() -> Tensor:
    return random_images(5, SIZE, seed=7)


def draws(samples: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (samples,), generator=generator), torch.rand(samples, generator=generator)


def test_is_the_mean_over_the_drawn_points(net: nn.Module, x: Tensor, references: Tensor) -> None:
    result = convscope.heatmaps(
        load_module(net, SIZE), x, [TARGETS] * 3, method=METHOD, samples=7, reference=references, seed=4
    )
    chosen, positions = draws(7, 5, seed=4)
    for n in range(3):
        for t, target in enumerate(TARGETS):
            expected = torch.zeros(SIZE, SIZE)
            for start, a in zip(references[chosen], positions, strict=True):
                point = (start + a * (x[n] - start)).requires_grad_()
                (gradient,) = torch.autograd.grad(net(point[None])[0, target], point)
                expected += ((x[n] - start) * gradient).sum(0) / 7
            assert relative_error(result.values[n, t], expected) < TINY
            with torch.no_grad():
                difference = net(x[n : n + 1])[0, target] - net(references[chosen])[:, target].mean()
            error = float(expected.sum() - difference)
            assert result.extras["completeness_error"][n, t] == pytest.approx(error, rel=1e-3, abs=1e-4)


def test_agrees_with_captum_on_the_same_draws(
    net: nn.Module, x: Tensor, references: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = 6
    actual = heatmap_values(load_module(net, SIZE), x, 2, method=METHOD, samples=samples, reference=references)
    chosen, positions = draws(samples, 5)
    # captum repeats every image `samples` times and draws for all of them at once; its coefficient weighs the image
    monkeypatch.setattr(np.random, "choice", lambda *_args, **_kwargs: chosen.repeat(3).numpy())
    monkeypatch.setattr(np.random, "uniform", lambda *_args, **_kwargs: positions.repeat(3).numpy())
    attribution = captum.attr.GradientShap(net).attribute(x, references, n_samples=samples, stdevs=0.0, target=2)
    assert relative_error(actual[:, 0], attribution.sum(1).detach()) < 1e-4


def test_is_exact_for_a_linear_network(x: Tensor, references: Tensor) -> None:
    """The gradient is the same everywhere: the map is the mean difference times the weights, and complete."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4))
    result = convscope.heatmaps(load_module(net, SIZE), x, 1, method=METHOD, samples=9, reference=references)
    weights = net[1].weight[1].detach().reshape(3, SIZE, SIZE)
    expected = ((x - references[draws(9, 5)[0]].mean(0)) * weights).sum(1)
    assert relative_error(result.values[:, 0], expected) < TINY
    assert np.abs(result.extras["completeness_error"]).max() < 1e-4


def test_is_complete_in_expectation(net: nn.Module, x: Tensor, references: Tensor) -> None:
    """The error shrinks with the number of draws."""
    model = load_module(net, SIZE)
    errors = [
        np.abs(
            convscope.heatmaps(model, x, 2, method=METHOD, samples=samples, reference=references, seed=seed).extras[
                "completeness_error"
            ]
        ).mean()
        for samples in (4, 400)
        for seed in (0,)
    ]
    with torch.no_grad():
        scale = float((net(x)[:, 2] - net(references)[:, 2].mean()).abs().mean())
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.1 * scale


def test_batches_are_independent_and_nothing_is_left_behind(net: nn.Module, x: Tensor, references: Tensor) -> None:
    model, before = load_module(net, SIZE), snapshot(net)
    options: dict[str, Any] = {"method": METHOD, "samples": 5, "reference": references}
    together = heatmap_values(model, x, [TARGETS] * 3, **options)
    alone = [[heatmap_values(model, x[n : n + 1], target, **options)[0, 0] for target in TARGETS] for n in range(3)]
    assert relative_error(together, alone) < TINY
    assert not diff_snapshots(before, snapshot(net))


def test_references_are_images_of_any_form(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    model = load_module(net, SIZE)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    by_array = heatmap_values(model, x, 2, method=METHOD, samples=4, reference=pixels)
    by_folder = heatmap_values(model, x, 2, method=METHOD, samples=4, reference=tmp_path)
    np.testing.assert_array_equal(by_array, by_folder)
    default = heatmap_values(model, x, 2, method=METHOD, samples=4)
    photographs = heatmap_values(model, x, 2, method=METHOD, samples=4, reference=convscope.samples.photographs())
    np.testing.assert_array_equal(default, photographs)


def test_wrong_options_are_refused(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    model = load_module(net, SIZE)
    with pytest.raises(ConvscopeError, match="samples is 0"):
        convscope.heatmaps(model, x, 2, method=METHOD, samples=0)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ConvscopeError, match=r"broken\.png"):
        convscope.heatmaps(
            model, x, 2, method=METHOD, reference=[*convscope.samples.photographs(), tmp_path / "broken.png"]
        )
    signals = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    one_dimensional = convscope.load(signals, preprocessing={"size": (32,), "mean": (0, 0), "std": (1, 1)})
    with pytest.raises(ConvscopeError, match="reference=, a sample of your data"):
        convscope.heatmaps(one_dimensional, torch.randn(2, 2, 32), 1, method=METHOD)
