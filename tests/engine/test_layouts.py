"""Layers whose output is not (N, C, H, W): tokens of transformers and channels-last maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError, Model
from convscope.engine import capture
from convscope.engine.layouts import Layout
from tests.engine.receptive_fields import assert_bounds, positive
from tests.oracles import receptive

SWIN = {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 2), "num_classes": 7}


class RectangularVit(torchvision.models.VisionTransformer):
    """torchvision's transformer, which accepts squares only, for rectangles."""

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


# Builder, input size, patch size, number of prefix tokens, and last spatial layer.
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
def test_each_token_lies_at_its_patch(name: str) -> None:
    build, size, patch, num_prefix, _ = TOKENS[name]
    model = load_model(build(), size)
    height, width = size[0] // patch, size[1] // patch
    # Up to the first attention, each token depends on its own patch alone.
    table = [entry for entry in model.layers if entry.layout.grid]
    single = [entry for entry in table if not entry.has_global_context]
    entry = single[-1]
    assert entry.layout == Layout(2, (1,), (height, width), num_prefix)
    assert (entry.shape, entry.units, entry.is_spatial) == ((entry.shape[0], height, width), entry.shape[0], True)
    assert entry.receptive_field == entry.stride == (patch, patch)
    assert entry.origin == (0, 0)
    x = random_batch(size, 1)
    with torch.no_grad(), capture.capture_layers(model, [entry.name]) as run:
        plain = run(x).maps[entry.name]
        assert plain.shape == (1, entry.shape[0], height, width)
        for i in range(height):
            for j in range(width):
                other = x.clone()
                other[:, :, i * patch + 3, j * patch + 5] += 1
                changed = (run(other).maps[entry.name] != plain).any(1)[0]
                assert changed.nonzero().tolist() == [[i, j]]


@pytest.mark.parametrize("name", TOKENS)
def test_later_layers_are_spatial_and_global(name: str) -> None:
    build, size, patch, num_prefix, last = TOKENS[name]
    model = load_model(build(), size)
    grid = size[0] // patch, size[1] // patch
    table = model.layers
    assert table.last_spatial().name == last
    assert table.last_spatial().shape == (24, *grid)
    for block in ("blocks.0", "blocks.1", "blocks.1.attn", "blocks.1.mlp.fc1") if last == "norm" else ("encoder.ln",):
        assert table[block].layout == Layout(2, (1,), grid, num_prefix), block
        assert (table[block].has_global_context, table[block].stride) == (True, (patch, patch))
        assert f"{table[block].units} x {grid[0]} x {grid[1]}" in str(table)
    assert not any(entry.is_spatial for entry in table if entry.shape[0] == 7)
    # Queries and keys of each head have other layouts: they are not spatial.
    assert not any(entry.is_spatial for entry in table if entry.name.endswith(("q_norm", "k_norm")))


@pytest.mark.parametrize("name", TOKENS)
def test_activations_are_the_tokens_on_their_grid(name: str) -> None:
    build, size, patch, num_prefix, last = TOKENS[name]
    model = load_model(build(), size)
    layer = "blocks.1" if last == "norm" else "encoder.layers.encoder_layer_1"
    outputs: list[Tensor] = []
    x = random_batch(size)
    handle = dict(model.module.named_modules())[layer].register_forward_hook(
        lambda _, __, output: outputs.append(output)
    )
    with torch.no_grad():
        model.module(x)
    handle.remove()
    maps = convscope.activations(model, x, layer)[layer]
    height, width = size[0] // patch, size[1] // patch
    assert outputs[0].shape == (2, num_prefix + height * width, 24)
    assert maps.shape == (2, 24, height, width)
    for i in range(height):
        for j in range(width):
            np.testing.assert_allclose(
                maps[:, :, i, j], outputs[0][:, num_prefix + i * width + j], rtol=1e-5, atol=1e-5
            )
    entry = model.layers[layer]
    nchw = entry.to_nchw(outputs[0])
    assert torch.equal(entry.from_nchw(nchw, outputs[0]), outputs[0])
    put_back = entry.from_nchw(nchw + 1, outputs[0])
    assert torch.equal(put_back[:, :num_prefix], outputs[0][:, :num_prefix])
    assert torch.equal(put_back[:, num_prefix:], outputs[0][:, num_prefix:] + 1)


@pytest.mark.parametrize("name", TOKENS)
def test_gradients_at_tokens_equal_those_by_hand(name: str) -> None:
    build, size, _, num_prefix, last = TOKENS[name]
    model = load_model(build().double(), size)
    layer = "blocks.0" if last == "norm" else "encoder.layers.encoder_layer_0"
    x = random_batch(size).double()
    outputs: list[Tensor] = []

    def detach_output(_: Any, __: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = dict(model.module.named_modules())[layer].register_forward_hook(detach_output)
    logits = model.module(x)
    (by_hand,) = torch.autograd.grad(logits[:, 3].sum(), outputs[0])
    handle.remove()
    with capture.capture_layers(model, [layer], detach_at_layer=True) as run:
        result = run(x)
        assert result.maps[layer].is_leaf
        (actual,) = torch.autograd.grad(result.logits[:, 3].sum(), result.maps[layer])
    expected = by_hand[:, num_prefix:].transpose(1, 2).reshape(actual.shape)
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)


def test_gradients_also_pass_through_the_class_token() -> None:
    """Between two captured layers, tokens without a position keep their gradients as well."""
    build, size, *_ = TOKENS["class token"]
    model = load_model(build(), size)
    x = random_batch(size)

    def gradient(layers: list[str]) -> Tensor:
        with capture.capture_layers(model, layers, detach_at_layer=True) as run:
            result = run(x)
            return torch.autograd.grad(result.logits[:, 3].sum(), result.maps["blocks.0.norm1"])[0]

    single, both = gradient(["blocks.0.norm1"]), gradient(["blocks.0.norm1", "blocks.1.norm1"])
    assert single.abs().max() > 0
    torch.testing.assert_close(both, single)


def test_tokens_that_do_not_fit_the_grid_are_refused() -> None:
    layout = Layout(2, (1,), (3, 2), 1)
    nchw = layout.to_nchw(torch.arange(14.0).view(1, 7, 2))
    assert nchw[0, 1].tolist() == [[3, 5], [7, 9], [11, 13]]
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
        # Maps of whole windows: timm 1.0.9 does not pad them.
        lambda: timm.create_model("swinv2_tiny_window8_256", img_size=(32, 48), window_size=2, **SWIN),
        "layers.0.blocks.1",
        "norm",
        "norm",
    ),
}


@pytest.mark.parametrize("name", SWINS)
def test_swin_layers_are_channels_last(name: str) -> None:
    build, block, norm, last = SWINS[name]
    model = load_model(build(), (32, 48))
    table = model.layers
    assert (table[block].shape, table[block].layout) == ((16, 8, 12), Layout(3, (1, 2)))
    assert (table[block].stride, table[block].has_global_context) == ((4, 4), True)
    assert (table[norm].shape, table[norm].layout, table[norm].stride) == ((32, 4, 6), Layout(3, (1, 2)), (8, 8))
    assert table.last_spatial().name == last
    window_layers = [entry for entry in table if ".attn." in entry.name]
    assert not any(entry.is_spatial for entry in window_layers)
    assert len(window_layers) > 0 or name.startswith("torchvision")
    x = random_batch((32, 48))
    maps = convscope.activations(model, x, norm)[norm]
    (pooled,) = [entry.name for entry in table if entry.name in ("flatten", "head.global_pool")]
    np.testing.assert_allclose(convscope.activations(model, x, pooled)[pooled], maps.mean((2, 3)), rtol=1e-3, atol=1e-5)


def test_shifted_windows_are_bounded() -> None:
    """The bound on what the windows of the first block let in holds against brute force."""
    size = (16, 24)
    net = positive(timm.create_model("swin_tiny_patch4_window7_224", img_size=size, window_size=2, **SWIN))
    entry = convscope.load(net, preprocessing={"size": size}).layers["layers.0.blocks.0"]
    assert entry.receptive_field == (12, 12)  # 2 x 2 patches of 4 x 4 pixels, to either side
    actual = receptive.receptive_fields(net, [entry.name], size, 3, "bump", {entry.name: entry.to_nchw})[entry.name]
    assert (
        assert_bounds(entry, receptive.any_channel(actual), slack=4) == 0
    )  # a window is 8 pixels, and lies to either side


def test_convnets_have_no_tokens() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.fc = nn.Conv2d(3, 6, 3), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(6, 4)
            self.flat, self.squeezed = nn.Flatten(2), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            gate = self.gate(self.squeezed(x.mean((2, 3))[:, None])).sigmoid()  # ECA: (N, 1, C)
            return self.fc(self.flat(x * gate[:, 0, :, None, None]).mean(2))

    table = load_model(Net(), (12, 10)).layers
    assert [entry.name for entry in table if entry.is_spatial] == ["conv"]
    assert table.last_spatial().name == "conv"
