"""Class activation maps beside other programs': the same numbers, or the reason why not, which is their formula.

A test that begins with `differs` names the equation that decides, reproduces the other program's number by the formula
that it really computes, and leaves ours to tests/test_heatmaps_cam.py, which holds it against the paper's.
docs/methods.md has the table.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope.attribution.methods.cam import eigen_cam
from convscope.attribution.targets import segmentation_target
from convscope.engine import capture
from tests.attribution.test_heatmaps import apart, loaded, resnet

# The last layer, rectified, behind which there is an average only; and layers with values of both signs before it.
CASES = [("lite0", "bn2"), ("lite0", "blocks.1"), ("resnet18", "layer3.1.conv2")]
TARGETS = [386, 281]
SAME = 1e-5  # gradients through up to twenty layers, in another order of summation

Subject = tuple[convscope.Model, Tensor]


@pytest.fixture(scope="module")
def subjects(lite0: convscope.Model, photos: list[str]) -> dict[str, Subject]:
    """Networks, and two photographs as these take them."""
    found = {}
    for name, model in (("lite0", lite0), ("resnet18", loaded(resnet(), 96, mean=(0.5,) * 3, std=(0.25,) * 3))):
        height, width = model.preprocessing.size
        opened = [Image.open(p).convert("RGB").resize((width, height)) for p in photos[:2]]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in opened])).permute(0, 3, 1, 2) / 255
        x = model.preprocessing.normalize(pixels).contiguous(memory_format=torch.channels_last)
        found[name] = model, x
    return found


@pytest.fixture(params=CASES, ids="/".join)
def case(request: pytest.FixtureRequest, subjects: dict[str, Subject]) -> tuple[convscope.Model, Tensor, str]:
    name, layer = request.param
    return *subjects[name], layer


def ours(model: convscope.Model, x: Tensor, layer: str, method: str) -> np.ndarray:
    return convscope.heatmaps(model, x, TARGETS, layer=layer, method=method).values[:, 0]


def seen(model: convscope.Model, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """The layer's output and its gradient, float64, as any program sees them."""
    with torch.no_grad(), capture.capture_layers(model, [layer], detach_at_layer=True) as run:
        now = run(x)
        with torch.enable_grad():
            score = now.logits.gather(1, torch.tensor(TARGETS)[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, now.maps[layer])
    return now.maps[layer].detach().double(), gradient.double()


def by_pytorch_grad_cam(name: str, model: convscope.Model, x: Tensor, layer: str, top: bool = False) -> np.ndarray:
    """Its map, of TARGETS or of each picture's top class, before it is rectified, scaled to [0, 1] and resized."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = copy.deepcopy(model.module).requires_grad_()  # it needs gradients all the way
    with getattr(pytorch_grad_cam, name)(net, [net.get_submodule(layer)]) as program:
        base = getattr(program, "base_cam", program)
        raw: list[np.ndarray] = []
        inner = base.get_cam_image

        def noted(*args: Any, **more: Any) -> np.ndarray:
            raw.append(inner(*args, **more))
            return raw[-1]

        base.get_cam_image = noted
        program(x.clone(), None if top else [ClassifierOutputTarget(t) for t in TARGETS])
    return raw[0]


def by_torchcam(name: str, model: convscope.Model, x: Tensor, layer: str, **given: Any) -> np.ndarray:
    """Its map, rectified, not normalised."""
    from torchcam import methods

    net = copy.deepcopy(model.module).requires_grad_()
    with getattr(methods, name)(net, layer, **given) as program:
        return program(TARGETS, net(x), normalized=False)[0].detach().numpy()


def rectified(maps: np.ndarray) -> np.ndarray:
    return np.maximum(maps, 0)


# --- the same numbers ------------------------------------------------------------------------------------------------


def test_captum(case: Any) -> None:
    from captum.attr import LayerGradCam, LayerGradientXActivation

    model, x, layer = case
    module = model.module.get_submodule(layer)
    given = x.clone().requires_grad_()
    grad_cam = LayerGradCam(model.module, module).attribute(given, TARGETS, relu_attributions=False)[:, 0]
    assert apart(ours(model, x, layer, "grad-cam"), grad_cam.detach()) < SAME
    product = LayerGradientXActivation(model.module, module).attribute(given, TARGETS).sum(1)
    assert apart(ours(model, x, layer, "hirescam"), product.detach()) < SAME


@pytest.mark.parametrize(
    ("method", "name"), [("grad-cam", "GradCAM"), ("hirescam", "HiResCAM"), ("layer-cam", "LayerCAM")]
)
def test_pytorch_grad_cam(case: Any, method: str, name: str) -> None:
    assert apart(ours(*case, method), by_pytorch_grad_cam(name, *case)) < SAME


@pytest.mark.parametrize(
    ("method", "name"),
    [("grad-cam", "GradCAM"), ("xgrad-cam", "XGradCAM"), ("layer-cam", "LayerCAM"), ("finer-cam", "FinerCAM")],
)
def test_torchcam(case: Any, method: str, name: str) -> None:
    assert apart(rectified(ours(*case, method)), by_torchcam(name, *case)) < SAME


@pytest.mark.parametrize(("name", "layer", "head"), [("lite0", "bn2", "classifier"), ("resnet18", "layer4", "fc")])
def test_torchcam_cam(subjects: dict[str, Subject], name: str, layer: str, head: str) -> None:
    """Not rectified, whatever its documentation says."""
    model, x = subjects[name]
    theirs = by_torchcam("CAM", model, x, layer, fc_layer=head)
    assert theirs.min() < 0
    assert apart(ours(model, x, layer, "cam"), theirs) < SAME


# --- other numbers, and why ------------------------------------------------------------------------------------------


def test_differs_grad_cam_pp_of_pytorch_grad_cam(case: Any) -> None:
    """Equation 19: a = G^2 / (2 G^2 + ...). Theirs adds 1e-6 below, which is nothing only where G is near 1.

    A gradient of 1e-3, common behind an average over 49 places, makes G^2 = 1e-6. Where maps are negative a has poles,
    next to which float32, theirs and ours, keeps three digits.
    """
    model, x, layer = case
    theirs = by_pytorch_grad_cam("GradCAMPlusPlus", model, x, layer)
    a, g = seen(model, x, layer)
    alpha = torch.where(g != 0, g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6), 0)
    formula = ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)
    assert apart(formula, theirs) < 5e-3
    assert apart(ours(model, x, layer, "grad-cam++"), theirs) > 0.05
    alpha = torch.where(g != 0, g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3), 0)
    paper = ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)
    assert apart(ours(model, x, layer, "grad-cam++"), paper) < 5e-3


def test_differs_grad_cam_pp_of_torchcam(case: Any) -> None:
    """Equation 19 again. Theirs divides a copy that a boolean mask made, and drops it: G^2 itself stays as a."""
    model, x, layer = case
    theirs = by_torchcam("GradCAMpp", model, x, layer)
    a, g = seen(model, x, layer)
    formula = ((g**2 * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)
    assert apart(formula.clamp(min=0), theirs) < 1e-4
    mine = rectified(ours(model, x, layer, "grad-cam++"))
    assert apart(mine, theirs) > 1e4
    assert apart(mine / mine.max(), theirs / theirs.max()) > 0.01  # scaling does not help


def test_differs_grad_cam_pp_of_its_authors(case: Any) -> None:
    """Equation 19 does not divide a by its sum over the places; the authors' program does, after it."""
    model, x, layer = case
    a, g = seen(model, x, layer)
    alpha = torch.where(g != 0, 1 / (2 + a.sum((2, 3), keepdim=True) * g), 0)
    total = alpha.sum((2, 3), keepdim=True)
    alpha = torch.where(total != 0, alpha / total, 0)
    authors = ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1).numpy()
    mine = ours(model, x, layer, "grad-cam++")
    assert apart(mine / mine.max(), authors / authors.max()) > 0.002


def test_differs_xgrad_cam_of_pytorch_grad_cam(case: Any) -> None:
    """Equation 8 divides by the channel's sum. Theirs adds 1e-7 to it, which tells where a sum of both signs is small:
    then 1e-4 of the map."""
    model, x, layer = case
    theirs = by_pytorch_grad_cam("XGradCAM", model, x, layer)
    a, g = (t.numpy().astype(np.float32) for t in seen(model, x, layer))
    weights = (g * a / (a.sum((2, 3), keepdims=True) + np.float32(1e-7))).sum((2, 3), keepdims=True)
    assert apart((weights * a).sum(1), theirs) < SAME
    difference = apart(ours(model, x, layer, "xgrad-cam"), theirs)
    assert difference < 1e-3
    assert (difference > SAME) == (layer != "bn2")


@pytest.mark.parametrize(("method", "name"), [("eigen-cam", "EigenCAM"), ("eigen-grad-cam", "EigenGradCAM")])
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids="/".join, indirect=True)  # it takes long over many places
def test_differs_eigen_cams_of_pytorch_grad_cam(case: Any, method: str, name: str) -> None:
    """Equation 3: the decomposition of the maps themselves. Theirs subtracts each channel's mean, and leaves the sign
    to the decomposition: of what is centred, neither side is the positive one."""
    model, x, layer = case
    theirs = by_pytorch_grad_cam(name, model, x, layer)
    a, g = seen(model, x, layer)
    maps = a if method == "eigen-cam" else g * a
    centred = eigen_cam(maps - maps.mean((2, 3), keepdim=True), g).numpy()
    signs = np.sign((centred * theirs).sum((1, 2), keepdims=True))
    assert apart(centred * signs, theirs) < 1e-4
    mine = ours(model, x, layer, method)
    assert min(apart(mine, side * signs * theirs) for side in (1, -1)) > 0.01


def test_differs_finer_cam_of_pytorch_grad_cam(case: Any) -> None:
    """Equation 8 averages over the nearest classes, with gamma 0.6. Theirs, as the authors' program, weighs them by
    their probabilities, with 1, and takes the gradient of those as well."""
    model, x, layer = case
    theirs = by_pytorch_grad_cam("FinerCAM", model, x, layer, top=True)

    def weighed(output: Tensor) -> Tensor:
        top, chance = output.topk(4, dim=1)[0], output.softmax(1).topk(4, dim=1)[0][:, 1:]
        return (chance * (top[:, :1] - top[:, 1:])).sum(1) / (chance.sum(1) + 1e-9)

    def averaged(output: Tensor) -> Tensor:
        top = output.topk(4, dim=1)[0]
        return top[:, 0] - 0.6 * top[:, 1:].mean(1)

    formula = convscope.heatmaps(model, x, [weighed, averaged], layer=layer).values
    assert apart(formula[:, 0], theirs) < 1e-4
    mine = convscope.heatmaps(model, x, layer=layer, method="finer-cam").values[:, 0]
    assert apart(formula[:, 1], mine) < SAME
    assert apart(mine, theirs) > 0.05


def test_differs_fusion_of_torchcam(subjects: dict[str, Subject]) -> None:
    """Both take the maximum over layers, as LayerCAM does. Theirs lifts small values before it, by tanh(2 M), what
    the paper does to early layers, in all of them; here each map is only divided by its largest value."""
    from torchcam.methods import LayerCAM

    model, x = subjects["lite0"]
    layers = ["blocks.3", "blocks.5"]
    net = copy.deepcopy(model.module).requires_grad_()
    with LayerCAM(net, layers) as program:
        theirs = program.fuse_cams(program(TARGETS, net(x))).detach().numpy()
    units = [torch.from_numpy(rectified(ours(model, x, layer, "layer-cam"))) for layer in layers]
    units = [(m - m.amin((1, 2), keepdim=True)) / (m - m.amin((1, 2), keepdim=True)).amax((1, 2), True) for m in units]
    fine = [nn.functional.interpolate(torch.tanh(2 * m)[None], (14, 14), mode="bilinear")[0] for m in units]
    assert apart(torch.stack(fine).amax(0), theirs) < SAME
    mine = convscope.heatmaps(model, x, TARGETS, layer=layers, method="layer-cam", fuse="max").values[:, 0]
    assert apart(rectified(mine) / mine.max((1, 2), keepdims=True), theirs / theirs.max((1, 2), keepdims=True)) > 0.1


def test_differs_region_of_pytorch_grad_cam() -> None:
    """A region's score is the mean here, whatever its size; theirs is the sum: the same map, times its places."""
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget

    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    model, x = loaded(net, 12), torch.randn(2, 3, 12, 12)
    mask = np.zeros((12, 12), np.float32)
    mask[2:5, 3:9] = 1
    theirs = SemanticSegmentationTarget(2, mask)
    asked = [segmentation_target(2, mask), lambda output: torch.stack([theirs(one) for one in output])]
    found = convscope.heatmaps(model, x, asked, layer="0")
    assert apart(found.values[:, 0] * 18, found.values[:, 1]) < SAME
