"""Class activation maps against captum, pytorch-grad-cam and torchcam.

A test named `..._differs_from_...` gives the equation that decides, and reproduces the other program's numbers by the
formula that it computes. test_cam.py compares ours with the papers' formulas. docs/methods.md has the table.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope.attribution.methods.cam import eigen_cam
from convscope.attribution.output_targets import segmentation_target
from convscope.engine import capture
from tests.attribution.helpers import load_module, preprocess, random_resnet, relative_error

# The last layer, after a ReLU and before a global average; and layers with values of both signs.
CASES = [("lite0", "bn2"), ("lite0", "blocks.1"), ("resnet18", "layer3.1.conv2")]
TARGETS = [386, 281]
SAME = 1e-5  # gradients through up to twenty layers, summed in another order

Case = tuple[convscope.Model, Tensor]


@pytest.fixture(scope="module")
def cases(lite0: convscope.Model, photos: list[str]) -> dict[str, Case]:
    """Return networks and two photographs preprocessed for them."""
    resnet = load_module(random_resnet(), 96, mean=(0.5,) * 3, std=(0.25,) * 3)
    return {
        "lite0": (lite0, preprocess(lite0, photos[:2], 112)),
        "lite0 at full size": (lite0, preprocess(lite0, photos[:2])),
        "resnet18": (resnet, preprocess(resnet, photos[:2])),
    }


@pytest.fixture(params=CASES, ids="/".join)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> tuple[convscope.Model, Tensor, str]:
    name, layer = request.param
    return *cases[name], layer


def heatmap(model: convscope.Model, x: Tensor, layer: str, method: str) -> np.ndarray:
    return convscope.heatmaps(model, x, TARGETS, layer=layer, method=method).values[:, 0]


def activation_and_gradient(model: convscope.Model, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Compute the layer's output and gradient in float64."""
    with torch.no_grad(), capture.capture_layers(model, [layer], detach_at_layer=True) as run:
        outputs = run(x)
        with torch.enable_grad():
            score = outputs.logits.gather(1, torch.tensor(TARGETS)[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, outputs.maps[layer])
    return outputs.maps[layer].detach().double(), gradient.double()


def pytorch_grad_cam_map(name: str, model: convscope.Model, x: Tensor, layer: str, top: bool = False) -> np.ndarray:
    """Return pytorch-grad-cam's map of TARGETS or the top classes, before ReLU, scaling to [0, 1] and resizing."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = copy.deepcopy(model.module).requires_grad_()  # pytorch-grad-cam needs gradients of all parameters
    with getattr(pytorch_grad_cam, name)(net, [net.get_submodule(layer)]) as program:
        base = getattr(program, "base_cam", program)
        raw: list[np.ndarray] = []
        inner = base.get_cam_image

        def record(*args: Any, **kwargs: Any) -> np.ndarray:
            raw.append(inner(*args, **kwargs))
            return raw[-1]

        base.get_cam_image = record
        program(x.clone(), None if top else [ClassifierOutputTarget(t) for t in TARGETS])
    return raw[0]


def torchcam_map(name: str, model: convscope.Model, x: Tensor, layer: str, **kwargs: Any) -> np.ndarray:
    """Return torchcam's map, after ReLU and not normalised."""
    from torchcam import methods

    net = copy.deepcopy(model.module).requires_grad_()
    with getattr(methods, name)(net, layer, **kwargs) as program:
        return program(TARGETS, net(x), normalized=False)[0].detach().numpy()


def relu(maps: np.ndarray) -> np.ndarray:
    return np.maximum(maps, 0)


# --- equal maps ------------------------------------------------------------------------------------------------------


def test_equals_captum(case: Any) -> None:
    from captum.attr import LayerGradCam, LayerGradientXActivation

    model, x, layer = case
    module = model.module.get_submodule(layer)
    kwargs = x.clone().requires_grad_()
    grad_cam = LayerGradCam(model.module, module).attribute(kwargs, TARGETS, relu_attributions=False)[:, 0]
    assert relative_error(heatmap(model, x, layer, "grad-cam"), grad_cam.detach()) < SAME
    product = LayerGradientXActivation(model.module, module).attribute(kwargs, TARGETS).sum(1)
    assert relative_error(heatmap(model, x, layer, "hirescam"), product.detach()) < SAME


@pytest.mark.parametrize(
    ("method", "name"), [("grad-cam", "GradCAM"), ("hirescam", "HiResCAM"), ("layer-cam", "LayerCAM")]
)
def test_equals_pytorch_grad_cam(case: Any, method: str, name: str) -> None:
    assert relative_error(heatmap(*case, method), pytorch_grad_cam_map(name, *case)) < SAME


@pytest.mark.parametrize(
    ("method", "name"),
    [("grad-cam", "GradCAM"), ("xgrad-cam", "XGradCAM"), ("layer-cam", "LayerCAM"), ("finer-cam", "FinerCAM")],
)
def test_equals_torchcam(case: Any, method: str, name: str) -> None:
    assert relative_error(relu(heatmap(*case, method)), torchcam_map(name, *case)) < SAME


@pytest.mark.parametrize(("name", "layer", "head"), [("lite0", "bn2", "classifier"), ("resnet18", "layer4", "fc")])
def test_cam_equals_torchcam(cases: dict[str, Case], name: str, layer: str, head: str) -> None:
    """torchcam applies no ReLU here, contrary to its documentation."""
    model, x = cases[name]
    reference = torchcam_map("CAM", model, x, layer, fc_layer=head)
    assert reference.min() < 0
    assert relative_error(heatmap(model, x, layer, "cam"), reference) < SAME


# --- different maps, with the reason ---------------------------------------------------------------------------------


def test_grad_cam_pp_differs_from_pytorch_grad_cam(case: Any) -> None:
    """Equation 19: a = G^2 / (2 G^2 + ...). Theirs adds 1e-6 to the denominator, negligible only for G near 1.

    A gradient of 1e-3, common before an average over 49 positions, makes G^2 = 1e-6. Where maps are negative, a has
    poles, near which float32 keeps three digits in both programs.
    """
    model, x, layer = case
    reference = pytorch_grad_cam_map("GradCAMPlusPlus", model, x, layer)
    a, g = activation_and_gradient(model, x, layer)
    alpha = torch.where(g != 0, g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6), 0)
    formula = ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)
    assert relative_error(formula, reference) < 5e-3
    assert relative_error(heatmap(model, x, layer, "grad-cam++"), reference) > 0.05
    alpha = torch.where(g != 0, g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3), 0)
    paper = ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)
    assert relative_error(heatmap(model, x, layer, "grad-cam++"), paper) < 5e-3


def test_grad_cam_pp_differs_from_torchcam(case: Any) -> None:
    """Equation 19. Theirs divides a copy made by boolean indexing and discards it, so that a = G^2."""
    model, x, layer = case
    reference = torchcam_map("GradCAMpp", model, x, layer)
    a, g = activation_and_gradient(model, x, layer)
    formula = ((g**2 * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)
    assert relative_error(formula.clamp(min=0), reference) < 1e-4
    ours = relu(heatmap(model, x, layer, "grad-cam++"))
    assert relative_error(ours, reference) > 1e4
    assert relative_error(ours / ours.max(), reference / reference.max()) > 0.01  # scaling does not help


def test_grad_cam_pp_differs_from_its_authors_program(case: Any) -> None:
    """Equation 19 does not divide a by its sum over the positions; the authors' program does."""
    model, x, layer = case
    a, g = activation_and_gradient(model, x, layer)
    alpha = torch.where(g != 0, 1 / (2 + a.sum((2, 3), keepdim=True) * g), 0)
    total = alpha.sum((2, 3), keepdim=True)
    alpha = torch.where(total != 0, alpha / total, 0)
    authors = ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1).numpy()
    ours = heatmap(model, x, layer, "grad-cam++")
    assert relative_error(ours / ours.max(), authors / authors.max()) > 0.002


@pytest.mark.parametrize("case", [CASES[0], ("lite0 at full size", "blocks.1"), CASES[2]], ids="/".join, indirect=True)
def test_xgrad_cam_differs_from_pytorch_grad_cam(case: Any) -> None:
    """Equation 8 divides by the channel's sum. Theirs adds 1e-7, which matters where the sum is small: up to
    1e-4 of the map."""
    model, x, layer = case
    reference = pytorch_grad_cam_map("XGradCAM", model, x, layer)
    a, g = (t.numpy().astype(np.float32) for t in activation_and_gradient(model, x, layer))
    weights = (g * a / (a.sum((2, 3), keepdims=True) + np.float32(1e-7))).sum((2, 3), keepdims=True)
    assert relative_error((weights * a).sum(1), reference) < SAME
    difference = relative_error(heatmap(model, x, layer, "xgrad-cam"), reference)
    assert difference < 1e-3
    assert (difference > SAME) == (layer != "bn2")


@pytest.mark.parametrize(("method", "name"), [("eigen-cam", "EigenCAM"), ("eigen-grad-cam", "EigenGradCAM")])
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids="/".join, indirect=True)  # slow for many positions
def test_eigen_cams_differ_from_pytorch_grad_cam(case: Any, method: str, name: str) -> None:
    """Equation 3 decomposes the maps themselves. Theirs subtracts each channel's mean and leaves the sign open:
    neither side of centred maps is the positive one."""
    model, x, layer = case
    reference = pytorch_grad_cam_map(name, model, x, layer)
    a, g = activation_and_gradient(model, x, layer)
    maps = a if method == "eigen-cam" else g * a
    centred = eigen_cam(maps - maps.mean((2, 3), keepdim=True)).numpy()
    signs = np.sign((centred * reference).sum((1, 2), keepdims=True))
    assert relative_error(centred * signs, reference) < 1e-4
    ours = heatmap(model, x, layer, method)
    assert min(relative_error(ours, side * signs * reference) for side in (1, -1)) > 0.01


def test_finer_cam_differs_from_pytorch_grad_cam(case: Any) -> None:
    """Equation 8 averages over the nearest classes, with gamma 0.6. Theirs, like the authors' program, weights them by
    their probabilities with gamma 1, and differentiates these as well."""
    model, x, layer = case
    reference = pytorch_grad_cam_map("FinerCAM", model, x, layer, top=True)

    def probability_weighted(output: Tensor) -> Tensor:
        top, chance = output.topk(4, dim=1)[0], output.softmax(1).topk(4, dim=1)[0][:, 1:]
        return (chance * (top[:, :1] - top[:, 1:])).sum(1) / (chance.sum(1) + 1e-9)

    def plain_mean(output: Tensor) -> Tensor:
        top = output.topk(4, dim=1)[0]
        return top[:, 0] - 0.6 * top[:, 1:].mean(1)

    formula = convscope.heatmaps(model, x, [probability_weighted, plain_mean], layer=layer).values
    assert relative_error(formula[:, 0], reference) < 1e-4
    ours = convscope.heatmaps(model, x, layer=layer, method="finer-cam").values[:, 0]
    assert relative_error(formula[:, 1], ours) < SAME
    assert relative_error(ours, reference) > 0.05


def test_fusion_differs_from_torchcam(cases: dict[str, Case]) -> None:
    """Both take the maximum over layers, as LayerCAM does. Theirs first applies tanh(2 M) to all layers, which the
    paper does to early layers; here each map is only divided by its maximum."""
    from torchcam.methods import LayerCAM

    model, x = cases["lite0"]
    layers = ["blocks.3", "blocks.5"]
    net = copy.deepcopy(model.module).requires_grad_()
    with LayerCAM(net, layers) as program:
        reference = program.fuse_cams(program(TARGETS, net(x))).detach().numpy()
    unit_maps = [torch.from_numpy(relu(heatmap(model, x, layer, "layer-cam"))) for layer in layers]
    unit_maps = [
        (m - m.amin((1, 2), keepdim=True)) / (m - m.amin((1, 2), keepdim=True)).amax((1, 2), True) for m in unit_maps
    ]
    fine = [nn.functional.interpolate(torch.tanh(2 * m)[None], (7, 7), mode="bilinear")[0] for m in unit_maps]
    assert relative_error(torch.stack(fine).amax(0), reference) < SAME
    ours = convscope.heatmaps(model, x, TARGETS, layer=layers, method="layer-cam", fuse="max").values[:, 0]
    assert (
        relative_error(relu(ours) / ours.max((1, 2), keepdims=True), reference / reference.max((1, 2), keepdims=True))
        > 0.1
    )


def test_segmentation_target_differs_from_pytorch_grad_cam() -> None:
    """Our score of a region is the mean, theirs the sum: the same map, times the number of positions."""
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget

    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    model, x = load_module(net, 12), torch.randn(2, 3, 12, 12)
    mask = np.zeros((12, 12), np.float32)
    mask[2:5, 3:9] = 1
    reference = SemanticSegmentationTarget(2, mask)
    targets = [segmentation_target(2, mask), lambda output: torch.stack([reference(row) for row in output])]
    actual = convscope.heatmaps(model, x, targets, layer="0")
    assert relative_error(actual.values[:, 0] * 18, actual.values[:, 1]) < SAME
