"""Tensors in nested containers: found, replaced and mapped, in containers of the same type."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch

from convscope.engine.nested import iter_leaves, iter_tensors, map_tensors, primary_tensor, replace_tensor
from tests.oracles.nets import PACKINGS, Output, Scores


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2), torch.zeros(3)


CONTAINERS: dict[str, Any] = {
    "tuple": lambda a, b: (a, 3, b),
    "list": lambda a, b: [a, "text", b],
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered dict": lambda a, b: OrderedDict(a=a, b=b),
    "other mapping": lambda a, b: UserDict(a=a, b=b),
    "named tuple": Scores,
    "dataclass": Output,
    "structure of torch": lambda a, b: torch.return_types.max((a, b)),
    "nested": lambda a, b: {"steps": [(1, a), None, Output(None, b)]},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_tensors_are_found_in_order(name: str) -> None:
    a, b = tensors()
    found = list(iter_tensors(CONTAINERS[name](a, b)))
    assert found[0] is a
    assert found[1] is b
    assert len(found) == 2


@pytest.mark.parametrize("name", CONTAINERS)
def test_mapping_keeps_the_containers_type(name: str) -> None:
    container = CONTAINERS[name](*tensors())
    doubled = map_tensors(container, lambda tensor: 2 * tensor)
    assert type(doubled) is type(container)
    assert [tensor.tolist() for tensor in iter_tensors(doubled)] == [[2, 2], [0, 0, 0]]
    assert [tensor.tolist() for tensor in iter_tensors(container)] == [[1, 1], [0, 0, 0]]


@pytest.mark.parametrize("name", CONTAINERS)
def test_one_tensor_is_replaced_by_identity(name: str) -> None:
    a, b = tensors()
    new = torch.full((1,), 7.0)
    replaced = list(iter_tensors(replace_tensor(CONTAINERS[name](a, b), b, new)))
    assert replaced[0] is a
    assert replaced[1] is new


@pytest.mark.parametrize("name", PACKINGS)
def test_primary_tensor_prefers_logits(name: str) -> None:
    pack, unpack = PACKINGS[name]
    logits = torch.randn(2, 3)
    output = pack(logits)
    assert primary_tensor(output) is unpack(output)


def test_primary_tensor_is_of_floats() -> None:
    floats = torch.ones(2)
    assert primary_tensor((torch.arange(3), floats)) is floats
    assert primary_tensor({"ids": torch.arange(3), "name": "text"}) is None
    assert primary_tensor(None) is None
    assert primary_tensor(Output) is None  # a class is no container


def test_leaves_are_everything_but_containers() -> None:
    assert list(iter_leaves({"a": (1, [None, "text"]), "b": Output(2.5, [])})) == [1, None, "text", 2.5]
