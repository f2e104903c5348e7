"""Skip connections: the gradient by hand, wherever the branch stands in the sum, and nothing else changed."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convscope
from convscope.engine import capture
from convscope.engine.acceleration import accelerate
from convscope.featurevis.skip_gradient import with_skip_gradient

DRAW = torch.Generator().manual_seed(3)


def weight(out=3, into=3, side=3):
    return torch.randn((out, into, side, side), generator=DRAW, dtype=torch.float64)


def gradient(run, x):
    x = x.clone().requires_grad_()
    y = run(x)
    (found,) = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), x)
    return y.detach(), found


@pytest.fixture
def x():
    return torch.randn((2, 3, 6, 6), generator=DRAW, dtype=torch.float64)


@pytest.mark.parametrize(
    "add",
    [
        lambda x, branch: x + branch,
        lambda x, branch: branch + x,
        lambda x, branch: torch.add(branch, x),
        lambda x, branch: operator.iadd(branch, x),
        lambda x, branch: branch.add_(x),
        lambda x, branch: torch.add(input=x, other=branch),
    ],
    ids=["skip first", "branch first", "torch.add", "in place", "add_", "by name"],
)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_branch_hands_on_its_share(x, add, share):
    """y = x + A x: the gradient is g + share * A^T g."""
    a = weight()
    y, found = gradient(with_skip_gradient(lambda x: add(x, F.conv2d(x, a, padding=1)), share), x)
    g = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)
    torch.testing.assert_close(y, x + F.conv2d(x, a, padding=1))
    torch.testing.assert_close(found, g + share * F.conv_transpose2d(g, a, padding=1))


def test_blocks_in_a_row(x):
    """(1 + share A)(1 + share B), a projected skip connection counts in full: its way is the shorter one."""
    a, b, c, d, p = (weight() for _ in range(5))

    def net(x):
        x = x + F.conv2d(x, a, padding=1)
        return F.conv2d(x, p, padding=1) + F.conv2d(F.conv2d(x, c, padding=1), d, padding=1) + b.sum()

    y, found = gradient(with_skip_gradient(net, 0.5), x)
    g = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)

    def back(g, w):
        return F.conv_transpose2d(g, w, padding=1)

    middle = back(g, p) + 0.5 * back(back(g, d), c)
    torch.testing.assert_close(found, middle + 0.5 * back(middle, a))


def test_other_sums_are_left_alone(x):
    """Parameters, numbers, sums of equally deep tensors and of other shapes are no skip connections."""
    a, b, bias = weight(), weight(), torch.randn((1, 3, 6, 6), generator=DRAW, dtype=torch.float64)

    def net(x):
        both = F.conv2d(x, a, padding=1) + F.conv2d(x, b, padding=1) + bias.expand(2, 3, 6, 6) + 2
        return both + F.conv2d(both, a, padding=1).mean((2, 3), keepdim=True)

    torch.testing.assert_close(gradient(with_skip_gradient(net, 0.1), x), gradient(net, x))


def test_a_real_network_by_hooks_of_its_own():
    """Lite0, folded as ascents have it: the same logits to the bit, and the gradient that scaled branches give.

    In double precision, as the rounding of single precision takes some rectifiers over their kink.
    """
    model = convscope.load("lite0")
    model.module.double()
    x = torch.rand((2, 3, 96, 96), generator=torch.Generator().manual_seed(0)).double()
    with capture.capture_layers(model, []) as run:
        quick = accelerate(run, x, gradients=True)
        y, found = gradient(lambda x: with_skip_gradient(quick, 0.5)(x).logits, x)
        usual, other = gradient(lambda x: quick(x).logits, x)
        assert torch.equal(y, usual)
        ends = [block.bn3 if hasattr(block, "bn3") else block.bn2 for block in blocks(model.module)]
        handles = [end.register_full_backward_hook(lambda m, gi, go: (0.5 * gi[0],)) for end in ends]
        try:
            expected = gradient(lambda x: run(x).logits, x)[1]
        finally:
            for handle in handles:
                handle.remove()
    assert len(ends) == 9
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert (found - other).abs().max() > 0.1 * other.abs().max()


def blocks(net: nn.Module):
    return [block for stage in net.blocks for block in stage if block.has_skip]


@pytest.mark.parametrize(
    ("source", "blocks"),
    [
        ("torchvision:resnet18", 8),  # sums in place, three skip connections projected
        ("torchvision:mobilenet_v2", 10),
        ("torchvision:squeezenet1_1", 0),
        ("timm:convnext_atto", 12),
        ("keras:MobileNetV2", 10),
    ],
)
def test_each_residual_branch_is_found_once(source, blocks, monkeypatch):
    model = convscope.load(source, weights="random")
    hooked, hook = [], torch.Tensor.register_hook
    # The tensors themselves are kept: one that is gone leaves its identity to another.
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda tensor, f: (hooked.append(tensor), hook(tensor, f))[1])
    x = torch.rand((2, 3, *model.preprocessing.image_size), generator=torch.Generator().manual_seed(0)).requires_grad_()
    with capture.capture_layers(model, []) as run:
        hooked.clear()
        with_skip_gradient(run, 0.5)(x)
    assert len(hooked) == len(set(map(id, hooked))) == blocks


def test_without_gradients_nothing_is_looked_at(x):
    seen = []
    with torch.no_grad():
        assert torch.equal(with_skip_gradient(lambda x: (seen.append(1), x + F.relu(x))[1], 0.5)(x), x + F.relu(x))
    assert seen == [1]
