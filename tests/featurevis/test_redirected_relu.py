"""Redirected ReLUs against explicit gradients, in all forms in which networks call them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convscope.featurevis.redirected_relu import redirect_relus


def apply_redirected(x: Tensor, weight: Tensor, relu: Any, mask: list[bool]) -> tuple[Tensor, Tensor]:
    """Return a ReLU's output and the gradient of its weighted sum, redirected for the images of the mask."""
    leaf = x.clone().requires_grad_()
    output = relu(leaf * 1)
    redirect_relus(value := (output * weight).sum(), torch.tensor(mask))
    (gradient,) = torch.autograd.grad(value, leaf)
    return output.detach(), gradient


RELU_VARIANTS: dict[str, tuple[Any, float]] = {
    "module": (nn.ReLU(), math.inf),
    "module in place": (nn.ReLU(inplace=True), math.inf),
    "function": (F.relu, math.inf),
    "function in place": (lambda x: F.relu(x, inplace=True), math.inf),
    "method": (lambda x: x.relu(), math.inf),
    "method in place": (lambda x: x.relu_(), math.inf),
    "torch": (torch.relu, math.inf),
    "ReLU6": (nn.ReLU6(), 6.0),
    "ReLU6 in place": (nn.ReLU6(inplace=True), 6.0),
    "relu6": (F.relu6, 6.0),
    "Hardtanh": (nn.Hardtanh(0, 2), 2.0),
}


@pytest.mark.parametrize("name", RELU_VARIANTS)
def test_redirected_relu_by_hand(name: str) -> None:
    relu, maximum = RELU_VARIANTS[name]
    x = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 1.5, -3.0], [7.0, 8.0, -9.0], [-1.0, -2.0, -3.0], [7.0, 6.5, 9.0]])
    weight = torch.tensor([[2.0, -1.0, 0.0], [2.0, 3.0, 4.0], [1.0, -1.0, 5.0], [2.0, -1.0, 3.0], [-1.0, 1.0, -2.0]])
    mask = [True, True, True, False, True]
    output, gradient = apply_redirected(x, weight, relu, mask)
    assert torch.equal(output, x.clamp(0, maximum))
    expected = torch.zeros_like(x)
    for n in range(5):
        usual = [w if 0 < v < maximum else 0.0 for v, w in zip(x[n].tolist(), weight[n].tolist(), strict=True)]
        inward = [
            w if (v <= 0 and w > 0) or (v >= maximum and w < 0) else 0.0
            for v, w in zip(x[n].tolist(), weight[n].tolist(), strict=True)
        ]
        expected[n] = torch.tensor(inward if mask[n] and not any(usual) else usual)
    assert torch.equal(gradient, expected)
    # Images that are off everywhere get the redirected gradient if they are in the mask; others the usual one.
    assert gradient[0].tolist() == [2, 0, 0]
    assert gradient[1].tolist() == [0, 3, 0]
    assert gradient[3].tolist() == [0, 0, 0]
    assert gradient[4].tolist() == ([-1, 1, -2] if maximum == math.inf else [-1, 0, -2])


@pytest.mark.parametrize("row", [0, 1, 2])
def test_gradient_anywhere_keeps_the_usual_gradient(row: int) -> None:
    """An image with one active pixel has the usual gradient; one without any has the redirected gradient."""
    x = torch.full((2, 1, 3, 2), -1.0)
    x[0, 0, row, 1] = 1
    _, gradient = apply_redirected(x, torch.ones(2, 1, 3, 2), F.relu, [True, True])
    assert torch.equal(gradient[0], (x[0] > 0).float())
    assert torch.equal(gradient[1], torch.ones(1, 3, 2))


def test_redirected_relu_in_place() -> None:
    x = torch.tensor([[-1.0, 2.0]])

    def discard_result(t: Tensor) -> Tensor:
        F.relu(t, inplace=True)
        return t

    output, gradient = apply_redirected(x, torch.tensor([[5.0, 3.0]]), discard_result, [True])
    assert output.tolist() == [[0, 2]]
    assert gradient.tolist() == [[0, 3]]


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3), (8, 2, 3)])
def test_redirected_relu_of_any_shape(shape: tuple[int, ...]) -> None:
    """Also for images split into consecutive rows of the batch, and for tensors without a batch axis."""
    x = -torch.ones(shape)
    x.view(4, -1)[1, 0] = 1
    _, gradient = apply_redirected(x, torch.ones(shape), F.relu, [True, True, False, True])
    expected = torch.ones(shape).view(4, -1)
    expected[1], expected[2] = 0, 0
    expected[1, 0] = 1
    assert torch.equal(gradient.view(4, -1), expected)
    for tensor in (torch.tensor(-1.0), -torch.ones(3)):
        assert torch.equal(
            apply_redirected(tensor, torch.ones_like(tensor), F.relu, [True, True])[1], torch.zeros_like(tensor)
        )


def test_other_functions_are_not_changed() -> None:
    x = torch.linspace(-2, 2, 9).view(3, 3)
    for function in (F.gelu, F.leaky_relu, torch.tanh, nn.Hardtanh(-1, 1), F.softplus):
        plain = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(plain).sum(), plain)
        output, gradient = apply_redirected(x, torch.ones_like(x), function, [True] * 3)
        assert torch.equal(output, function(x))
        assert torch.equal(gradient, expected)
