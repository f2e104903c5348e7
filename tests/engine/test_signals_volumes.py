"""Networks on signals (N, C, L) and volumes (N, C, D, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError, Model, Preprocessing
from convscope.engine import capture
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from tests.engine.receptive_fields import FunctionNet, check_receptive_fields


def load_model(net: nn.Module, size: tuple[int, ...], channels: int = 3) -> Model:
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return convscope.load(net.eval(), preprocessing={"size": size, "channels": channels})


def random_batch(size: tuple[int, ...], count: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn((count, channels, *size), generator=torch.Generator().manual_seed(seed))


def conv1(kernel: int = 3, channels: int = 1, **options: int) -> nn.Conv1d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv1d(channels, channels, kernel, **options)


def causal(net: FunctionNet, x: Tensor) -> Tensor:
    """As in WaveNet: each position depends on earlier ones only."""
    return net.b(F.pad(net.a(F.pad(x, (2, 0))), (4, 0))) + x


SIGNALS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(
        nn.Conv1d(1, 2, 5, 2, 1), nn.BatchNorm1d(2), nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.Conv1d(2, 2, 3, dilation=2)
    ),
    "pools": lambda: nn.Sequential(
        nn.AvgPool1d(2), conv1(4, stride=2), nn.MaxPool1d(3, 1, ceil_mode=True), nn.AvgPool1d(3, 2)
    ),
    "adaptive": lambda: nn.Sequential(conv1(), nn.AdaptiveAvgPool1d(10), conv1(), nn.AdaptiveMaxPool1d(5)),
    "causal": lambda: FunctionNet(causal, a=conv1(padding=0), b=conv1(padding=0, dilation=2)),
    "channels behind": lambda: FunctionNet(
        lambda net, x: net.b(net.norm(net.a(x).transpose(1, 2)).transpose(1, 2)),
        a=nn.Conv1d(1, 4, 3, stride=2),
        norm=nn.LayerNorm(4),
        b=nn.Conv1d(4, 2, 3),
    ),
    "residual": lambda: FunctionNet(lambda net, x: net.a(x) + net.b(x[:, :, 1::2]), a=conv1(7, stride=2), b=conv1()),
}
VOLUMES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "chain": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, (3, 2, 3), (1, 2, 1), 1),
            nn.BatchNorm3d(2),
            nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(2, 1, (2, 1, 2)),
            nn.AvgPool3d(2, 1),
        ),
        (6, 8, 9),
    ),
    "time and space": (  # R(2+1)D
        lambda: nn.Sequential(nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(2, 1, (3, 1, 1), (2, 1, 1))),
        (6, 8, 9),
    ),
    "adaptive": (lambda: nn.Sequential(nn.Conv3d(1, 1, 1), nn.AdaptiveAvgPool3d((2, 4, 3))), (4, 8, 6)),
    "adaptive max": (lambda: nn.Sequential(nn.AdaptiveMaxPool3d((2, 4, 3)), nn.Conv3d(1, 1, 2)), (4, 8, 6)),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_match_brute_force(name: str) -> None:
    table = check_receptive_fields(SIGNALS[name](), (40,), cropped=name == "residual")
    assert all(len(entry.shape) == 2 and len(entry.receptive_field) == 1 for entry in table if entry.is_spatial)
    assert table[-1].is_spatial
    assert table[-1].receptive_field[0] > 3
    assert not table[-1].has_global_context


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes_match_brute_force(name: str) -> None:
    build, size = VOLUMES[name]
    table = check_receptive_fields(build(), size)
    assert all(len(entry.shape) == 4 and len(entry.receptive_field) == 3 for entry in table)


@pytest.mark.parametrize("size", [(40,), (5, 6, 7)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resampled_signals_and_volumes_are_bounded(size: tuple[int, ...], mode: str) -> None:
    conv, mode = (conv1(), mode) if len(size) == 1 else (nn.Conv3d(1, 1, 3, padding=1), mode.replace("lin", "trilin"))
    table = check_receptive_fields(
        nn.Sequential(conv, nn.Upsample(scale_factor=2, mode=mode)), size, slack=2, change="bump"
    )
    assert table["1"].shape[1:] == tuple(2 * side for side in size)
    assert table["1"].stride == (0.5,) * len(size)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_reflected_borders_count_as_a_continued_signal(mode: str) -> None:
    for kind, size in ((nn.Conv1d, (20,)), (nn.Conv3d, (6, 6, 6))):
        table = check_receptive_fields(nn.Sequential(kind(1, 1, 5, padding=2, padding_mode=mode)), size)
        assert table["0"].receptive_field == (5,) * len(size)


class SignalNet(nn.Module):
    """A network on 2 channels of 32 values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.Conv1d(4, 6, 3, padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool1d(1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv2(self.conv1(x).relu())).flatten(1))


class VolumeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 6, 3, stride=(1, 2, 2), padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool3d(1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv2(self.conv1(x).relu())).flatten(1))


def test_layer_table_of_a_network_on_signals() -> None:
    table = load_model(SignalNet(), (32,), 2).layers
    assert [(entry.name, entry.shape, entry.units, entry.is_spatial) for entry in table] == [
        ("conv1", (4, 16), 4, True),
        ("conv2", (6, 16), 6, True),
        ("pool", (6, 1), 6, False),
        ("fc", (3,), 3, False),
    ]
    assert (table["conv1"].receptive_field, table["conv1"].stride, table["conv1"].origin) == ((5,), (2,), (-2,))
    assert table["conv2"].receptive_field == (5 + 2 * 2,)
    assert table.last_spatial().name == "conv2"
    assert "4 x 16" in str(table)
    lines = str(load_model(VolumeNet(), (5, 8, 6), 1).layers.all).splitlines()
    assert " ".join(lines[2].split()) == "conv2 Conv3d 6 x 5 x 4 x 3 6 5 1 x 2 x 2 654"


def test_activations_of_signals_by_hand() -> None:
    model = load_model(SignalNet(), (32,), 2)
    x = random_batch((32,), 3, 2)
    assert convscope.activations(model, x).layers == ["conv2"]  # the last of this resolution
    result = convscope.activations(model, x, ["conv1", "conv2"])
    assert result["conv1"].shape == (3, 4, 16)
    weight, bias = model.module.conv1.weight.detach().numpy(), model.module.conv1.bias.detach().numpy()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2)))
    for position in range(16):
        window = padded[:, :, 2 * position : 2 * position + 5]
        expected = np.einsum("nck,uck->nu", window, weight) + bias
        np.testing.assert_allclose(result["conv1"][:, :, position], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(convscope.predict(model, x).logits, model.module(x), rtol=1e-4, atol=1e-5)


def test_one_signal_is_a_batch_of_one() -> None:
    model = load_model(SignalNet(), (32,), 2)
    x = random_batch((32,), 5, 2)
    logits = convscope.predict(model, x).logits
    np.testing.assert_allclose(convscope.predict(model, x[3]).logits, logits[3:4], rtol=1e-4, atol=1e-6)
    spoilt = x.clone()
    spoilt[1, 0, 7] = float("nan")
    actual = convscope.predict(model, spoilt)
    assert [str(failure) for failure in actual.failed] == ["image 1: holds NaN or infinity"]
    np.testing.assert_allclose(actual.logits, logits[[0, 2, 3, 4]], rtol=1e-4, atol=1e-6)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "signals": (SignalNet, (32,), 2),
    "volumes": (VolumeNet, (5, 8, 6), 1),
}


@pytest.mark.parametrize("name", NETS)
def test_gradients_in_signals_and_volumes(name: str) -> None:
    build, size, channels = NETS[name]
    model = load_model(build(), size, channels)
    with capture.capture_layers(model, ["conv2"], detach_at_layer=True) as run:
        result = run(random_batch(size, 2, channels))
        (actual,) = torch.autograd.grad(result.logits[:, 1].sum(), result.maps["conv2"])
    positions = actual[0, 0].numel()
    expected = (model.module.fc.weight[1] / positions).view(1, -1, *[1] * len(size)).expand_as(actual)
    torch.testing.assert_close(actual, expected.detach())


@pytest.mark.parametrize("name", NETS)
def test_results_without_images_are_saved(name: str, tmp_path: Path) -> None:
    build, size, channels = NETS[name]
    model = load_model(build(), size, channels)
    x = random_batch(size, 2, channels)
    result = convscope.activations(model, x)
    result.save(tmp_path / "activations")
    assert sorted(path.name for path in (tmp_path / "activations").iterdir()) == ["arrays.npz", "manifest.json"]
    with np.load(tmp_path / "activations" / "arrays.npz") as saved:
        np.testing.assert_array_equal(saved["conv2"], result["conv2"])
    with pytest.raises(ConvscopeError, match="none of these layers has maps to draw"):
        result.figure()
    convscope.predict(model, x).save(tmp_path / "predictions")
    with pytest.raises(ConvscopeError, match="not images"):
        convscope.patterns(model, "conv1", [0])


def test_networks_on_volumes_load_from_a_factory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Five-dimensional kernels have no channels-last format."""
    (tmp_path / "of_volumes.py").write_text("from tests.engine.test_signals_volumes import VolumeNet as make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = convscope.load("of_volumes:make", preprocessing={"size": (5, 8, 6), "channels": 1})
    assert model.layers["conv2"].shape == (6, 5, 4, 3)
    assert convscope.predict(model, random_batch((5, 8, 6), 1, 1)).logits.shape == (1, 3)


def test_preprocessing_of_signals_and_volumes() -> None:
    signal = Preprocessing.of({"size": (1000,), "mean": [1, 2], "std": 4, "channels": 2})
    assert (signal.size, signal.mean, signal.std, signal.channel_order) == ((1000,), (1, 2), (4, 4), "channels")
    assert Preprocessing.of(signal.as_dict()) == signal
    assert str(signal) == "1000 with 2 channels, 0..1, mean 1 2, std 4"
    assert Preprocessing.of({"size": [16, 32, 32]}).channels == 1
    assert Preprocessing.of({"size": (8, 9, 10), "channels": 3}).channel_order == "channels"
    assert Preprocessing.of({"size": 1000}).size == Preprocessing(size=1000).size == (1000, 1000)
    x = random_batch((7,), 2, 2)
    expected = (x - torch.tensor([1.0, 2.0])[:, None]) / 4
    assert torch.allclose(signal.normalize(x), expected)
    assert torch.allclose(signal.denormalize(signal.normalize(x)), x, atol=1e-6)
    with pytest.raises(ConvscopeError, match=r"expected \(N, 2, L\)"):
        signal.normalize(x[..., None])
    for size in ((1000,), (8, 9, 10)):
        with pytest.raises(ConvscopeError, match="size is"):
            Preprocessing.of({"size": size, "channel_order": "RGB"})
    with pytest.raises(ConvscopeError, match="size is"):
        Preprocessing.of({"size": (2, 3, 4, 5), "channels": 1})


def test_signals_are_accepted_as_tensors_only() -> None:
    signal = Preprocessing.of({"size": (8,), "channels": 2})
    for given, words in (
        (np.zeros((8, 2), np.float32), r"ndarray given; .* tensors \(N, 2, L\) only"),
        ("a.png", "str given"),
        ([np.zeros((8, 2))], "list given"),
        (torch.zeros(2, 3, 8), r"a tensor \(2, 3, 8\) of torch.float32; expected .* \(N, 2, L\)"),
        (torch.zeros(2, 2, 8, 8), r"expected .* \(N, 2, L\)"),
        (torch.zeros(2, 2, 8, dtype=torch.int32), "floating"),
    ):
        with pytest.raises(ConvscopeError, match=words):
            ImageBatchLoader(given, signal)
    loader = ImageBatchLoader(torch.zeros(1, 2, 8), signal)
    (batch,) = loader.batches(4)
    assert batch.geometry == (Geometry((8,), (0, 8)),)
    with pytest.raises(ConvscopeError, match="image 0 is not an image"):
        loader.original(0)


@pytest.mark.parametrize(("size", "mode"), [((13,), "linear"), ((5, 9, 7), "trilinear")])
def test_maps_are_resized_to_signals_and_volumes(size: tuple[int, ...], mode: str) -> None:
    maps = random_batch(tuple(max(2, side // 3) for side in size), 2, 3)
    actual = Geometry.whole(size).to_original(maps)
    torch.testing.assert_close(actual, F.interpolate(maps, size, mode=mode), rtol=1e-5, atol=1e-6)
