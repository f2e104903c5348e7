"""Heatmaps against closed forms and captum; targets, layers, geometry and overlays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.methods.cam import grad_cam
from convscope.attribution.targets import parse_classes
from convscope.images.colormap import apply_colormap, blend, lookup_table
from tests.attribution.helpers import SIZE, load_module, preprocess, random_images, random_resnet, relative_error
from tests.oracles.nets import SmallConvNet, UnusedBranchNet, randomized

TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Convolve (N, C, H, W) with (K, C, k, k) in float64 by shifting and adding."""
    k = weight.shape[-1]
    height, width = x.shape[2] - k + 1, x.shape[3] - k + 1
    out = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for i in range(k):
        for j in range(k):
            moved = x[:, :, i : i + height, j : j + width].astype(np.float64)
            out += np.einsum("nchw,kc->nkhw", moved, weight[..., i, j])
    return out


class Pooled(nn.Module):
    """Convolution, optional ReLU, global average, linear head: every gradient has a closed form."""

    def __init__(self, with_relu: bool, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.relu = nn.ReLU(inplace=True) if with_relu else nn.Identity()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def weights_of(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in net.named_parameters()}


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_grad_cam_of_one_convolution() -> None:
    """Scores are the means of the maps, so the weight of class k's map is 1 / (H W) and that of others 0."""

    class SingleConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    net = randomized(SingleConv())
    x = random_images()
    w = weights_of(net)
    maps = convolve(x.numpy(), w["conv.weight"], w["conv.bias"])
    actual = convscope.heatmaps(load_module(net), x, [[0, 3]] * 3)
    assert actual.layer == "conv"
    assert actual.values.dtype == np.float32
    assert relative_error(actual.values, maps[:, [0, 3]] / 22**2) < TINY
    assert relative_error(actual.logits, maps.mean((2, 3))[:, [0, 3]]) < TINY


def test_grad_cam_before_a_global_average_is_cam() -> None:
    """Grad-CAM is then CAM / (H W) (Selvaraju et al. 2017, section 3.1; Zhou et al. 2016)."""
    net = randomized(Pooled(with_relu=False))
    x, w = random_images(), weights_of(net)
    maps = convolve(x.numpy(), w["conv.weight"], w["conv.bias"])
    cam = np.einsum("tk,nkhw->nthw", w["fc.weight"], maps)
    actual = convscope.heatmaps(load_module(net), x, [[0, 1, 2, 3]] * 3)
    assert relative_error(actual.values, cam / 22**2) < TINY
    assert actual.values.min() < 0 < actual.values.max()


def test_grad_cam_before_a_relu() -> None:
    """a_k = w_k / (H W) times the fraction of positions at which map k is positive."""
    net = randomized(Pooled(with_relu=True))
    x, w = random_images(), weights_of(net)
    maps = convolve(x.numpy(), w["conv.weight"], w["conv.bias"])
    active = (maps > 0).mean((2, 3))
    expected = np.einsum("tk,nk,nkhw->nthw", w["fc.weight"], active, maps) / 22**2
    actual = convscope.heatmaps(load_module(net), x, [[2, 0]] * 3, layer="conv")
    assert relative_error(actual.values, expected[:, [2, 0]]) < TINY
    later = convscope.heatmaps(load_module(net), x, [[2, 0]] * 3, layer="relu")
    cam = np.einsum("tk,nkhw->nthw", w["fc.weight"], np.maximum(maps, 0)) / 22**2
    assert relative_error(later.values, cam[:, [2, 0]]) < TINY


def test_grad_cam_in_plain_loops() -> None:
    rng = np.random.default_rng(0)
    for n, c, h, w in ((1, 1, 1, 1), (2, 3, 4, 5), (3, 2, 7, 1)):
        activation, gradient = rng.normal(size=(2, n, c, h, w))
        expected = np.zeros((n, h, w))
        for i in range(n):
            for k in range(c):
                weight = sum(gradient[i, k, y, x] for y in range(h) for x in range(w)) / (h * w)
                for y in range(h):
                    for x in range(w):
                        expected[i, y, x] += weight * activation[i, k, y, x]
        actual = grad_cam(torch.from_numpy(activation), torch.from_numpy(gradient))
        assert relative_error(actual, expected) < 1e-12  # float64


# --- agreement with captum -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(lite0: convscope.Model, photos: list[str]) -> dict[str, tuple[convscope.Model, Tensor]]:
    """Return networks and the photographs preprocessed for them."""
    resnet = load_module(random_resnet(), 96, mean=(0.5,) * 3, std=(0.25,) * 3)
    return {
        "lite0": (lite0, preprocess(lite0, photos)),
        "resnet18": (resnet, preprocess(resnet, photos)),
    }


CASES = [("lite0", "conv_head"), ("lite0", "blocks.5"), ("resnet18", "layer4")]  # test_peers.py has others
TARGETS = [3, 386, 281, 999]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_agrees_with_captum(cases: Any, name: str, layer: str) -> None:
    from captum.attr import LayerGradCam

    model, x = cases[name]
    actual = convscope.heatmaps(model, x, [[t, 7] for t in TARGETS], layer=layer)
    reference = LayerGradCam(model.module, model.module.get_submodule(layer))
    for position, targets in enumerate((TARGETS, [7] * 4)):
        expected = reference.attribute(x.clone().requires_grad_(), target=targets, relu_attributions=False)[:, 0]
        # Gradients through up to eight layers, summed in another order.
        assert relative_error(actual.values[:, position], expected.detach()) < 1e-4
    with torch.no_grad():
        logits = model.module(x)
    assert relative_error(actual.logits, torch.stack([logits[range(4), TARGETS], logits[:, 7]], 1)) < 1e-5
    assert all(p.grad is None for p in model.module.parameters())


# --- batches are independent -----------------------------------------------------------------------------------------


def test_maps_do_not_depend_on_the_batch(cases: Any) -> None:
    model, x = cases["lite0"]
    four = convscope.heatmaps(model, x, TARGETS, layer="blocks.4")
    permuted = convscope.heatmaps(model, x[[3, 0, 0, 2]], [999, 3, 3, 281], layer="blocks.4")
    assert np.array_equal(four.values[[3, 0, 0, 2]], permuted.values)
    for n in range(4):
        single = convscope.heatmaps(model, x[n : n + 1], TARGETS[n], layer="blocks.4")
        assert relative_error(single.values, four.values[n : n + 1]) < 1e-5  # rounding differs between batch sizes
        assert relative_error(single.logits, four.logits[n : n + 1]) < 1e-5


def test_several_targets_equal_separate_calls(cases: Any) -> None:
    model, x = cases["lite0"]
    together = convscope.heatmaps(model, x, [TARGETS] * 4)
    assert together.values.shape[:2] == (4, 4)
    for position, target in enumerate(TARGETS):
        single = convscope.heatmaps(model, x, target)
        assert np.array_equal(single.values[:, 0], together.values[:, position])
        assert np.array_equal(single.logits[:, 0], together.logits[:, position])


def test_all_targets_share_one_forward_pass() -> None:
    net = randomized(SmallConvNet())
    model = load_module(net)
    convscope.heatmaps(model, random_images())  # chooses the layer, once per model
    runs: list[int] = []
    net.register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    convscope.heatmaps(model, random_images(), [[0, 1, 2, 3, 4]] * 3)
    assert runs == [3]


def test_memory_changes_maps_by_rounding_only() -> None:
    model = load_module(randomized(SmallConvNet()))
    full = convscope.heatmaps(model, random_images(5), [[1, 0]] * 5, layer="conv1")
    parts = convscope.heatmaps(model, random_images(5), [[1, 0]] * 5, layer="conv1", memory=1)
    assert relative_error(parts.values, full.values) < 1e-5  # rounding differs between batch sizes
    assert np.array_equal(parts.targets, full.targets)


# --- targets ---------------------------------------------------------------------------------------------------------

NAMES = ["lesser panda", "Crane", "crane", "African_elephant", "sea lion"]


@pytest.fixture(scope="module")
def small_model() -> convscope.Model:
    return load_module(randomized(SmallConvNet()), classes=NAMES)


ACCEPTED: list[tuple[Any, int, list[list[int]]]] = [
    (3, 3, [[3], [3], [3]]),
    (np.int64(3), 2, [[3], [3]]),
    (np.uint8(0), 1, [[0]]),
    ("lesser panda", 2, [[0], [0]]),
    ("LESSER_panda", 1, [[0]]),
    (" african elephant ", 1, [[3]]),
    ("4", 1, [[4]]),
    ([1, 2, 3], 3, [[1], [2], [3]]),
    ((1, "sea lion"), 2, [[1], [4]]),
    (np.array([4, 0]), 2, [[4], [0]]),
    (torch.tensor([4, 0]), 2, [[4], [0]]),
    (torch.tensor(2), 2, [[2], [2]]),
    (range(2), 2, [[0], [1]]),
    ([[1, 2], [3, 4]], 2, [[1, 2], [3, 4]]),
    (np.array([[1, 2], [3, 4], [0, 0]]), 3, [[1, 2], [3, 4], [0, 0]]),
    ([("sea lion", 0)], 1, [[4, 0]]),
    ([4, 0, 1], 1, [[4, 0, 1]]),
    (["sea lion", "lesser panda"], 1, [[4, 0]]),
    ([[2], [2]], 2, [[2], [2]]),
]


@pytest.mark.parametrize(("targets", "count", "expected"), ACCEPTED)
def test_accepted_targets(small_model: convscope.Model, targets: Any, count: int, expected: list[list[int]]) -> None:
    actual = parse_classes(small_model, targets, count)
    assert actual is not None
    assert actual.tolist() == expected
    result = convscope.heatmaps(small_model, random_images(count), targets)
    assert result.targets.tolist() == expected
    assert result.names == [[NAMES[t] for t in row] for row in expected]
    logits = convscope.predict(small_model, random_images(count)).logits
    assert np.array_equal(result.logits, np.take_along_axis(logits, np.array(expected), 1))


REFUSED: list[tuple[Any, int, str]] = [
    (5, 1, "class 5 is out of range: this model has 5 classes, 0 to 4"),
    (-1, 1, "class -1 is out of range"),
    ([0, 9], 2, "class 9 is out of range"),
    ("9", 1, "class 9 is out of range"),
    ("leser panda", 1, "class 'leser panda' is not in this model; nearest: lesser panda"),
    ("Crane", 1, r"class 'Crane' is the name of several classes: \[1, 2\]; give the index"),
    ([0, 1], 3, r"2 targets for 3 images; .* one list for all of them, such as \[\[0, 1\]\]"),
    ([[0, 1], [0, 2]], 3, "2 targets for 3 images"),
    ([[0, 1], [2]], 2, "different numbers of targets"),
    ([0, [1]], 2, "expected class indices or names"),
    ([[0], []], 2, "indices or names"),
    ([], 1, "expected None, a class"),
    (True, 1, "expected None, a class"),
    ([True, False], 2, "indices or names"),
    (2.0, 1, "expected None, a class"),
    ([1.5, 2], 2, "indices or names"),
    (np.array([0.0, 1.0]), 2, "indices or names"),
    (np.array([True, False]), 2, "indices or names"),
    ({"a": 1}, 1, "expected None, a class"),
    ({1, 2}, 1, "expected None, a class"),
    ([None, 1], 2, "indices or names"),
]


@pytest.mark.parametrize(("targets", "count", "message"), REFUSED)
def test_refused_targets(small_model: convscope.Model, targets: Any, count: int, message: str) -> None:
    with pytest.raises(ConvscopeError, match=message) as caught:
        convscope.heatmaps(small_model, random_images(count), targets)
    assert "\n" not in str(caught.value)


def test_one_list_of_targets_is_for_all_images(small_model: convscope.Model) -> None:
    images = random_images(3)
    several = convscope.heatmaps(small_model, images, [[0, 2]])
    expected = convscope.heatmaps(small_model, images, [[0, 2]] * 3)
    assert np.array_equal(several.targets, expected.targets)
    assert np.array_equal(several.values, expected.values)


def test_default_target_is_the_top_class(lite0: convscope.Model, photos: list[str]) -> None:
    actual = convscope.heatmaps(lite0, photos)
    top = convscope.predict(lite0, photos, top=1)
    assert np.array_equal(actual.targets, top.indices)
    assert len(set(actual.targets.ravel().tolist())) == 4
    assert np.array_equal(actual.logits, np.take_along_axis(top.logits, top.indices, 1))
    repeated = convscope.heatmaps(lite0, photos, [row[0] for row in actual.names])
    assert np.array_equal(actual.values, repeated.values)
    assert actual.names[3] == ["lesser panda"]


def test_ambiguous_imagenet_name(lite0: convscope.Model) -> None:
    with pytest.raises(ConvscopeError, match=r"'crane' is the name of several classes: \[134, 517\]"):
        convscope.heatmaps(lite0, np.zeros((9, 9, 3), np.uint8), "crane")


def test_class_name_needs_class_names() -> None:
    with pytest.raises(ConvscopeError, match="this model has no class names; give the index"):
        convscope.heatmaps(load_module(randomized(SmallConvNet())), random_images(1), "sea lion")


def test_targets_stay_with_their_images_when_one_is_unreadable(small_model: convscope.Model) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(4)]
    mixed = [images[0], "missing.png", images[1], np.zeros((2, 2, 7)), *images[2:]]
    targets = [[0, 1], [2, 2], [3, 4], [2, 2], [4, 0], [1, 3]]
    for memory in (1 << 30, 1):
        actual = convscope.heatmaps(small_model, mixed, targets, memory=memory)
        good = convscope.heatmaps(small_model, images, [targets[i] for i in (0, 2, 4, 5)], memory=memory)
        assert [f.name for f in actual.failed] == ["missing.png", "image 3"]
        assert actual.image_names == ("image 0", "image 2", "image 4", "image 5")
        assert actual.targets.tolist() == good.targets.tolist()
        assert np.array_equal(actual.logits, good.logits)
        assert np.array_equal(actual.values, good.values)
        actual_overlays, others = actual.overlay(), good.overlay()
        assert len(actual_overlays) == 8
        assert all(np.array_equal(a, b) for a, b in zip(actual_overlays, others, strict=True))


# --- the layer -------------------------------------------------------------------------------------------------------


def test_default_layer_is_the_last_spatial_one(small_model: convscope.Model, lite0: convscope.Model) -> None:
    assert convscope.heatmaps(small_model, random_images(1)).layer == "relu3"
    assert lite0.layers.last_spatial().name == "bn2"


def test_invalid_layers_and_methods(small_model: convscope.Model) -> None:
    with pytest.raises(ConvscopeError, match=r"'gap' has output 10 x 1 x 1 without spatial extent; .*relu3"):
        convscope.heatmaps(small_model, random_images(1), layer="gap")
    with pytest.raises(ConvscopeError, match="'relu9' is not in this model; nearest: relu"):
        convscope.heatmaps(small_model, random_images(1), layer="relu9")
    with pytest.raises(ConvscopeError, match="method 'gradcem' is not known; nearest: grad-cam"):
        convscope.heatmaps(small_model, random_images(1), method="gradcem")


# --- maps without positive evidence ----------------------------------------------------------------------------------


def negative() -> convscope.Model:
    """Every position is evidence against class 0 and for class 1."""
    net = randomized(Pooled(with_relu=True, channels=2, classes=2))
    with torch.no_grad():
        net.conv.weight.abs_()
        net.conv.bias.fill_(0.1)
        net.fc.weight.copy_(torch.tensor([[-1.0, -2.0], [1.0, 2.0]]))
    return load_module(net, classes=["nothing", "something"])


@pytest.mark.filterwarnings("error")  # for instance 0 / 0
def test_negative_map_is_noted_and_not_changed() -> None:
    image = np.random.default_rng(0).integers(0, 256, (31, 40, 3), np.uint8)
    actual = convscope.heatmaps(negative(), image, [[0, 1]])
    assert actual.values[0, 0].max() < 0
    assert relative_error(actual.values[0, 0], -actual.values[0, 1]) < TINY
    assert actual.notes == (
        "image 0, nothing: the map is negative everywhere; this layer is evidence against the target",
    )
    against, favourable = (np.asarray(p, np.int64) for p in actual.overlay(alpha=0.4))
    zero = 0.6 * image + 0.4 * lookup_table("jet")[0]
    assert np.abs(against - zero).max() <= 0.5 + 1e-4  # rounded to 8 bits, from float32
    assert np.abs(favourable - zero).max() > 20


@pytest.mark.filterwarnings("error")  # for instance 0 / 0
def test_zero_map_is_noted_and_stays_zero() -> None:
    image = np.random.default_rng(0).integers(0, 256, (31, 40, 3), np.uint8)
    model = load_module(randomized(UnusedBranchNet()), classes=["a", "b", "c", "d"])
    for layer in ("unused", "zeroed"):
        actual = convscope.heatmaps(model, image, "c", layer=layer)
        assert not actual.values.any()
        assert actual.notes == ("image 0, c: the map is zero everywhere; this layer has no influence on the target",)
        (overlays,) = actual.overlay(alpha=0.3, colormap="inferno")
        zero = 0.7 * image + 0.3 * lookup_table("inferno")[0]
        assert np.abs(np.asarray(overlays) - zero).max() <= 0.5 + 1e-4  # rounded to 8 bits, from float32
    used = convscope.heatmaps(model, image, "c", layer="used")
    assert used.values.max() > 0 >= used.resized()[0].max()  # so that its overlay shows nothing
    assert [note.partition(":")[2][:24] for note in used.notes] == [" no positive evidence is"]


def test_infinite_gradient_raises() -> None:
    """The square root at 0 has a finite score and an infinite gradient."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 2, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x)).sqrt().mean((2, 3))

    model = load_module(randomized(Root()))
    with pytest.raises(
        ConvscopeError, match="the evidence by grad-cam at layer 'relu' is not finite although the weights are"
    ):
        convscope.heatmaps(model, random_images(1), 0, layer="relu")
    assert np.isfinite(convscope.heatmaps(model, random_images(1), 0, layer="conv").values).all()


# --- geometry --------------------------------------------------------------------------------------------------------


class PatchMeans(nn.Module):
    """Each position is the mean of a patch of 4 x 4 pixels; the score is the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 1, 4, stride=4, bias=False)
        with torch.no_grad():
            self.patches.weight.fill_(1 / 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).mean((2, 3))


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize(("height", "width"), [(96, 48), (48, 120), (72, 72), (37, 101)])
def test_heatmap_lies_on_the_bright_square(height: int, width: int, fit: str) -> None:
    model = load_module(PatchMeans(), 48)
    image = np.zeros((height, width, 3), np.uint8)
    # Inside the centre, which is visible with either fit.
    top, left = height // 2 - 8, width // 2 + 1
    image[top : top + 12, left : left + 8] = 255
    actual = convscope.heatmaps(model, image, 0, fit=fit)
    (heatmap,) = actual.resized()
    assert heatmap.shape == (1, height, width)
    heatmap = heatmap[0].astype(np.float64)
    assert heatmap.min() == 0
    down, across = np.mgrid[:height, :width] + 0.5
    centre = (heatmap * down).sum() / heatmap.sum(), (heatmap * across).sum() / heatmap.sum()
    # The resolution: one position of the map in pixels of the image.
    if fit == "squash":
        cell = height / 12, width / 12
    else:
        shorter = min(height, width) / round(48 / 0.875)
        cell = 4 * shorter, 4 * shorter
    assert abs(centre[0] - (top + 6)) < cell[0] / 2
    assert abs(centre[1] - (left + 4)) < cell[1] / 2
    # Two positions away: one that the square overlaps, one for the interpolation.
    away = (
        (down < top - 2 * cell[0])
        | (down > top + 12 + 2 * cell[0])
        | (across < left - 2 * cell[1])
        | (across > left + 8 + 2 * cell[1])
    )
    # Antialiasing may spread a little further.
    assert heatmap[away].max() < 0.01 * heatmap.max()
    hottest = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert top - cell[0] < hottest[0] < top + 12 + cell[0]
    assert left - cell[1] < hottest[1] < left + 8 + cell[1]


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (61, 60)])
def test_heatmap_is_zero_outside_the_crop(height: int, width: int) -> None:
    """The crop by hand: the shorter side becomes 48 / 0.875 = 55 pixels, of which the central 48 x 48 are used."""
    model = load_module(PatchMeans(), 48)
    white = np.full((height, width, 3), 255, np.uint8)
    heatmap = convscope.heatmaps(model, white, 0, fit="crop").resized()[0][0]
    per = min(height, width) / 55
    long = int(55 * max(height, width) / min(height, width))
    rows, columns = (55, long) if height <= width else (long, 55)
    scale_down, scale_across = height / rows, width / columns
    first_row, first_column = round((rows - 48) / 2) * scale_down, round((columns - 48) / 2) * scale_across
    assert scale_down == pytest.approx(per, rel=0.02)
    down, across = np.mgrid[:height, :width] + 0.5
    inside = (
        (down >= first_row)
        & (down < first_row + 48 * scale_down)
        & (across >= first_column)
        & (across < first_column + 48 * scale_across)
    )
    assert 0.2 < inside.mean() < 0.95
    assert not heatmap[~inside].any()
    # The map of a white image is 1 everywhere, times 1/144.
    assert heatmap[inside] == pytest.approx(1 / 144, rel=TINY)
    everywhere = convscope.heatmaps(model, white, 0, fit="squash").resized()[0][0]
    assert everywhere == pytest.approx(1 / 144, rel=TINY)


def test_resized_maps_have_raw_values_and_the_images_sizes(small_model: convscope.Model) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((24, 24), (48, 12), (7, 90))]
    actual = convscope.heatmaps(small_model, images, [[0, 1, 2]] * 3, layer="conv1")
    resized = actual.resized()
    assert [r.shape for r in resized] == [(3, 24, 24), (3, 48, 12), (3, 7, 90)]
    # The map has the first image's size: nothing is interpolated.
    assert relative_error(resized[0], actual.values[0]) < TINY
    for r, values in zip(resized, actual.values, strict=True):
        assert values.min() < 0
        assert r.min() >= values.min() * (1 + TINY)
        assert r.max() <= values.max() * (1 + TINY)


# --- overlays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "colormap"), [(0.4, "jet"), (0.0, "jet"), (1.0, "viridis"), (0.75, "inferno")])
def test_overlay_by_hand(small_model: convscope.Model, alpha: float, colormap: str) -> None:
    """The positive part divided by its maximum, in colors: (1 - alpha) image + alpha colors."""
    from matplotlib import colormaps

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((30, 20), (10, 50))]
    actual = convscope.heatmaps(small_model, images, [[0, 1], [2, 3]], layer="conv2")
    overlays = actual.overlay(alpha=alpha, colormap=colormap)
    assert len(overlays) == 4
    assert (actual.values.max((2, 3)) > 0).sum() >= 2
    for n, image in enumerate(images):
        for t in range(2):
            heatmap = np.maximum(actual.resized()[n][t], 0)
            colors = colormaps[colormap](np.rint(heatmap / (heatmap.max() or 1) * 255).astype(int))[..., :3] * 255
            expected = (1 - alpha) * image + alpha * colors
            # matplotlib truncates its colors to 8 bits, and the sum is rounded to 8 bits.
            assert np.abs(np.asarray(overlays[2 * n + t]) - expected).max() <= alpha + 0.5 + 1e-3


def test_overlay_refuses_invalid_arguments(small_model: convscope.Model) -> None:
    actual = convscope.heatmaps(small_model, random_images(1))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConvscopeError, match="alpha is"):
            actual.overlay(alpha=alpha)
    with pytest.raises(ConvscopeError, match="colormap 'viridiss' is not known; nearest: viridis"):
        actual.overlay(colormap="viridiss")


def test_colors_do_not_overflow() -> None:
    white = np.full((1, 3, 3), 255, np.uint8)
    heatmap = np.array([[-1.0, 0.5, 2.0]])
    assert np.array_equal(apply_colormap(heatmap, "gray"), np.array([[[0] * 3, [128] * 3, [255] * 3]], np.uint8))
    assert np.array_equal(np.asarray(blend(white, heatmap, 0.5, "gray"))[0, :, 0], [128, 192, 255])


def test_overlay_of_preprocessed_tensors_shows_their_images() -> None:
    model = load_module(randomized(SmallConvNet()), mean=(0.5,) * 3, std=(0.25,) * 3)
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    x = model.preprocessing.normalize(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    by_tensor, by_array = (convscope.heatmaps(model, images, 1) for images in (x, image))
    assert relative_error(by_tensor.values, by_array.values) < TINY
    actual_overlays, others = (np.asarray(r.overlay()[0], np.int64) for r in (by_tensor, by_array))
    assert np.abs(actual_overlays - others).max() <= 1  # a color may round the other way
