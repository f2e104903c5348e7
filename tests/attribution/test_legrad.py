"""LeGrad against its authors' program, and against the equations where that does not go.

The program, ``legrad-torch`` with ``einops``, requires an old open_clip: install it with ``pip install --no-deps``.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from tests.attribution.helpers import heatmap_values, load_module, random_images, relative_error
from tests.attribution.test_attention import RTOL, SIZE, TARGETS, hugging_face_vit, small_vit, torchvision_vit, unfused
from tests.oracles.nets import diff_snapshots, snapshot


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(2, SIZE)


class ZeroShot(nn.Module):
    """The similarities of images to texts."""

    def __init__(self, visual: nn.Module, texts: Tensor) -> None:
        super().__init__()
        self.visual, self.texts = visual, texts

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.visual(x), dim=-1) @ self.texts.T


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_the_authors_program_on_clip(x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    """Their map is the sum over blocks, upsampled and scaled to 0 ... 1."""
    model = pytest.importorskip("open_clip.model")
    legrad = pytest.importorskip("legrad")
    torch.manual_seed(0)
    vision = model.CLIPVisionCfg(layers=3, width=24, head_width=8, patch_size=8, image_size=SIZE)
    text = model.CLIPTextCfg(context_length=8, vocab_size=20, width=8, heads=1, layers=1)
    clip = model.CLIP(8, vision, text).eval()
    with torch.no_grad():
        for block in clip.visual.transformer.resblocks:
            block.attn.in_proj_weight.mul_(4)
    texts = F.normalize(torch.randn(4, 8), dim=-1)
    actual = torch.from_numpy(
        heatmap_values(
            load_module(ZeroShot(copy.deepcopy(clip.visual), texts), SIZE), x, [TARGETS] * 2, method="legrad"
        )
    )
    wrapper = legrad.LeWrapper(clip, layer_index=0)
    capsys.readouterr()
    for n in range(2):
        for t, target in enumerate(TARGETS):
            expected = wrapper.compute_legrad(texts[[target]], x[n : n + 1])
            upsampled = F.interpolate(actual[n, t][None, None], scale_factor=8, mode="bilinear")
            scaled = (upsampled - upsampled.min()) / (upsampled.max() - upsampled.min())
            assert relative_error(scaled, expected.detach()) < RTOL


def test_attention_pooling_follows_the_authors_pooler(x: Tensor) -> None:
    utils = pytest.importorskip("legrad.utils")
    net = small_vit(name="vit_base_patch16_siglip_224", embed_dim=48, num_heads=4)
    actual = heatmap_values(load_module(net, SIZE), x, [TARGETS] * 2, method="legrad")
    pool = copy.deepcopy(net.attn_pool)
    pool.forward = types.MethodType(utils.hooked_attentional_pooler_timm_forward, pool)
    tokens: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *args: tokens.append(args[2])) for block in net.blocks]
    net(x)
    for handle in handles:
        handle.remove()
    for t, target in enumerate(TARGETS):
        relevance = torch.zeros(2, 16)
        for block_tokens in tokens:
            scores = net.head(net.fc_norm(pool(net.norm(block_tokens))))[:, target]
            (gradient,) = torch.autograd.grad(scores.sum(), pool.attn_probs, retain_graph=True)
            relevance += gradient.clamp(min=0).mean(1)[:, 0] / len(tokens)
        assert relative_error(actual[:, t], relevance.reshape(2, 4, 4)) < RTOL


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "class_token": False}])
def test_classifiers_follow_the_equation(options: dict[str, Any], x: Tensor) -> None:
    """The head is applied to the mean of a block's tokens."""
    net = small_vit(**options)
    actual = heatmap_values(load_module(net, SIZE), x, [TARGETS] * 2, method="legrad")
    tokens: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *args: tokens.append(args[2])) for block in net.blocks]
    with unfused(net) as weights:
        net(x)
    for handle in handles:
        handle.remove()
    prefix = net.num_prefix_tokens
    for t, target in enumerate(TARGETS):
        relevance = torch.zeros(2, 16)
        for block_tokens, w in zip(tokens, weights, strict=True):
            scores = net.head(net.fc_norm(net.norm(block_tokens.mean(1))))[:, target]
            (gradient,) = torch.autograd.grad(scores.sum(), w, retain_graph=True)
            relevance += gradient.clamp(min=0).mean((1, 2))[:, prefix:] / len(tokens)
        assert relative_error(actual[:, t], relevance.reshape(2, 4, 4)) < RTOL


@pytest.mark.parametrize("name", ["torchvision", "hugging face"])
def test_other_libraries_and_independent_batches(name: str, x: Tensor) -> None:
    torch.manual_seed(0)
    net = (torchvision_vit() if name == "torchvision" else hugging_face_vit("sdpa")).eval()
    model, before = load_module(net, SIZE), snapshot(net)
    together = heatmap_values(model, x, [TARGETS] * 2, method="legrad")
    alone = np.stack([[heatmap_values(model, x[[n]], t, method="legrad")[0, 0] for t in TARGETS] for n in range(2)])
    assert together.any((2, 3)).all()
    assert relative_error(together, alone) < 1e-5
    assert not diff_snapshots(before, snapshot(net))


def test_other_networks_are_refused(x: Tensor) -> None:
    convnet = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(ConvscopeError, match="reads attention weights"):
        convscope.heatmaps(load_module(convnet.eval(), SIZE), x, 3, method="legrad")
