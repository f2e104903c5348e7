"""Attention methods against the papers' equations on weights taken by hooks, and against other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.registry import usable_methods
from tests.attribution.helpers import heatmap_values, load_module, random_images, relative_error
from tests.oracles.nets import diff_snapshots, snapshot

RTOL = 1e-4
SIZE = 32
TARGETS = [3, 0]
METHODS = ("attention-rollout", "transformer-attribution")


def small_vit(**options: Any) -> nn.Module:
    """Return a timm ViT with random weights, sixteen patches and attention that is far from uniform."""
    torch.manual_seed(0)
    name = options.pop("name", "vit_tiny_patch16_224")
    net = timm.create_model(name, img_size=SIZE, patch_size=8, depth=3, num_classes=5, **options)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.mul_(4 if "qkv.weight" in key else 1).add_(0.02 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return small_vit()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(3, SIZE)


@contextmanager
def unfused(net: nn.Module) -> Iterator[list[Tensor]]:
    """Let timm's blocks compute attention by themselves; the block gets the weights, as hooks see them."""
    weights: list[Tensor] = []
    handles = []
    for block in net.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _m, args, _out: weights.append(args[0])))
    try:
        yield weights
    finally:
        for handle, block in zip(handles, net.blocks, strict=True):
            handle.remove()
            block.attn.fused_attn = True


def reference(net: nn.Module, x: Tensor, target: int, method: str) -> Tensor:
    """Compute the class token's row as the authors' notebooks do, image by image."""
    maps = []
    for image in x:
        with unfused(net) as weights:
            score = net(image[None])[0, target]
        gradients = torch.autograd.grad(score, weights)
        result = torch.eye(weights[0].shape[-1])
        for w, gradient in zip(weights, gradients, strict=True):
            if method == "attention-rollout":
                mixed = w[0].mean(0) + torch.eye(len(result))
                result = (mixed / mixed.sum(-1, keepdim=True)) @ result
            else:
                result = result + (gradient[0] * w[0]).clamp(min=0).mean(0) @ result
        maps.append(result[0, 1:].reshape(4, 4).detach())
    return torch.stack(maps)


@pytest.mark.parametrize("method", METHODS)
def test_follows_the_equations_with_a_class_token(method: str, vit: nn.Module, x: Tensor) -> None:
    actual = heatmap_values(load_module(vit, SIZE), x, [TARGETS] * 3, method=method)
    expected = torch.stack([reference(vit, x, target, method) for target in TARGETS], 1)
    assert relative_error(actual, expected) < RTOL
    assert float(expected.std() / expected.mean()) > 0.05  # the maps are not flat


@pytest.mark.parametrize("method", METHODS)
def test_averages_all_tokens_where_the_score_does(method: str, x: Tensor) -> None:
    net = small_vit(global_pool="avg", class_token=False)
    actual = heatmap_values(load_module(net, SIZE), x, [TARGETS] * 3, method=method)
    for t, target in enumerate(TARGETS):
        for n in range(3):
            with unfused(net) as weights:
                score = net(x[n : n + 1])[0, target]
            gradients = torch.autograd.grad(score, weights)
            result = torch.eye(16)
            for w, gradient in zip(weights, gradients, strict=True):
                if method == "attention-rollout":
                    result = (w[0].mean(0) + torch.eye(16)) / 2 @ result
                else:
                    result = result + (gradient[0] * w[0]).clamp(min=0).mean(0) @ result
            assert relative_error(actual[n, t], result.mean(0).reshape(4, 4).detach()) < RTOL


def test_attention_pooling_takes_the_rows_of_its_query(x: Tensor) -> None:
    net = small_vit(name="vit_base_patch16_siglip_224", embed_dim=48, num_heads=4)
    model = load_module(net, SIZE)
    with unfused(net) as weights, torch.no_grad():
        features = net.forward_features(x)
        pool = net.attn_pool
        q = pool.q_norm(pool.q(pool.latent).reshape(1, 1, 4, 12).transpose(1, 2))
        k = pool.kv(features).reshape(3, 16, 2, 4, 12).permute(2, 0, 3, 1, 4)[0]
        last = (q @ pool.k_norm(k).transpose(-2, -1) * pool.scale).softmax(-1).mean(1)
        rollout = torch.eye(16).expand(3, 16, 16)
        for w in weights:
            rollout = (w.mean(1) + torch.eye(16)) / 2 @ rollout
    expected = (last @ rollout).reshape(3, 1, 4, 4)
    assert relative_error(heatmap_values(model, x, [0] * 3, method="attention-rollout"), expected) < RTOL
    assert heatmap_values(model, x, [0] * 3, method="transformer-attribution").any()


class Encoder(nn.Module):
    """A classifier of PyTorch's own encoder layers, which average their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def torchvision_vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(
        image_size=SIZE, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5
    )
    nn.init.normal_(net.heads.head.weight)  # torchvision begins with 0
    return net


def hugging_face_vit(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48},
        **{"image_size": SIZE, "patch_size": 8, "num_labels": 5, "attn_implementation": attention},
    )
    return transformers.ViTForImageClassification(config)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "encoder layers": Encoder,
    "torchvision": torchvision_vit,
    "hugging face, sdpa": lambda: hugging_face_vit("sdpa"),
    "hugging face, eager": lambda: hugging_face_vit("eager"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_library(name: str, x: Tensor) -> None:
    torch.manual_seed(0)
    model = load_module(NETWORKS[name]().eval(), SIZE)
    for method in METHODS:
        together = heatmap_values(model, x, [TARGETS] * 3, method=method)
        assert together.shape == (3, 2, 4, 4)
        assert (together >= 0).all()
        assert together.any((2, 3)).all()
        alone = np.concatenate([heatmap_values(model, x[n : n + 1], [[3]], method=method) for n in range(3)])
        assert relative_error(together[:, :1], alone) < 1e-5


def test_sdpa_and_eager_agree(x: Tensor) -> None:
    eager = hugging_face_vit("eager").eval()
    sdpa = hugging_face_vit("sdpa").eval()
    sdpa.load_state_dict(eager.state_dict())
    for method in METHODS:
        values = [heatmap_values(load_module(net, SIZE), x, 3, method=method) for net in (eager, sdpa)]
        assert relative_error(values[1], values[0]) < RTOL


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method: str, vit: nn.Module, x: Tensor) -> None:
    model = load_module(vit, SIZE)
    before = snapshot(vit)
    heatmap_values(model, x, 3, method=method)
    assert not diff_snapshots(before, snapshot(vit))
    assert not any(p.grad is not None for p in vit.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_networks_without_attention_over_all_tokens_are_refused(method: str, x: Tensor) -> None:
    convnet = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(ConvscopeError, match=r"reads attention weights, and .* computes none\. Use grad-cam"):
        convscope.heatmaps(load_module(convnet.eval(), SIZE), x, 3, method=method)
    assert method not in usable_methods(load_module(convnet.eval(), SIZE))
    swin = torchvision.models.SwinTransformer([2, 2], 12, [2], [2], [4, 4], num_classes=5).eval()
    with pytest.raises(ConvscopeError, match="attention within windows"):
        convscope.heatmaps(load_module(swin, SIZE), x, 3, method=method)
    assert method not in usable_methods(load_module(swin, SIZE))


def test_methods_are_offered_for_transformers(vit: nn.Module, x: Tensor) -> None:
    assert {*METHODS, "legrad", "attn-lrp"} <= set(usable_methods(load_module(vit, SIZE)))


def test_enlarged_images_have_an_enlarged_grid(x: Tensor) -> None:
    net = small_vit(dynamic_img_size=True)
    enlarged = small_vit(dynamic_img_size=True)
    actual = heatmap_values(load_module(net, SIZE), x, 3, method="attention-rollout", scale=2)
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    expected = heatmap_values(load_module(enlarged, 2 * SIZE), large, 3, method="attention-rollout")
    assert actual.shape == (3, 1, 8, 8)
    assert relative_error(actual, expected) < 0.05  # another interpolation


def test_threads_get_their_own_maps(vit: nn.Module, x: Tensor) -> None:
    model = load_module(vit, SIZE)
    alone = [heatmap_values(model, x[[n]], 3, method="transformer-attribution") for n in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(lambda n: heatmap_values(model, x[[n]], 3, method="transformer-attribution"), range(3))
        )
    np.testing.assert_array_equal(together, alone)
