"""`convscope.patterns`: the plain recipe against the notebook's loop, independence of the batch, and arguments."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.engine.batching import gradient_bytes
from convscope.featurevis.defaults import plain_size, robust_size
from convscope.featurevis.optimizer import (
    DEAD_AFTER_STEPS,
)
from convscope.featurevis.parameterization import FourierImage
from convscope.featurevis.recipes import REDIRECT_STEPS, deprocess_image
from convscope.featurevis.transforms import AugmentationConfig, random_affine
from tests.featurevis.helpers import CPU, load_model, relative_error
from tests.oracles.nets import SharedReluNet, SmallConvNet, randomized

TOLERANCE = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order


def reference_deprocess(x: np.ndarray) -> np.ndarray:
    """Return the notebook's `deprocess_image` of one image (H, W, C) in float64, before the conversion to uint8."""
    x = x.astype(np.float64)
    x = x - x.mean()
    x /= x.std() + 1e-5
    x *= 0.1
    x += 0.5
    return np.clip(np.clip(x, 0, 1) * 255, 0, 255)


# --- the plain recipe ------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """One convolution without bias."""

    def __init__(self, units: int = 3, kernel: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, units, kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("space", ["input", "pixels"])
def test_linear_unit_converges_to_its_weight(space: str) -> None:
    """On an image of the kernel's size, the gradient is the weight, and one step follows it."""
    net = randomized(Linear())
    std, mean = np.array([0.2, 0.25, 0.5]), np.array([0.4, 0.5, 0.6])
    model = load_model(net, 5, mean=tuple(mean), std=tuple(std))
    start = np.random.default_rng(0).uniform(100, 150, (5, 5, 3))
    result = convscope.patterns(model, "conv", recipe="plain", space=space, start=start, steps=1, step_size=40)
    for u in range(3):
        w = net.conv.weight[u].detach().double().permute(1, 2, 0).numpy()
        gradient = w if space == "input" else w / std / 255
        network_input = start if space == "input" else (start / 255 - mean) / std
        assert result.history[0, u] == pytest.approx((w * network_input).sum(), rel=1e-5, abs=1e-4)
        expected_pixels = start + 40 * gradient / (np.sqrt((gradient**2).mean()) + 1e-5)
        image = reference_deprocess(expected_pixels)
        # Truncated to integers; float32 may round to the other side.
        assert np.abs(result.images[u] - np.floor(image + 1e-3)).max() <= (np.abs(image % 1 - 0.5) > 0.499).any()
        final = result.images[u].astype(np.float64)
        network_input = final if space == "input" else (final / 255 - mean) / std
        assert result.scores[u] == pytest.approx((w * network_input).sum(), rel=1e-5, abs=1e-4)
        # From a constant image, which shows nothing but the step, the result is the weight.
        gray = convscope.patterns(
            model, "conv", [u], recipe="plain", space=space, start=np.full((5, 5, 3), 128.0), steps=1
        )
        direction = np.corrcoef(gray.images[0].ravel(), gradient.ravel())[0, 1]
        assert direction > 0.995  # the difference is clipping and rounding to 8 bits


def test_deprocess_image_by_hand() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(100, [[[[1]]], [[[30]]], [[[4000]]]], (3, 3, 20, 30))
    pixels[0, :, 0, 0] = 1e4  # a clipped pixel
    flat = np.full((1, 3, 20, 30), 17.0)
    all_pixels = np.concatenate([pixels, flat])
    actual = deprocess_image(torch.from_numpy(all_pixels))
    assert actual.dtype == torch.uint8
    for n, image in enumerate(all_pixels):
        assert np.array_equal(
            actual[n].permute(1, 2, 0), reference_deprocess(image.transpose(1, 2, 0)).astype(np.uint8)
        )
    assert (actual[3] == 127).all()
    single = deprocess_image(torch.from_numpy(all_pixels).float())
    assert (single.int() - actual.int()).abs().max() <= 1  # float32 may round to the other side of an integer


def test_plain_recipe_is_the_notebooks_loop() -> None:
    """Forty steps through two convolutions and ReLUs, against the loop of the notebook."""
    net = randomized(SharedReluNet())
    model = load_model(net, 24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    rng = np.random.default_rng(0)
    start = rng.random((24, 24, 3), np.float32) * 20 + 128
    units = [4, 0, 6]
    for space in ("input", "pixels"):
        result = convscope.patterns(model, "relu#2", units, recipe="plain", start=start, space=space)
        assert result.images.shape == (3, 24, 24, 3)
        assert result.history.shape == (40, 3)
        for position, u in enumerate(units):
            x = torch.from_numpy(start).permute(2, 0, 1)[None].clone()
            losses = []
            for _ in range(40):
                x.requires_grad_(True)
                network_images = x if space == "input" else model.preprocessing.normalize(x / 255)
                loss = net.conv2(net.conv1(network_images).relu()).relu()[:, u].mean()
                (grads,) = torch.autograd.grad(loss, x)
                grads = grads / (grads.pow(2).mean().sqrt() + 1e-5)
                losses.append(loss.item())
                x = (x + grads).detach()
            # Forty steps amplify rounding errors.
            assert result.history[:, position] == pytest.approx(losses, rel=1e-3)
            image = reference_deprocess(x[0].permute(1, 2, 0).numpy())
            assert np.abs(result.images[position] - image).max() < 3


# --- dead starts -----------------------------------------------------------------------------------------------------


class PartlyDead(nn.Module):
    """Unit 0 is active on the start, unit 1 can become active, unit 2 cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 3, 3)
        self.relu = nn.ReLU(inplace=True)
        randomized(self)
        with torch.no_grad():
            self.conv2.weight[1] = self.conv2.weight[1].abs()
            self.conv2.bias[0], self.conv2.bias[1] = 5, -11
            self.conv2.weight[2], self.conv2.bias[2] = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.conv1(x).relu())).mean((2, 3))


def test_dead_start_is_noted_by_plain_and_solved_by_robust() -> None:
    model = load_model(PartlyDead(), 32)
    plain = convscope.patterns(model, "relu", recipe="plain", size=32)
    assert plain.scores[0] > 0
    assert not plain.history[:, 1:].any()
    assert plain.scores[1] == plain.scores[2] == 0
    assert plain.notes == tuple(
        f"unit {u} looks dead: its ReLU is off everywhere and has no gradient. recipe='robust' redirects the gradient."
        for u in (1, 2)
    )
    robust = convscope.patterns(model, "relu", size=32, steps=64)
    assert robust.history[0, 1] == 0
    assert robust.scores[0] > 0
    assert robust.scores[1] > 0
    assert robust.notes == (
        "unit 2 looks dead: no activation on the sample images or from 8 starts. It has no pattern.",
    )
    assert robust.scores[2] == 0
    # Before the ReLU, the value of the dead unit is its bias, for any image.
    before = convscope.patterns(model, "conv2", [2], size=32, steps=2)
    assert before.notes == (
        "unit 2 has a score of -1, not above the noise baseline (-1). The pattern does not show what it responds to.",
    )


def test_dead_start_stays_dead_without_redirection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive score of the test above is due to the redirection."""
    monkeypatch.setattr(sys.modules["convscope.featurevis.recipes"], "REDIRECT_STEPS", 0)
    monkeypatch.setattr(sys.modules["convscope.featurevis.recipes"], "RETRY_STEPS", 0)
    no_activations = SimpleNamespace(values=torch.zeros(3))
    monkeypatch.setattr(
        sys.modules["convscope.featurevis.api"], "max_activations", lambda *_: no_activations
    )  # nor on a photograph
    robust = convscope.patterns(load_model(PartlyDead(), 32), "relu", [1], size=32, steps=64)
    assert robust.scores[0] == 0


def test_redirection_is_independent_per_image() -> None:
    """A dead unit keeps its redirection; a live unit with an inactive inner ReLU must not be affected."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
            self.gate = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return (x + self.gate(x).relu()).relu()

    net = randomized(Gated())
    with torch.no_grad():
        net.gate.bias.fill_(-50)  # off everywhere, for every image
        net.conv.bias.fill_(3)
        net.conv.weight[2], net.conv.bias[2], net.gate.weight[2] = 0, -1, 0  # unit 2 is never active
    model = convscope.load(nn.Sequential(net), preprocessing={"size": 32})
    steps = REDIRECT_STEPS + 16
    with_dead = convscope.patterns(model, "0", [0, 2], size=32, steps=steps)
    with_live = convscope.patterns(model, "0", [0, 1], size=32, steps=steps)
    assert not with_dead.history[:, 1].any()
    assert (with_dead.history[:, 0] > 0).all()
    assert np.array_equal(with_dead.history[:, 0], with_live.history[:, 0])
    assert np.array_equal(with_dead.images[0], with_live.images[0])


def test_network_without_gradients_is_refused() -> None:
    class DetachedInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.detach()).mean((2, 3))

    model = load_model(randomized(DetachedInput()), 24)
    for recipe in ("plain", "robust"):
        with pytest.raises(ConvscopeError, match="returns no gradient to the image"):
            convscope.patterns(model, "conv", [0], recipe=recipe, size=24, steps=1)


# --- independence of the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["plain", "robust"])
@pytest.mark.parametrize("layer", ["conv1", "relu3", "logits"])
def test_result_does_not_depend_on_the_batch(layer: str, recipe: str) -> None:
    """Same seed and batch size: the same bytes, whatever the other units and their order."""
    model = load_model(randomized(SmallConvNet()), 24)

    def run(units: list[int], **options: Any) -> convscope.Patterns:
        return convscope.patterns(model, layer, units, recipe=recipe, size=32, steps=12, **options)

    first, permuted, repeated = run([3, 0, 1]), run([2, 4, 3]), run([3, 0, 1])
    for name in ("images", "scores", "history"):
        assert np.array_equal(first.arrays()[name], repeated.arrays()[name])
    assert np.array_equal(first.images[0], permuted.images[2])
    assert first.scores[0] == permuted.scores[2]
    assert np.array_equal(first.history[:, 0], permuted.history[:, 2])
    duplicates = run([1, 1])
    assert np.array_equal(duplicates.images[0], duplicates.images[1])
    # Other batch sizes: rounding, which the optimisation amplifies.
    single = run([3])
    assert single.scores[0] == pytest.approx(first.scores[0], rel=0.01)
    reseeded = run([3, 0, 1], seed=1)
    assert all((a != b).mean() > 0.5 for a, b in zip(first.images, reseeded.images, strict=True))
    assert not np.array_equal(first.images[0], first.images[1])


def test_result_does_not_depend_on_the_batch_in_a_real_network(lite0: convscope.Model) -> None:
    def run(units: list[int], **options: Any) -> convscope.Patterns:
        return convscope.patterns(lite0, "blocks.2.1.bn1", units, size=64, steps=6, **options)

    first, permuted = run([5, 77, 30]), run([30, 100, 5])
    assert np.array_equal(first.images[[0, 2]], permuted.images[[2, 0]])
    assert np.array_equal(first.scores[[0, 2]], permuted.scores[[2, 0]])
    assert first.scores == pytest.approx(run([5, 77, 30, 100, 101]).scores[:3], rel=0.01)
    assert (first.scores > first.history[0]).all()


def test_batch_size_changes_rounding_only() -> None:
    model = load_model(randomized(SmallConvNet()), 24)
    image_bytes = gradient_bytes(model, "relu2", 32 * 32)
    progress_calls: list[tuple[int, int]] = []
    single_batch = convscope.patterns(model, "relu2", range(6), size=32, steps=10)
    chunked = convscope.patterns(
        model,
        "relu2",
        range(6),
        size=32,
        steps=10,
        memory=int(3 * image_bytes),
        progress=lambda *t: progress_calls.append(t),
    )
    assert progress_calls == [(i, 20) for i in range(1, 21)]
    assert chunked.scores == pytest.approx(single_batch.scores, rel=0.01)  # guaranteed: 1 % for other batch sizes
    assert chunked.history[0] == pytest.approx(single_batch.history[0], rel=1e-5)
    first_three = convscope.patterns(model, "relu2", range(3), size=32, steps=10)
    assert np.array_equal(chunked.images[:3], first_three.images)
    starts = np.random.default_rng(0).uniform(0, 255, (6, 32, 32, 3))
    chunked_plain, single_plain = (
        convscope.patterns(model, "relu2", range(6), recipe="plain", start=starts, steps=2, memory=m)
        for m in (int(2 * image_bytes), 1 << 30)
    )
    assert chunked_plain.scores == pytest.approx(single_plain.scores, rel=0.01)


@pytest.mark.parametrize("recipe", ["plain", "robust"])
def test_zero_steps(recipe: str) -> None:
    model = load_model(randomized(SmallConvNet()), 24)
    progress_calls: list[Any] = []
    result = convscope.patterns(
        model, "conv1", [2, 5], recipe=recipe, steps=0, size=40, progress=lambda *t: progress_calls.append(t)
    )
    assert progress_calls == []
    assert result.history.shape == (0, 2)
    assert result.images.shape == (2, 40, 40, 3)
    assert result.scores == pytest.approx(reference_scores(model, "conv1", result), rel=1e-5)
    assert not np.array_equal(result.images[0], result.images[1])
    if recipe == "plain":
        start = np.random.default_rng(0).uniform(0, 255, (40, 40, 3))
        untouched = convscope.patterns(model, "conv1", [2], recipe="plain", steps=0, start=start)
        assert np.abs(untouched.images[0] - reference_deprocess(start)).max() <= 1 + 1e-3  # truncated to integers


def reference_scores(model: convscope.Model, layer: str, result: convscope.Patterns) -> list[float]:
    """Return each unit's mean activation on its finished 8-bit image, captured by a hook of the test."""
    x = model.preprocessing.normalize(torch.from_numpy(result.images).permute(0, 3, 1, 2) / 255)
    captured: list[Tensor] = []
    module = model.module if layer == "logits" else model.module.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, output: captured.append(output.clone()))
    with torch.no_grad():
        model.module(x)
    handle.remove()
    return [float(captured[0][i, u].mean()) for i, u in enumerate(result.units)]


@pytest.mark.parametrize("recipe", ["plain", "robust"])
@pytest.mark.parametrize("layer", ["conv1", "relu2", "fc", "logits"])
def test_scores_are_of_the_finished_image(layer: str, recipe: str) -> None:
    model = load_model(randomized(SmallConvNet()), 24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    result = convscope.patterns(model, layer, [0, 4], recipe=recipe, size=(32, 40), steps=10)
    assert result.images.dtype == np.uint8
    assert result.images.shape == (2, 32, 40, 3)
    # Rounding in another memory layout.
    assert result.scores == pytest.approx(reference_scores(model, layer, result), rel=1e-4, abs=1e-5)
    assert (result.history[-1] > result.history[0]).all()


# --- image, transforms, objective ------------------------------------------------------------------------------------


def test_objective_is_averaged_over_views() -> None:
    """The value of the first step, computed from the initial image and the views of the units' generators."""
    net = randomized(SmallConvNet())
    model = load_model(net, 56)
    result = convscope.patterns(model, "logits", [3, 1], views=3, steps=2, seed=4)
    generators = [Generator().manual_seed((4 * 1_000_003 + u * 7919 + 1) % (1 << 63)) for u in (3, 1)]
    canvas = FourierImage(generators, 3, (56, 56), CPU)
    transform = random_affine(AugmentationConfig((0.5, 1), 10, (32, 32)), 3, generators, CPU)
    with torch.no_grad():
        images = canvas.images((32, 32))
        values = [net(model.preprocessing.normalize(transform(k, images)))[[0, 1], [3, 1]] for k in range(3)]
    assert relative_error(result.history[0], torch.stack(values).mean(0)) < 1e-5  # sums in another memory layout
    assert result.parameters()["views"] == 3
    assert not np.array_equal(result.images, convscope.patterns(model, "logits", [3, 1], steps=2, seed=4).images)


def test_default_canvas_sizes() -> None:
    assert plain_size(3, (224, 224), True) == (150, 150)
    assert plain_size(3, (28, 28), False) == (28, 28)
    assert robust_size(5, (224, 224), True) == (64, 64)
    assert robust_size(30, (224, 224), True) == (96, 96)  # 90, rounded up to a multiple of 8
    assert robust_size(200, (224, 192), True) == (224, 192)
    assert robust_size(None, (224, 192), True) == (224, 192)
    assert robust_size(5, (28, 28), True) == (28, 28)
    assert robust_size(5, (224, 224), False) == (224, 224)


@pytest.mark.parametrize(("size", "view_sides"), [(24, (24, 24, 24)), (40, (32, 32, 34)), (112, (40, 56, 96))])
def test_progressive_view_sizes(size: int, view_sides: tuple[int, ...]) -> None:
    """5/14, 7/14 and 12/14 of the canvas, at least 32 pixels, at most the canvas."""
    net = randomized(SmallConvNet())
    model = load_model(net, size)
    input_shapes: list[tuple[int, ...]] = []
    net.conv1.register_forward_pre_hook(lambda _, args: input_shapes.append(tuple(args[0].shape)))
    convscope.patterns(model, "logits", [0, 1], steps=3)
    # Three steps, the finished image, and the noise baseline.
    assert input_shapes[-5:] == [(2, 3, side, side) for side in view_sides] + [
        (2, 3, size, size),
        (8, 3, size, size),
    ]


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named_model() -> convscope.Model:
    return convscope.load(
        randomized(SmallConvNet()), preprocessing={"size": 24}, classes=["ant", "bee", "cow", "cow", "elk"]
    )


@pytest.mark.parametrize(
    ("layer", "units", "expected"),
    [
        ("relu2", 3, [3]),
        ("relu2", np.int64(3), [3]),
        ("relu2", [5, 1, 5], [5, 1, 5]),
        ("relu2", range(2), [0, 1]),
        ("relu2", np.array([4, 2]), [4, 2]),
        ("relu2", (u for u in (7, 8)), [7, 8]),
        ("relu2", None, list(range(12))),
        ("logits", None, list(range(5))),
        ("logits", "Ant", [0]),
        ("logits", ["elk", 1], [4, 1]),
        ("relu2#1", 0, [0]),
    ],
)
def test_accepted_units(named_model: convscope.Model, layer: str, units: Any, expected: list[int]) -> None:
    result = convscope.patterns(named_model, layer, units, steps=0, size=24)
    assert result.units.tolist() == expected
    assert len(result.images) == len(expected)
    names = ["ant", "bee", "cow", "cow", "elk"] if layer == "logits" else [f"relu2 {u}" for u in range(12)]
    assert result.names == [names[u] for u in expected]


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("relu2", {"units": 12}, "unit 12 is not in layer 'relu2', which has 12 units, 0 to 11"),
        ("relu2", {"units": -1}, "unit -1 is not in layer"),
        ("relu2", {"units": 1.0}, None),
        ("relu2", {"units": [1.5]}, "unit 1.5 is not in layer"),
        ("relu2", {"units": [True]}, "unit True is not in layer"),
        ("relu2", {"units": "3"}, "unit '3' is not in layer"),
        ("relu2", {"units": []}, "no units were given"),
        ("logits", {"units": 5}, "class 5 is out of range"),
        ("logits", {"units": [1.5]}, "class 1.5 is neither an index nor a name"),
        ("logits", {"units": [True]}, "class True is neither an index nor a name"),
        ("logits", {"units": "cow"}, r"several classes: \[2, 3\]"),
        ("logits", {"units": "bees"}, "nearest: bee"),
        ("relu22", {}, "layer 'relu22' is not in this model; nearest: relu2"),
        ("relu2", {"recipe": "robustt"}, "recipe 'robustt' is not known; nearest: robust"),
        ("relu2", {"space": "output"}, "space 'output' is not known"),
        ("relu2", {"start": np.zeros((9, 9, 3))}, "recipe 'robust' takes no start image; leave out start="),
        ("relu2", {"space": "input"}, "space='input' is for recipe='plain'; the images of 'robust' need"),
        ("relu2", {"recipe": "dream"}, "recipe 'dream' needs a photograph; give one as start="),
        ("relu2", {"recipe": "plain", "views": 2}, "recipe 'plain' uses no random views; leave out views="),
        ("relu2", {"views": 0}, "views is 0; expected a whole number, 1 or more"),
        ("relu2", {"steps": -1}, "steps is -1; expected a whole number, 0 or more"),
        ("relu2", {"size": 0}, "size is 0; expected pixels"),
        ("relu2", {"size": (1, 1)}, r"does not run on images of 1 x 1 \(RuntimeError: .*\); its own size is 24 x 24"),
        ("relu2", {"recipe": "plain", "start": np.zeros((9, 9))}, r"start has shape \(9, 9\); expected \(H, W, 3\)"),
        ("relu2", {"recipe": "plain", "start": np.zeros((5, 9, 9, 3))}, r"start has shape \(5, 9, 9, 3\)"),
        ("relu2", {"recipe": "plain", "start": torch.zeros(1, 9, 9, 3)}, r"or a tensor \(12, 3, H, W\)"),
        ("relu2", {"recipe": "plain", "start": np.full((9, 9, 3), np.nan)}, "start contains NaN"),
    ],
)
def test_refused(named_model: convscope.Model, layer: str, options: dict[str, Any], message: str | None) -> None:
    with pytest.raises(ConvscopeError if message else (ConvscopeError, TypeError), match=message):
        convscope.patterns(named_model, layer, **options)


def test_start_as_array_list_or_tensor(named_model: convscope.Model) -> None:
    """All forms give the same images, and the user's tensor does not change."""
    start = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    batch = np.stack([start] * 2)
    tensor = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
    original = tensor.clone()
    results = [
        convscope.patterns(named_model, "conv2", [0, 1], recipe="plain", start=start_form, steps=3)
        for start_form in (start, batch, start[None], tensor, tensor[:1], start.tolist())
    ]
    for result in results:
        assert result.images.shape == (2, 30, 20, 3)
        assert np.array_equal(result.images, results[0].images)
    assert torch.equal(tensor, original)
    different = batch.copy()
    different[1] = 255 - different[1]
    result = convscope.patterns(named_model, "conv2", [0, 1], recipe="plain", start=different, steps=3)
    assert np.array_equal(result.images[0], results[0].images[0])
    assert not np.array_equal(result.images[1], results[0].images[1])
    assert result.seed == 0
    seeded = convscope.patterns(named_model, "conv2", [0, 1], recipe="plain", start=start, steps=3, seed=5)
    assert np.array_equal(seeded.images, results[0].images)  # no random numbers are used with a start


class PositionSensitive(nn.Module):
    """Unit 0 is active only on images with a dark left and a bright right half, which few views preserve."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 32, bias=True)
        with torch.no_grad():
            halves = torch.cat([-torch.ones(32, 16), torch.ones(32, 16)], dim=1)
            self.conv.weight.copy_(torch.stack([halves, torch.ones(32, 32)])[:, None] / 1024)
            self.conv.bias.copy_(torch.tensor([-0.3, 0.0]))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)).mean((2, 3))


def test_unit_inactive_under_transforms_is_retried_without() -> None:
    """Flips make the unit inactive in views; the other unit of the batch is not affected."""
    model = load_model(PositionSensitive(), 32, channels=1)
    result = convscope.patterns(model, "relu", [0, 1], size=32, steps=32)
    assert result.scores[0] > 0
    assert not result.history[:, 0].any()
    assert "not on any shifted or scaled view" in result.notes[0]
    repeated_unit = convscope.patterns(model, "relu", [1, 1], size=32, steps=32)
    np.testing.assert_array_equal(result.images[1], repeated_unit.images[0])


def test_only_inactive_units_are_retried() -> None:
    """Other units are not run again; a single retried unit is run twice, to avoid a batch of one."""
    model, passes = load_model(PositionSensitive(), 32, channels=1), []
    handle = model.module.relu.register_forward_hook(lambda _, __, output: passes.append(len(output)))
    result = convscope.patterns(model, "relu", [1, 0, 1], size=32, steps=32)
    handle.remove()
    assert (result.scores > 0).all()
    assert passes.count(3) == 32 + 2  # each step, and the finished images before and after the retry
    assert passes.count(2) >= DEAD_AFTER_STEPS
    in_another_batch = convscope.patterns(model, "relu", [1, 0, 0], size=32, steps=32)
    assert np.array_equal(in_another_batch.images[1], result.images[1])


def test_size_and_start_together_are_refused() -> None:
    with pytest.raises(ConvscopeError, match="size= and start= were both given"):
        convscope.patterns(
            load_model(PositionSensitive(), 32, channels=1),
            "relu",
            [0],
            recipe="plain",
            size=32,
            start=np.zeros((32, 32, 1)),
        )
