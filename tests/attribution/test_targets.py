"""Targets: contrasts, functions of the output, regions, several outputs, and many targets at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.methods.cam import finer_cam_score
from convscope.attribution.output_targets import output_target, segmentation_target
from convscope.attribution.registry import METHODS
from convscope.attribution.targets import parse_targets
from convscope.engine.capture import ForwardResult
from tests.attribution.helpers import load_module, random_images, relative_error
from tests.oracles.nets import PACKINGS, PackedNet, SmallConvNet, diff_snapshots, randomized, snapshot

TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order
NAMES = ["lesser panda", "Crane", "crane", "African_elephant", "sea lion"]
LINEAR = ["cam", "grad-cam", "hirescam", "xgrad-cam"]  # linear in the gradient
NOT_LINEAR = ["grad-cam++", "layer-cam"]
METHODS_ALL = [*LINEAR, *NOT_LINEAR, "eigen-cam", "eigen-grad-cam", "finer-cam"]


@pytest.fixture(scope="module")
def small_model() -> convscope.Model:
    return load_module(randomized(SmallConvNet()), classes=NAMES)


def small_maps(model: convscope.Model, targets: Any, method: str = "grad-cam", **kwargs: Any) -> np.ndarray:
    return convscope.heatmaps(model, random_images(), targets, method=method, **kwargs).values


# --- contrasts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LINEAR)
def test_contrast_is_the_difference_of_two_maps(small_model: convscope.Model, method: str) -> None:
    single, other, third = (small_maps(small_model, t, method) for t in (0, 3, 4))
    assert relative_error(small_maps(small_model, 0, method, against=3), single - other) < 1e-5
    assert relative_error(small_maps(small_model, 0, method, against=[3, 4]), single - (other + third) / 2) < 1e-5
    pairs = small_maps(small_model, [[0, 4]] * 3, method, against=3)
    assert relative_error(pairs, np.concatenate([single - other, third - other], axis=1)) < 1e-5


@pytest.mark.parametrize("method", NOT_LINEAR)
def test_contrast_of_methods_that_are_not_linear(small_model: convscope.Model, method: str) -> None:
    """It is the map of the scores' difference, not the difference of the maps."""
    contrast = small_maps(small_model, 0, method, against=3)
    assert relative_error(contrast, small_maps(small_model, lambda output: output[:, 0] - output[:, 3], method)) < 1e-5
    assert relative_error(contrast, small_maps(small_model, 0, method) - small_maps(small_model, 3, method)) > 0.01


AGAINST: list[tuple[Any, list[list[int]]]] = [
    (3, [[3]] * 3),
    ("african elephant", [[3]] * 3),
    ([3, 4, 0], [[3], [4], [0]]),  # as many as images: one per image
    (np.array([3, 4, 0]), [[3], [4], [0]]),
    ([3, 4], [[3, 4]] * 3),  # otherwise several for all
    (np.array([3, 4]), [[3, 4]] * 3),
    (torch.tensor([3, 4]), [[3, 4]] * 3),
    (("sea lion", 0), [[4, 0]] * 3),
    ([3], [[3]] * 3),
    ([[3, 4], [0, 1], [4, 2]], [[3, 4], [0, 1], [4, 2]]),
]


@pytest.mark.parametrize(("against", "expected"), AGAINST)
def test_accepted_contrasts(small_model: convscope.Model, against: Any, expected: list[list[int]]) -> None:
    spec = parse_targets(small_model, 0, 3, against)
    assert spec.against is not None
    assert spec.against.tolist() == expected
    actual = convscope.heatmaps(small_model, random_images(), 0, against=against)
    plain = small_maps(small_model, [[0, 1, 2, 3, 4]] * 3)
    off = np.stack([plain[n, row].mean(0) for n, row in enumerate(expected)])
    assert relative_error(actual.values[:, 0], plain[:, 0] - off) < 1e-5
    # Targets and logits are those of the target classes, nothing subtracted.
    assert actual.targets.tolist() == [[0]] * 3
    assert np.array_equal(actual.logits, convscope.heatmaps(small_model, random_images(), 0).logits)
    names = [" and ".join(NAMES[i] for i in row) for row in expected]
    assert actual.names == [[f"lesser panda rather than {name}"] for name in names]


def test_contrasts_stay_with_their_images(small_model: convscope.Model) -> None:
    """Also image by image, and with an unreadable image."""
    against = [[3, 4], [0, 1], [4, 2]]
    together = small_maps(small_model, [0, 2, 3], against=against)
    assert relative_error(small_maps(small_model, [0, 2, 3], against=against, memory=1), together) < 1e-5
    images = [np.full((9, 9, 3), 40 * i, np.uint8) for i in range(3)]
    mixed = [images[0], "missing.png", *images[1:]]
    actual = convscope.heatmaps(small_model, mixed, [0, 1, 2, 3], against=[[3, 4], [2, 2], [0, 1], [4, 2]])
    good = convscope.heatmaps(small_model, images, [0, 2, 3], against=against)
    assert np.array_equal(actual.values, good.values)
    assert actual.names == good.names


def test_contrast_with_one_image_and_with_the_top_class(small_model: convscope.Model) -> None:
    single = convscope.heatmaps(small_model, random_images(1), against=[3, 4])
    top = int(single.targets[0, 0])
    assert single.names == [[f"{NAMES[top]} rather than African_elephant and sea lion"]]
    explicit = convscope.heatmaps(small_model, random_images(1), top, against=[3, 4])
    assert np.array_equal(single.values, explicit.values)
    itself = convscope.heatmaps(small_model, random_images(), 3, against=3)
    assert not itself.values.any()
    assert itself.notes[1] == (  # after the range of the random tensors
        "image 0, African_elephant rather than African_elephant: the map is zero everywhere; "
        "this layer has no influence on the target"
    )


@pytest.mark.parametrize(
    ("targets", "against", "message"),
    [
        (0, 5, "class 5 is out of range"),
        (0, "no such", "class 'no such' is not in this model"),
        (0, [[1, 2], [3]], "2 targets for 3 images"),
        (0, [[1, 2], [3], [4]], "different numbers of targets"),
        (0, [], "expected class indices or names"),
        (0, 1.5, "expected None, a class"),
        (0, lambda output: output[:, 0], "expected None, a class"),
        (
            lambda output: output[:, 0],
            1,
            "against= needs classes as targets; a function can subtract another class itself",
        ),
        ([lambda output: output[:, 0], 1], None, "targets mixes classes and functions"),
        ([1, segmentation_target(0, np.ones((2, 2)))], None, "targets mixes classes and functions"),
    ],
)
def test_invalid_targets_are_refused_before_any_pass(
    small_model: convscope.Model, targets: Any, against: Any, message: str
) -> None:
    def ran(*_: Any) -> None:
        pytest.fail("the network ran")

    handle = small_model.module.register_forward_pre_hook(ran)
    try:
        with pytest.raises(ConvscopeError, match=message):
            convscope.heatmaps(small_model, random_images(), targets, against=against)
    finally:
        handle.remove()


# --- finer-cam -------------------------------------------------------------------------------------------------------


def test_finer_cam_subtracts_the_three_nearest_classes() -> None:
    """Zhang et al. 2025, equations 5 to 8: Grad-CAM of the mean of y_c - 0.6 y_d over the three nearest classes."""
    model = load_module(randomized(SmallConvNet(classes=9)))
    plain = convscope.heatmaps(model, random_images(), [list(range(9))] * 3)
    for targets in ([[0, 5]] * 3, [[1, 2], [3, 3], [8, 0]]):
        actual = convscope.heatmaps(model, random_images(), targets, method="finer-cam")
        for n in range(3):
            for t, target in enumerate(targets[n]):
                logits = plain.logits[n].astype(np.float64)
                others = sorted((c for c in range(9) if c != target), key=lambda c: abs(logits[c] - logits[target]))
                expected = sum(plain.values[n, target] - 0.6 * plain.values[n, d] for d in others[:3]) / 3
                assert relative_error(actual.values[n, t], expected) < 1e-5
        assert actual.targets.tolist() == targets
        assert np.array_equal(actual.logits, np.take_along_axis(plain.logits, np.array(targets), 1))


def test_finer_cam_with_few_classes() -> None:
    two = load_module(randomized(SmallConvNet(classes=2)))
    plain = small_maps(two, [[0, 1]] * 3)
    assert relative_error(small_maps(two, 0, "finer-cam")[:, 0], plain[:, 0] - 0.6 * plain[:, 1]) < 1e-5
    with pytest.raises(ConvscopeError, match="this network has a single output"):
        small_maps(load_module(randomized(SmallConvNet(classes=1))), 0, "finer-cam")


def test_finer_cam_with_equal_scores() -> None:
    """Classes with equal scores are each other's nearest; no class is its own."""
    logits = torch.tensor([[2.0, 2, 2, 2, 9, -5]], requires_grad=True)
    for target in range(4):
        score = finer_cam_score(BatchTargets(torch.tensor([[target]])), ForwardResult({}, logits, logits))
        (gradient,) = torch.autograd.grad(score.sum(), logits)
        expected = [1.0 if c == target else -0.2 if c < 4 else 0.0 for c in range(6)]
        assert gradient[0].tolist() == pytest.approx(expected)


def test_finer_cam_refuses_contrasts_and_functions(small_model: convscope.Model) -> None:
    before = snapshot(small_model.module)
    for targets, against in ((0, 1), (lambda output: output[:, 0], None)):
        with pytest.raises(ConvscopeError, match="give classes as targets, and no against="):
            small_maps(small_model, targets, "finer-cam", against=against)
    assert diff_snapshots(before, snapshot(small_model.module)) == []


# --- functions of the output -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS_ALL if m != "finer-cam"])
def test_function_that_selects_a_class_equals_the_class(small_model: convscope.Model, method: str) -> None:
    actual = convscope.heatmaps(small_model, random_images(), lambda output: output[:, 3], method=method)
    expected = convscope.heatmaps(small_model, random_images(), 3, method=method)
    assert relative_error(actual.values, expected.values) < TINY
    assert np.array_equal(actual.logits, expected.logits)
    assert actual.targets.tolist() == [[-1]] * 3


def test_names_of_functions(small_model: convscope.Model) -> None:
    class Margin:
        def __call__(self, output: Tensor) -> Tensor:
            return output[:, :1] - output[:, 1:2]  # (M, 1) is accepted

    def spread(output: Tensor) -> Tensor:
        return output.std(1)

    actual = convscope.heatmaps(small_model, random_images(), (Margin(), spread), layer="conv2")
    assert actual.names == [["Margin", "spread"]] * 3
    assert actual.parameters()["classes"] == [["Margin", "spread"]] * 3
    assert actual.values.shape[:2] == actual.targets.shape == (3, 2)
    contrast = small_maps(small_model, 0, against=1, layer="conv2")
    assert relative_error(actual.values[:, :1], contrast) < 1e-5
    logits = convscope.predict(small_model, random_images()).logits
    assert relative_error(actual.logits, np.stack([logits[:, 0] - logits[:, 1], logits.std(1, ddof=1)], 1)) < TINY


INVALID_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "too many": (lambda output: output, r"target '<lambda>' returned a tensor of shape \(3, 5\) for 3 images"),
    "one for all": (
        lambda output: output.sum(),
        r"returned a tensor of shape \(\) for 3 images; expected a tensor with one score",
    ),
    "no tensor": (lambda output: output[:, 0].tolist(), "returned a list for 3 images"),
    "nothing": (lambda output: None, "returned a NoneType for 3 images"),
    "no maps": (
        segmentation_target(1, np.ones((4, 4))),
        "segmentation_target needs a network that returns class maps",
    ),
    "no outputs": (
        output_target("depth", 1),
        r"the network has no output 'depth'; it returns a tensor of shape \(3, 5\)",
    ),
    "not finite": (lambda output: output[:, 0] / 0, "not finite"),
}


@pytest.mark.parametrize("name", INVALID_FUNCTIONS)
def test_invalid_function_is_refused_at_the_first_batch(name: str) -> None:
    net = randomized(SmallConvNet())
    model, before = load_module(net), snapshot(net)
    function, message = INVALID_FUNCTIONS[name]
    with pytest.raises(ConvscopeError, match=message) as caught:
        convscope.heatmaps(model, random_images(), function, memory=1 << 30)
    assert "\n" not in str(caught.value)
    assert diff_snapshots(before, snapshot(net)) == []


def test_constant_function_is_noted(small_model: convscope.Model) -> None:
    def nothing(output: Tensor) -> Tensor:
        return torch.ones(len(output))

    actual = convscope.heatmaps(small_model, random_images(1), nothing)
    assert not actual.values.any()
    assert actual.notes[-1] == "image 0, nothing: the map is zero everywhere; this layer has no influence on the target"


def test_regression_with_one_output() -> None:
    """A single output is the top class; a network that returns (N,) is accepted too."""
    net = randomized(SmallConvNet(classes=1))
    actual = convscope.heatmaps(load_module(net), random_images())
    assert actual.targets.tolist() == [[0]] * 3
    assert actual.names == [["output 0"]] * 3
    with torch.no_grad():
        assert relative_error(actual.logits, net(random_images())) < TINY
    by_function = convscope.heatmaps(load_module(net), random_images(), lambda output: output)
    assert relative_error(actual.values, by_function.values) < TINY

    class Scalar(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0]

    bare = randomized(Scalar(classes=1))
    assert relative_error(convscope.heatmaps(load_module(bare), random_images(), 0).values, actual.values) < TINY


# --- regions and several outputs -------------------------------------------------------------------------------------


class Segmenting(nn.Module):
    """Class maps (N, K, H, W) that are linear in the layer's maps at the same position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_segmentation_target_by_hand(scale: int) -> None:
    """The score is the mean over the region R: its gradient is w_k / |R| inside and 0 outside."""
    net = randomized(Segmenting())
    inside = np.zeros((12, 12), bool)
    inside[2:5, 3:10] = True
    region = segmentation_target(2, np.kron(inside, np.ones((scale, scale))))  # at any resolution
    assert region.__name__ == "class 2 over a region"
    with torch.no_grad():
        activation = net.conv(random_images()).double().numpy()
        score = net(random_images()).double().numpy()[:, 2][:, inside].mean(1)
    weight = net.head.weight.detach().double().numpy()[2, :, 0, 0]
    weighted = np.einsum("k,nkhw->nhw", weight, activation)
    model = load_module(net)
    hires = convscope.heatmaps(model, random_images(), region, layer="conv", method="hirescam")
    assert relative_error(hires.values[:, 0], weighted * inside / inside.sum()) < TINY
    assert relative_error(hires.logits[:, 0], score) < TINY
    assert hires.names == [["class 2 over a region"]] * 3
    grad = convscope.heatmaps(model, random_images(), region, layer="conv")
    assert relative_error(grad.values[:, 0], weighted / 144) < TINY  # Grad-CAM loses the region's position


def test_invalid_regions() -> None:
    for mask in (np.zeros((4, 4)), np.ones(4), np.ones((2, 3, 4))):
        with pytest.raises(ConvscopeError, match=r"expected \(H, W\) with at least one position inside"):
            segmentation_target(0, mask)
    model = load_module(randomized(Segmenting()))
    for target in (5, -1):
        with pytest.raises(
            ConvscopeError, match=rf"class {target} is out of range: the network's output has shape \(3, 5,"
        ):
            convscope.heatmaps(model, random_images(), segmentation_target(target, np.ones((12, 12))), layer="conv")
    single_pixel = np.zeros((1200, 1200))
    single_pixel[1, 1] = 1
    with pytest.raises(
        ConvscopeError, match="no position of the network's maps lies inside the region at their resolution of 12 x 12"
    ):
        convscope.heatmaps(model, random_images(), segmentation_target(0, single_pixel), layer="conv")


class TwoOutputs(SmallConvNet):
    """A network with two outputs."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.depth, self.pack = nn.Linear(10, 2), pack

    def forward(self, x: Tensor) -> Any:
        x = self.relu2(self.conv2(self.pool(self.relu1(self.bn1(self.conv1(x))))))
        x = self.relu3(self.bn3(self.conv3(x))).mean((2, 3))
        return self.pack(self.fc(x), self.depth(x))


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_output_target_by_hand(kind: str) -> None:
    """Before a global average and a linear head: w_k / Z times the maps, with the named output's weights."""
    pack: Callable[[Tensor, Tensor], Any] = (
        (lambda a, b: {"kind": a, "depth": b}) if kind == "dict" else lambda a, b: (a, b)
    )
    keys = ("kind", "depth") if kind == "dict" else (0, 1)
    net = randomized(TwoOutputs(pack))
    model = load_module(net)
    targets = [output_target(keys[0], 4), output_target(keys[1], 1)]
    actual = convscope.heatmaps(model, random_images(), targets, layer="relu3")
    activation = convscope.activations(model, random_images(), "relu3")["relu3"].astype(np.float64)
    for t, (layer, row) in enumerate(((net.fc, 4), (net.depth, 1))):
        weight = layer.weight.detach().double().numpy()[row]
        expected = np.einsum("k,nkhw->nhw", weight, activation) / activation[0, 0].size
        assert relative_error(actual.values[:, t], expected) < TINY
    assert actual.names[0] == [f"class 4 of {keys[0]}", f"class 1 of {keys[1]}"]
    with pytest.raises(ConvscopeError, match=r"class 2 is out of range: output .* has shape \(\d, 2\)"):
        convscope.heatmaps(model, random_images(), output_target(keys[1], 2))
    missing = "the network has no output 'color'; it returns a " + (
        "dict with 'kind'" if kind == "dict" else "tuple with 0"
    )
    with pytest.raises(ConvscopeError, match=missing):
        convscope.heatmaps(model, random_images(), output_target("color", 0))


@pytest.mark.parametrize("packing", ["dict", "ordered", "namedtuple", "dataclass", "tuple"])
def test_output_target_of_every_output_type(packing: str) -> None:
    model = load_module(randomized(PackedNet(*PACKINGS[packing])))
    with torch.no_grad():
        output = model.module(random_images())
    key: Any = 0 if packing == "tuple" else "logits"
    if isinstance(output, Mapping):
        key = next(k for k in output if k != "aux")
    actual = convscope.heatmaps(model, random_images(), output_target(key, 2), layer="relu")
    assert relative_error(actual.values, convscope.heatmaps(model, random_images(), 2, layer="relu").values) < TINY


# --- many targets at once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS_ALL)
def test_many_targets_equal_separate_calls(small_model: convscope.Model, method: str) -> None:
    """With different and with repeated targets."""
    assert method in METHODS
    targets = [[0, 4, 2], [1, 1, 3], [2, 0, 0]]
    layer = None if method == "cam" else "relu2"
    together = convscope.heatmaps(small_model, random_images(), targets, method=method, layer=layer)
    assert together.targets.tolist() == targets
    for t in range(3):
        single = convscope.heatmaps(
            small_model, random_images(), [row[t] for row in targets], method=method, layer=layer
        )
        assert relative_error(together.values[:, t], single.values[:, 0]) < TINY
        assert np.array_equal(together.logits[:, t], single.logits[:, 0])
