"""Layers whose own output is no (N, C, H, W): transformers' tokens, signals, volumes; all against numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError, Model, Preprocessing
from convscope.engine import capture
from convscope.engine.layer_table import Layout
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from tests.engine.receptive_fields import FunctionNet, assert_bounds, check_receptive_fields, positive
from tests.oracles import receptive

SWIN = {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 2), "num_classes": 7}


class RectangularVit(torchvision.models.VisionTransformer):
    """torchvision's own takes squares only; its forward pass does not mind."""

    def __init__(self, height: int, width: int, patch: int) -> None:
        super().__init__(patch, patch, 2, 2, 24, 48, num_classes=7)
        self.grid = height // patch, width // patch
        self.seq_length = self.grid[0] * self.grid[1] + 1
        self.encoder.pos_embedding = nn.Parameter(torch.randn(1, self.seq_length, 24))

    def _process_input(self, x: Tensor) -> Tensor:
        return self.conv_proj(x).reshape(len(x), 24, -1).permute(0, 2, 1)


def swin(version: int) -> nn.Module:
    blocks = torchvision.models.swin_transformer
    kinds = {"block": blocks.SwinTransformerBlockV2, "downsample_layer": blocks.PatchMergingV2} if version == 2 else {}
    return blocks.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=7, **kinds)


def tiny_model(name: str, *size: int) -> nn.Module:
    return timm.create_model(name, img_size=size, depth=2, embed_dim=24, num_heads=2, num_classes=7)


# How to make it, its input, its patches, how many tokens come before them, and the last layer of all with places.
TOKENS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int, int, str]] = {
    "class token": (lambda: tiny_model("vit_tiny_patch16_224", 64, 48), (64, 48), 16, 1, "norm"),
    "registers": (lambda: tiny_model("vit_small_patch14_reg4_dinov2", 28, 56), (28, 56), 14, 5, "norm"),
    "distilled": (lambda: tiny_model("deit_tiny_distilled_patch16_224", 32, 48), (32, 48), 16, 2, "norm"),
    "averaged": (lambda: tiny_model("vit_relpos_small_patch16_224", 48, 32), (48, 32), 16, 0, "norm"),
    "registers, averaged": (lambda: tiny_model("vit_medium_patch16_reg4_gap_256", 48, 32), (48, 32), 16, 4, "norm"),
    "rotated": (lambda: tiny_model("eva02_tiny_patch14_224", 42, 28), (42, 28), 14, 1, "norm"),
    "a single row": (lambda: tiny_model("vit_tiny_patch16_224", 16, 64), (16, 64), 16, 1, "norm"),
    "torchvision": (lambda: RectangularVit(32, 24, 8), (32, 24), 8, 1, "encoder"),
}


def load_model(net: nn.Module, size: tuple[int, ...], channels: int = 3) -> Model:
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return convscope.load(net.eval(), preprocessing={"size": size, "channels": channels})


def random_batch(size: tuple[int, ...], count: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn((count, channels, *size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TOKENS)
def test_each_token_lies_where_its_patch_is(name: str) -> None:
    build, size, patch, before, _ = TOKENS[name]
    model = load_model(build(), size)
    high, wide = size[0] // patch, size[1] // patch
    # The last layer in front of the first attention: up to there each token knows its own patch alone.
    rows = [row for row in model.layers if row.layout.grid]
    alone = [row for row in rows if not row.has_global_context]
    row = alone[-1]
    assert row.layout == Layout(2, (1,), (high, wide), before)
    assert (row.shape, row.units, row.is_spatial) == ((row.shape[0], high, wide), row.shape[0], True)
    assert row.receptive_field == row.stride == (patch, patch)
    assert row.origin == (0, 0)
    x = random_batch(size, 1)
    with torch.no_grad(), capture.capture_layers(model, [row.name]) as run:
        plain = run(x).maps[row.name]
        assert plain.shape == (1, row.shape[0], high, wide)
        for i in range(high):
            for j in range(wide):
                other = x.clone()
                other[:, :, i * patch + 3, j * patch + 5] += 1
                changed = (run(other).maps[row.name] != plain).any(1)[0]
                assert changed.nonzero().tolist() == [[i, j]]


@pytest.mark.parametrize("name", TOKENS)
def test_every_layer_behind_has_places_and_sees_all(name: str) -> None:
    build, size, patch, before, last = TOKENS[name]
    model = load_model(build(), size)
    grid = size[0] // patch, size[1] // patch
    rows = model.layers
    assert rows.last_spatial().name == last
    assert rows.last_spatial().shape == (24, *grid)
    for block in ("blocks.0", "blocks.1", "blocks.1.attn", "blocks.1.mlp.fc1") if last == "norm" else ("encoder.ln",):
        assert rows[block].layout == Layout(2, (1,), grid, before), block
        assert (rows[block].has_global_context, rows[block].stride) == (True, (patch, patch))
        assert f"{rows[block].units} x {grid[0]} x {grid[1]}" in str(rows)
    assert not any(row.is_spatial for row in rows if row.shape[0] == 7)
    # Queries and keys of each head lie otherwise: they are left alone.
    assert not any(row.is_spatial for row in rows if row.name.endswith(("q_norm", "k_norm")))


@pytest.mark.parametrize("name", TOKENS)
def test_activations_are_the_tokens_on_their_grid(name: str) -> None:
    build, size, patch, before, last = TOKENS[name]
    model = load_model(build(), size)
    layer = "blocks.1" if last == "norm" else "encoder.layers.encoder_layer_1"
    own: list[Tensor] = []
    x = random_batch(size)
    handle = dict(model.module.named_modules())[layer].register_forward_hook(lambda _, __, output: own.append(output))
    with torch.no_grad():
        model.module(x)
    handle.remove()
    maps = convscope.activations(model, x, layer)[layer]
    high, wide = size[0] // patch, size[1] // patch
    assert own[0].shape == (2, before + high * wide, 24)
    assert maps.shape == (2, 24, high, wide)
    for i in range(high):
        for j in range(wide):
            np.testing.assert_allclose(maps[:, :, i, j], own[0][:, before + i * wide + j], rtol=1e-5, atol=1e-5)
    row = model.layers[layer]
    laid = row.to_nchw(own[0])
    assert torch.equal(row.from_nchw(laid, own[0]), own[0])
    put_back = row.from_nchw(laid + 1, own[0])
    assert torch.equal(put_back[:, :before], own[0][:, :before])
    assert torch.equal(put_back[:, before:], own[0][:, before:] + 1)


@pytest.mark.parametrize("name", TOKENS)
def test_gradients_at_tokens_are_those_by_hand(name: str) -> None:
    build, size, _, before, last = TOKENS[name]
    model = load_model(build().double(), size)
    layer = "blocks.0" if last == "norm" else "encoder.layers.encoder_layer_0"
    x = random_batch(size).double()
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = dict(model.module.named_modules())[layer].register_forward_hook(keep)
    logits = model.module(x)
    (by_hand,) = torch.autograd.grad(logits[:, 3].sum(), kept[0])
    handle.remove()
    with capture.capture_layers(model, [layer], detach_at_layer=True) as run:
        seen = run(x)
        assert seen.maps[layer].is_leaf
        (found,) = torch.autograd.grad(seen.logits[:, 3].sum(), seen.maps[layer])
    expected = by_hand[:, before:].transpose(1, 2).reshape(found.shape)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_gradients_reach_an_earlier_layer_through_the_class_token_too() -> None:
    """Between two watched layers all tokens go on with their gradients, those without a place as well."""
    build, size, *_ = TOKENS["class token"]
    model = load_model(build(), size)
    x = random_batch(size)

    def gradient(layers: list[str]) -> Tensor:
        with capture.capture_layers(model, layers, detach_at_layer=True) as run:
            seen = run(x)
            return torch.autograd.grad(seen.logits[:, 3].sum(), seen.maps["blocks.0.norm1"])[0]

    alone, both = gradient(["blocks.0.norm1"]), gradient(["blocks.0.norm1", "blocks.1.norm1"])
    assert alone.abs().max() > 0
    torch.testing.assert_close(both, alone)


def test_tokens_that_do_not_fit_the_grid_are_refused() -> None:
    layout = Layout(2, (1,), (3, 2), 1)
    laid = layout.to_nchw(torch.arange(14.0).view(1, 7, 2))
    assert laid[0, 1].tolist() == [[3, 5], [7, 9], [11, 13]]
    with pytest.raises(ConvscopeError, match="returned 8 tokens; expected 7"):
        layout.to_nchw(torch.zeros(1, 8, 2))


SWINS: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "torchvision": (lambda: swin(1), "features.1.1", "norm", "permute"),
    "torchvision, version 2": (lambda: swin(2), "features.1.1", "norm", "permute"),
    "timm": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=(32, 48), window_size=4, **SWIN),
        "layers.0.blocks.1",
        "norm",
        "norm",
    ),
    "timm, version 2": (
        lambda: timm.create_model("swinv2_tiny_window8_256", img_size=(32, 48), window_size=4, **SWIN),
        "layers.0.blocks.1",
        "norm",
        "norm",
    ),
}


@pytest.mark.parametrize("name", SWINS)
def test_swin(name: str) -> None:
    build, block, norm, last = SWINS[name]
    model = load_model(build(), (32, 48))
    rows = model.layers
    assert (rows[block].shape, rows[block].layout) == ((16, 8, 12), Layout(3, (1, 2)))
    assert (rows[block].stride, rows[block].has_global_context) == ((4, 4), True)
    assert (rows[norm].shape, rows[norm].layout, rows[norm].stride) == ((32, 4, 6), Layout(3, (1, 2)), (8, 8))
    assert rows.last_spatial().name == last
    windows = [row for row in rows if ".attn." in row.name]
    assert not any(row.is_spatial for row in windows)
    assert len(windows) > 0 or name.startswith("torchvision")
    x = random_batch((32, 48))
    maps = convscope.activations(model, x, norm)[norm]
    (pooled,) = [row.name for row in rows if row.name in ("flatten", "head.global_pool")]
    np.testing.assert_allclose(convscope.activations(model, x, pooled)[pooled], maps.mean((2, 3)), rtol=1e-3, atol=1e-5)


def test_a_window_sees_itself() -> None:
    """The bound on what joins in through the windows of the first block holds what brute force finds."""
    size = (16, 24)
    net = positive(timm.create_model("swin_tiny_patch4_window7_224", img_size=size, window_size=2, **SWIN))
    row = convscope.load(net, preprocessing={"size": size}).layers["layers.0.blocks.0"]
    assert row.receptive_field == (12, 12)  # 2 x 2 patches of 4 x 4 pixels, wherever in the window a place is
    found = receptive.receptive_fields(net, [row.name], size, 3, "bump", {row.name: row.to_nchw})[row.name]
    assert (
        assert_bounds(row, receptive.any_channel(found), slack=4) == 0
    )  # a window is 8 pixels, and lies to either side


def test_plain_convnets_have_no_tokens() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.fc = nn.Conv2d(3, 6, 3), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(6, 4)
            self.flat, self.squeezed = nn.Flatten(2), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            gate = self.gate(self.squeezed(x.mean((2, 3))[:, None])).sigmoid()  # ECA: (N, 1, C)
            return self.fc(self.flat(x * gate[:, 0, :, None, None]).mean(2))

    rows = load_model(Net(), (12, 10)).layers
    assert [row.name for row in rows if row.is_spatial] == ["conv"]
    assert rows.last_spatial().name == "conv"


# --- signals and volumes ---------------------------------------------------------------------------------------------


def conv1(kernel: int = 3, channels: int = 1, **options: int) -> nn.Conv1d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv1d(channels, channels, kernel, **options)


def causal(net: FunctionNet, x: Tensor) -> Tensor:
    """As WaveNet has it: each place sees what came before it."""
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
    "time and place": (  # R(2+1)D
        lambda: nn.Sequential(nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(2, 1, (3, 1, 1), (2, 1, 1))),
        (6, 8, 9),
    ),
    "adaptive": (lambda: nn.Sequential(nn.Conv3d(1, 1, 1), nn.AdaptiveAvgPool3d((2, 4, 3))), (4, 8, 6)),
    "adaptive max": (lambda: nn.Sequential(nn.AdaptiveMaxPool3d((2, 4, 3)), nn.Conv3d(1, 1, 2)), (4, 8, 6)),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_see_what_brute_force_finds(name: str) -> None:
    rows = check_receptive_fields(SIGNALS[name](), (40,), cropped=name == "residual")
    assert all(len(row.shape) == 2 and len(row.receptive_field) == 1 for row in rows if row.is_spatial)
    assert rows[-1].is_spatial
    assert rows[-1].receptive_field[0] > 3
    assert not rows[-1].has_global_context


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes_see_what_brute_force_finds(name: str) -> None:
    build, size = VOLUMES[name]
    rows = check_receptive_fields(build(), size)
    assert all(len(row.shape) == 4 and len(row.receptive_field) == 3 for row in rows)


@pytest.mark.parametrize("size", [(40,), (5, 6, 7)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_enlarged_signals_and_volumes_are_bounded(size: tuple[int, ...], mode: str) -> None:
    conv, mode = (conv1(), mode) if len(size) == 1 else (nn.Conv3d(1, 1, 3, padding=1), mode.replace("lin", "trilin"))
    rows = check_receptive_fields(
        nn.Sequential(conv, nn.Upsample(scale_factor=2, mode=mode)), size, slack=2, change="bump"
    )
    assert rows["1"].shape[1:] == tuple(2 * side for side in size)
    assert rows["1"].stride == (0.5,) * len(size)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_mirrored_borders_count_as_if_the_signal_went_on(mode: str) -> None:
    for kind, size in ((nn.Conv1d, (20,)), (nn.Conv3d, (6, 6, 6))):
        rows = check_receptive_fields(nn.Sequential(kind(1, 1, 5, padding=2, padding_mode=mode)), size)
        assert rows["0"].receptive_field == (5,) * len(size)


class Signals(nn.Module):
    """A network on 2 channels of 32 values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.Conv1d(4, 6, 3, padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool1d(1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv2(self.conv1(x).relu())).flatten(1))


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 6, 3, stride=(1, 2, 2), padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool3d(1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv2(self.conv1(x).relu())).flatten(1))


def test_the_table_of_a_network_on_signals() -> None:
    rows = load_model(Signals(), (32,), 2).layers
    assert [(row.name, row.shape, row.units, row.is_spatial) for row in rows] == [
        ("conv1", (4, 16), 4, True),
        ("conv2", (6, 16), 6, True),
        ("pool", (6, 1), 6, False),
        ("fc", (3,), 3, False),
    ]
    assert (rows["conv1"].receptive_field, rows["conv1"].stride, rows["conv1"].origin) == ((5,), (2,), (-2,))
    assert rows["conv2"].receptive_field == (5 + 2 * 2,)
    assert rows.last_spatial().name == "conv2"
    assert "4 x 16" in str(rows)
    lines = str(load_model(Volumes(), (5, 8, 6), 1).layers).splitlines()
    assert " ".join(lines[2].split()) == "conv2 Conv3d 6 x 5 x 4 x 3 6 5 1 x 2 x 2 654"


def test_activations_of_signals_by_hand() -> None:
    model = load_model(Signals(), (32,), 2)
    x = random_batch((32,), 3, 2)
    seen = convscope.activations(model, x)
    assert seen.layers == ["conv1", "conv2"]
    assert seen["conv1"].shape == (3, 4, 16)
    weight, bias = model.module.conv1.weight.detach().numpy(), model.module.conv1.bias.detach().numpy()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2)))
    for place in range(16):
        window = padded[:, :, 2 * place : 2 * place + 5]
        expected = np.einsum("nck,uck->nu", window, weight) + bias
        np.testing.assert_allclose(seen["conv1"][:, :, place], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(convscope.predict(model, x).logits, model.module(x), rtol=1e-4, atol=1e-5)


def test_one_signal_is_a_batch_and_batches_keep_their_values() -> None:
    model = load_model(Signals(), (32,), 2)
    x = random_batch((32,), 5, 2)
    logits = convscope.predict(model, x).logits
    np.testing.assert_allclose(convscope.predict(model, x[3]).logits, logits[3:4], rtol=1e-4, atol=1e-6)
    spoilt = x.clone()
    spoilt[1, 0, 7] = float("nan")
    found = convscope.predict(model, spoilt)
    assert [str(failure) for failure in found.failed] == ["image 1: holds NaN or infinity"]
    np.testing.assert_allclose(found.logits, logits[[0, 2, 3, 4]], rtol=1e-4, atol=1e-6)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "signals": (Signals, (32,), 2),
    "volumes": (Volumes, (5, 8, 6), 1),
}


@pytest.mark.parametrize("name", NETS)
def test_gradients_in_signals_and_volumes(name: str) -> None:
    build, size, channels = NETS[name]
    model = load_model(build(), size, channels)
    with capture.capture_layers(model, ["conv2"], detach_at_layer=True) as run:
        seen = run(random_batch(size, 2, channels))
        (found,) = torch.autograd.grad(seen.logits[:, 1].sum(), seen.maps["conv2"])
    places = found[0, 0].numel()
    expected = (model.module.fc.weight[1] / places).view(1, -1, *[1] * len(size)).expand_as(found)
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("name", NETS)
def test_what_cannot_be_drawn_is_saved_all_the_same(name: str, tmp_path: Path) -> None:
    build, size, channels = NETS[name]
    model = load_model(build(), size, channels)
    x = random_batch(size, 2, channels)
    seen = convscope.activations(model, x)
    seen.save(tmp_path / "seen")
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["arrays.npz", "manifest.json"]
    with np.load(tmp_path / "seen" / "arrays.npz") as saved:
        np.testing.assert_array_equal(saved["conv2"], seen["conv2"])
    with pytest.raises(ConvscopeError, match="none of these layers has maps to draw"):
        seen.figure()
    convscope.predict(model, x).save(tmp_path / "said")
    with pytest.raises(ConvscopeError, match="not images"):
        convscope.patterns(model, "conv1", [0])


def test_other_networks_on_volumes_are_loaded_from_a_factory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels of five dimensions cannot lie channels last."""
    (tmp_path / "of_volumes.py").write_text("from tests.engine.test_layouts import Volumes as make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = convscope.load("of_volumes:make", preprocessing={"size": (5, 8, 6), "channels": 1})
    assert model.layers["conv2"].shape == (6, 5, 4, 3)
    assert convscope.predict(model, random_batch((5, 8, 6), 1, 1)).logits.shape == (1, 3)


def test_sizes_of_one_and_of_three_numbers() -> None:
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


def test_signals_come_as_tensors_only() -> None:
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
    pictures = ImageBatchLoader(torch.zeros(1, 2, 8), signal)
    (batch,) = pictures.batches(4)
    assert batch.geometry == (Geometry((8,), (0, 8)),)
    with pytest.raises(ConvscopeError, match="image 0 is not an image"):
        pictures.original(0)


@pytest.mark.parametrize(("size", "mode"), [((13,), "linear"), ((5, 9, 7), "trilinear")])
def test_maps_go_back_over_signals_and_volumes(size: tuple[int, ...], mode: str) -> None:
    maps = random_batch(tuple(max(2, side // 3) for side in size), 2, 3)
    found = Geometry.whole(size).to_original(maps)
    torch.testing.assert_close(found, F.interpolate(maps, size, mode=mode), rtol=1e-5, atol=1e-6)
