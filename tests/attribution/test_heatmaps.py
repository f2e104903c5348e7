"""Heatmaps: known by hand where they can be, agreed upon by other programs where not, and put where the eye expects."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.methods.cam import grad_cam
from convscope.attribution.targets import parse_classes
from convscope.images.colormap import apply_colormap, blend, lookup_table
from tests.oracles.nets import Aside, Usual, filled

SIZE = 24
TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order


def loaded(net: nn.Module, size: Any = SIZE, classes: list[str] | None = None, **more: Any) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": size, **more}, classes=classes)


def inputs(count: int = 3, size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(seed))


def apart(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(N, C, H, W) by (K, C, k, k), in float64, by shifting and adding."""
    k = weight.shape[-1]
    height, width = x.shape[2] - k + 1, x.shape[3] - k + 1
    out = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for i in range(k):
        for j in range(k):
            moved = x[:, :, i : i + height, j : j + width].astype(np.float64)
            out += np.einsum("nchw,kc->nkhw", moved, weight[..., i, j])
    return out


class Pooled(nn.Module):
    """Convolution, rectifier or not, average over all places, linear head: every gradient has a closed form."""

    def __init__(self, rectified: bool, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.relu = nn.ReLU(inplace=True) if rectified else nn.Identity()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def numbers(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in net.named_parameters()}


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_one_convolution() -> None:
    """Scores are the means of the maps, so the weight of class k's own map is 1/(H W), that of others 0."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    net = filled(One())
    x = inputs()
    w = numbers(net)
    maps = convolved(x.numpy(), w["conv.weight"], w["conv.bias"])
    found = convscope.heatmaps(loaded(net), x, [[0, 3]] * 3)
    assert found.layer == "conv"
    assert found.values.dtype == np.float32
    assert apart(found.values, maps[:, [0, 3]] / 22**2) < TINY
    assert apart(found.logits, maps.mean((2, 3))[:, [0, 3]]) < TINY


def test_global_average_and_linear_head_give_the_class_activation_map() -> None:
    """Grad-CAM is then CAM / (H W) (Selvaraju et al. 2017, section 3.1; Zhou et al. 2016)."""
    net = filled(Pooled(rectified=False))
    x, w = inputs(), numbers(net)
    maps = convolved(x.numpy(), w["conv.weight"], w["conv.bias"])
    cam = np.einsum("tk,nkhw->nthw", w["fc.weight"], maps)
    found = convscope.heatmaps(loaded(net), x, [[0, 1, 2, 3]] * 3)
    assert apart(found.values, cam / 22**2) < TINY
    assert found.values.min() < 0 < found.values.max()


def test_rectifier_behind_the_layer_counts_only_what_it_lets_through() -> None:
    """a_k = w_k / (H W) times the share of places at which map k is on."""
    net = filled(Pooled(rectified=True))
    x, w = inputs(), numbers(net)
    maps = convolved(x.numpy(), w["conv.weight"], w["conv.bias"])
    on = (maps > 0).mean((2, 3))
    expected = np.einsum("tk,nk,nkhw->nthw", w["fc.weight"], on, maps) / 22**2
    found = convscope.heatmaps(loaded(net), x, [[2, 0]] * 3, layer="conv")
    assert apart(found.values, expected[:, [2, 0]]) < TINY
    behind = convscope.heatmaps(loaded(net), x, [[2, 0]] * 3, layer="relu")
    cam = np.einsum("tk,nkhw->nthw", w["fc.weight"], np.maximum(maps, 0)) / 22**2
    assert apart(behind.values, cam[:, [2, 0]]) < TINY


def test_formula_in_plain_loops() -> None:
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
        found = grad_cam(torch.from_numpy(activation), torch.from_numpy(gradient))
        assert apart(found, expected) < 1e-12  # float64


# --- agreement with other programs -----------------------------------------------------------------------------------


def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.resnet18(weights=None)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.normal_(0, 0.3)
    return net.eval()


@pytest.fixture(scope="module")
def subjects(lite0: convscope.Model, photos: list[str]) -> dict[str, tuple[convscope.Model, Tensor]]:
    """Networks, and the photographs as these take them."""
    found = {}
    for name, model in (("lite0", lite0), ("resnet18", loaded(resnet(), 96, mean=(0.5,) * 3, std=(0.25,) * 3))):
        height, width = model.preprocessing.size
        opened = [Image.open(p).convert("RGB").resize((width, height)) for p in photos]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in opened])).permute(0, 3, 1, 2) / 255
        x = model.preprocessing.normalize(pixels).contiguous(memory_format=torch.channels_last)
        found[name] = model, x
    return found


CASES = [
    ("lite0", "conv_head"),
    ("lite0", "bn2"),
    ("lite0", "blocks.5"),
    ("resnet18", "layer4"),
    ("resnet18", "layer3.1.conv2"),
]
TARGETS = [3, 386, 281, 999]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_agrees_with_captum(subjects: Any, name: str, layer: str) -> None:
    from captum.attr import LayerGradCam

    model, x = subjects[name]
    found = convscope.heatmaps(model, x, [[t, 7] for t in TARGETS], layer=layer)
    theirs = LayerGradCam(model.module, model.module.get_submodule(layer))
    for position, targets in enumerate((TARGETS, [7] * 4)):
        expected = theirs.attribute(x.clone().requires_grad_(), target=targets, relu_attributions=False)[:, 0]
        # Gradients through up to eight layers in two orders of summation.
        assert apart(found.values[:, position], expected.detach()) < 1e-4
    with torch.no_grad():
        logits = model.module(x)
    assert apart(found.logits, torch.stack([logits[range(4), TARGETS], logits[:, 7]], 1)) < 1e-5
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_agrees_with_pytorch_grad_cam(subjects: Any, name: str, layer: str) -> None:
    """Theirs is rectified, scaled to [0, 1] and resized, so ours is taken through the same."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = subjects[name]
    found = convscope.heatmaps(model, x, TARGETS, layer=layer)
    net = copy.deepcopy(model.module).requires_grad_()  # it needs gradients all the way
    with GradCAM(net, [net.get_submodule(layer)]) as cam:
        theirs = cam(x.clone(), [ClassifierOutputTarget(t) for t in TARGETS])
    scaled = scale_cam_image(np.maximum(found.values[:, 0], 0), x.shape[:-3:-1])
    assert theirs.max() > 0.9
    # A picture's scale is set by its own highest value: differences grow where the map is nearly zero.
    assert apart(scale_cam_image(scaled), theirs) < 1e-4


# --- batches are independent -----------------------------------------------------------------------------------------


def test_neighbours_change_nothing(subjects: Any) -> None:
    model, x = subjects["lite0"]
    four = convscope.heatmaps(model, x, TARGETS, layer="blocks.4")
    turned = convscope.heatmaps(model, x[[3, 0, 0, 2]], [999, 3, 3, 281], layer="blocks.4")
    assert np.array_equal(four.values[[3, 0, 0, 2]], turned.values)
    for n in range(4):
        alone = convscope.heatmaps(model, x[n : n + 1], TARGETS[n], layer="blocks.4")
        assert apart(alone.values, four.values[n : n + 1]) < 1e-5  # the engine's promise for other batch sizes
        assert apart(alone.logits, four.logits[n : n + 1]) < 1e-5


def test_several_targets_in_one_call_are_as_many_calls(subjects: Any) -> None:
    model, x = subjects["lite0"]
    together = convscope.heatmaps(model, x, [TARGETS] * 4)
    assert together.values.shape[:2] == (4, 4)
    for position, target in enumerate(TARGETS):
        alone = convscope.heatmaps(model, x, target)
        assert np.array_equal(alone.values[:, 0], together.values[:, position])
        assert np.array_equal(alone.logits[:, 0], together.logits[:, position])


def test_one_forward_pass_whatever_the_targets() -> None:
    net = filled(Usual())
    model = loaded(net)
    runs: list[int] = []
    net.register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    convscope.heatmaps(model, inputs(), [[0, 1, 2, 3, 4]] * 3)
    assert runs == [3]


def test_chunks_change_nothing_but_rounding() -> None:
    model = loaded(filled(Usual()))
    whole = convscope.heatmaps(model, inputs(5), [[1, 0]] * 5, layer="conv1")
    parts = convscope.heatmaps(model, inputs(5), [[1, 0]] * 5, layer="conv1", memory=1)
    assert apart(parts.values, whole.values) < 1e-5  # the engine's promise for other batch sizes
    assert np.array_equal(parts.targets, whole.targets)


# --- targets ---------------------------------------------------------------------------------------------------------

NAMES = ["lesser panda", "Crane", "crane", "African_elephant", "sea lion"]


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    return loaded(filled(Usual()), classes=NAMES)


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
def test_targets_taken(usual: convscope.Model, targets: Any, count: int, expected: list[list[int]]) -> None:
    found = parse_classes(usual, targets, count)
    assert found is not None
    assert found.tolist() == expected
    result = convscope.heatmaps(usual, inputs(count), targets)
    assert result.targets.tolist() == expected
    assert result.names == [[NAMES[t] for t in row] for row in expected]
    logits = convscope.predict(usual, inputs(count)).logits
    assert np.array_equal(result.logits, np.take_along_axis(logits, np.array(expected), 1))


REFUSED: list[tuple[Any, int, str]] = [
    (5, 1, "class 5 is out of range: this model has 5 classes, 0 to 4"),
    (-1, 1, "class -1 is out of range"),
    ([0, 9], 2, "class 9 is out of range"),
    ("9", 1, "class 9 is out of range"),
    ("leser panda", 1, "class 'leser panda' is not in this model; nearest: lesser panda"),
    ("Crane", 1, r"class 'Crane' is the name of several classes: \[1, 2\]; give the index"),
    ([0, 1], 3, "2 targets for 3 pictures"),
    ([[0, 1]], 3, "1 targets for 3 pictures"),
    ([[0, 1], [2]], 2, "same number of targets"),
    ([0, [1]], 2, "expected|indices or names"),
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
def test_targets_refused(usual: convscope.Model, targets: Any, count: int, message: str) -> None:
    with pytest.raises(ConvscopeError, match=message) as caught:
        convscope.heatmaps(usual, inputs(count), targets)
    assert "\n" not in str(caught.value)


def test_without_targets_each_picture_has_its_top_class(lite0: convscope.Model, photos: list[str]) -> None:
    found = convscope.heatmaps(lite0, photos)
    top = convscope.predict(lite0, photos, top=1)
    assert np.array_equal(found.targets, top.indices)
    assert len(set(found.targets.ravel().tolist())) == 4
    assert np.array_equal(found.logits, np.take_along_axis(top.logits, top.indices, 1))
    again = convscope.heatmaps(lite0, photos, [row[0] for row in found.names])
    assert np.array_equal(found.values, again.values)
    assert found.names[3] == ["lesser panda"]


def test_ambiguous_name_of_imagenet(lite0: convscope.Model) -> None:
    with pytest.raises(ConvscopeError, match=r"'crane' is the name of several classes: \[134, 517\]"):
        convscope.heatmaps(lite0, np.zeros((9, 9, 3), np.uint8), "crane")


def test_names_need_names() -> None:
    with pytest.raises(ConvscopeError, match="this model has no class names; give the index"):
        convscope.heatmaps(loaded(filled(Usual())), inputs(1), "sea lion")


def test_targets_stay_with_their_pictures_when_one_is_bad(usual: convscope.Model) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(4)]
    mixed = [pictures[0], "missing.png", pictures[1], np.zeros((2, 2, 7)), *pictures[2:]]
    targets = [[0, 1], [2, 2], [3, 4], [2, 2], [4, 0], [1, 3]]
    for memory in (1 << 30, 1):
        found = convscope.heatmaps(usual, mixed, targets, memory=memory)
        good = convscope.heatmaps(usual, pictures, [targets[i] for i in (0, 2, 4, 5)], memory=memory)
        assert [f.name for f in found.failed] == ["missing.png", "image 3"]
        assert found.image_names == ("image 0", "image 2", "image 4", "image 5")
        assert found.targets.tolist() == good.targets.tolist()
        assert np.array_equal(found.logits, good.logits)
        assert np.array_equal(found.values, good.values)
        ours, others = found.overlay(), good.overlay()
        assert len(ours) == 8
        assert all(np.array_equal(a, b) for a, b in zip(ours, others, strict=True))


# --- the layer -------------------------------------------------------------------------------------------------------


def test_default_layer_is_the_last_with_places(usual: convscope.Model, lite0: convscope.Model) -> None:
    assert convscope.heatmaps(usual, inputs(1)).layer == "relu3"
    assert lite0.layers.last_spatial().name == "bn2"


def test_layers_that_cannot_be_laid_over_a_picture(usual: convscope.Model) -> None:
    with pytest.raises(ConvscopeError, match=r"'gap' gives 10 x 1 x 1 and has no spatial extent; .*relu3"):
        convscope.heatmaps(usual, inputs(1), layer="gap")
    with pytest.raises(ConvscopeError, match="'relu9' is not in this model; nearest: relu"):
        convscope.heatmaps(usual, inputs(1), layer="relu9")
    with pytest.raises(ConvscopeError, match="method 'gradcam' is not known; nearest: grad-cam"):
        convscope.heatmaps(usual, inputs(1), method="gradcam")


# --- honest numbers --------------------------------------------------------------------------------------------------


def negative() -> convscope.Model:
    """Every place speaks against class 0 and for class 1."""
    net = filled(Pooled(rectified=True, channels=2, classes=2))
    with torch.no_grad():
        net.conv.weight.abs_()
        net.conv.bias.fill_(0.1)
        net.fc.weight.copy_(torch.tensor([[-1.0, -2.0], [1.0, 2.0]]))
    return loaded(net, classes=["nothing", "something"])


@pytest.mark.filterwarnings("error")  # such as a division of nought by nought
def test_all_negative_map_is_said_and_stays_raw() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (31, 40, 3), np.uint8)
    found = convscope.heatmaps(negative(), picture, [[0, 1]])
    assert found.values[0, 0].max() < 0
    assert apart(found.values[0, 0], -found.values[0, 1]) < TINY
    assert found.notes == ("image 0, nothing: the map is negative everywhere; this layer speaks against the target",)
    against, favourable = (np.asarray(p, np.int64) for p in found.overlay(alpha=0.4))
    zero = 0.6 * picture + 0.4 * lookup_table("jet")[0]
    assert np.abs(against - zero).max() <= 0.5 + 1e-4  # rounded to 8 bits, from float32
    assert np.abs(favourable - zero).max() > 20


@pytest.mark.filterwarnings("error")  # such as a division of nought by nought
def test_zero_map_is_said_and_stays_zero() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (31, 40, 3), np.uint8)
    model = loaded(filled(Aside()), classes=["a", "b", "c", "d"])
    for layer in ("aside", "drowned"):
        found = convscope.heatmaps(model, picture, "c", layer=layer)
        assert not found.values.any()
        assert found.notes == ("image 0, c: the map is zero everywhere; this layer has no influence on the target",)
        (shown,) = found.overlay(alpha=0.3, colormap="inferno")
        zero = 0.7 * picture + 0.3 * lookup_table("inferno")[0]
        assert np.abs(np.asarray(shown) - zero).max() <= 0.5 + 1e-4  # rounded to 8 bits, from float32
    assert convscope.heatmaps(model, picture, "c", layer="used").notes == ()


def test_gradient_that_is_not_finite_is_said() -> None:
    """A square root at nought: finite scores, infinite slope."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 2, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x)).sqrt().mean((2, 3))

    model = loaded(filled(Root()))
    with pytest.raises(
        ConvscopeError, match="the evidence by grad-cam at layer 'relu' is not finite although the weights are"
    ):
        convscope.heatmaps(model, inputs(1), 0, layer="relu")
    assert np.isfinite(convscope.heatmaps(model, inputs(1), 0, layer="conv").values).all()


# --- geometry --------------------------------------------------------------------------------------------------------


class Bright(nn.Module):
    """One cell of 4 x 4 pixels, one place: the mean of its pixels. The score is the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 1, 4, stride=4, bias=False)
        with torch.no_grad():
            self.cells.weight.fill_(1 / 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x).mean((2, 3))


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize(("height", "width"), [(96, 48), (48, 120), (72, 72), (37, 101)])
def test_heat_lands_on_the_bright_square(height: int, width: int, fit: str) -> None:
    model = loaded(Bright(), 48)
    picture = np.zeros((height, width, 3), np.uint8)
    # Inside the middle, which both ways of fitting show.
    top, left = height // 2 - 8, width // 2 + 1
    picture[top : top + 12, left : left + 8] = 255
    found = convscope.heatmaps(model, picture, 0, fit=fit)
    (heat,) = found.resized()
    assert heat.shape == (1, height, width)
    heat = heat[0].astype(np.float64)
    assert heat.min() == 0
    down, across = np.mgrid[:height, :width] + 0.5
    centre = (heat * down).sum() / heat.sum(), (heat * across).sum() / heat.sum()
    # One cell of the map, in pixels of the picture, is how finely the heat can say where.
    if fit == "squash":
        cell = height / 12, width / 12
    else:
        shorter = min(height, width) / round(48 / 0.875)
        cell = 4 * shorter, 4 * shorter
    assert abs(centre[0] - (top + 6)) < cell[0] / 2
    assert abs(centre[1] - (left + 4)) < cell[1] / 2
    # Two cells away: one that the square reaches into, one over which its heat is blended out.
    away = (
        (down < top - 2 * cell[0])
        | (down > top + 12 + 2 * cell[0])
        | (across < left - 2 * cell[1])
        | (across > left + 8 + 2 * cell[1])
    )
    # Antialiasing may spread a trace of light one cell further.
    assert heat[away].max() < 0.01 * heat.max()
    hottest = np.unravel_index(heat.argmax(), heat.shape)
    assert top - cell[0] < hottest[0] < top + 12 + cell[0]
    assert left - cell[1] < hottest[1] < left + 8 + cell[1]


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (61, 60)])
def test_no_heat_where_a_crop_did_not_look(height: int, width: int) -> None:
    """The box by hand: the shorter side becomes 48 / 0.875 = 55 pixels, the middle 48 x 48 are shown."""
    model = loaded(Bright(), 48)
    white = np.full((height, width, 3), 255, np.uint8)
    heat = convscope.heatmaps(model, white, 0, fit="crop").resized()[0][0]
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
    assert not heat[~inside].any()
    # A white picture's map is 1 everywhere, times 1/144.
    assert heat[inside] == pytest.approx(1 / 144, rel=TINY)
    everywhere = convscope.heatmaps(model, white, 0, fit="squash").resized()[0][0]
    assert everywhere == pytest.approx(1 / 144, rel=TINY)


def test_resized_keeps_raw_values_and_each_pictures_own_size(usual: convscope.Model) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((24, 24), (48, 12), (7, 90))]
    found = convscope.heatmaps(usual, pictures, [[0, 1, 2]] * 3, layer="conv1")
    resized = found.resized()
    assert [r.shape for r in resized] == [(3, 24, 24), (3, 48, 12), (3, 7, 90)]
    # The map has the first picture's own size: nothing is interpolated.
    assert apart(resized[0], found.values[0]) < TINY
    for r, values in zip(resized, found.values, strict=True):
        assert values.min() < 0
        assert r.min() >= values.min() * (1 + TINY)
        assert r.max() <= values.max() * (1 + TINY)


# --- overlays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "colormap"), [(0.4, "jet"), (0.0, "jet"), (1.0, "viridis"), (0.75, "inferno")])
def test_overlay_by_hand(usual: convscope.Model, alpha: float, colormap: str) -> None:
    """Rectified, divided by its highest value, coloured; (1 - alpha) picture + alpha colours."""
    from matplotlib import colormaps

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((30, 20), (10, 50))]
    found = convscope.heatmaps(usual, pictures, [[0, 1], [2, 3]], layer="conv2")
    shown = found.overlay(alpha=alpha, colormap=colormap)
    assert len(shown) == 4
    assert (found.values.max((2, 3)) > 0).sum() >= 2
    for n, picture in enumerate(pictures):
        for t in range(2):
            heat = np.maximum(found.resized()[n][t], 0)
            colours = colormaps[colormap](np.rint(heat / (heat.max() or 1) * 255).astype(int))[..., :3] * 255
            expected = (1 - alpha) * picture + alpha * colours
            # matplotlib cuts its colours down to 8 bits, and the sum is rounded to them.
            assert np.abs(np.asarray(shown[2 * n + t]) - expected).max() <= alpha + 0.5 + 1e-3


def test_overlay_refuses_what_makes_no_picture(usual: convscope.Model) -> None:
    found = convscope.heatmaps(usual, inputs(1))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConvscopeError, match="alpha is"):
            found.overlay(alpha=alpha)
    with pytest.raises(ConvscopeError, match="colormap 'viridiss' is not known; nearest: viridis"):
        found.overlay(colormap="viridiss")


def test_colours_do_not_wrap_around() -> None:
    white = np.full((1, 3, 3), 255, np.uint8)
    heat = np.array([[-1.0, 0.5, 2.0]])
    assert np.array_equal(apply_colormap(heat, "gray"), np.array([[[0] * 3, [128] * 3, [255] * 3]], np.uint8))
    assert np.array_equal(np.asarray(blend(white, heat, 0.5, "gray"))[0, :, 0], [128, 192, 255])


def test_overlay_of_prepared_tensors_shows_their_pictures() -> None:
    model = loaded(filled(Usual()), mean=(0.5,) * 3, std=(0.25,) * 3)
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    x = model.preprocessing.normalize(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    by_tensor, by_array = (convscope.heatmaps(model, given, 1) for given in (x, picture))
    assert apart(by_tensor.values, by_array.values) < TINY
    ours, others = (np.asarray(r.overlay()[0], np.int64) for r in (by_tensor, by_array))
    assert np.abs(ours - others).max() <= 1  # a colour may round the other way
