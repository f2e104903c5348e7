"""The layer table: names, order, shapes, aliases, layouts and memory of layers."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from convscope import ConvscopeError
from convscope.engine.layer_table import LayerTable
from convscope.engine.layouts import Layout
from tests.engine.receptive_fields import (
    SIZE,
    FunctionNet,
    H,
    W,
    check_receptive_fields,
    load_table,
)

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


def test_calls_are_listed_in_the_order_in_which_they_finish():
    layers = check_receptive_fields(SharedRelu())
    assert layers.names == ["conv", "relu", "again", "relu#2", "again#2", "relu#3"]
    assert [layer.receptive_field[0] for layer in layers] == [3, 3, 5, 5, 7, 7]
    assert layers["relu#1"] is layers["relu"]
    assert "never" not in layers
    with pytest.raises(ConvscopeError, match="layer 'never' is not in this model"):
        layers["never"]


def test_containers_finish_after_their_parts():
    layers = load_table(nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(2, 2, 3))))
    assert layers.names == ["0.0", "0.1", "0", "1.0", "1"]
    assert [layer.alias_of for layer in layers] == [None, None, "0.1", None, "1.0"]


def test_layers_that_pass_their_input_on_are_aliases():
    layers = load_table(
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
    assert [layer.alias_of for layer in layers] == [None, "0", "0", None, "3", None, None]
    assert [layer.name for layer in layers.unique_spatial()] == ["0", "3", "5"]
    assert [layer.is_spatial for layer in layers] == [True] * 6 + [False]


def test_lookup_by_name_position_and_slice():
    layers = load_table(
        nn.Sequential(OrderedDict(features=nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), pool=nn.MaxPool2d(2)))
    )
    assert layers[0] is layers["features.0"]
    assert layers[-1] is layers.find("pool")
    assert isinstance(layers[1:], LayerTable)
    assert layers[1:].names == ["features.1", "features", "pool"]
    assert "features.0" not in layers[1:]
    assert "features.1" in layers
    assert layers[0] in layers
    assert 3 not in layers
    assert len(layers) == 4 == len(list(layers))
    with pytest.raises(ConvscopeError, match=r"layer 'featurs.0' is not in this model; nearest: features.0"):
        layers["featurs.0"]
    with pytest.raises(IndexError):
        layers[9]


def test_table_prints_in_aligned_columns():
    layers = load_table(nn.Sequential(OrderedDict([("<b>&", nn.Conv2d(1, 12, (3, 5))), ("relu", nn.ReLU())])))
    lines = str(layers).splitlines()
    assert repr(layers) == str(layers)
    assert lines[0].split()[:4] == ["layer", "kind", "output", "receptive"]
    assert "12 x 23 x 16" in lines[1]
    assert "3 x 5" in lines[1]
    starts = {line.index("12 x 23 x 16") for line in lines[1:]}
    assert len(starts) == 1  # columns are aligned
    assert all(line == line.rstrip() for line in lines)
    html = layers._repr_html_()
    assert "&lt;b&gt;&amp;" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 3


class Block(nn.Module):
    """A convolution between two identities, whose output is the block's."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.before, self.conv, self.after = nn.Identity(), nn.Conv2d(4, 4, 3, stride, 1), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.conv(self.before(x)))


def test_main_layers_are_the_outermost_of_equal_ones():
    stage = nn.Sequential(Block(2), Block(1))
    features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), stage, nn.MaxPool2d(2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    layers = load_table(nn.Sequential(OrderedDict(features=features, head=head)))
    # Not features, whose children differ in resolution, nor head; a stage stands for its last block.
    assert layers.main.names == ["features.0", "features.1.0", "features.1", "features.2", "head.0", "head.1", "head.2"]
    shown = [line.split()[0] for line in str(layers).splitlines()[1:-1]]
    assert shown == layers.main.names
    assert str(layers).splitlines()[-1].startswith("7 of 16 layers; print(model.layers.all)")
    assert [line.split()[0] for line in str(layers.all).splitlines()[1:]] == layers.names
    assert layers._ipython_key_completions_() == layers.names


# --- channels last ---


def test_channels_last_layers_are_listed_channels_first():
    module = torchvision.models.convnext.CNBlock(6, 1.0, 0.0)
    layers = check_receptive_fields(
        FunctionNet(lambda net, x: net.block(net.stem(x)), stem=nn.Conv2d(1, 6, 2, stride=2), block=module)
    )
    for name in ("block.block.2", "block.block.3", "block.block.4", "block.block.5"):
        assert layers[name].layout == Layout(3, (1, 2)), name
    assert layers["block.block.3"].shape == (24, 12, 10)
    assert layers["block.block.3"].units == 24
    assert layers["block.block.3"].parameters == 6 * 24 + 24
    assert layers["block.block.0"].layout == layers["block"].layout == Layout(1, (2, 3))
    assert not layers["block"].has_global_context
    assert layers["block"].receptive_field == (2 + 6 * 2,) * 2
    nhwc = torch.arange(24.0).view(1, 2, 3, 4)
    nchw = layers["block.block.3"].to_nchw(nhwc)
    assert nchw.shape == (1, 4, 2, 3)
    assert nchw[0, 1, 1, 2] == nhwc[0, 1, 2, 1]
    assert torch.equal(layers["block.block.3"].from_nchw(nchw, nhwc), nhwc)


def test_convnext():
    layers = load_table(torchvision.models.convnext_tiny(), (64, 64), 3)
    assert layers.last_spatial().name == "features"
    assert all(layer.units == layer.shape[0] for layer in layers if layer.is_spatial)
    assert layers["features.1.0.block.3"].shape == (384, 16, 16)
    # stem 4/4, then 3 + 3 + 9 + 3 depthwise 7 x 7 and three 2/2: by the formula for chains
    size, stride = 4, 4
    for depth in (3, 3, 9, 3):
        size, stride = (size + stride, stride * 2) if depth != 3 or size > 4 else (size, stride)
        size += depth * 6 * stride
    assert layers["features"].receptive_field == (size, size)


# --- known networks ---


@pytest.fixture(scope="module")
def vgg16() -> LayerTable:
    return load_table(torchvision.models.vgg16(init_weights=False), (64, 64), 3)


def test_vgg16(vgg16):
    """The figures of the literature: 196 for block5_conv3, 212 after the last pooling."""
    expected = {"features.0": 3, "features.2": 5, "features.4": 6, "features.10": 24, "features.29": 196}
    for name, size in expected.items():
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


LAST = {  # the default layer of Grad-CAM, its receptive field and stride
    "torchvision:resnet50": ("layer4", 427, 32),
    "torchvision:alexnet": ("features.11", 163, 16),
    "torchvision:densenet121": ("features", 2071, 32),
    "torchvision:squeezenet1_1": ("classifier.2", 207, 16),
    "timm:convnext_atto": ("norm_pre", 1136, 32),
    "timm:efficientnet_b0": ("bn2", 851, 32),
}


@pytest.mark.parametrize("name", LAST)
def test_default_layer_of_known_networks(name):
    source, _, architecture = name.partition(":")
    module = torchvision.models.get_model(architecture) if source == "torchvision" else timm.create_model(architecture)
    layer = load_table(module, (64, 64), 3).last_spatial()
    expected_name, size, stride = LAST[name]
    assert (layer.name, layer.receptive_field, layer.stride) == (expected_name, (size, size), (stride, stride))
    assert layer.has_global_context == (name == "timm:efficientnet_b0")  # squeeze-and-excitation


def test_lite0(lite0):
    layers = lite0.layers
    assert layers.last_spatial().name == "bn2"
    assert layers.last_spatial().receptive_field == (851, 851)
    assert layers["conv_stem"].origin == (0, 0)  # TensorFlow's padding: one pixel more after than before
    total = sum(p.numel() for p in lite0.module.parameters())
    leaves = [layer for layer in layers if not list(dict(lite0.module.named_modules())[layer.name].children())]
    in_norms = sum(layers[name].parameters for name in layers.names if layers[name].kind == "BatchNormAct2d")
    assert sum(layer.parameters for layer in leaves) + in_norms == total


# --- other columns ---


def test_outputs_in_dicts_and_tuples():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.conv(x)
            return {"count": torch.tensor(3), "maps": (y, x)}

    layers = load_table(FunctionNet(lambda net, x: net.inner(x)["maps"][0].mean((2, 3)), inner=Both()))
    assert layers["inner"].shape == (2, 23, 18)
    assert layers["inner"].alias_of == "inner.conv"
    assert layers["inner"].receptive_field == (3, 3)


def test_layers_without_spatial_axes():
    layers = load_table(
        FunctionNet(
            lambda net, x: net.fc(net.tokens(net.conv(x).flatten(2).transpose(1, 2).flip(1)[:, 7:]).mean(1)),
            conv=nn.Conv2d(1, 4, 3),
            tokens=nn.Linear(4, 6),
            fc=nn.Linear(6, 3),
        )
    )
    assert layers["tokens"].shape == (23 * 18 - 7, 6)
    assert (layers["tokens"].units, layers["fc"].units) == (6, 3)
    assert not layers["tokens"].is_spatial
    assert not layers["fc"].is_spatial
    assert layers.last_spatial().name == "conv"
    with pytest.raises(ConvscopeError, match="no layer of this model has spatial extent"):
        load_table(nn.Sequential(nn.Flatten(), nn.Linear(H * W, 3))).last_spatial()
    pooled = load_table(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 3, 1)))
    assert [layer.is_spatial for layer in pooled] == [False, False]
    line = load_table(nn.Sequential(nn.Conv2d(1, 3, (H, 1)), nn.Conv2d(3, 3, (1, 5))))
    assert [layer.shape for layer in line] == [(3, 1, W), (3, 1, W - 4)]
    assert all(layer.is_spatial for layer in line)
    module = FunctionNet(
        lambda net, x: net.b(net.a(x).reshape(-1, 1, 1, W)), a=nn.Conv2d(1, 1, (H, 1)), b=nn.Conv2d(1, 3, (1, 5))
    )
    assert load_table(module)["b"].is_spatial
    assert load_table(module)["b"].receptive_field == (H, 5)


def test_poolings_are_marked():
    layers = load_table(
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
    assert [layer.is_pooling for layer in layers] == [True, False, True, True, False, True, True, True]
    assert layers.last_spatial().name == "4"


def test_allocated_bytes_are_those_of_the_tensors():
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Identity(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )
    layers = load_table(module)
    position = math.prod(SIZE) * 4
    pooled = 8 * 12 * 10
    assert [layer.allocated_bytes for layer in layers[:4]] == [8 * position, 8 * position, 8 * position, 16 * position]
    assert layers["4"].allocated_bytes - layers["3"].allocated_bytes in (
        pooled * 4,
        pooled * 12,
    )  # with or without the indices, int64
    assert layers["5"].allocated_bytes == layers["4"].allocated_bytes  # a view
    large = load_table(torchvision.models.resnet18(), (64, 64), 3)
    allocated = [layer.allocated_bytes for layer in large]
    assert allocated == sorted(allocated)
    leaves = [layer for layer in large if not any(other.startswith(layer.name + ".") for other in large.names)]
    total = sum(4 * math.prod(layer.shape) for layer in leaves if layer.kind != "ReLU")  # they work in place
    assert total <= allocated[-1] < 1.1 * total
