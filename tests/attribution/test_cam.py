"""Class activation maps: each formula position by position, and against closed forms where there are any."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.methods.cam import cam, eigen_cam, eigen_grad_cam, grad_cam_pp
from convscope.attribution.registry import METHODS, CamMethod
from tests.attribution.helpers import load_module, relative_error
from tests.oracles.cams import FORMULAS
from tests.oracles.nets import SmallConvNet, randomized

TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order
EXACT = 1e-12  # float64
SIZES: dict[int, tuple[int, ...]] = {1: (40,), 2: (12, 10), 3: (6, 7, 5)}


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def apply_method(name: str, activation: Tensor | np.ndarray, gradient: Tensor | np.ndarray) -> Tensor:
    method = METHODS[name]
    assert isinstance(method, CamMethod)
    tensors = [torch.as_tensor(activation), torch.as_tensor(gradient)]
    return method.function(*tensors if method.score is not None else tensors[:1])


class Averaged(nn.Module):
    """Convolution, optional ReLU, global average, linear head; for signals, images and volumes."""

    def __init__(self, dims: int = 2, with_relu: bool = False, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, channels, 3)
        self.act = nn.ReLU(inplace=True) if with_relu else nn.Identity()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).flatten(2).mean(2))


class Flat(nn.Module):
    """Convolution, optional ReLU, linear layer on all positions: the gradient differs between positions."""

    def __init__(self, with_relu: bool = False, size: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.act = nn.ReLU() if with_relu else nn.Identity()
        self.fc = nn.Linear(3 * (size - 2) ** 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).flatten(1))


def random_signals(dims: int, count: int = 3) -> Tensor:
    return torch.randn((count, 3, *SIZES[dims]), generator=torch.Generator().manual_seed(1))


def layer_maps(net: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return net.act(net.conv(x)).double().numpy()


# --- the papers' formulas, position by position ----------------------------------------------------------------------

SHAPES = [(1, 1, 1), (2, 3, 7), (2, 1, 9), (1, 3, 4, 5), (3, 2, 1, 6), (2, 4, 2, 3, 2), (1, 6, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", [name for name in FORMULAS if name != "cam"])
def test_methods_match_their_formulas(method: str, shape: tuple[int, ...]) -> None:
    activation, gradient = random_array(*shape), random_array(*shape, seed=1)
    expected = [FORMULAS[method](a, g) for a, g in zip(activation, gradient, strict=True)]
    assert (
        relative_error(apply_method(method, activation, gradient), expected) < 1e-10
    )  # eigenvectors of a squared matrix


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cam_matches_its_formula(shape: tuple[int, ...]) -> None:
    """CAM is defined only for a gradient that is the same at every position."""
    activation = random_array(*shape)
    gradient = np.broadcast_to(random_array(*shape[:2], *[1] * (len(shape) - 2), seed=1), shape).copy()
    expected = [FORMULAS["cam"](a, g) for a, g in zip(activation, gradient, strict=True)]
    assert relative_error(apply_method("cam", activation, gradient), expected) < EXACT


def test_every_cam_method_has_a_reference_formula() -> None:
    cam_names = {name for name, method in METHODS.items() if isinstance(method, CamMethod)}
    assert cam_names == {*FORMULAS, "finer-cam", "odam"}  # odam: with the targets that are boxes
    assert METHODS["finer-cam"].function is METHODS["grad-cam"].function


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["grad-cam++", "xgrad-cam"])
def test_no_division_by_zero(method: str) -> None:
    """Zero gradients, zero channels, channels that sum to zero, and denominators that cancel to zero."""
    activation, gradient = random_array(1, 6, 2, 2), random_array(1, 6, 2, 2, seed=1)
    gradient[0, 0] = 0
    activation[0, 1] = 0
    activation[0, 2] = [[1, -1], [2, -2]]
    activation[0, 3], gradient[0, 3] = -0.25, [[2, 2], [1, 2]]  # 2 G^2 - G^3 is 0 where G is 2
    gradient[0, 4, 0] = 0
    gradient[0, 5] = -abs(gradient[0, 5])
    actual = apply_method(method, activation, gradient)
    assert actual.isfinite().all()
    assert relative_error(actual, FORMULAS[method](activation[0], gradient[0])[None]) < EXACT


def test_small_gradients_are_not_lost_to_rounding() -> None:
    """In float32 the square of 1e-25 is 0; alpha is exactly 1/2 there."""
    activation, gradient = np.abs(random_array(2, 3, 4, 4)), random_array(2, 3, 4, 4, seed=1)
    small = grad_cam_pp(torch.from_numpy(activation).float(), torch.from_numpy(gradient * 1e-25).float())
    weights = (np.maximum(gradient, 0) / 2).sum((2, 3), keepdims=True)
    assert relative_error(small.double() * 1e25, (weights * activation).sum(1)) < TINY


@pytest.mark.parametrize("with_relu", [False, True])
def test_grad_cam_pp_equals_third_order_autograd(with_relu: bool) -> None:
    """Grad-CAM++ without its closed form: Y = exp(y), differentiated three times by autograd at every position.

    The closed form holds where y is locally linear in the maps, as here.
    """
    net = randomized(Flat(with_relu))
    x = torch.randn((2, 3, 6, 6), generator=torch.Generator().manual_seed(1))
    actual = convscope.heatmaps(load_module(net, (6, 6)), x, [[0, 3]] * 2, layer="conv", method="grad-cam++")
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
                    weight += alpha * max(
                        (first[at] / value).item(), 0.0
                    )  # without exp(y), which is constant over the map
                expected[n, t] += weight * maps[0, k].detach().numpy()
    assert relative_error(actual.values, expected) < 1e-5  # float32 loses digits near the poles of alpha


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", SIZES)
def test_before_a_global_average_weights_are_those_of_the_head(dims: int) -> None:
    """CAM is weights times maps; Grad-CAM and HiResCAM are CAM divided by the number of positions."""
    net = randomized(Averaged(dims))
    x, model = random_signals(dims), load_module(net, SIZES[dims], channels=3)
    maps, weight = layer_maps(net, x), net.fc.weight.detach().double().numpy()
    expected = np.einsum("tk,nk...->nt...", weight, maps)
    positions = maps[0, 0].size

    def actual(method: str) -> convscope.heatmaps.Heatmaps:
        return convscope.heatmaps(model, x, [[0, 1, 2, 3]] * 3, method=method)

    assert actual("cam").layer == "act"
    assert relative_error(actual("cam").values, expected) < TINY
    for method in ("grad-cam", "hirescam", "xgrad-cam"):
        assert relative_error(actual(method).values * positions, expected) < (1e-4 if method == "xgrad-cam" else TINY)
    positive = np.einsum("tk,nk...->nt...", np.maximum(weight, 0), maps)
    assert relative_error(actual("layer-cam").values * positions, positive) < TINY
    slope = weight / positions
    alpha = 1 / (2 + maps.reshape(3, 1, 6, -1).sum(3) * slope)
    plus = np.einsum("ntk,nk...->nt...", alpha * np.maximum(weight, 0), maps)
    assert relative_error(actual("grad-cam++").values, plus) < 1e-5


def test_hirescam_sums_to_the_score() -> None:
    """If the rest of the network is linear, the map sums to the logit without the bias."""
    net = randomized(Flat())
    x = torch.randn((3, 3, 6, 6), generator=torch.Generator().manual_seed(1))
    model = load_module(net, (6, 6))
    actual = convscope.heatmaps(model, x, [[0, 1, 2, 3]] * 3, layer="conv", method="hirescam")
    without = actual.logits - net.fc.bias.detach().numpy()
    assert relative_error(actual.values.sum((2, 3)), without) < TINY
    xgrad = convscope.heatmaps(model, x, [[0, 1, 2, 3]] * 3, layer="conv", method="xgrad-cam")
    assert (
        relative_error(xgrad.values.sum((2, 3)), without) < 1e-5
    )  # the axiom of conservation; channel sums in the denominators
    grad = convscope.heatmaps(model, x, [[0, 1, 2, 3]] * 3, layer="conv")
    assert relative_error(grad.values.sum((2, 3)), without) > 0.1


def test_cam_raises_where_it_is_not_defined() -> None:
    small_model = load_module(randomized(SmallConvNet()), 24)
    x = torch.randn((2, 3, 24, 24), generator=torch.Generator().manual_seed(1))
    assert convscope.heatmaps(small_model, x, method="cam").layer == "relu3"
    for layer in ("conv3", "relu2", "conv1"):
        with pytest.raises(ConvscopeError, match="cam needs a layer whose channel averages determine the class score"):
            convscope.heatmaps(small_model, x, method="cam", layer=layer)
    relu_model = load_module(randomized(Averaged(with_relu=True)), 24)
    with pytest.raises(ConvscopeError, match="choose the last layer with spatial extent, or use grad-cam"):
        convscope.heatmaps(relu_model, x, method="cam", layer="conv")
    assert np.isfinite(convscope.heatmaps(relu_model, x, method="cam", layer="act").values).all()


def test_cam_checks_each_image_separately() -> None:
    """A steep gradient of one image does not hide that CAM is undefined for another."""
    gradient = torch.ones(2, 1, 2, 2)
    gradient[1, 0, 0, 0] = 1.5
    gradient[0] *= 1e6
    with pytest.raises(ConvscopeError, match="cam needs a layer"):
        cam(torch.ones(2, 1, 2, 2), gradient)
    assert cam(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).abs().sum() == 0


# --- first singular vectors ------------------------------------------------------------------------------------------


def with_singular_values(values: list[float], channels: int, *space: int) -> Tensor:
    """Return maps (1, C, ...) whose positions x channels matrix has these singular values and random vectors."""
    generator = torch.Generator().manual_seed(3)
    count = int(np.prod(space))
    left = torch.linalg.qr(torch.randn((count, len(values)), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn((channels, len(values)), generator=generator, dtype=torch.float64))[0]
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
    """More and fewer positions than channels; large, small and nearly equal singular values."""
    maps = with_singular_values(values, channels, *space)
    actual = eigen_cam(maps.float())
    assert actual.shape == (1, *space)
    assert (
        relative_error(actual[0], by_svd(maps)) < 1e-4
    )  # rounding, divided by the gap of the two largest values: a few times 6e-8 / 0.01
    assert float(actual.sum()) > 0


def test_eigen_cam_of_equal_singular_values_lies_in_their_subspace() -> None:
    """Any unit vector of the subspace is valid; the map's norm is the singular value."""
    for space in ((4, 4), (40, 40)):
        maps = with_singular_values([3.0, 3.0, 1.0], 20, *space)
        actual = eigen_cam(maps.float())[0].double().flatten()
        matrix = maps[0].flatten(1).T
        assert float(actual.norm()) == pytest.approx(3, rel=TINY)
        plane = torch.linalg.svd(matrix, full_matrices=False)[0][:, :2]
        assert float((actual - plane @ (plane.T @ actual)).norm()) < 1e-5


def test_eigen_cam_finds_a_single_strong_channel() -> None:
    """A regression test: block power iteration started at every second channel returned zeros here."""
    maps = torch.zeros(1, 16, 40, 40)
    maps[0, 1, 20:30, 20:30] = 5 + torch.rand(10, 10)
    maps[0, 2, 30:, 30:] = 1
    actual = eigen_cam(maps)[0]
    assert relative_error(actual, maps[0, 1]) < TINY


def test_eigen_cam_of_zeros_is_zero() -> None:
    for space in ((3, 3), (40, 40)):
        for method in ("eigen-cam", "eigen-grad-cam"):
            actual = apply_method(method, torch.zeros(2, 5, *space), torch.ones(2, 5, *space))
            assert actual.shape == (2, *space)
            assert not actual.any()


def test_eigen_grad_cam_is_positive_where_evidence_is() -> None:
    """One channel is evidence for the target, a weaker one against it: the map is positive at the former."""
    activation, gradient = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    activation[0, 0, :2], activation[0, 1, 2:] = 2, 1
    gradient[0, 1] = -1
    for sign in (1, -1):
        actual = eigen_grad_cam(activation, sign * gradient)[0]
        assert torch.allclose(actual[:2], torch.full((2, 4), 2.0 * sign))
        assert actual[2:].abs().max() < TINY


def test_non_finite_values_stay_in_their_image() -> None:
    """The decomposition itself would raise an error that does not mention the network."""
    for bad in (float("nan"), float("inf")):
        for space in ((3, 3), (40, 40)):
            maps = torch.ones(3, 20, *space)
            maps[1, 0, 0, 0] = bad
            for method in ("eigen-cam", "eigen-grad-cam"):
                actual = apply_method(method, maps, torch.ones_like(maps))
                assert actual[[0, 2]].isfinite().all()
                assert not actual[1].isfinite().all()


CAMS = [name for name, method in METHODS.items() if isinstance(method, CamMethod) and not method.needs_boxes]


@pytest.mark.parametrize("shape", [(5, 40, 7, 7), (4, 7, 11, 11), (3, 6, 37), (3, 4, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("method", CAMS)
def test_same_bytes_at_any_position_of_the_batch(method: str, shape: tuple[int, ...]) -> None:
    """Also for odd sizes, at which images are aligned differently in memory."""
    activation, gradient = (torch.from_numpy(random_array(*shape, seed=s)).float() for s in (0, 1))
    if method == "cam":
        gradient = gradient.flatten(2)[..., :1].reshape(*shape[:2], *[1] * (len(shape) - 2)).repeat(1, 1, *shape[2:])
    permuted = apply_method(method, activation.flip(0), gradient.flip(0)).flip(0)
    assert torch.equal(permuted, apply_method(method, activation, gradient))


@pytest.mark.parametrize("method", CAMS)
def test_images_are_independent(method: str) -> None:
    """An image's map does not depend on the other images of the batch and their scale."""
    activation, gradient = (torch.from_numpy(random_array(3, 4, 5, 6, seed=s)).float() for s in (0, 1))
    if method == "cam":
        gradient = gradient.mean((2, 3), keepdim=True).expand_as(activation)
    activation[1] *= 1e4
    together = apply_method(method, activation, gradient)
    for n in range(3):
        assert (
            relative_error(apply_method(method, activation[n : n + 1], gradient[n : n + 1]), together[n : n + 1]) < 1e-5
        )
