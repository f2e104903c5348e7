"""The layer table against brute force: what a layer sees is found by changing each pixel of its input."""

from __future__ import annotations

import math
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

import convscope
from convscope import ConvscopeError
from convscope.engine.layer_table import Layer, LayerTable, Layout
from tests.oracles import receptive

SIZE = H, W = (25, 20)


def table(module: nn.Module, size: tuple[int, ...] = SIZE, channels: int = 1) -> LayerTable:
    return convscope.load(module, preprocessing={"size": size, "channels": channels}).layers


def positive(module: nn.Module) -> nn.Module:
    """Weights above zero keep every ReLU alive and let no two changes cancel."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.2, 0.6)
    return module.double().eval()


def compare(row: Layer, seen: np.ndarray, *, slack: float = 0, cropped: bool = False) -> int:
    """Whether the row bounds what is seen (h, w, H, W); returns how many places on each axis were compared exactly.

    Every place must see nothing beyond its window. Where the window lies inside the picture, it must be filled up to
    its edges (if the network has `cropped` the picture, in at least half of these places); with `slack`, the widest
    view must come up to the window but for so many pixels.
    """
    assert row.receptive_field is not None, f"{row.name}: {row}"
    compared = 0
    count = len(row.receptive_field)
    for axis in range(count):
        by_place = seen.any(tuple(other for other in range(2 * count) if other % count != axis))  # (places, pixels)
        size, stride, origin = row.receptive_field[axis], row.stride[axis], row.origin[axis]
        widest, exact = 0, []
        for place, pixels in enumerate(by_place):
            (looked_at,) = np.nonzero(pixels)
            first, last = origin + place * stride, origin + place * stride + size - 1
            if len(looked_at):
                assert looked_at[0] >= first - 1e-6, (row.name, axis, place)
                assert looked_at[-1] <= last + 1 - 1e-6 if slack else looked_at[-1] <= last + 1e-6, (row.name, place)
                widest = max(widest, looked_at[-1] - looked_at[0] + 1)
            if first >= 0 and last < by_place.shape[1]:
                exact.append(len(looked_at) > 0 and (looked_at[0], looked_at[-1]) == (first, last))
        if slack:
            assert widest >= size - slack, (row.name, axis)
        elif cropped:
            assert sum(exact) >= len(exact) / 2, (row.name, axis, exact)
        else:
            assert all(exact), (row.name, axis, exact)
        compared += sum(exact)
    return compared


def check(
    module: nn.Module,
    size: tuple[int, ...] = SIZE,
    *,
    slack: float = 0,
    way: str = "nan",
    channels: int = 1,
    cropped: bool = False,
) -> LayerTable:
    """Compare every layer that has space, and return the table; at least one place must have been exact."""
    layers = table(positive(module), size, channels)
    rows = [row for row in layers if row.is_spatial and row.receptive_field is not None]
    laid = {row.name: row.to_nchw for row in rows}
    found = receptive.receptive_fields(module, list(laid), size, channels, way, laid)
    compared = 0
    for row in rows:
        seen = receptive.any_channel(found[row.name])
        compared += compare(row, seen, slack=slack, cropped=cropped)
    assert compared or slack
    return layers


class Run(nn.Module):
    """Named layers and the function that calls them."""

    def __init__(self, run: Callable[[Run, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.end = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.run(self, x))


# --- chains of everything ---


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
def test_chains_see_what_brute_force_finds(layers):
    module = positive(nn.Sequential(*layers))
    try:
        with torch.no_grad():
            module(torch.zeros(1, 1, *SIZE, dtype=torch.float64))
    except RuntimeError:
        return  # nothing is left of the picture
    rows = table(module)
    found = receptive.receptive_fields(module, rows.names, SIZE)
    assert [row.name for row in rows] == [str(i) for i in range(len(layers))]
    for row in rows:
        if row.is_spatial:
            compare(row, receptive.any_channel(found[row.name]))


def test_a_chain_by_hand():
    rows = check(
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(2, 2, (5, 3), dilation=(1, 2)))
    )
    assert rows["0"].receptive_field == (3, 3)
    assert (rows["0"].stride, rows["0"].origin) == ((1, 1), (-1, -1))
    assert (rows["1"].receptive_field, rows["1"].stride, rows["1"].origin) == ((4, 4), (2, 2), (-1, -1))
    assert rows["2"].receptive_field == (4 + 4 * 2, 4 + 2 * 2 * 2)
    assert rows["2"].origin == (-1, -1)


# --- graphs ---


def conv(kernel: int = 3, channels: int = 1, **options: int) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(channels, channels, kernel, **options)


def inception(net: Run, x: Tensor) -> Tensor:
    return torch.cat([net.one(x), net.three(x), net.five(net.one(x)), F.max_pool2d(x, 3, 1, 1)], 1)


def residual(net: Run, x: Tensor) -> Tensor:
    y = net.three(x)
    y += net.one(x)
    return net.five(y) + net.down(y)


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "inception": lambda: Run(inception, one=conv(1), three=conv(3), five=conv(5)),
    "residual": lambda: Run(residual, three=conv(3), one=conv(1), five=conv(5, stride=2), down=conv(1, stride=2)),
    "lopsided": lambda: Run(lambda net, x: net.a(F.pad(x, (0, 4, 0, 4))) + x, a=conv(5, padding=0)),
    "negative padding": lambda: Run(lambda net, x: net.a(F.pad(x, (-2, 3, -1, -4))), a=conv(5)),
    "asymmetric padding": lambda: Run(lambda net, x: net.a(F.pad(x, (1, 2, 3, 0))), a=conv(4, padding=0, stride=2)),
    "same padding": lambda: nn.Sequential(nn.Conv2d(1, 1, 4, padding="same"), nn.Conv2d(1, 1, 3, padding="same")),
    "timm's same": lambda: nn.Sequential(timm.layers.Conv2dSame(1, 1, 3, stride=2), timm.layers.Conv2dSame(1, 1, 5, 2)),
    "timm's pool": lambda: nn.Sequential(timm.layers.create_pool2d("max", 3, 2, padding="same"), conv()),
    "slices": lambda: Run(lambda net, x: net.a(x[..., 1::2, ::2]) + net.a(x)[..., : H - 1 : 2, 1::2], a=conv()),
    "negative slices": lambda: Run(lambda net, x: net.a(x[:, :, 2:-3, -17:]), a=conv(5)),
    "focus": lambda: Run(
        lambda net, x: net.a(torch.cat([x[..., i : 16 + i : 2, j : 16 + j : 2] for i in (0, 1) for j in (0, 1)], 1)),
        a=nn.Conv2d(4, 1, 3, padding=1),
    ),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)),
    "swapped axes": lambda: Run(lambda net, x: net.a(x.transpose(2, 3)).transpose(2, 3), a=nn.Conv2d(1, 1, (5, 2))),
    "convolution of one transposed": lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 3), conv()),
    "functional": lambda: Run(
        lambda net, x: F.avg_pool2d(F.conv2d(F.relu(x), net.a.weight, stride=2), 3, 2, ceil_mode=True), a=conv(5)
    ),
    "unshuffled": lambda: Run(
        lambda net, x: net.a(F.pixel_unshuffle(x[..., :16, :16], 2)), a=nn.Conv2d(4, 4, 3, padding=1)
    ),
    "unshuffled by hand": lambda: Run(
        lambda net, x: net.a(x[..., :16, :16].view(-1, 1, 8, 2, 4, 4).permute(0, 3, 5, 1, 2, 4).reshape(-1, 8, 8, 4)),
        a=nn.Conv2d(8, 8, 3, padding=1),
    ),
    "channels shuffled": lambda: Run(
        lambda net, x: net.b(net.a(x).view(-1, 2, 3, H, W).transpose(1, 2).reshape(-1, 6, H, W)),
        a=nn.Conv2d(1, 6, 3, padding=1),
        b=nn.Conv2d(6, 6, 3, padding=1, groups=3),
    ),
    "space to tokens and back": lambda: Run(
        lambda net, x: net.b(net.fc(net.a(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(-1, 4, H, W)),
        a=nn.Conv2d(1, 4, 3, padding=1),
        fc=nn.Linear(4, 4),
        b=nn.Conv2d(4, 4, 5),
    ),
    "split": lambda: Run(
        lambda net, x: torch.cat([net.b(part) for part in net.a(x).chunk(2, 1)], 1), a=nn.Conv2d(1, 4, 3), b=conv(3, 2)
    ),
    "adaptive": lambda: Run(lambda net, x: net.a(F.adaptive_avg_pool2d(x[..., :16, :16], (4, 8))), a=conv()),
}


CROPPED = ("slices", "negative slices", "negative padding", "focus", "unshuffled", "unshuffled by hand", "adaptive")


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_see_what_brute_force_finds(name):
    rows = check(GRAPHS[name](), cropped=name in CROPPED)
    assert not rows[-1].has_global_context
    assert max(rows[-1].receptive_field) > 3


# Where neighbours see windows of different size, the numbers are bounds, and by how many pixels is said here.
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
        lambda: Run(
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
        lambda: Run(
            lambda net, x: net.b(torch.cat([F.interpolate(x[..., :13, :10], (H, W)), net.a(x)], 1)),
            a=conv(),
            b=nn.Conv2d(2, 1, 3, padding=1),
        ),
        4,
        "bump",
    ),
    "down and up": (
        lambda: Run(
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
def test_enlarging_is_bounded(name):
    build, slack, way = BOUNDED[name]
    rows = check(build(), slack=slack, way=way)
    assert rows.last_spatial().receptive_field is not None or rows.last_spatial().is_pooling


def test_mirrored_borders_count_as_if_the_picture_went_on():
    for mode in ("reflect", "replicate"):
        rows = check(nn.Sequential(nn.Conv2d(1, 1, 5, padding=2, padding_mode=mode), conv()))
        assert rows["1"].receptive_field == (7, 7)


# --- whole pictures ---


class Squeeze(nn.Module):
    """Squeeze-and-excitation as its first implementation has it, or with convolutions."""

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
def test_a_global_gate_keeps_the_local_field(style):
    module = positive(Squeeze(style))
    rows = table(module)
    found = receptive.any_channel(receptive.receptive_fields(module, ["b"], SIZE)["b"])
    assert found.all()  # through the gate each place sees everything
    assert rows["b"].has_global_context
    assert rows["b"].receptive_field == (5, 5)
    assert rows["b"].origin == (-2, -2)
    assert not rows["a"].has_global_context
    assert "5 + global" in str(rows)


def channel_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)


NORMS: dict[str, tuple[nn.Module, bool]] = {
    "group": (nn.GroupNorm(2, 4), True),
    "instance": (nn.InstanceNorm2d(4), True),
    "instance, affine": (nn.InstanceNorm2d(4, affine=True), True),
    "instance, tracked": (nn.InstanceNorm2d(4, track_running_stats=True), False),
    "layer, over places": (nn.LayerNorm([4, *SIZE]), True),
    "layer, over channels": (Run(lambda net, x: channel_norm(x)), False),
    "batch": (nn.BatchNorm2d(4), False),
    "softmax over channels": (nn.Softmax(1), False),
    "softmax over places": (nn.Softmax(3), True),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    norm, whole = NORMS[name]
    module = positive(nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3, padding=1), norm=norm)))
    row = table(module)["norm"]
    found = receptive.any_channel(receptive.receptive_fields(module, ["norm"], SIZE)["norm"])
    assert row.has_global_context == whole
    assert row.receptive_field == (3, 3)
    if whole:
        assert found[12, 10].sum() > 9
    else:
        assert compare(row, found) > 0


def roll_channels(net: Run, x: Tensor) -> Tensor:
    return net.a(torch.cat([x[..., :1], x[..., :-1]], 3))


def write_in_place(net: Run, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 5:] = x[..., :-5]
    return net.a(y + x)


def smear(net: Run, x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 5:] += x[..., :-5]
    return net.a(y)


def grid_sample(net: Run, x: Tensor) -> Tensor:
    grid = F.affine_grid(
        torch.tensor([[[0, 1.0, 0], [1, 0, 0]]], dtype=x.dtype).expand(len(x), 2, 3), list(x.shape), False
    )
    return net.a(F.grid_sample(x, grid, align_corners=False))


def attention(net: Run, x: Tensor) -> Tensor:
    tokens = net.a(x).flatten(2).transpose(1, 2)
    weights = (tokens @ tokens.transpose(1, 2)).softmax(2)
    return net.a(x + (weights @ tokens).transpose(1, 2).view(-1, 1, *x.shape[2:]))


UNKNOWN: dict[str, Callable[[Run, Tensor], Tensor]] = {
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
def test_what_is_not_known_counts_as_whole(name):
    """A field that is too small would be a lie; one that is too large says that it is not known."""
    module = positive(Run(UNKNOWN[name], a=conv()))
    row = table(module)["end"]
    assert row.has_global_context
    if name != "weights of its own":
        found = receptive.any_channel(receptive.receptive_fields(module, ["end"], SIZE)["end"])
        rows, columns = np.nonzero(found.any((1, 3))), np.nonzero(found.any((0, 2)))
        assert max(np.ptp(rows, 0).max(), np.ptp(columns, 0).max()) > 1  # farther than the convolution alone


def test_a_picture_stays_a_picture_behind_something_unknown():
    rows = table(positive(Run(UNKNOWN["roll"], a=conv())))
    assert rows["a"].is_spatial
    assert (rows["a"].receptive_field, rows["a"].stride, rows["a"].origin) == (None, None, None)
    assert "whole image" in str(rows)


def test_classes_see_the_whole_picture(lite0):
    assert lite0.layers["classifier"].has_global_context
    assert lite0.layers["classifier"].receptive_field is None
    assert lite0.layers["global_pool.pool"].has_global_context


# --- names, order, kinds ---


class SharedRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.again = nn.Conv2d(2, 2, 3)
        self.relu = nn.ReLU()
        self.never = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        return self.relu(self.again(self.relu(self.again(x)))).mean((2, 3))


def test_calls_are_rows_in_the_order_of_finishing():
    rows = check(SharedRelu())
    assert rows.names == ["conv", "relu", "again", "relu#2", "again#2", "relu#3"]
    assert [row.receptive_field[0] for row in rows] == [3, 3, 5, 5, 7, 7]
    assert rows["relu#1"] is rows["relu"]
    assert "never" not in rows
    with pytest.raises(ConvscopeError, match="layer 'never' is not in this model"):
        rows["never"]


def test_containers_finish_behind_their_parts():
    rows = table(nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(2, 2, 3))))
    assert rows.names == ["0.0", "0.1", "0", "1.0", "1"]
    assert [row.alias_of for row in rows] == [None, None, "0.1", None, "1.0"]


def test_what_passes_on_is_told_apart_from_what_makes():
    rows = table(
        nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.Identity(),
            nn.Dropout(0.5),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.5, inplace=True),
            nn.ReLU(),
            nn.Flatten(),
        )
    )
    assert [row.alias_of for row in rows] == [None, "0", "0", None, "3", None, None]
    assert [row.name for row in rows.unique_spatial()] == ["0", "3", "5"]
    assert [row.is_spatial for row in rows] == [True] * 6 + [False]


def test_lookup():
    rows = table(
        nn.Sequential(OrderedDict(features=nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), pool=nn.MaxPool2d(2)))
    )
    assert rows[0] is rows["features.0"]
    assert rows[-1] is rows.find("pool")
    assert isinstance(rows[1:], LayerTable)
    assert rows[1:].names == ["features.1", "features", "pool"]
    assert "features.0" not in rows[1:]
    assert "features.1" in rows
    assert rows[0] in rows
    assert 3 not in rows
    assert len(rows) == 4 == len(list(rows))
    with pytest.raises(ConvscopeError, match=r"layer 'featurs.0' is not in this model; nearest: features.0"):
        rows["featurs.0"]
    with pytest.raises(IndexError):
        rows[9]


def test_the_table_prints_well():
    rows = table(nn.Sequential(OrderedDict([("<b>&", nn.Conv2d(1, 12, (3, 5))), ("relu", nn.ReLU())])))
    lines = str(rows).splitlines()
    assert repr(rows) == str(rows)
    assert lines[0].split()[:4] == ["layer", "kind", "output", "units"]
    assert "12 x 23 x 16" in lines[1]
    assert "3 x 5" in lines[1]
    starts = {line.index("12 x 23 x 16") for line in lines[1:]}
    assert len(starts) == 1  # columns stand below each other
    assert all(line == line.rstrip() for line in lines)
    html = rows._repr_html_()
    assert "&lt;b&gt;&amp;" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 3


# --- channels last ---


def test_channels_last_is_seen_and_shown_channels_first():
    module = torchvision.models.convnext.CNBlock(6, 1.0, 0.0)
    rows = check(Run(lambda net, x: net.block(net.stem(x)), stem=nn.Conv2d(1, 6, 2, stride=2), block=module))
    for name in ("block.block.2", "block.block.3", "block.block.4", "block.block.5"):
        assert rows[name].layout == Layout(3, (1, 2)), name
    assert rows["block.block.3"].shape == (24, 12, 10)
    assert rows["block.block.3"].units == 24
    assert rows["block.block.3"].parameters == 6 * 24 + 24
    assert rows["block.block.0"].layout == rows["block"].layout == Layout(1, (2, 3))
    assert not rows["block"].has_global_context
    assert rows["block"].receptive_field == (2 + 6 * 2,) * 2
    nhwc = torch.arange(24.0).view(1, 2, 3, 4)
    nchw = rows["block.block.3"].to_nchw(nhwc)
    assert nchw.shape == (1, 4, 2, 3)
    assert nchw[0, 1, 1, 2] == nhwc[0, 1, 2, 1]
    assert torch.equal(rows["block.block.3"].from_nchw(nchw, nhwc), nhwc)


def test_real_channels_last_networks():
    rows = table(torchvision.models.convnext_tiny(), (64, 64), 3)
    assert rows.last_spatial().name == "features"
    assert all(row.units == row.shape[0] for row in rows if row.is_spatial)
    assert rows["features.1.0.block.3"].shape == (384, 16, 16)
    # stem 4/4, then 3 + 3 + 9 + 3 depthwise 7 x 7 and three 2/2: by the formula for chains
    size, stride = 4, 4
    for depth in (3, 3, 9, 3):
        size, stride = (size + stride, stride * 2) if depth != 3 or size > 4 else (size, stride)
        size += depth * 6 * stride
    assert rows["features"].receptive_field == (size, size)


# --- real networks ---


@pytest.fixture(scope="module")
def vgg16() -> LayerTable:
    return table(torchvision.models.vgg16(init_weights=False), (64, 64), 3)


def test_vgg16(vgg16):
    """The figures of the literature: 196 for block5_conv3, 212 behind the last pooling."""
    named = {"features.0": 3, "features.2": 5, "features.4": 6, "features.10": 24, "features.29": 196}
    for name, size in named.items():
        assert vgg16[name].receptive_field == (size, size), name
    assert vgg16["features.30"].receptive_field == (212, 212)
    assert vgg16["features.29"].stride == (16, 16)
    assert vgg16.last_spatial().name == "features.29"
    assert vgg16["features.30"].is_pooling
    assert not vgg16["features.29"].is_pooling
    assert vgg16["features.0"].parameters == 64 * 27 + 64
    assert vgg16["features"].parameters == 14_714_688
    assert vgg16["classifier"].parameters + vgg16["features"].parameters == 138_357_544
    assert vgg16["classifier.6"].shape == (1000,)


LAST = {  # where Grad-CAM looks, and what that sees
    "torchvision:resnet50": ("layer4", 427, 32),
    "torchvision:alexnet": ("features.11", 163, 16),
    "torchvision:densenet121": ("features", 2071, 32),
    "torchvision:squeezenet1_1": ("classifier.2", 207, 16),
    "timm:convnext_atto": ("norm_pre", 1136, 32),
    "timm:efficientnet_b0": ("bn2", 851, 32),
}


@pytest.mark.parametrize("name", LAST)
def test_where_to_look_by_default(name):
    source, _, own = name.partition(":")
    module = torchvision.models.get_model(own) if source == "torchvision" else timm.create_model(own)
    row = table(module, (64, 64), 3).last_spatial()
    layer, size, stride = LAST[name]
    assert (row.name, row.receptive_field, row.stride) == (layer, (size, size), (stride, stride))
    assert row.has_global_context == (name == "timm:efficientnet_b0")  # squeeze-and-excitation


def test_lite0(lite0):
    rows = lite0.layers
    assert rows.last_spatial().name == "bn2"
    assert rows.last_spatial().receptive_field == (851, 851)
    assert rows["conv_stem"].origin == (0, 0)  # TensorFlow's padding: one pixel more behind than in front
    total = sum(p.numel() for p in lite0.module.parameters())
    own = [row for row in rows if not list(dict(lite0.module.named_modules())[row.name].children())]
    within_norms = sum(rows[name].parameters for name in rows.names if rows[name].kind == "BatchNormAct2d")
    assert sum(row.parameters for row in own) + within_norms == total


def test_a_real_residual_stage_against_brute_force():
    """Four strides, residuals, in-place ReLUs: torchvision's own blocks, as narrow as they go."""
    block = torchvision.models.resnet.BasicBlock
    down = nn.Sequential(nn.Conv2d(2, 4, 1, 2), nn.BatchNorm2d(4))
    stem = [nn.Conv2d(1, 2, 7, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    rows = check(nn.Sequential(*stem, block(2, 2), block(2, 4, 2, down)), (44, 28))
    assert rows["4"].receptive_field == (27, 27)
    assert rows["5"].receptive_field == (51, 51)
    assert rows["5.relu#2"].stride == (8, 8)


# --- what else a row says ---


def test_outputs_that_are_dicts_and_tuples():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.conv(x)
            return {"count": torch.tensor(3), "maps": (y, x)}

    rows = table(Run(lambda net, x: net.inner(x)["maps"][0].mean((2, 3)), inner=Both()))
    assert rows["inner"].shape == (2, 23, 18)
    assert rows["inner"].alias_of == "inner.conv"
    assert rows["inner"].receptive_field == (3, 3)


def test_layers_without_space():
    rows = table(
        Run(
            lambda net, x: net.fc(net.tokens(net.conv(x).flatten(2).transpose(1, 2).flip(1)).mean(1)),
            conv=nn.Conv2d(1, 4, 3),
            tokens=nn.Linear(4, 6),
            fc=nn.Linear(6, 3),
        )
    )
    assert rows["tokens"].shape == (23 * 18, 6)
    assert (rows["tokens"].units, rows["fc"].units) == (6, 3)
    assert not rows["tokens"].is_spatial
    assert not rows["fc"].is_spatial
    assert rows.last_spatial().name == "conv"
    with pytest.raises(ConvscopeError, match="no layer of this model has spatial extent"):
        table(nn.Sequential(nn.Flatten(), nn.Linear(H * W, 3))).last_spatial()
    one = table(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 3, 1)))
    assert [row.is_spatial for row in one] == [False, False]
    line = table(nn.Sequential(nn.Conv2d(1, 3, (H, 1)), nn.Conv2d(3, 3, (1, 5))))
    assert [row.shape for row in line] == [(3, 1, W), (3, 1, W - 4)]
    assert all(row.is_spatial for row in line)
    module = Run(
        lambda net, x: net.b(net.a(x).reshape(-1, 1, 1, W)), a=nn.Conv2d(1, 1, (H, 1)), b=nn.Conv2d(1, 3, (1, 5))
    )
    assert table(module)["b"].is_spatial
    assert table(module)["b"].receptive_field == (H, 5)


def test_poolings_are_marked():
    rows = table(
        nn.Sequential(
            nn.MaxPool2d(2),
            nn.Conv2d(1, 2, 1),
            nn.AvgPool2d(2),
            nn.Dropout(),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
    )
    assert [row.is_pooling for row in rows] == [True, False, True, True, False, True, True, True]
    assert rows.last_spatial().name == "4"


def test_bytes_are_what_the_tensors_take():
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Identity(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )
    rows = table(module)
    place = math.prod(SIZE) * 4
    pooled = 8 * 12 * 10
    assert [row.allocated_bytes for row in rows[:4]] == [8 * place, 8 * place, 8 * place, 16 * place]
    assert rows["4"].allocated_bytes - rows["3"].allocated_bytes in (pooled * 4, pooled * 12)  # with or without the indices, int64
    assert rows["5"].allocated_bytes == rows["4"].allocated_bytes  # a view
    large = table(torchvision.models.resnet18(), (64, 64), 3)
    taken = [row.allocated_bytes for row in large]
    assert taken == sorted(taken)
    leaves = [row for row in large if not any(other.startswith(row.name + ".") for other in large.names)]
    made = sum(4 * math.prod(row.shape) for row in leaves if row.kind != "ReLU")  # they work in place
    assert made <= taken[-1] < 1.1 * made
