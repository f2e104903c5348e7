"""AttnLRP against lxt, and by hand on small networks."""

from __future__ import annotations

import copy
import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope.attribution.methods.attn_lrp import AttnLrpMode
from tests.attribution.helpers import heatmap_values, load_module, random_images, relative_error
from tests.attribution.test_attention import RTOL, SIZE, TARGETS, hugging_face_vit, small_vit
from tests.oracles.nets import diff_snapshots, snapshot


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(2, SIZE)


def lxt_patches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the patches of lxt, without its language models, which newer versions of transformers cannot import."""
    lxt = pytest.importorskip("lxt")
    package = ModuleType("lxt.efficient")
    package.__path__ = [f"{path}/efficient" for path in lxt.__path__]
    monkeypatch.setitem(sys.modules, "lxt.efficient", package)
    return importlib.import_module("lxt.efficient.patches")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_agrees_with_lxt(attention: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patches of transformers: uniform rule in attention, identity rule in GELU and layer normalisation."""
    patches = lxt_patches(monkeypatch)
    from transformers.activations import GELUActivation
    from transformers.models.vit import modeling_vit

    torch.manual_seed(0)
    net = hugging_face_vit("eager").eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = hugging_face_vit(attention).eval()
    ours.load_state_dict(net.state_dict())
    actual = heatmap_values(load_module(ours, SIZE), x, [TARGETS] * 2, method="attn-lrp")

    monkeypatch.setattr(nn.LayerNorm, "forward", patches.layer_norm_forward)
    monkeypatch.setattr(GELUActivation, "original_forward", GELUActivation.forward, raising=False)
    monkeypatch.setattr(GELUActivation, "forward", patches.non_linear_forward)
    forward = patches.wrap_attention_forward(modeling_vit.eager_attention_forward)
    monkeypatch.setattr(modeling_vit, "eager_attention_forward", forward)
    for t, target in enumerate(TARGETS):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(leaf).logits[:, target].sum(), leaf)
        assert relative_error(actual[:, t], (x * gradient).sum(1)) < RTOL


def test_rules_by_hand() -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    w = torch.randn(4, dtype=torch.double)
    with AttnLrpMode():
        product, activated = (a @ b.T).sum(), F.gelu(a).sum()
        gated, scaled = (a * b).sum(), (a * w).sum()
        norm = F.layer_norm(a, (4,), w, w)
        in_place = F.silu(a.clone(), inplace=True).sum()
        group = F.group_norm(a.reshape(1, 4, 3), 2).square().sum()
        unit = (F.normalize(a, dim=1) * w).sum()
    assert torch.autograd.grad(unit, a)[0].allclose(w / a.norm(dim=1, keepdim=True))
    assert torch.autograd.grad(product, [a, b])[1].allclose(a.sum(0).expand(3, 4) / 2)
    assert torch.autograd.grad(activated, a)[0].allclose(F.gelu(a) / a)
    assert torch.autograd.grad(in_place, a)[0].allclose(F.silu(a) / a)
    assert torch.autograd.grad(gated, [a, b])[0].allclose(b / 2)
    assert torch.autograd.grad(scaled, a)[0].allclose(w.expand(3, 4))
    deviation = (a.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    (gradient,) = torch.autograd.grad(norm[:, 0].sum(), a)
    assert gradient.allclose((torch.eye(4, dtype=torch.double)[0] - 0.25) * w[0] / deviation)
    assert norm.allclose(F.layer_norm(a, (4,), w, w))
    groups = a.detach().reshape(2, 6)
    centered = groups - groups.mean(1, keepdim=True)
    expected = 2 * centered / (groups.var(1, unbiased=False, keepdim=True) + 1e-5)
    assert torch.autograd.grad(group, a)[0].reshape(2, 6).allclose(expected)


def test_relevance_is_conserved_without_biases() -> None:
    """Products, activations and residual connections keep the sum; a softmax and constants do not."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate, self.up = (
                nn.Conv2d(3, 8, 4, 4, bias=False),
                nn.Linear(8, 8, False),
                nn.Linear(8, 8, False),
            )
            self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 5, False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).mT
            x = x + F.silu(self.gate(self.norm(x))) * self.up(x)
            return self.head(x.mean(1))

    torch.manual_seed(0)
    net, x = Gated(), random_images(2, 8)
    result = convscope.heatmaps(load_module(net, 8), x, [TARGETS] * 2, method="attn-lrp")
    assert np.abs(result.extras["conservation_error"]).max() < 1e-5 * np.abs(result.logits).max()
    assert relative_error(result.values.sum((2, 3)), net(x)[:, TARGETS].detach()) < 1e-5


def test_is_input_x_gradient_for_piecewise_linear_networks() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 5))
    model, x = load_module(net, 8), random_images(2, 8)
    expected = heatmap_values(model, x, 3, method="input-x-gradient")
    assert relative_error(heatmap_values(model, x, 3, method="attn-lrp"), expected) < 1e-6


def test_fused_and_own_attention_agree_and_nothing_is_left_behind(x: Tensor) -> None:
    net = small_vit()
    own = copy.deepcopy(net)
    for block in own.blocks:
        block.attn.fused_attn = False
    model, before = load_module(net, SIZE), snapshot(net)
    together = heatmap_values(model, x, [TARGETS] * 2, method="attn-lrp")
    assert relative_error(together, heatmap_values(load_module(own, SIZE), x, [TARGETS] * 2, method="attn-lrp")) < RTOL
    alone = np.stack([[heatmap_values(model, x[[n]], t, method="attn-lrp")[0, 0] for t in TARGETS] for n in range(2)])
    assert relative_error(together, alone) < 1e-5
    assert not diff_snapshots(before, snapshot(net))


def test_runs_on_gated_convnets_and_swin(x: Tensor) -> None:
    for name in ("efficientnet_b0", "swin_tiny_patch4_window7_224"):
        options = {"img_size": SIZE, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
        net = timm.create_model(name, num_classes=5, **(options if "swin" in name else {})).eval()
        assert heatmap_values(load_module(net, SIZE), x[:1], 3, method="attn-lrp").any()
