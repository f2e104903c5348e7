"""Files of weights as training frameworks write them: prefixes, members, heads of another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import convscope
from convscope import ConvscopeError

NAME = "torchvision:squeezenet1_1"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return dict(torchvision.models.squeezenet1_1().state_dict())


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


CHECKPOINTS: dict[str, Any] = {
    "Lightning": lambda s: {"state_dict": prefixed(s, "model.") | {"loss.weight": torch.ones(2)}, "epoch": 3},
    "net": lambda s: {"net": s, "accuracy": 0.9},
    "optimizer": lambda s: {"optimizer": {"m": prefixed(s, "a."), "v": prefixed(s, "b.")}, "weights": s},
    "DataParallel and compile": lambda s: prefixed(s, "module._orig_mod."),
    "own prefix": lambda s: prefixed(s, "encoder.backbone."),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_prefixes_are_removed_by_agreement_of_keys(kind: str, state: Any, tmp_path: Path) -> None:
    torch.save(CHECKPOINTS[kind](state), tmp_path / "w.ckpt")
    model = convscope.load(NAME, weights=tmp_path / "w.ckpt")
    loaded = model.module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    notes = [note for note in model.notes if "prefix" in note]
    expected = {"net": [], "optimizer": []}.get(kind)
    assert notes == expected if expected is not None else len(notes) == 1
    if kind == "Lightning":
        assert notes == ["prefix 'model.' removed from the names of the weights; left out: loss.weight"]


def test_a_head_of_another_size(tmp_path: Path) -> None:
    torch.manual_seed(4)
    net = torchvision.models.resnet18(num_classes=5)
    torch.save(net.state_dict(), tmp_path / "five.pth")
    with pytest.raises(ConvscopeError, match=r"head 'fc' has 5 outputs in .*five.pth and 1000 in ResNet.*classes=\["):
        convscope.load("torchvision:resnet18", weights=tmp_path / "five.pth")
    model = convscope.load("torchvision:resnet18", weights=tmp_path / "five.pth", classes=list("abcde"))
    assert model.num_outputs == 5
    assert torch.equal(model.module.fc.weight, net.fc.weight)
    assert convscope.load("timm:resnet18", weights="random", classes=list("abc")).num_outputs == 3
