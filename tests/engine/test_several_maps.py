"""Layers that return several maps of their own: each has a row in the table, and is captured, resumed and explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope import Model
from convscope.attribution.default_layer import choose_layer
from convscope.engine.resume import resume_from_layer
from tests.engine.helpers import inputs, load_model, relative_error
from tests.oracles.nets import diff_snapshots, randomized, snapshot


class Block(nn.Module):
    """Two streams of different resolution; the first goes into the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        coarse = coarse + self.b(coarse + F.avg_pool2d(fine, 2)).relu()
        return fine + self.a(fine).relu(), coarse


class Streams(nn.Module):
    """Scores made of both streams behind two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(*self.features(x, 2))

    def features(self, x: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        fine = self.stem(x).relu()
        coarse = F.avg_pool2d(fine, 2)
        for block in self.blocks[:num_blocks]:
            fine, coarse = block(fine, coarse)
        return fine, coarse

    def head(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return self.fc(torch.cat([fine.mean((2, 3)), coarse.square().mean((2, 3))], 1))


@pytest.fixture(scope="module")
def net() -> Streams:
    return randomized(Streams())


@pytest.fixture(scope="module")
def model(net: Streams) -> Model:
    return load_model(net)


def test_each_map_has_a_row(model: Model) -> None:
    rows = [layer for layer in model.layers if layer.call == "blocks.0"]
    assert [(layer.name, layer.shape, layer.num_tensors) for layer in rows] == [
        ("blocks.0", (4, 24, 24), 2),
        ("blocks.0[1]", (4, 12, 12), 2),
    ]
    second = model.layers["blocks.1[1]"]
    assert (second.stride, second.receptive_field) == ((2, 2), (12, 12))
    assert ("blocks.0[1]", "blocks.1.b") in model.layers.edges()


def test_activations_are_those_of_the_second_map(net: Streams, model: Model) -> None:
    x = inputs()
    activations = convscope.activations(model, x, ["blocks.0", "blocks.0[1]"])
    with torch.no_grad():
        fine, coarse = net.features(x, 1)
    assert relative_error(activations["blocks.0"], fine) < 1e-6
    assert relative_error(activations["blocks.0[1]"], coarse) < 1e-6


def test_grad_cam_by_hand(net: Streams, model: Model) -> None:
    """The default is the last of the maps that every path passes through together; the network is left as it was."""
    x, before = inputs(), snapshot(net)
    layer, reason = choose_layer(model)
    assert layer.name == "blocks.1[1]"
    assert "that every path to the target passes through, or through another output of 'blocks.1'" in reason
    heatmaps = convscope.heatmaps(model, x, 2)
    assert diff_snapshots(before, snapshot(net)) == []
    coarse = net.features(x, 2)[1].detach()
    gradient = net.fc.weight[2, 4:].detach()[:, None, None] * 2 * coarse / coarse[0, 0].numel()
    expected = (gradient.mean((2, 3), keepdim=True) * coarse).sum(1)
    assert (heatmaps.layer, heatmaps.layer_reason) == (layer.name, reason)
    assert relative_error(heatmaps.values[:, 0], expected) < 1e-5


def test_gradient_through_later_blocks(net: Streams, model: Model) -> None:
    x = inputs()
    fine, coarse = (maps.detach().requires_grad_() for maps in net.features(x, 1))
    score = net.head(*net.blocks[1](fine, coarse))[:, 3].sum()
    for name, maps in (("blocks.0", fine), ("blocks.0[1]", coarse)):
        gradient = torch.autograd.grad(score, maps, retain_graph=True)[0]
        expected = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).detach()
        assert relative_error(convscope.heatmaps(model, x, 3, layer=name).values[:, 0], expected) < 1e-5


def test_resume_replaces_the_second_map_alone(net: Streams, model: Model) -> None:
    x = inputs(1)
    maps = torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        fine, coarse = net.features(x, 1)
        expected = net.head(*net.blocks[1](fine.expand(3, -1, -1, -1), maps))
    with resume_from_layer(model, "blocks.0[1]", x) as run:
        result = run(maps)
    assert relative_error(result.logits, expected) < 1e-5
    assert relative_error(result.maps["blocks.0[1]"], coarse) < 1e-6


def test_pattern_scores_are_means_of_the_second_map(net: Streams, model: Model) -> None:
    patterns = convscope.patterns(model, "blocks.0[1]", [0, 3], size=24, steps=2)
    x = torch.as_tensor(patterns.images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        coarse = net.features(x, 1)[1]
    expected = [float(coarse[i, unit].mean()) for i, unit in enumerate((0, 3))]
    np.testing.assert_allclose(patterns.scores, expected, rtol=1e-4)


def test_scan_reads_the_second_map(net: Streams, model: Model, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    store = convscope.scan(model, images, tmp_path / "store", ["blocks.0[1]"], 2, workers=0, progress=False)
    with torch.no_grad():
        coarse = net.features(torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255, 1)[1]
    for unit in range(4):
        maximum = store.unit("blocks.0[1]", unit).statistics["maximum"]
        assert maximum == pytest.approx(float(coarse[:, unit].max()), rel=1e-4)


def test_a_later_layer_that_returns_the_second_map_among_others() -> None:
    """Its gradients begin where the map was made."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.streams = randomized(Streams())

        def forward(self, x: Tensor) -> dict[str, Any]:
            fine, coarse = self.streams.features(x, 2)
            return {"out": coarse, "pooled": coarse.square().mean((2, 3)), "fine": fine}

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = Body(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.body(x)
            return self.fc(torch.cat([maps["pooled"], maps["fine"].mean((2, 3))], 1))

    model = load_model(randomized(Network()))
    assert model.layers["body"].alias_of == "body.streams.blocks.1[1]"
    body, block = (convscope.heatmaps(model, inputs(), 1, layer=n).values for n in ("body", "body.streams.blocks.1[1]"))
    assert np.abs(body).max() > 0
    np.testing.assert_allclose(body, block, rtol=1e-5, atol=1e-7)


def test_a_map_that_is_passed_on_counts_where_it_was_made() -> None:
    """The first stream comes out of the last block as it went into the first."""

    class Passing(Block):
        def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
            return fine, super().forward(fine, coarse)[1]

    net = Streams()
    net.blocks = nn.ModuleList([Passing(), Passing()])
    assert choose_layer(load_model(randomized(net)))[0].name == "blocks.1[1]"


def test_later_stages_that_other_paths_bypass_are_named() -> None:
    class Heads(nn.Module):
        """A score of each of two stages."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
            self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.first(x.mean((2, 3))) + self.second(self.b(x).relu().mean((2, 3)))

    layer, reason = choose_layer(load_model(randomized(Heads())))
    assert layer.name == "a"
    assert reason.endswith("part of the influence passes through later layers ('b', 11 x 11), which other paths bypass")
