"""Batch sizes: limits by memory and cache, chunks, and padding to a fixed batch size."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from convscope.engine.batching import (
    CACHE_BYTES,
    MAX_BATCH,
    MIN_FORWARD_BATCH,
    balanced_chunks,
    batch_size,
    cache_friendly_batch_size,
    forward_batch_size,
    forward_bytes,
    gradient_bytes,
    pad_to_fixed_batch,
)
from tests.engine.helpers import load_model
from tests.oracles.nets import SmallConvNet, randomized


def test_batch_sizes_and_bytes_by_hand() -> None:
    model = load_model(randomized(SmallConvNet()))
    largest = 4 * 8 * 24 * 24  # bytes of conv1's output
    assert forward_bytes(model) == 4 * largest
    assert batch_size(model, 100, 1000) == 10
    assert batch_size(model, 100, 99) == 1
    assert batch_size(model, 100, 1 << 40) == 32
    assert batch_size(model, 0, 1 << 40, max_batch=7) == 7
    bytes_from = {row.name: forward_bytes(model, [row]) for row in model.layers}
    assert bytes_from["conv1"] > bytes_from["conv2"] > bytes_from["conv3"]
    # Autograd keeps at least the outputs of conv3 and bn3 (10 x 12 x 12), and their gradients.
    assert bytes_from["conv2"] >= 4 * largest + 2 * 4 * 2 * 10 * 12 * 12
    assert gradient_bytes(model, "conv1", 24 * 24) == 2 * largest
    assert gradient_bytes(model, "conv1", 48 * 48) == 8 * largest
    assert gradient_bytes(model, None, 24 * 24) > gradient_bytes(model, "conv2", 24 * 24) > 2 * largest


def test_balanced_chunks_are_complete_and_even() -> None:
    for count, size in itertools.product(range(30), range(1, 12)):
        parts = list(balanced_chunks(range(count), size))
        assert [i for part in parts for i in part] == list(range(count))
        lengths = [len(part) for part in parts]
        assert all(0 < n <= size for n in lengths)
        assert max(lengths, default=0) - min(lengths, default=0) <= 1
        assert len(parts) == -(-count // size)


@pytest.mark.parametrize("size", [24, 240, 2400])
def test_cache_limits_the_batch_size_by_the_largest_activation(size: int) -> None:
    model = load_model(randomized(SmallConvNet()))
    largest = 4 * 8 * size * size  # bytes of conv1's output for an image of this size
    forward = cache_friendly_batch_size(model, pixels=size * size)
    assert forward == max(MIN_FORWARD_BATCH, min(MAX_BATCH, 2 * CACHE_BYTES // largest))
    backward = cache_friendly_batch_size(model, "relu1", size * size, with_gradients=True)
    assert backward == max(1, min(MAX_BATCH, CACHE_BYTES // largest))


def test_forward_batch_size_is_limited_by_memory() -> None:
    model = load_model(randomized(SmallConvNet()))
    assert forward_batch_size(model, 1 << 40) == MAX_BATCH
    assert forward_batch_size(model, int(3 * forward_bytes(model))) == 3
    assert forward_batch_size(dataclasses.replace(model, fixed_batch_size=5), 1) == 5


def test_padding_repeats_the_last_row() -> None:
    model = load_model(randomized(SmallConvNet()))
    x = torch.arange(6.0).view(3, 2)
    assert pad_to_fixed_batch(model, x) is x
    padded = pad_to_fixed_batch(dataclasses.replace(model, fixed_batch_size=5), x)
    assert padded.tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
