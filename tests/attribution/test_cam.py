"""Class activation maps: each formula against the paper's own, place by place, and closed forms where there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.methods.cam import cam, eigen_cam, eigen_grad_cam, grad_cam_pp
from convscope.attribution.registry import METHODS, CamMethod
from tests.oracles.cams import FORMULAS
from tests.oracles.nets import Usual, filled

TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order
EXACT = 1e-12  # float64
SIZES: dict[int, tuple[int, ...]] = {1: (40,), 2: (12, 10), 3: (6, 7, 5)}


def apart(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def ours(method: str, activation: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    row = METHODS[method]
    assert isinstance(row, CamMethod)
    return row.function(torch.from_numpy(activation), torch.from_numpy(gradient)).numpy()


class Averaged(nn.Module):
    """Convolution, rectifier or not, average over all places, linear head; for signals, pictures and volumes."""

    def __init__(self, dims: int = 2, rectified: bool = False, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, channels, 3)
        self.act = nn.ReLU(inplace=True) if rectified else nn.Identity()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).flatten(2).mean(2))


class Flat(nn.Module):
    """Convolution, rectifier or not, and one linear layer on all of it: the gradient differs from place to place."""

    def __init__(self, rectified: bool = False, size: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.act = nn.ReLU() if rectified else nn.Identity()
        self.fc = nn.Linear(3 * (size - 2) ** 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).flatten(1))


def signal(dims: int, count: int = 3) -> Tensor:
    return torch.randn((count, 3, *SIZES[dims]), generator=torch.Generator().manual_seed(1))


def loaded(net: nn.Module, *size: int) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": size, "channels": 3})


def maps_of(net: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return net.act(net.conv(x)).double().numpy()


# --- the papers' formulas, place by place ----------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (2, 3, 7), (2, 1, 9), (1, 3, 4, 5), (3, 2, 1, 6), (2, 4, 2, 3, 2), (1, 6, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", [name for name in FORMULAS if name != "cam"])
def test_formula_place_by_place(method: str, shape: tuple[int, ...]) -> None:
    activation, gradient = drawn(*shape), drawn(*shape, seed=1)
    expected = [FORMULAS[method](a, g) for a, g in zip(activation, gradient, strict=True)]
    assert apart(ours(method, activation, gradient), expected) < 1e-10  # eigenvectors of a squared matrix


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cam_place_by_place(shape: tuple[int, ...]) -> None:
    """Only a gradient that is the same everywhere makes sense of it."""
    activation = drawn(*shape)
    gradient = np.broadcast_to(drawn(*shape[:2], *[1] * (len(shape) - 2), seed=1), shape).copy()
    expected = [FORMULAS["cam"](a, g) for a, g in zip(activation, gradient, strict=True)]
    assert apart(ours("cam", activation, gradient), expected) < EXACT


def test_every_cam_has_its_formula_here() -> None:
    mine = {name for name, row in METHODS.items() if isinstance(row, CamMethod)}
    assert mine == {*FORMULAS, "finer-cam"}
    assert METHODS["finer-cam"].function is METHODS["grad-cam"].function


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["grad-cam++", "xgrad-cam"])
def test_nothing_is_divided_by_nought(method: str) -> None:
    """Dead gradients, dead channels, channels whose sum is nought, and denominators that are nought by themselves."""
    activation, gradient = drawn(1, 6, 2, 2), drawn(1, 6, 2, 2, seed=1)
    gradient[0, 0] = 0
    activation[0, 1] = 0
    activation[0, 2] = [[1, -1], [2, -2]]
    activation[0, 3], gradient[0, 3] = -0.25, [[2, 2], [1, 2]]  # 2 G^2 - G^3 is nought where G is 2
    gradient[0, 4, 0] = 0
    gradient[0, 5] = -abs(gradient[0, 5])
    found = ours(method, activation, gradient)
    assert np.isfinite(found).all()
    assert apart(found, FORMULAS[method](activation[0], gradient[0])[None]) < EXACT


def test_small_gradients_are_not_lost_to_rounding() -> None:
    """In float32 the square of 1e-25 is nought; a is 1/2 there to all its digits."""
    activation, gradient = np.abs(drawn(2, 3, 4, 4)), drawn(2, 3, 4, 4, seed=1)
    small = grad_cam_pp(torch.from_numpy(activation).float(), torch.from_numpy(gradient * 1e-25).float())
    weights = (np.maximum(gradient, 0) / 2).sum((2, 3), keepdims=True)
    assert apart(small.double() * 1e25, (weights * activation).sum(1)) < TINY


@pytest.mark.parametrize("rectified", [False, True])
def test_alphas_by_three_derivatives_of_the_exponential(rectified: bool) -> None:
    """Grad-CAM++ without its shortcut: Y = exp(y), differentiated three times by autograd, at every single place.

    The shortcut holds where y is linear in the maps around where they are, as here.
    """
    net = filled(Flat(rectified))
    x = torch.randn((2, 3, 6, 6), generator=torch.Generator().manual_seed(1))
    found = convscope.heatmaps(loaded(net, 6, 6), x, [[0, 3]] * 2, layer="conv", method="grad-cam++")
    net = net.double()
    expected = np.zeros((2, 2, 4, 4))
    for n in range(2):
        for t, target in enumerate((0, 3)):
            maps = net.conv(x[n : n + 1].double()).detach().requires_grad_()
            value = net.fc(net.act(maps).flatten(1))[0, target].exp()
            (first,) = torch.autograd.grad(value, maps, create_graph=True)
            for k in range(3):
                weight = 0.0
                for i in np.ndindex(4, 4):
                    at = (0, k, *i)
                    second = torch.autograd.grad(first[at], maps, create_graph=True)[0][at]
                    third = torch.autograd.grad(second, maps, retain_graph=True)[0][at]
                    below = 2 * second + maps[0, k].sum() * third
                    alpha = (second / below).item() if below.item() != 0 else 0.0
                    weight += alpha * max((first[at] / value).item(), 0.0)  # exp(y), the same for the whole map, apart
                expected[n, t] += weight * maps[0, k].detach().numpy()
    assert apart(found.values, expected) < 1e-5  # poles of a, near which float32 loses digits


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", SIZES)
def test_behind_an_average_all_weights_are_the_heads(dims: int) -> None:
    """Signals, pictures and volumes: CAM is weights times maps, Grad-CAM and HiResCAM that by the number of places."""
    net = filled(Averaged(dims))
    x, model = signal(dims), loaded(net, *SIZES[dims])
    maps, weight = maps_of(net, x), net.fc.weight.detach().double().numpy()
    expected = np.einsum("tk,nk...->nt...", weight, maps)
    places = maps[0, 0].size

    def found(method: str) -> convscope.heatmaps.Heatmaps:
        return convscope.heatmaps(model, x, [[0, 1, 2, 3]] * 3, method=method)

    assert found("cam").layer == "act"
    assert apart(found("cam").values, expected) < TINY
    for method in ("grad-cam", "hirescam", "xgrad-cam"):
        assert apart(found(method).values * places, expected) < (1e-4 if method == "xgrad-cam" else TINY)
    positive = np.einsum("tk,nk...->nt...", np.maximum(weight, 0), maps)
    assert apart(found("layer-cam").values * places, positive) < TINY
    slope = weight / places
    alpha = 1 / (2 + maps.reshape(3, 1, 6, -1).sum(3) * slope)
    plus = np.einsum("ntk,nk...->nt...", alpha * np.maximum(weight, 0), maps)
    assert apart(found("grad-cam++").values, plus) < 1e-5


def test_hirescam_adds_up_to_the_score() -> None:
    """For whatever is linear behind the layer: its sum is the logit without the bias; that of others is not."""
    net = filled(Flat())
    x = torch.randn((3, 3, 6, 6), generator=torch.Generator().manual_seed(1))
    model = loaded(net, 6, 6)
    found = convscope.heatmaps(model, x, [[0, 1, 2, 3]] * 3, layer="conv", method="hirescam")
    without = found.logits - net.fc.bias.detach().numpy()
    assert apart(found.values.sum((2, 3)), without) < TINY
    xgrad = convscope.heatmaps(model, x, [[0, 1, 2, 3]] * 3, layer="conv", method="xgrad-cam")
    assert apart(xgrad.values.sum((2, 3)), without) < 1e-5  # the axiom of conservation, with channels' sums below
    grad = convscope.heatmaps(model, x, [[0, 1, 2, 3]] * 3, layer="conv")
    assert apart(grad.values.sum((2, 3)), without) > 0.1


def test_cam_is_refused_where_it_is_not_defined() -> None:
    usual = loaded(filled(Usual()), 24, 24)
    x = torch.randn((2, 3, 24, 24), generator=torch.Generator().manual_seed(1))
    assert convscope.heatmaps(usual, x, method="cam").layer == "relu3"
    for layer in ("conv3", "relu2", "conv1"):
        with pytest.raises(ConvscopeError, match="cam is defined only where the class score is a weighted sum"):
            convscope.heatmaps(usual, x, method="cam", layer=layer)
    rectified = loaded(filled(Averaged(rectified=True)), 24, 24)
    with pytest.raises(ConvscopeError, match="choose the last layer with spatial extent, or grad-cam"):
        convscope.heatmaps(rectified, x, method="cam", layer="conv")
    assert np.isfinite(convscope.heatmaps(rectified, x, method="cam", layer="act").values).all()


def test_one_pictures_slope_does_not_hide_anothers() -> None:
    """Whether cam is defined is asked of each picture: a steep one beside it changes nothing."""
    gradient = torch.ones(2, 1, 2, 2)
    gradient[1, 0, 0, 0] = 1.5
    gradient[0] *= 1e6
    with pytest.raises(ConvscopeError, match="cam is defined only"):
        cam(torch.ones(2, 1, 2, 2), gradient)
    assert cam(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).abs().sum() == 0


# --- first singular vectors ------------------------------------------------------------------------------------------


def with_singular_values(values: list[float], channels: int, *space: int) -> Tensor:
    """Maps (1, C, ...) whose matrix of places by channels has these singular values, and random vectors."""
    draw = torch.Generator().manual_seed(3)
    count = int(np.prod(space))
    left = torch.linalg.qr(torch.randn((count, len(values)), generator=draw, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn((channels, len(values)), generator=draw, dtype=torch.float64))[0]
    matrix = left * torch.tensor(values, dtype=torch.float64) @ right.T
    return matrix.T.reshape(1, channels, *space)


def by_svd(maps: Tensor) -> np.ndarray:
    matrix = maps[0].double().flatten(1).T
    first = matrix @ torch.linalg.svd(matrix, full_matrices=False)[2][0]
    return (first if first.sum() > 0 else -first).reshape(maps.shape[2:]).numpy()


@pytest.mark.parametrize("space", [(5,), (4, 4), (36, 36), (11, 12, 13)], ids=str)
@pytest.mark.parametrize("channels", [3, 24, 200])
@pytest.mark.parametrize("values", [[5.0, 1.0, 0.5], [1.0, 0.99, 0.9], [2.0], [1e-20, 1e-21], [1e18, 1e12]], ids=str)
def test_eigen_cam_is_the_first_singular_vector(values: list[float], channels: int, space: tuple[int, ...]) -> None:
    """Few and many places, more and fewer than channels; large, small and nearly equal singular values."""
    maps = with_singular_values(values, channels, *space)
    found = eigen_cam(maps.float())
    assert found.shape == (1, *space)
    assert apart(found[0], by_svd(maps)) < 1e-4  # rounding, by the gap of the largest two: 6e-8 / 0.01, a few times
    assert float(found.sum()) > 0


def test_eigen_cam_of_equal_singular_values_lies_in_their_plane() -> None:
    """Any vector of the plane is right: the map's length is the singular value all the same."""
    for space in ((4, 4), (40, 40)):
        maps = with_singular_values([3.0, 3.0, 1.0], 20, *space)
        found = eigen_cam(maps.float())[0].double().flatten()
        matrix = maps[0].flatten(1).T
        assert float(found.norm()) == pytest.approx(3, rel=TINY)
        plane = torch.linalg.svd(matrix, full_matrices=False)[0][:, :2]
        assert float((found - plane @ (plane.T @ found)).norm()) < 1e-5


def test_eigen_cam_finds_a_channel_wherever_it_is() -> None:
    """Block power iteration that began at every second channel's map came out as nought here, and said so to no one."""
    maps = torch.zeros(1, 16, 40, 40)
    maps[0, 1, 20:30, 20:30] = 5 + torch.rand(10, 10)
    maps[0, 2, 30:, 30:] = 1
    found = eigen_cam(maps)[0]
    assert apart(found, maps[0, 1]) < TINY


def test_eigen_cam_of_nothing_is_nothing() -> None:
    for space in ((3, 3), (40, 40)):
        for method in (eigen_cam, eigen_grad_cam):
            found = method(torch.zeros(2, 5, *space), torch.ones(2, 5, *space))
            assert found.shape == (2, *space)
            assert not found.any()


def test_eigen_grad_cam_takes_the_side_of_the_evidence() -> None:
    """One channel that speaks for the target and one, weaker, against it: positive where the former is."""
    activation, gradient = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    activation[0, 0, :2], activation[0, 1, 2:] = 2, 1
    gradient[0, 1] = -1
    for sign in (1, -1):
        found = eigen_grad_cam(activation, sign * gradient)[0]
        assert torch.allclose(found[:2], torch.full((2, 4), 2.0 * sign))
        assert found[2:].abs().max() < TINY


def test_what_is_not_finite_stays_so_and_with_its_picture() -> None:
    """A decomposition of it would raise an error of its own, which says nothing of the network."""
    for bad in (float("nan"), float("inf")):
        for space in ((3, 3), (40, 40)):
            maps = torch.ones(3, 20, *space)
            maps[1, 0, 0, 0] = bad
            for method in (eigen_cam, eigen_grad_cam):
                found = method(maps, torch.ones_like(maps))
                assert found[[0, 2]].isfinite().all()
                assert not found[1].isfinite().all()


CAMS = [name for name, row in METHODS.items() if isinstance(row, CamMethod)]


@pytest.mark.parametrize("shape", [(5, 40, 7, 7), (4, 7, 11, 11), (3, 6, 37), (3, 4, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("method", CAMS)
def test_same_bytes_at_any_position_of_the_batch(method: str, shape: tuple[int, ...]) -> None:
    """The engine's promise, for odd sizes too, at which pictures lie differently in memory."""
    function: Callable[..., Tensor] = METHODS[method].function
    activation, gradient = (torch.from_numpy(drawn(*shape, seed=s)).float() for s in (0, 1))
    if method == "cam":
        gradient = gradient.flatten(2)[..., :1].reshape(*shape[:2], *[1] * (len(shape) - 2)).repeat(1, 1, *shape[2:])
    turned = function(activation.flip(0), gradient.flip(0)).flip(0)
    assert torch.equal(turned, function(activation, gradient))


@pytest.mark.parametrize("method", CAMS)
def test_pictures_are_independent(method: str) -> None:
    """A picture's map is the same alone and among others, whatever their scale."""
    function: Callable[..., Tensor] = METHODS[method].function
    activation, gradient = (torch.from_numpy(drawn(3, 4, 5, 6, seed=s)).float() for s in (0, 1))
    if method == "cam":
        gradient = gradient.mean((2, 3), keepdim=True).expand_as(activation)
    activation[1] *= 1e4
    together = function(activation, gradient)
    for n in range(3):
        assert apart(function(activation[n : n + 1], gradient[n : n + 1]), together[n : n + 1]) < 1e-5
