"""What a heatmap is asked about: contrasts, functions of the output, regions, heads, and many targets at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.registry import METHODS
from convscope.attribution.targets import (
    BatchTargets,
    finer_cam_score,
    output_target,
    parse_targets,
    segmentation_target,
)
from convscope.engine.capture import ForwardResult
from tests.oracles.nets import PACKINGS, Packed, Usual, changes, filled, snapshot

SIZE = 24
TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order
NAMES = ["lesser panda", "Crane", "crane", "African_elephant", "sea lion"]
LINEAR = ["cam", "grad-cam", "hirescam", "xgrad-cam"]  # in the gradient
NOT_LINEAR = ["grad-cam++", "layer-cam"]
METHODS_ALL = [*LINEAR, *NOT_LINEAR, "eigen-cam", "eigen-grad-cam", "finer-cam"]


def loaded(net: nn.Module, classes: list[str] | None = None) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": SIZE}, classes=classes)


def inputs(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn((count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


def apart(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    return loaded(filled(Usual()), NAMES)


def maps(model: convscope.Model, targets: Any, method: str = "grad-cam", **given: Any) -> np.ndarray:
    return convscope.heatmaps(model, inputs(), targets, method=method, **given).values


# --- contrasts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LINEAR)
def test_contrast_is_the_difference_of_two_maps(usual: convscope.Model, method: str) -> None:
    one, other, third = (maps(usual, t, method) for t in (0, 3, 4))
    assert apart(maps(usual, 0, method, against=3), one - other) < 1e-5
    assert apart(maps(usual, 0, method, against=[3, 4]), one - (other + third) / 2) < 1e-5
    pairs = maps(usual, [[0, 4]] * 3, method, against=3)
    assert apart(pairs, np.concatenate([one - other, third - other], axis=1)) < 1e-5


@pytest.mark.parametrize("method", NOT_LINEAR)
def test_contrast_of_what_is_not_linear_is_none(usual: convscope.Model, method: str) -> None:
    """It is the map of the difference, not the difference of the maps: as a function that takes it says too."""
    contrast = maps(usual, 0, method, against=3)
    assert apart(contrast, maps(usual, lambda output: output[:, 0] - output[:, 3], method)) < 1e-5
    assert apart(contrast, maps(usual, 0, method) - maps(usual, 3, method)) > 0.01


AGAINST: list[tuple[Any, list[list[int]]]] = [
    (3, [[3]] * 3),
    ("african elephant", [[3]] * 3),
    ([3, 4, 0], [[3], [4], [0]]),  # as many as pictures: one for each
    (np.array([3, 4, 0]), [[3], [4], [0]]),
    ([3, 4], [[3, 4]] * 3),  # otherwise several for all
    (np.array([3, 4]), [[3, 4]] * 3),
    (torch.tensor([3, 4]), [[3, 4]] * 3),
    (("sea lion", 0), [[4, 0]] * 3),
    ([3], [[3]] * 3),
    ([[3, 4], [0, 1], [4, 2]], [[3, 4], [0, 1], [4, 2]]),
]


@pytest.mark.parametrize(("against", "expected"), AGAINST)
def test_what_is_taken_off(usual: convscope.Model, against: Any, expected: list[list[int]]) -> None:
    asked = parse_targets(usual, 0, 3, against)
    assert asked.against is not None
    assert asked.against.tolist() == expected
    found = convscope.heatmaps(usual, inputs(), 0, against=against)
    plain = maps(usual, [[0, 1, 2, 3, 4]] * 3)
    off = np.stack([plain[n, row].mean(0) for n, row in enumerate(expected)])
    assert apart(found.values[:, 0], plain[:, 0] - off) < 1e-5
    # The targets and their logits are those asked about, nothing taken off.
    assert found.targets.tolist() == [[0]] * 3
    assert np.array_equal(found.logits, convscope.heatmaps(usual, inputs(), 0).logits)
    called = [" and ".join(NAMES[i] for i in row) for row in expected]
    assert found.names == [[f"lesser panda rather than {name}"] for name in called]


def test_contrasts_stay_with_their_pictures(usual: convscope.Model) -> None:
    """Picture by picture, and with one that cannot be used."""
    against = [[3, 4], [0, 1], [4, 2]]
    together = maps(usual, [0, 2, 3], against=against)
    assert apart(maps(usual, [0, 2, 3], against=against, memory=1), together) < 1e-5
    pictures = [np.full((9, 9, 3), 40 * i, np.uint8) for i in range(3)]
    mixed = [pictures[0], "missing.png", *pictures[1:]]
    found = convscope.heatmaps(usual, mixed, [0, 1, 2, 3], against=[[3, 4], [2, 2], [0, 1], [4, 2]])
    good = convscope.heatmaps(usual, pictures, [0, 2, 3], against=against)
    assert np.array_equal(found.values, good.values)
    assert found.names == good.names


def test_contrast_with_one_picture_and_with_the_top_class(usual: convscope.Model) -> None:
    one = convscope.heatmaps(usual, inputs(1), against=[3, 4])
    top = int(one.targets[0, 0])
    assert one.names == [[f"{NAMES[top]} rather than African_elephant and sea lion"]]
    explicit = convscope.heatmaps(usual, inputs(1), top, against=[3, 4])
    assert np.array_equal(one.values, explicit.values)
    itself = convscope.heatmaps(usual, inputs(), 3, against=3)
    assert not itself.values.any()
    assert itself.notes[0] == (
        "image 0, African_elephant rather than African_elephant: the map is zero everywhere; "
        "this layer has no influence on the target"
    )


@pytest.mark.parametrize(
    ("targets", "against", "message"),
    [
        (0, 5, "class 5 is out of range"),
        (0, "no such", "class 'no such' is not in this model"),
        (0, [[1, 2], [3]], "2 targets for 3 pictures"),
        (0, [[1, 2], [3], [4]], "same number of targets"),
        (0, [], "classes are indices or names"),
        (0, 1.5, "expected None, a class"),
        (0, lambda output: output[:, 0], "expected None, a class"),
        (lambda output: output[:, 0], 1, "against= goes with classes; a function can take another class off by itself"),
        ([lambda output: output[:, 0], 1], None, "targets are either all classes or all functions"),
        ([1, segmentation_target(0, np.ones((2, 2)))], None, "targets are either all classes or all functions"),
    ],
)
def test_refused_before_any_pass(usual: convscope.Model, targets: Any, against: Any, message: str) -> None:
    def ran(*_: Any) -> None:
        pytest.fail("the network ran")

    handle = usual.module.register_forward_pre_hook(ran)
    try:
        with pytest.raises(ConvscopeError, match=message):
            convscope.heatmaps(usual, inputs(), targets, against=against)
    finally:
        handle.remove()


# --- finer-cam -------------------------------------------------------------------------------------------------------


def test_finer_cam_takes_off_the_three_nearest() -> None:
    """Zhang et al. 2025, equations 5 to 8: the mean over the three nearest classes of y_c - 0.6 y_d, Grad-CAM of it."""
    model = loaded(filled(Usual(classes=9)))
    plain = convscope.heatmaps(model, inputs(), [list(range(9))] * 3)
    for targets in ([[0, 5]] * 3, [[1, 2], [3, 3], [8, 0]]):
        found = convscope.heatmaps(model, inputs(), targets, method="finer-cam")
        for n in range(3):
            for t, target in enumerate(targets[n]):
                logits = plain.logits[n].astype(np.float64)
                others = sorted((c for c in range(9) if c != target), key=lambda c: abs(logits[c] - logits[target]))
                expected = sum(plain.values[n, target] - 0.6 * plain.values[n, d] for d in others[:3]) / 3
                assert apart(found.values[n, t], expected) < 1e-5
        assert found.targets.tolist() == targets
        assert np.array_equal(found.logits, np.take_along_axis(plain.logits, np.array(targets), 1))


def test_finer_cam_of_few_classes() -> None:
    two = loaded(filled(Usual(classes=2)))
    plain = maps(two, [[0, 1]] * 3)
    assert apart(maps(two, 0, "finer-cam")[:, 0], plain[:, 0] - 0.6 * plain[:, 1]) < 1e-5
    with pytest.raises(ConvscopeError, match="this network has only one"):
        maps(loaded(filled(Usual(classes=1))), 0, "finer-cam")


def test_finer_cam_of_twins() -> None:
    """Classes with the very same score: each is the others' nearest, none is its own."""
    logits = torch.tensor([[2.0, 2, 2, 2, 9, -5]], requires_grad=True)
    for target in range(4):
        score = finer_cam_score(BatchTargets(torch.tensor([[target]])), ForwardResult({}, logits, logits))
        (gradient,) = torch.autograd.grad(score.sum(), logits)
        expected = [1.0 if c == target else -0.2 if c < 4 else 0.0 for c in range(6)]
        assert gradient[0].tolist() == pytest.approx(expected)


def test_finer_cam_refuses_what_it_cannot_compare(usual: convscope.Model) -> None:
    before = snapshot(usual.module)
    for targets, against in ((0, 1), (lambda output: output[:, 0], None)):
        with pytest.raises(ConvscopeError, match="give classes, no against="):
            maps(usual, targets, "finer-cam", against=against)
    assert changes(before, snapshot(usual.module)) == []


# --- functions of the output -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS_ALL if m != "finer-cam"])
def test_function_that_picks_a_class_is_the_class(usual: convscope.Model, method: str) -> None:
    found = convscope.heatmaps(usual, inputs(), lambda output: output[:, 3], method=method)
    expected = convscope.heatmaps(usual, inputs(), 3, method=method)
    assert apart(found.values, expected.values) < TINY
    assert np.array_equal(found.logits, expected.logits)
    assert found.targets.tolist() == [[-1]] * 3


def test_functions_have_their_names(usual: convscope.Model) -> None:
    class Margin:
        def __call__(self, output: Tensor) -> Tensor:
            return output[:, :1] - output[:, 1:2]  # (M, 1) will do

    def spread(output: Tensor) -> Tensor:
        return output.std(1)

    found = convscope.heatmaps(usual, inputs(), (Margin(), spread), layer="conv2")
    assert found.names == [["Margin", "spread"]] * 3
    assert found.parameters()["classes"] == [["Margin", "spread"]] * 3
    assert found.values.shape[:2] == found.targets.shape == (3, 2)
    contrast = maps(usual, 0, against=1, layer="conv2")
    assert apart(found.values[:, :1], contrast) < 1e-5
    logits = convscope.predict(usual, inputs()).logits
    assert apart(found.logits, np.stack([logits[:, 0] - logits[:, 1], logits.std(1, ddof=1)], 1)) < TINY


BAD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "too many": (lambda output: output, r"target '<lambda>' gave a tensor \(3, 5\) for 3 pictures"),
    "one for all": (lambda output: output.sum(), r"gave a tensor \(\) for 3 pictures; expected a tensor with a score"),
    "no tensor": (lambda output: output[:, 0].tolist(), "gave a list for 3 pictures"),
    "nothing": (lambda output: None, "gave a NoneType for 3 pictures"),
    "no maps": (
        segmentation_target(1, np.ones((4, 4))),
        "a region was given, but the network gives no maps of classes",
    ),
    "no heads": (output_target("depth", 1), r"the network gives no head 'depth' in a tensor \(3, 5\)"),
    "not finite": (lambda output: output[:, 0] / 0, "not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_function_is_refused_at_the_first_batch(name: str) -> None:
    net = filled(Usual())
    model, before = loaded(net), snapshot(net)
    function, message = BAD[name]
    with pytest.raises(ConvscopeError, match=message) as caught:
        convscope.heatmaps(model, inputs(), function, memory=1 << 30)
    assert "\n" not in str(caught.value)
    assert changes(before, snapshot(net)) == []


def test_function_that_looks_at_nothing_is_said(usual: convscope.Model) -> None:
    def nothing(output: Tensor) -> Tensor:
        return torch.ones(len(output))

    found = convscope.heatmaps(usual, inputs(1), nothing)
    assert not found.values.any()
    assert found.notes == ("image 0, nothing: the map is zero everywhere; this layer has no influence on the target",)


def test_regression_with_one_output() -> None:
    """One output is one class, the top one; a network that gives (N,) is taken too."""
    net = filled(Usual(classes=1))
    found = convscope.heatmaps(loaded(net), inputs())
    assert found.targets.tolist() == [[0]] * 3
    assert found.names == [["class 0"]] * 3
    with torch.no_grad():
        assert apart(found.logits, net(inputs())) < TINY
    by_function = convscope.heatmaps(loaded(net), inputs(), lambda output: output)
    assert apart(found.values, by_function.values) < TINY

    class Scalar(Usual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0]

    bare = filled(Scalar(classes=1))
    assert apart(convscope.heatmaps(loaded(bare), inputs(), 0).values, found.values) < TINY


# --- regions and heads -----------------------------------------------------------------------------------------------


class Segmenting(nn.Module):
    """Maps of classes (N, K, H, W) that are linear in the layer's maps at the very same place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_over_region_by_hand(scale: int) -> None:
    """The score is the mean over the region R: its gradient is w_k / |R| inside and 0 outside."""
    net = filled(Segmenting())
    inside = np.zeros((12, 12), bool)
    inside[2:5, 3:10] = True
    region = segmentation_target(2, np.kron(inside, np.ones((scale, scale))))  # at any resolution
    assert region.__name__ == "class 2 over a region"
    with torch.no_grad():
        activation = net.conv(inputs()).double().numpy()
        score = net(inputs()).double().numpy()[:, 2][:, inside].mean(1)
    weight = net.head.weight.detach().double().numpy()[2, :, 0, 0]
    weighed = np.einsum("k,nkhw->nhw", weight, activation)
    model = loaded(net)
    hires = convscope.heatmaps(model, inputs(), region, layer="conv", method="hirescam")
    assert apart(hires.values[:, 0], weighed * inside / inside.sum()) < TINY
    assert apart(hires.logits[:, 0], score) < TINY
    assert hires.names == [["class 2 over a region"]] * 3
    grad = convscope.heatmaps(model, inputs(), region, layer="conv")
    assert apart(grad.values[:, 0], weighed / 144) < TINY  # Grad-CAM forgets where the region was


def test_regions_that_cannot_be_meant() -> None:
    for mask in (np.zeros((4, 4)), np.ones(4), np.ones((2, 3, 4))):
        with pytest.raises(ConvscopeError, match=r"expected \(H, W\) with at least one place inside"):
            segmentation_target(0, mask)
    model = loaded(filled(Segmenting()))
    for target in (5, -1):
        with pytest.raises(ConvscopeError, match=rf"class {target} is out of range: the network's maps gave \(3, 5,"):
            convscope.heatmaps(model, inputs(), segmentation_target(target, np.ones((12, 12))), layer="conv")
    speck = np.zeros((1200, 1200))
    speck[1, 1] = 1
    with pytest.raises(ConvscopeError, match="nothing of the region is left"):
        convscope.heatmaps(model, inputs(), segmentation_target(0, speck), layer="conv")


class Heads(Usual):
    """Two answers beside each other."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.depth, self.pack = nn.Linear(10, 2), pack

    def forward(self, x: Tensor) -> Any:
        x = self.relu2(self.conv2(self.pool(self.relu1(self.bn1(self.conv1(x))))))
        x = self.relu3(self.bn3(self.conv3(x))).mean((2, 3))
        return self.pack(self.fc(x), self.depth(x))


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_of_head_by_hand(kind: str) -> None:
    """Behind an average and a linear head: w_k / Z times the maps, of the head that is named."""
    pack: Callable[[Tensor, Tensor], Any] = (
        (lambda a, b: {"kind": a, "depth": b}) if kind == "dict" else lambda a, b: (a, b)
    )
    keys = ("kind", "depth") if kind == "dict" else (0, 1)
    net = filled(Heads(pack))
    model = loaded(net)
    targets = [output_target(keys[0], 4), output_target(keys[1], 1)]
    found = convscope.heatmaps(model, inputs(), targets, layer="relu3")
    activation = convscope.activations(model, inputs(), "relu3")["relu3"].astype(np.float64)
    for t, (layer, row) in enumerate(((net.fc, 4), (net.depth, 1))):
        weight = layer.weight.detach().double().numpy()[row]
        expected = np.einsum("k,nkhw->nhw", weight, activation) / activation[0, 0].size
        assert apart(found.values[:, t], expected) < TINY
    assert found.names[0] == [f"class 4 of {keys[0]}", f"class 1 of {keys[1]}"]
    with pytest.raises(ConvscopeError, match=r"class 2 is out of range: head .* gave \(3, 2\)"):
        convscope.heatmaps(model, inputs(), output_target(keys[1], 2))
    missing = "the network gives no head 'colour'" + (": kind, depth" if kind == "dict" else " in a tuple")
    with pytest.raises(ConvscopeError, match=missing):
        convscope.heatmaps(model, inputs(), output_target("colour", 0))


@pytest.mark.parametrize("packing", ["dict", "ordered", "namedtuple", "dataclass", "tuple"])
def test_of_head_of_every_packing(packing: str) -> None:
    model = loaded(filled(Packed(*PACKINGS[packing])))
    with torch.no_grad():
        output = model.module(inputs())
    key: Any = 0 if packing == "tuple" else "logits"
    if isinstance(output, Mapping):
        key = next(k for k in output if k != "aux")
    found = convscope.heatmaps(model, inputs(), output_target(key, 2), layer="relu")
    assert apart(found.values, convscope.heatmaps(model, inputs(), 2, layer="relu").values) < TINY


# --- many targets at once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS_ALL)
def test_many_targets_are_as_many_calls(usual: convscope.Model, method: str) -> None:
    """Different ones for each picture, repeated ones too."""
    assert method in METHODS
    targets = [[0, 4, 2], [1, 1, 3], [2, 0, 0]]
    layer = None if method == "cam" else "relu2"
    together = convscope.heatmaps(usual, inputs(), targets, method=method, layer=layer)
    assert together.targets.tolist() == targets
    for t in range(3):
        alone = convscope.heatmaps(usual, inputs(), [row[t] for row in targets], method=method, layer=layer)
        assert apart(together.values[:, t], alone.values[:, 0]) < TINY
        assert np.array_equal(together.logits[:, t], alone.logits[:, 0])
