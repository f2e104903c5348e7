"""The skip gradient method: derived gradients, for every form of the sum, and unchanged outputs."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convscope
from convscope.engine import capture
from convscope.engine.acceleration import accelerate
from convscope.featurevis.skip_gradient import residual_branches, with_skip_gradient

GENERATOR = torch.Generator().manual_seed(3)


def random_kernel(channels_out=3, channels_in=3, side=3):
    return torch.randn((channels_out, channels_in, side, side), generator=GENERATOR, dtype=torch.float64)


def gradient(run, x):
    x = x.clone().requires_grad_()
    y = run(x)
    (actual,) = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), x)
    return y.detach(), actual


@pytest.fixture
def x():
    return torch.randn((2, 3, 6, 6), generator=GENERATOR, dtype=torch.float64)


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
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_branch_gradient_is_scaled(x, add, scale):
    """For y = x + A x, the gradient is g + scale * A^T g."""
    a = random_kernel()
    y, actual = gradient(with_skip_gradient(lambda x: add(x, F.conv2d(x, a, padding=1)), scale), x)
    g = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)
    torch.testing.assert_close(y, x + F.conv2d(x, a, padding=1))
    torch.testing.assert_close(actual, g + scale * F.conv_transpose2d(g, a, padding=1))


def test_consecutive_blocks(x):
    """(1 + scale A)(1 + scale B); a projected skip connection is not scaled, as its path is the shorter one."""
    a, b, c, d, p = (random_kernel() for _ in range(5))

    def net(x):
        x = x + F.conv2d(x, a, padding=1)
        return F.conv2d(x, p, padding=1) + F.conv2d(F.conv2d(x, c, padding=1), d, padding=1) + b.sum()

    y, actual = gradient(with_skip_gradient(net, 0.5), x)
    g = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)

    def transposed(g, w):
        return F.conv_transpose2d(g, w, padding=1)

    middle = transposed(g, p) + 0.5 * transposed(transposed(g, d), c)
    torch.testing.assert_close(actual, middle + 0.5 * transposed(middle, a))


def test_other_sums_are_not_changed(x):
    """Sums with parameters or numbers, of equally deep tensors and of other shapes are no skip connections."""
    a, b, bias = random_kernel(), random_kernel(), torch.randn((1, 3, 6, 6), generator=GENERATOR, dtype=torch.float64)

    def net(x):
        total = F.conv2d(x, a, padding=1) + F.conv2d(x, b, padding=1) + bias.expand(2, 3, 6, 6) + 2
        return total + F.conv2d(total, a, padding=1).mean((2, 3), keepdim=True)

    torch.testing.assert_close(gradient(with_skip_gradient(net, 0.1), x), gradient(net, x))


def test_real_network_against_backward_hooks():
    """Lite0 with fused convolutions: identical logits, and the gradient of backward hooks on the branches.

    In double precision, because rounding in single precision changes the sign of some ReLU inputs.
    """
    model = convscope.load("lite0")
    model.module.double()
    x = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).double()
    with capture.capture_layers(model, []) as run:
        fused = accelerate(run, model.module, x, gradients=True)
        y, actual = gradient(lambda x: with_skip_gradient(fused, 0.5)(x).logits, x)
        unscaled_logits, unscaled_gradient = gradient(lambda x: fused(x).logits, x)
        assert torch.equal(y, unscaled_logits)
        ends = [block.bn3 if hasattr(block, "bn3") else block.bn2 for block in blocks(model.module)]
        handles = [end.register_full_backward_hook(lambda m, gi, go: (0.5 * gi[0],)) for end in ends]
        try:
            expected = gradient(lambda x: run(x).logits, x)[1]
        finally:
            for handle in handles:
                handle.remove()
    assert len(ends) == 9
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert (actual - unscaled_gradient).abs().max() > 0.1 * unscaled_gradient.abs().max()


def blocks(net: nn.Module):
    return [block for stage in net.blocks for block in stage if block.has_skip]


@pytest.mark.parametrize(
    ("source", "blocks"),
    [
        ("torchvision:resnet18", 8),  # sums in place, three skip connections projected
        ("torchvision:mobilenet_v2", 10),
        ("torchvision:squeezenet1_1", 0),
        ("timm:convnext_atto", 12),
        pytest.param("keras:MobileNetV2", 10, marks=pytest.mark.slow),
    ],
)
def test_each_residual_branch_is_found_once(source, blocks):
    model = convscope.load(source, weights="random")
    x = torch.rand((2, 3, *model.preprocessing.image_size), generator=torch.Generator().manual_seed(0)).requires_grad_()
    with capture.capture_layers(model, []) as run:
        branches = list(residual_branches([run(x).logits], x))
    assert len(branches) == len(set(branches)) == blocks


def test_nothing_is_hooked_without_gradients(x):
    calls = []
    with torch.no_grad():
        assert torch.equal(with_skip_gradient(lambda x: (calls.append(1), x + F.relu(x))[1], 0.5)(x), x + F.relu(x))
    assert calls == [1]
