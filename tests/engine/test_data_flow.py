"""Data flow: dominators of small graphs by hand, and of traced networks; tensors made of weights alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import convscope
from convscope.engine.data_flow import IMAGE, DataFlow
from tests.engine.helpers import inputs, load_model
from tests.oracles.nets import randomized


def flow(**sources: str) -> DataFlow:
    """Return a graph of single letters; "-" is the image."""
    return DataFlow({node: frozenset(IMAGE if s == "-" else s for s in before) for node, before in sources.items()})


def test_dominators_by_hand() -> None:
    chain = flow(a="-", b="a", c="b")
    assert chain.dominators({"c"}) == ["c", "b", "a"]
    diamond = flow(a="-", b="a", c="a", d="bc", e="d")
    assert diamond.dominators({"e"}) == ["e", "d", "a"]
    assert diamond.dominators({"b", "c"}) == ["a"]
    assert flow(a="-", b="-a", c="b").dominators({"c"}) == ["c", "b"]  # the image bypasses a
    assert flow(a="-", b="a").dominators({"b", IMAGE}) == []
    assert flow(a="-", b="", c="b").dominators({"c"}) == ["c", "b"]  # the sources of b are not known
    assert flow(a="-").dominators(set()) == []


def test_a_layer_that_returns_several_tensors_separates() -> None:
    pyramid = flow(a="-", b="a", p="a", q="b", r="pq")
    assert pyramid.dominators({"r"}) == ["r", "a"]
    assert pyramid.separate({"p", "q"}, {"r"})
    assert not pyramid.separate({"q"}, {"r"})


def test_dominators_against_brute_force() -> None:
    """A node dominates the end if the image is not reached without it."""
    draw = random.Random(0)
    for _ in range(50):
        names = "abcdefgh"
        before = {n: draw.sample(["-", *names[:i]], min(i + 1, draw.randint(1, 3))) for i, n in enumerate(names)}
        graph = flow(**{n: "".join(b) for n, b in before.items()})
        for end in names:
            expected = {n for n in names if graph.separate({n}, {end})}
            assert set(graph.dominators({end})) == expected


class Several(nn.Module):
    """A layer that returns a map and what it made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.conv(x).relu()
        return maps, maps.square().mean((2, 3))


class Body(nn.Module):
    """Return the map of an inner layer, and that map pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.encoder(x)
        return {"maps": maps, "pooled": maps.square().mean((2, 3))}


class Headed(nn.Module):
    """Classify by the pooled output of a body alone."""

    def __init__(self, body: nn.Module, key: Any) -> None:
        super().__init__()
        self.body, self.fc, self.key = body, nn.Linear(4, 5), key

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.body(x)[self.key])
        return result


@pytest.mark.parametrize(("body", "key"), [(Several(), 1), (Body(), "pooled")])
def test_a_map_and_its_pooled_map(body: nn.Module, key: Any) -> None:
    """The map's gradient is that through the pooled map: 2 w_c A / Z for the mean of squares."""
    net = randomized(Headed(body, key))
    model, x = load_model(net), inputs()
    assert model.layers["body"].num_tensors == 2
    maps = body(x)[0 if key == 1 else "maps"].detach()
    gradient = 2 * net.fc.weight[3].detach()[:, None, None] * maps / maps[0, 0].numel()
    expected = (gradient.mean((2, 3), keepdim=True) * maps).sum(1)
    for layer in ("body", None):
        actual = convscope.heatmaps(model, x, 3, layer=layer)
        assert actual.layer == ("body.encoder" if layer is None and key == "pooled" else "body")
        torch.testing.assert_close(torch.as_tensor(actual.values[:, 0]), expected, rtol=1e-4, atol=1e-7)
    both = convscope.heatmaps(model, x, 3, layer=["body", *(["body.encoder"] if key == "pooled" else [])])
    assert both.values.any()
    if key == "pooled":  # without a channel, its own share of the score is missing
        ablated = convscope.heatmaps(model, x, 3, layer="body", method="ablation-cam").values
        inner = convscope.heatmaps(model, x, 3, layer="body.encoder", method="ablation-cam").values
        assert ablated.any()
        assert (ablated == inner).all()


# --- tensors made of weights alone ---


class Modulated(nn.Module):
    """A convolution whose kernel a layer makes of other weights, as in StyleGAN; a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.conv, self.positions = nn.Linear(2, 4), nn.Conv2d(3, 4, 3, padding=1), nn.Embedding(24, 4)
        self.latent = nn.Parameter(torch.ones(1, 2))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight * self.style(self.latent).view(4, 1, 1, 1)
        maps = F.conv2d(x, kernel, padding=1) + self.positions(torch.arange(x.shape[-1])).T[:, None]
        return self.fc(self.conv(x).mean((2, 3)) + maps.relu().mean((2, 3)))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(kind: str) -> nn.Module:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    if kind == "weight norm":
        conv = parametrizations.weight_norm(conv)
    elif kind == "spectral norm":
        conv = parametrizations.spectral_norm(conv)
    elif kind == "orthogonal":
        conv = parametrizations.orthogonal(conv)
    else:
        parametrize.register_parametrization(conv, "weight", Doubled())
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "orthogonal", "own"])
def test_parametrizations_are_no_layers(kind: str) -> None:
    model = load_model(parametrized(kind))
    assert model.layers.names == ["0", "1", "2", "3", "4"]
    assert model.layers["0"].receptive_field == (3, 3)
    assert not model.layers["0"].has_global_context
    assert model.layers.edges() == list(itertools.pairwise(model.layers.names))


def test_weights_made_of_weights_are_no_layers() -> None:
    model = load_model(randomized(Modulated()))
    assert model.layers.names == ["conv", "fc"]
    assert not model.layers["conv"].has_global_context


def test_a_kernel_made_of_the_image_lets_the_image_in() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.after, self.fc = nn.Linear(3, 9), nn.Identity(), nn.Linear(1, 5)

        def forward(self, x: Tensor) -> Tensor:
            kernel = self.make(x.mean((2, 3)))[:1].view(1, 1, 3, 3).expand(1, 3, 3, 3)
            return self.fc(self.after(F.conv2d(x, kernel)).mean((2, 3)))

    layers = load_model(randomized(Dynamic())).layers
    assert layers.names == ["make", "after", "fc"]
    assert layers["after"].has_global_context
