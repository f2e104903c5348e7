"""From pictures to maps: how many passes it takes, what is fused and averaged, what methods are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import Model
from convscope.attribution.api import compute_heatmaps, resolve_method
from convscope.attribution.context import MethodContext
from convscope.attribution.registry import METHODS, CamMethod, ModelMethod
from tests.oracles.nets import Aside, Usual, filled

SIZE = 24
TINY = 1e-6  # float32 rounds at 6e-8; sums of a few hundred products, in another order
BATCHES = 1e-5  # the engine's promise for other batch sizes
CAMS = [name for name in METHODS if isinstance(METHODS[name], CamMethod)]
ANYWHERE = [name for name in CAMS if name != "cam"]


def loaded(net: nn.Module) -> Model:
    return convscope.load(net, preprocessing={"size": SIZE})


def inputs(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn((count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


def apart(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def maps(model: Model, x: Tensor, targets: Any = None, **given: Any) -> np.ndarray:
    return convscope.heatmaps(model, x, targets, **given).values


def several(model: Model, x: Tensor, targets: Any, *cells: tuple[str, Any], fuse: str = "mean", **given: Any) -> Any:
    return compute_heatmaps(
        model, x, targets, [resolve_method(model, method, layer, fuse, {}) for method, layer in cells], **given
    )


class Counted(Usual):
    """Counts its forward passes, and the backward passes that come by between its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards, self.backwards = [], 0
        outer = self

        class Passing(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Tensor:
                outer.backwards += 1
                return gradients[0]

        self.passing = Passing

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(len(x))
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.conv2(x))
        x = self.passing.apply(self.bn3(self.conv3(x)))
        return self.fc(self.relu3(x).mean((2, 3)))


@pytest.fixture
def counted() -> tuple[Model, Counted]:
    net = Counted()
    model = loaded(filled(net))
    net.forwards.clear()
    return model, net


@pytest.fixture(scope="module")
def usual() -> Model:
    return loaded(filled(Usual()))


# --- no wasted work --------------------------------------------------------------------------------------------------


def test_all_methods_at_all_layers_in_one_pass(counted: tuple[Model, Counted]) -> None:
    """One forward, one backward for what asks for the target itself, one for the contrast of finer-cam."""
    model, net = counted
    cells = [(method, layer) for layer in ("relu1", "conv2", "conv3") for method in ANYWHERE]
    cells += [("grad-cam", ["conv1", "conv3"])]
    found = several(model, inputs(), [[0, 1, 2]] * 3, *cells)
    assert net.forwards == [3]
    assert net.backwards == 2
    for result, (method, layer) in zip(found, cells, strict=True):
        alone = convscope.heatmaps(model, inputs(), [[0, 1, 2]] * 3, method=method, layer=layer)
        assert apart(result.values, alone.values) < TINY
        assert (result.method, result.layer) == (alone.method, alone.layer)
        assert np.array_equal(result.logits, alone.logits)
        assert result.settings == alone.settings


def test_one_backward_pass_whatever_the_targets(counted: tuple[Model, Counted]) -> None:
    model, net = counted
    maps(model, inputs(), [[0, 1, 2, 3, 4]] * 3, layer="conv1")
    assert (net.forwards, net.backwards) == ([3], 1)
    maps(model, inputs(), layer="relu3")
    assert (net.forwards, net.backwards) == ([3, 3], 1)  # behind the layer nothing of it is left


def test_little_memory_takes_targets_and_pictures_one_by_one(counted: tuple[Model, Counted]) -> None:
    model, net = counted
    for method in ANYWHERE:
        whole = maps(model, inputs(), [[0, 1, 2]] * 3, method=method, layer="relu2")
        net.forwards.clear()
        net.backwards = 0
        parts = maps(model, inputs(), [[0, 1, 2]] * 3, method=method, layer="relu2", memory=1)
        expected = 0 if method == "eigen-cam" else 9  # it needs none
        assert (net.forwards, net.backwards) == ([1, 1, 1], expected)
        assert apart(parts, whole) < BATCHES


@pytest.mark.parametrize("memory", [1 << 16, 1 << 18, 1 << 20])
def test_any_memory_gives_the_same(usual: Model, memory: int) -> None:
    whole = maps(usual, inputs(5), [[0, 1, 2, 3, 4]] * 5, layer="conv1")
    assert apart(maps(usual, inputs(5), [[0, 1, 2, 3, 4]] * 5, layer="conv1", memory=memory), whole) < BATCHES


def test_backward_pass_that_looks_at_its_numbers_takes_targets_one_by_one() -> None:
    """A user's own operation with a branch on values cannot go back for several targets at once."""

    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradients[0] * (x > 0) if bool((gradients[0] != 0).any()) else gradients[0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(Looking.apply(self.conv(x)).mean((2, 3)))

    model = loaded(filled(Net()))
    together = maps(model, inputs(), [[0, 1, 4]] * 3, layer="conv")
    alone = np.concatenate([maps(model, inputs(), t, layer="conv") for t in (0, 1, 4)], axis=1)
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("method", CAMS)
def test_batch_is_its_pictures(usual: Model, method: str) -> None:
    layer = None if method == "cam" else "conv2"
    together = maps(usual, inputs(), method=method, layer=layer)
    turned = maps(usual, inputs().flip(0), method=method, layer=layer)
    assert np.array_equal(together, turned[::-1])
    for n in range(3):
        assert apart(maps(usual, inputs()[n : n + 1], method=method, layer=layer), together[n : n + 1]) < BATCHES


# --- several layers --------------------------------------------------------------------------------------------------


def stretched(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Linear interpolation along each axis, pixels being areas."""
    for axis, count in enumerate(size):
        have = values.shape[axis]
        at = (np.arange(count) + 0.5) * have / count - 0.5
        values = np.apply_along_axis(lambda line, at=at, n=have: np.interp(at, np.arange(n), line), axis, values)
    return values


FUSED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda stack: stack.mean(0),
    "max": lambda stack: stack.max(0),
    "product": lambda stack: np.maximum(stack, 0).prod(0) ** (1 / len(stack)),
}


@pytest.mark.parametrize("method", ["grad-cam", "layer-cam", "eigen-cam"])
@pytest.mark.parametrize("fuse", FUSED)
def test_fused_by_hand(usual: Model, fuse: str, method: str) -> None:
    """24 x 24 and 12 x 12: each divided by its largest absolute value, brought to the finest, then fused."""
    layers = ["conv2", "conv1", "relu3"]
    parts = [maps(usual, inputs(), [[0, 3]] * 3, layer=name, method=method).astype(np.float64) for name in layers]
    expected = np.zeros((3, 2, 24, 24))
    for n, t in np.ndindex(3, 2):
        units = [part[n, t] / np.abs(part[n, t]).max() for part in parts]
        expected[n, t] = FUSED[fuse](np.stack([stretched(unit, (24, 24)) for unit in units]))
    found = convscope.heatmaps(usual, inputs(), [[0, 3]] * 3, layer=layers, method=method, fuse=fuse)
    assert found.layer == "conv2 + conv1 + relu3"
    assert found.settings["fuse"] == fuse
    # The root of a product near nought is steep.
    assert apart(found.values, expected) < (1e-4 if fuse == "product" else BATCHES)


def test_one_layer_stays_raw_and_twice_is_once(usual: Model) -> None:
    once = maps(usual, inputs(), layer="conv2")
    for layers in (["conv2"], ("conv2", "conv2"), ["conv2#1", "conv2"]):
        found = convscope.heatmaps(usual, inputs(), layer=layers, fuse="product")
        assert found.layer == "conv2"
        assert "fuse" not in found.settings
        assert np.array_equal(found.values, once)


def test_layer_without_influence_beside_one_with() -> None:
    model = loaded(filled(Aside()))
    used = maps(model, inputs(), [[0, 1]] * 3, layer="used")
    found = maps(model, inputs(), [[0, 1]] * 3, layer=["aside", "used"])
    assert apart(found, used / np.abs(used).max((2, 3), keepdims=True) / 2) < TINY


# --- smoothing -------------------------------------------------------------------------------------------------------


def test_flips_by_hand() -> None:
    """The mirror image is asked about the class of the picture itself, whatever its own top class is."""
    net = filled(nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5)))
    model, x = loaded(net), inputs(6)
    found = convscope.heatmaps(model, x, smooth="flips", layer="0")
    assert found.settings["smooth"] == "flips"
    plain = convscope.heatmaps(model, x, layer="0")
    assert np.array_equal(found.targets, plain.targets)
    assert np.array_equal(found.logits, plain.logits)
    assert not np.array_equal(convscope.predict(model, x.flip(-1), top=1).indices, plain.targets)
    other = maps(model, x.flip(-1), plain.targets, layer="0")
    assert apart(found.values, (plain.values + other[..., ::-1]) / 2) < TINY


def test_flips_change_nothing_for_what_does_not_know_left_from_right() -> None:
    net = filled(Usual())
    with torch.no_grad():
        for conv in (net.conv1, net.conv2, net.conv3):
            conv.weight.add_(conv.weight.flip(-1).clone())
    model = loaded(net)
    for method in CAMS:
        assert apart(maps(model, inputs(), method=method, smooth="flips"), maps(model, inputs(), method=method)) < 1e-4


def test_noise_by_hand(usual: Model) -> None:
    """Eight copies and the picture; noise of a tenth of its own range, the same draws for every picture."""
    x = inputs() * torch.tensor([1.0, 10, 0.1]).reshape(3, 1, 1, 1)
    draw = torch.Generator().manual_seed(5)
    plain = convscope.heatmaps(usual, x, layer="conv2")
    total = plain.values.astype(np.float64)
    for _ in range(8):
        noise = torch.randn((3, SIZE, SIZE), generator=draw)
        copies = torch.stack([one + 0.1 * (one.max() - one.min()) * noise for one in x])
        total += maps(usual, copies, plain.targets, layer="conv2")
    found = convscope.heatmaps(usual, x, smooth="noise", seed=5, layer="conv2")
    assert np.array_equal(found.targets, plain.targets)
    assert apart(found.values, total / 9) < BATCHES
    again = maps(usual, x[[2, 0, 1]], smooth="noise", seed=5, layer="conv2")
    assert np.array_equal(again, found.values[[2, 0, 1]])
    assert apart(maps(usual, x, smooth="noise", seed=6, layer="conv2"), found.values) > 0.01


# --- methods that ask for themselves ---------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[MethodContext]:
    """Two methods that note what they are asked; one looks at a layer, one at the input."""
    questions: list[MethodContext] = []

    def at_layer(question: MethodContext, *, factor: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
        questions.append(question)
        question.report_progress(0.5)
        mean = question.layer_activations().mean(1, keepdim=True).expand(-1, question.num_targets, -1, -1)
        return factor * mean, {"error": question.x.flatten(1).mean(1)}

    def at_input(question: MethodContext) -> Tensor:
        questions.append(question)
        return question.x[:, :1].expand(-1, question.num_targets, -1, -1)

    monkeypatch.setitem(METHODS, "at-layer", ModelMethod(at_layer, at_input=False))
    monkeypatch.setitem(METHODS, "at-input", ModelMethod(at_input))
    return questions


def test_what_a_method_is_asked_and_what_it_finds(usual: Model, asked: list[MethodContext]) -> None:
    found = convscope.heatmaps(usual, inputs(), [[0, 1]] * 3, method="at-layer", layer="conv2", factor=3.0, seed=4)
    mean = convscope.activations(usual, inputs(), "conv2")["conv2"].mean(1, keepdims=True)
    assert apart(found.values, np.repeat(3 * mean, 2, axis=1)) < TINY
    assert found.settings["factor"] == 3.0
    assert apart(found.extras["error"], inputs().flatten(1).mean(1)) < 1e-4
    assert apart(found.arrays()["error"], found.extras["error"]) == 0
    (question,) = asked
    assert question.layer is not None
    assert (question.layer.name, question.seed, question.num_targets) == ("conv2", 4, 2)
    at_input = convscope.heatmaps(usual, inputs(), [[0, 1]] * 3, method="at-input", smooth="flips")
    assert at_input.layer == "input"
    assert apart(at_input.values, inputs()[:, [0, 0]]) < TINY  # the mirror image is turned back
    both = convscope.heatmaps(usual, inputs(), method="at-layer", layer=["conv1", "conv2"])
    assert both.extras == {}  # what belongs to one layer is not that of the fused map
    assert [question.layer.name for question in asked[-2:] if question.layer] == ["conv1", "conv2"]


def test_mixed_cells_keep_to_themselves(usual: Model, asked: list[MethodContext]) -> None:
    cells = [("at-layer", "conv2"), ("grad-cam", "relu1"), ("at-input", None), ("finer-cam", "conv3")]
    for result, (method, layer) in zip(several(usual, inputs(), 1, *cells), cells, strict=True):
        assert apart(result.values, maps(usual, inputs(), 1, method=method, layer=layer)) < TINY
    assert len(asked) == 4


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [None, "flips", "noise"])
def test_progress_rises_to_the_end(usual: Model, asked: list[MethodContext], smooth: str | None) -> None:
    told: list[tuple[float, int]] = []

    def note(done: float, whole: int) -> None:
        told.append((done, whole))

    pictures = [np.zeros((9, 9, 3), np.uint8), "missing.png", np.full((9, 9, 3), 99, np.uint8)]
    cells = [("grad-cam", None), ("at-layer", ["conv1", "conv2"]), ("hirescam", "conv1")]
    several(usual, pictures, 0, *cells, smooth=smooth, progress=note, memory=1)
    done = [value for value, _ in told]
    assert {whole for _, whole in told} == {3}
    assert done == sorted(done)
    assert done[-1] == pytest.approx(3)
    assert len(set(done)) > 4
