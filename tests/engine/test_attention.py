"""Attention computed step by step equals PyTorch's own, and its weights are those that the output depends on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convscope.engine.attention import AttentionMode, AttentionRecorder

SHAPE = (2, 4, 6, 8)  # images, heads, tokens, channels


def random_qkv(key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(SHAPE), torch.randn(2, key_heads, 5, 8), torch.randn(2, key_heads, 5, 3)
    return q, k, v


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.7},
        {"attn_mask": torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))},
        {"enable_gqa": True},
    ],
)
def test_scaled_dot_product_attention_is_the_same(options: dict[str, Any]) -> None:
    q, k, v = random_qkv(2 if "enable_gqa" in options else 4)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with AttentionRecorder() as recorder:
        actual = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    (weights,) = recorder.weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(SHAPE[:3]))
    torch.testing.assert_close(weights @ v.repeat_interleave(4 // v.shape[1], 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_is_the_same(need_weights: bool, batch_first: bool) -> None:
    layer = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval().requires_grad_(False)
    x = torch.randn(2, 7, 12) if batch_first else torch.randn(7, 2, 12)
    x.requires_grad_()
    expected, expected_weights = layer(x, x, x, average_attn_weights=False)
    with AttentionRecorder() as recorder:
        actual, _ = layer(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(actual, expected)
    (weights,) = recorder.weights
    torch.testing.assert_close(weights.reshape(2, 3, 7, 7), expected_weights)
    (gradient,) = torch.autograd.grad(actual[0, 0, 0], weights)
    assert gradient.reshape(2, 3, 7, 7)[0, :, 0].any()
    assert gradient.count_nonzero() == 3 * 7  # the token's own row in each head


def test_the_fast_path_of_encoder_layers_is_recorded() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    x = torch.randn(2, 7, 12)
    with torch.no_grad():
        expected = layer(x)
        with AttentionRecorder() as recorder:
            actual = layer(x)
    torch.testing.assert_close(actual, expected)
    assert [w.shape for w in recorder.weights] == [(2, 3, 7, 7)]


def test_own_attention_is_recorded_and_other_softmaxes_are_not() -> None:
    q, k, v = torch.randn(3, *SHAPE)
    with AttentionRecorder() as recorder:
        weights = F.softmax(q @ k.transpose(-2, -1), dim=-1)
        output = F.dropout(weights, 0.5, training=False) @ v
        torch.softmax(output, 1) @ torch.ones(8, 1)  # not over the keys
        torch.softmax(output, -1) * 2  # no product
        other = torch.einsum("nhqk,nhkd->nhqd", (q @ k.mT).softmax(3), v)
    assert other.shape == output.shape
    assert len(recorder.weights) == 2
    assert recorder.weights[0] is weights


def test_other_threads_and_later_calls_are_not_affected() -> None:
    q, k, v = random_qkv()
    functions = F.scaled_dot_product_attention, F.multi_head_attention_forward
    seen: list[int] = []

    def in_thread() -> None:
        F.scaled_dot_product_attention(q, k, v)
        seen.append(len(recorder.weights))

    with AttentionRecorder() as recorder:
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
    F.scaled_dot_product_attention(q, k, v)
    assert seen == [0]
    assert not recorder.weights
    assert functions == (F.scaled_dot_product_attention, F.multi_head_attention_forward)


def test_steps_of_fused_attention_are_intercepted() -> None:
    names = []

    class Log(AttentionMode):
        def intercept_step(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
            names.append(name)
            return function(*args, **kwargs)

    with Log():
        F.scaled_dot_product_attention(*random_qkv())
    assert [name for name in names if name in ("matmul", "softmax")] == ["matmul", "softmax", "matmul"]
