"""Receptive fields against brute force: every pixel of the input is changed, and the change followed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.engine.receptive_fields import (
    SIZE,
    FunctionNet,
    H,
    W,
    assert_bounds,
    check_receptive_fields,
    conv,
    load_table,
    positive,
)
from tests.oracles import receptive

# --- chains ---


@st.composite
def windows(draw: st.DrawFn) -> nn.Module:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel = pair(1, 4)
    kind = draw(st.sampled_from(["conv", "max", "avg", "pad", "relu", "norm"]))
    if kind == "conv":
        return nn.Conv2d(1, 1, kernel, stride=pair(1, 3), padding=pair(0, 4), dilation=pair(1, 2))
    if kind == "pad":
        return nn.ZeroPad2d((*pair(0, 3), *pair(0, 3)))
    padding = (kernel[0] // 2, kernel[1] // 2)
    ceil = draw(st.booleans())
    if kind == "max":
        dilation = draw(st.integers(1, 2))
        return nn.MaxPool2d(kernel, stride=pair(1, 3), padding=padding, dilation=dilation, ceil_mode=ceil)
    if kind == "avg":
        return nn.AvgPool2d(kernel, stride=pair(1, 3), padding=padding, ceil_mode=ceil)
    return nn.ReLU() if kind == "relu" else nn.BatchNorm2d(1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(windows(), min_size=1, max_size=5))
def test_chains_match_brute_force(operations):
    module = positive(nn.Sequential(*operations))
    try:
        with torch.no_grad():
            module(torch.zeros(1, 1, *SIZE, dtype=torch.float64))
    except RuntimeError:
        return  # the windows are larger than the image
    layers = load_table(module)
    fields = receptive.receptive_fields(module, layers.names, SIZE)
    assert [layer.name for layer in layers] == [str(i) for i in range(len(operations))]
    for layer in layers:
        if layer.is_spatial:
            assert_bounds(layer, receptive.any_channel(fields[layer.name]))


def test_chain_by_hand():
    layers = check_receptive_fields(
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(2, 2, (5, 3), dilation=(1, 2)))
    )
    assert layers["0"].receptive_field == (3, 3)
    assert (layers["0"].stride, layers["0"].origin) == ((1, 1), (-1, -1))
    assert (layers["1"].receptive_field, layers["1"].stride, layers["1"].origin) == ((4, 4), (2, 2), (-1, -1))
    assert layers["2"].receptive_field == (4 + 4 * 2, 4 + 2 * 2 * 2)
    assert layers["2"].origin == (-1, -1)


# --- graphs ---


def inception(net: FunctionNet, x: Tensor) -> Tensor:
    return torch.cat([net.one(x), net.three(x), net.five(net.one(x)), F.max_pool2d(x, 3, 1, 1)], 1)


def residual(net: FunctionNet, x: Tensor) -> Tensor:
    y = net.three(x)
    y += net.one(x)
    return net.five(y) + net.down(y)


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "inception": lambda: FunctionNet(inception, one=conv(1), three=conv(3), five=conv(5)),
    "residual": lambda: FunctionNet(
        residual, three=conv(3), one=conv(1), five=conv(5, stride=2), down=conv(1, stride=2)
    ),
    "lopsided": lambda: FunctionNet(lambda net, x: net.a(F.pad(x, (0, 4, 0, 4))) + x, a=conv(5, padding=0)),
    "negative padding": lambda: FunctionNet(lambda net, x: net.a(F.pad(x, (-2, 3, -1, -4))), a=conv(5)),
    "asymmetric padding": lambda: FunctionNet(
        lambda net, x: net.a(F.pad(x, (1, 2, 3, 0))), a=conv(4, padding=0, stride=2)
    ),
    "same padding": lambda: nn.Sequential(nn.Conv2d(1, 1, 4, padding="same"), nn.Conv2d(1, 1, 3, padding="same")),
    "timm's same": lambda: nn.Sequential(timm.layers.Conv2dSame(1, 1, 3, stride=2), timm.layers.Conv2dSame(1, 1, 5, 2)),
    "timm's pool": lambda: nn.Sequential(timm.layers.create_pool2d("max", 3, 2, padding="same"), conv()),
    "slices": lambda: FunctionNet(lambda net, x: net.a(x[..., 1::2, ::2]) + net.a(x)[..., : H - 1 : 2, 1::2], a=conv()),
    "negative slices": lambda: FunctionNet(lambda net, x: net.a(x[:, :, 2:-3, -17:]), a=conv(5)),
    "focus": lambda: FunctionNet(
        lambda net, x: net.a(torch.cat([x[..., i : 16 + i : 2, j : 16 + j : 2] for i in (0, 1) for j in (0, 1)], 1)),
        a=nn.Conv2d(4, 1, 3, padding=1),
    ),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)),
    "swapped axes": lambda: FunctionNet(
        lambda net, x: net.a(x.transpose(2, 3)).transpose(2, 3), a=nn.Conv2d(1, 1, (5, 2))
    ),
    "convolution of one transposed": lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 3), conv()),
    "functional": lambda: FunctionNet(
        lambda net, x: F.avg_pool2d(F.conv2d(F.relu(x), net.a.weight, stride=2), 3, 2, ceil_mode=True), a=conv(5)
    ),
    "unshuffled": lambda: FunctionNet(
        lambda net, x: net.a(F.pixel_unshuffle(x[..., :16, :16], 2)), a=nn.Conv2d(4, 4, 3, padding=1)
    ),
    "unshuffled by hand": lambda: FunctionNet(
        lambda net, x: net.a(x[..., :16, :16].view(-1, 1, 8, 2, 4, 4).permute(0, 3, 5, 1, 2, 4).reshape(-1, 8, 8, 4)),
        a=nn.Conv2d(8, 8, 3, padding=1),
    ),
    "channels shuffled": lambda: FunctionNet(
        lambda net, x: net.b(net.a(x).view(-1, 2, 3, H, W).transpose(1, 2).reshape(-1, 6, H, W)),
        a=nn.Conv2d(1, 6, 3, padding=1),
        b=nn.Conv2d(6, 6, 3, padding=1, groups=3),
    ),
    "space to tokens and back": lambda: FunctionNet(
        lambda net, x: net.b(net.fc(net.a(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(-1, 4, H, W)),
        a=nn.Conv2d(1, 4, 3, padding=1),
        fc=nn.Linear(4, 4),
        b=nn.Conv2d(4, 4, 5),
    ),
    "windows as tokens": lambda: FunctionNet(
        lambda net, x: net.fc(F.unfold(net.a(x), (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 3)).mT),
        a=conv(),
        fc=nn.Linear(6, 2),
    ),
    "windows in the batch": lambda: FunctionNet(
        lambda net, x: net.fc(net.a(F.unfold(x, 4, stride=4).mT.reshape(-1, 1, 4, 4)).view(len(x), -1, 16)),
        a=conv(1),
        fc=nn.Linear(16, 2),
    ),
    "split": lambda: FunctionNet(
        lambda net, x: torch.cat([net.b(part) for part in net.a(x).chunk(2, 1)], 1), a=nn.Conv2d(1, 4, 3), b=conv(3, 2)
    ),
    "adaptive": lambda: FunctionNet(lambda net, x: net.a(F.adaptive_avg_pool2d(x[..., :16, :16], (4, 8))), a=conv()),
}


CROPPED = ("slices", "negative slices", "negative padding", "focus", "unshuffled", "unshuffled by hand", "adaptive")


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_match_brute_force(name):
    layers = check_receptive_fields(GRAPHS[name](), cropped=name in CROPPED)
    assert not layers[-1].has_global_context
    assert max(layers[-1].receptive_field) > 3


# Where neighbouring positions have windows of different size, fields are bounds; the number is the slack in pixels.
BOUNDED: dict[str, tuple[Callable[[], nn.Module], float, str]] = {
    "transposed": (lambda: nn.Sequential(conv(stride=2), nn.ConvTranspose2d(1, 1, 4, stride=2, padding=1)), 2, "nan"),
    "transposed, dilated": (lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 3, stride=3, dilation=2), conv()), 1, "nan"),
    "nearest": (lambda: nn.Sequential(conv(), nn.Upsample(scale_factor=2), conv()), 1, "bump"),
    "nearest, odd": (lambda: nn.Sequential(conv(), nn.Upsample(size=(40, 29)), conv()), 2, "bump"),
    "nearest, smaller": (lambda: nn.Sequential(conv(), nn.Upsample(size=(12, 10)), conv()), 2, "bump"),
    "nearest, by factor": (lambda: nn.Sequential(conv(), nn.Upsample(scale_factor=1.3), conv()), 2, "bump"),
    "bilinear": (lambda: nn.Sequential(conv(), nn.Upsample(scale_factor=2, mode="bilinear"), conv()), 2, "bump"),
    "bilinear, odd": (lambda: nn.Sequential(conv(), nn.Upsample(size=(40, 29), mode="bilinear")), 2, "bump"),
    "bilinear, corners": (
        lambda: nn.Sequential(conv(), nn.Upsample(scale_factor=3, mode="bilinear", align_corners=True)),
        2,
        "bump",
    ),
    "bicubic": (lambda: nn.Sequential(conv(), nn.Upsample(scale_factor=2, mode="bicubic")), 3, "bump"),
    "adaptive, odd": (lambda: nn.Sequential(conv(), nn.AdaptiveAvgPool2d((7, 9)), conv()), 12, "nan"),
    "adaptive max": (lambda: nn.Sequential(conv(), nn.AdaptiveMaxPool2d((7, 9))), 4, "nan"),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.PixelShuffle(2), conv()), 1, "nan"),
    "pixel shuffle by hand": (
        lambda: FunctionNet(
            lambda net, x: net.b(
                net.a(x)
                .view(-1, 2, 3, H, W)
                .permute(0, 3, 1, 4, 2)
                .reshape(-1, 1, 2 * H, 3 * W)  # rows by 2, columns by 3
            ),
            a=nn.Conv2d(1, 6, 3, padding=1),
            b=conv(),
        ),
        2,
        "nan",
    ),
    "a part, enlarged, beside the whole": (
        lambda: FunctionNet(
            lambda net, x: net.b(torch.cat([F.interpolate(x[..., :13, :10], (H, W)), net.a(x)], 1)),
            a=conv(),
            b=nn.Conv2d(2, 1, 3, padding=1),
        ),
        4,
        "bump",
    ),
    "down and up": (
        lambda: FunctionNet(
            lambda net, x: F.interpolate(net.b(F.max_pool2d(net.a(x), 4)), size=x.shape[2:]) + net.c(x),
            a=conv(),
            b=conv(),
            c=conv(),
        ),
        4,
        "bump",
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_resampled_fields_are_bounded(name):
    build, slack, change = BOUNDED[name]
    layers = check_receptive_fields(build(), slack=slack, change=change)
    assert layers.last_spatial().receptive_field is not None or layers.last_spatial().is_pooling


def test_reflected_borders_count_as_a_continued_image():
    for mode in ("reflect", "replicate"):
        layers = check_receptive_fields(nn.Sequential(nn.Conv2d(1, 1, 5, padding=2, padding_mode=mode), conv()))
        assert layers["1"].receptive_field == (7, 7)


def test_residual_stage_matches_brute_force():
    """Four strides, residual connections and in-place ReLUs in torchvision's blocks."""
    block = torchvision.models.resnet.BasicBlock
    down = nn.Sequential(nn.Conv2d(2, 4, 1, 2), nn.BatchNorm2d(4))
    stem = [nn.Conv2d(1, 2, 7, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    layers = check_receptive_fields(nn.Sequential(*stem, block(2, 2), block(2, 4, 2, down)), (44, 28))
    assert layers["4"].receptive_field == (27, 27)
    assert layers["5"].receptive_field == (51, 51)
    assert layers["5.relu#2"].stride == (8, 8)


# --- global operations ---


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation with linear layers or convolutions."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.a, self.b = style, nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Conv2d(4, 4, 1) if style in ("conv", "expanded conv") else nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.style == "linear":
            gate = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)).view(-1, 4, 1, 1).expand_as(x)
        elif self.style == "mean":
            gate = self.fc(x.mean((2, 3)))[:, :, None, None]
        else:
            gate = self.fc(x.mean((2, 3), keepdim=True))
        return self.b(x * (gate.expand_as(x) if self.style == "expanded conv" else gate).sigmoid())


@pytest.mark.parametrize("style", ["linear", "mean", "conv", "expanded conv"])
def test_squeeze_and_excitation_keeps_the_local_field(style):
    module = positive(SqueezeExcitation(style))
    layers = load_table(module)
    fields = receptive.any_channel(receptive.receptive_fields(module, ["b"], SIZE)["b"])
    assert fields.all()  # through the gate, each position depends on all pixels
    assert layers["b"].has_global_context
    assert layers["b"].receptive_field == (5, 5)
    assert layers["b"].origin == (-2, -2)
    assert not layers["a"].has_global_context
    assert "5 + global" in str(layers)


def channel_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)


NORMS: dict[str, tuple[nn.Module, bool]] = {
    "group": (nn.GroupNorm(2, 4), True),
    "instance": (nn.InstanceNorm2d(4), True),
    "instance, affine": (nn.InstanceNorm2d(4, affine=True), True),
    "instance, tracked": (nn.InstanceNorm2d(4, track_running_stats=True), False),
    "layer, over places": (nn.LayerNorm([4, *SIZE]), True),
    "layer, over channels": (FunctionNet(lambda net, x: channel_norm(x)), False),
    "batch": (nn.BatchNorm2d(4), False),
    "softmax over channels": (nn.Softmax(1), False),
    "softmax over places": (nn.Softmax(3), True),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalisations_are_global_if_they_mix_positions(name):
    norm, is_global = NORMS[name]
    module = positive(nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3, padding=1), norm=norm)))
    layer = load_table(module)["norm"]
    fields = receptive.any_channel(receptive.receptive_fields(module, ["norm"], SIZE)["norm"])
    assert layer.has_global_context == is_global
    assert layer.receptive_field == (3, 3)
    if is_global:
        assert fields[12, 10].sum() > 9
    else:
        assert assert_bounds(layer, fields) > 0


def roll_channels(net: FunctionNet, x: Tensor) -> Tensor:
    return net.a(torch.cat([x[..., :1], x[..., :-1]], 3))


def write_in_place(net: FunctionNet, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 5:] = x[..., :-5]
    return net.a(y + x)


def smear(net: FunctionNet, x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 5:] += x[..., :-5]
    return net.a(y)


def grid_sample(net: FunctionNet, x: Tensor) -> Tensor:
    grid = F.affine_grid(
        torch.tensor([[[0, 1.0, 0], [1, 0, 0]]], dtype=x.dtype).expand(len(x), 2, 3), list(x.shape), False
    )
    return net.a(F.grid_sample(x, grid, align_corners=False))


def attention(net: FunctionNet, x: Tensor) -> Tensor:
    tokens = net.a(x).flatten(2).transpose(1, 2)
    weights = (tokens @ tokens.transpose(1, 2)).softmax(2)
    return net.a(x + (weights @ tokens).transpose(1, 2).view(-1, 1, *x.shape[2:]))


UNKNOWN: dict[str, Callable[[FunctionNet, Tensor], Tensor]] = {
    "flip": lambda net, x: net.a(x.flip(3)),
    "roll": lambda net, x: net.a(x.roll(7, 2)),
    "roll, added": lambda net, x: net.a(x + x.roll(7, 2)),
    "sort": lambda net, x: net.a(x.sort(3).values),
    "cumsum": lambda net, x: net.a(x.cumsum(2)),
    "index": lambda net, x: net.a(x[:, :, torch.arange(H - 1, -1, -1)]),
    "index_select": lambda net, x: net.a(x.index_select(3, torch.arange(W - 1, -1, -1))),
    "shifted": roll_channels,
    "written into zeros": write_in_place,
    "written into itself": smear,
    "circular": lambda net, x: net.a(F.pad(x, (3, 3, 3, 3), mode="circular")),
    "grid_sample": grid_sample,
    "fft": lambda net, x: net.a(torch.fft.ifft2(torch.fft.fft2(x)).real),
    "mixed along the rows": lambda net, x: net.a(x @ torch.ones(W, W, dtype=x.dtype)),
    "mixed along the columns": lambda net, x: net.a(torch.ones(H, H, dtype=x.dtype) @ x),
    "attention": attention,
    "bicubic, antialiased": lambda net, x: net.a(F.interpolate(x, (9, 9), mode="bicubic", antialias=True)),
    "weights of its own": lambda net, x: F.conv2d(x[:1], x[:1, :, :3, :3], padding=1).expand(len(x), 1, H, W) + x,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operations_without_a_rule_count_as_global(name):
    """Unknown fields must be too large, never too small."""
    module = positive(FunctionNet(UNKNOWN[name], a=conv()))
    layer = load_table(module)["end"]
    assert layer.has_global_context
    if name != "weights of its own":
        fields = receptive.any_channel(receptive.receptive_fields(module, ["end"], SIZE)["end"])
        vertical, horizontal = np.nonzero(fields.any((1, 3))), np.nonzero(fields.any((0, 2)))
        assert max(np.ptp(vertical, 0).max(), np.ptp(horizontal, 0).max()) > 1  # more than the convolution alone


def test_image_stays_an_image_after_an_unknown_operation():
    layers = load_table(positive(FunctionNet(UNKNOWN["roll"], a=conv())))
    assert layers["a"].is_spatial
    assert (layers["a"].receptive_field, layers["a"].stride, layers["a"].origin) == (None, None, None)
    assert "whole image" in str(layers)


def test_classifier_depends_on_the_whole_image(lite0):
    assert lite0.layers["classifier"].has_global_context
    assert lite0.layers["classifier"].receptive_field is None
    assert lite0.layers["global_pool.pool"].has_global_context
