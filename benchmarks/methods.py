"""All other methods: convscope, pytorch-grad-cam, captum, torchcam and a bare forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytorch_grad_cam as pgc
import torch
import torchcam.methods as tc
from captum.attr import Occlusion
from grad_cam import NETWORKS, as_users_have_it, photographs
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timing import Timed, interleaved
from torch import Tensor, nn

import convscope
from convscope.attribution.api import compute_heatmaps, resolve_method

FAMILY = {
    "grad-cam": (pgc.GradCAM, tc.GradCAM),
    "hirescam": (pgc.HiResCAM, None),
    "grad-cam++": (pgc.GradCAMPlusPlus, tc.GradCAMpp),
    "xgrad-cam": (pgc.XGradCAM, tc.XGradCAM),
    "layer-cam": (pgc.LayerCAM, tc.LayerCAM),
    "eigen-cam": (pgc.EigenCAM, None),
    "eigen-grad-cam": (pgc.EigenGradCAM, None),
    "finer-cam": (pgc.FinerCAM, None),
}
TARGET = 281  # an arbitrary class


@dataclass(frozen=True)
class Family:
    """One network: each method's time relative to the bare forward pass, and the peers' relative to convscope's."""

    network: str
    bare: Timed
    ours: dict[str, Timed]
    together: Timed
    peers: dict[str, dict[str, Timed]]


@dataclass(frozen=True)
class Targets:
    """One image: seconds for one target, and the ratio for twenty targets."""

    network: str
    one: float
    twenty: float


@dataclass(frozen=True)
class ManyPasses:
    """One method on one image: all times, and the correlation of the maps with convscope's."""

    method: str
    work: str
    times: dict[str, Timed]
    correlations: dict[str, float]


def family(name: str, batch: int, rounds: int) -> Family:
    """Time all methods of the CAM family at the last spatial layer, on one batch."""
    source = NETWORKS[name]
    model = convscope.load(source, weights="default" if source == "lite0" else "random")
    layer = model.layers.last_spatial().name
    x = photographs(model, batch)
    specs = [resolve_method(model, method, layer, "mean", {}) for method in FAMILY]

    def bare() -> Tensor:
        with torch.no_grad():
            return model.module(x)

    contenders: dict[str, Callable[[], object]] = {"bare": bare}
    for method in FAMILY:
        contenders[method] = lambda method=method: convscope.heatmaps(model, x, TARGET, layer=layer, method=method)
    contenders["together"] = lambda: compute_heatmaps(model, x, TARGET, specs)
    times = interleaved(contenders, "bare", rounds)
    peers = {}
    for method, (theirs, others) in FAMILY.items():
        contenders_of_method: dict[str, Callable[[], object]] = {"convscope": contenders[method]}
        contenders_of_method["pytorch-grad-cam"] = _pgc(theirs, as_users_have_it(model.module), layer, x)
        if others is not None:
            contenders_of_method["torchcam"] = _torchcam(others, as_users_have_it(model.module), layer, x)
        peers[method] = interleaved(contenders_of_method, "convscope", max(3, rounds // 3))
    ours = {method: times[method] for method in FAMILY}
    return Family(f"{name}, {batch} (`{layer}`)", times["bare"], ours, times["together"], peers)


def targets(name: str, rounds: int) -> Targets:
    """Time twenty targets of one image against one."""
    source = NETWORKS[name]
    model = convscope.load(source, weights="default" if source == "lite0" else "random")
    x = photographs(model, 1)
    twenty = [list(range(0, 1000, 50))]
    contenders: dict[str, Callable[[], object]] = {
        "one": lambda: convscope.heatmaps(model, x, TARGET),
        "twenty": lambda: convscope.heatmaps(model, x, twenty),
    }
    times = interleaved(contenders, "one", rounds)
    return Targets(name, times["one"].seconds, times["twenty"].ratio)


def many_passes(rounds: int) -> list[ManyPasses]:
    """Time methods with many forward passes, or gradients at every layer; one photograph, Lite0."""
    model = convscope.load("lite0")
    x = photographs(model, 1)
    layer = "blocks.6"  # 320 channels: as many evaluations for methods that perturb each
    plain = as_users_have_it(model.module)

    def ours(method: str, layer: str | None = None, **options: object) -> Callable[[], np.ndarray]:
        return lambda: convscope.heatmaps(model, x, TARGET, layer=layer, method=method, **options).values[0, 0]

    def theirs(kind: type, layer: str = layer) -> Callable[[], np.ndarray]:
        return _pgc(kind, copy.deepcopy(plain), layer, x)

    occluded = Occlusion(copy.deepcopy(plain))
    window, stride = (3, 32, 32), (3, 16, 16)

    def by_captum() -> np.ndarray:
        with torch.no_grad():
            attributions = occluded.attribute(
                x, target=TARGET, sliding_window_shapes=window, strides=stride, perturbations_per_eval=16
            )
        return np.asarray(attributions[0, 0])

    rise = {"samples": 320, "tolerance": 0.0, "probability": True}
    # pytorch-grad-cam finds no biases in Lite0: it only supports torch's own batch normalisation.
    deep = convscope.load("torchvision:resnet50", weights="random")
    full = {
        "convscope": lambda: convscope.heatmaps(deep, x, TARGET, method="full-grad").values[0, 0],
        "pytorch-grad-cam": _pgc(pgc.FullGrad, as_users_have_it(deep.module), "layer4", x),
    }
    cases = [
        ("full-grad", "ResNet-50, one backward pass", full),
        (
            "eigen-cam",
            "56 x 56 positions, 24 channels (`blocks.1`)",
            {"convscope": ours("eigen-cam", "blocks.1"), "pytorch-grad-cam": theirs(pgc.EigenCAM, "blocks.1")},
        ),
        (
            "score-cam",
            "320 evaluations",
            {
                "convscope": ours("score-cam", layer),
                "pytorch-grad-cam": theirs(pgc.ScoreCAM),
                "torchcam": _torchcam(tc.ScoreCAM, copy.deepcopy(plain), layer, x),
            },
        ),
        (
            "ablation-cam",
            "320 evaluations",
            {"convscope": ours("ablation-cam", layer), "pytorch-grad-cam": theirs(pgc.AblationCAM)},
        ),
        (
            "occlusion",
            "windows of 32, stride 16",
            {"convscope": ours("occlusion", window=32, stride=16), "captum": by_captum},
        ),
        (
            "rise",
            "320 masks",
            {"convscope": ours("rise", **rise), "the authors' loop": lambda: _rise(plain, x, 320)},
        ),
    ]
    rows = []
    for method, work, contenders in cases:
        times = interleaved(contenders, "convscope", rounds)
        our_map = contenders["convscope"]()
        correlations = {
            peer: _correlation(our_map, np.asarray(run())) for peer, run in contenders.items() if peer != "convscope"
        }
        rows.append(ManyPasses(method, work, times, correlations))
    return rows


def _pgc(kind: type, module: nn.Module, layer: str, x: Tensor) -> Callable[[], np.ndarray]:
    cam = kind(module, [module.get_submodule(layer)])
    inputs = x.contiguous(memory_format=torch.contiguous_format)
    return lambda: cam(input_tensor=inputs, targets=[ClassifierOutputTarget(TARGET)] * len(x))[0]


def _torchcam(kind: type, module: nn.Module, layer: str, x: Tensor) -> Callable[[], np.ndarray]:
    cam = kind(module, module.get_submodule(layer))
    inputs = x.contiguous(memory_format=torch.contiguous_format)

    def run() -> np.ndarray:
        if kind is tc.ScoreCAM:
            with torch.no_grad():
                return cam(TARGET, module(inputs))[0][0].numpy()
        return cam(TARGET, module(inputs))[0][0].detach().numpy()

    return run


def _rise(module: nn.Module, x: Tensor, samples: int, cells: int = 7, batch: int = 100) -> np.ndarray:
    """Run RISE as in the authors' code: all masks first, then batches of `batch`; probabilities."""
    generator = np.random.default_rng(0)
    side = x.shape[2]
    cell = -(-side // cells)
    masks = torch.empty(samples, 1, side, side)
    for i in range(samples):
        grid = torch.from_numpy((generator.random((cells, cells)) < 0.5).astype(np.float32))[None, None]
        large = nn.functional.interpolate(grid, ((cells + 1) * cell,) * 2, mode="bilinear")[0]
        top, left = generator.integers(0, cell, 2)
        masks[i] = large[:, top : top + side, left : left + side]
    inputs = x.contiguous(memory_format=torch.contiguous_format)
    with torch.no_grad():
        probabilities = torch.cat([module(inputs * part).softmax(1)[:, TARGET] for part in masks.split(batch)])
    return np.asarray((probabilities[:, None, None] * masks[:, 0]).mean(0) / 0.5)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two maps, after resizing the smaller one."""
    tensors = [torch.from_numpy(np.ascontiguousarray(m, np.float32))[None, None] for m in (first, second)]
    size = max((t.shape[2:] for t in tensors), key=lambda s: s[0])
    flat = [nn.functional.interpolate(t, size, mode="bilinear").flatten().clamp(min=0) for t in tensors]
    return float(torch.corrcoef(torch.stack(flat))[0, 1])


def run(rounds: int) -> tuple[list[Family], list[Targets], list[ManyPasses]]:
    """Run all three tables."""
    torch.manual_seed(0)
    return (
        [family(name, 8, rounds) for name in ("ResNet-50", "Lite0")],
        [targets(name, rounds) for name in NETWORKS],
        many_passes(max(3, rounds // 3)),
    )


def table(families: list[Family], targets: list[Targets], many_passes: list[ManyPasses]) -> list[str]:
    """Return the section of the README: text and tables."""
    names = list(families[0].ours)
    lines = [
        "Time of convscope relative to the bare forward pass, channels_last, at the last spatial layer; `all` are",
        "these methods together in one call. The next lines of a cell are the times of other packages relative to",
        "convscope's, for the same method and weights, in PyTorch's default memory format.",
        "",
        "| network, batch | " + " | ".join(names) + " | all |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    for family in families:
        cells = []
        for name in names:
            peers = [f"{peer} {timed.text(1)}" for peer, timed in family.peers[name].items() if peer != "convscope"]
            cells.append("<br>".join([family.ours[name].text(), *peers]))
        lines.append(f"| {family.network} | " + " | ".join([*cells, family.together.text()]) + " |")
    lines += [
        "",
        "Grad-CAM of one image: "
        + "; ".join(
            f"{t.network} {1000 * t.one:.0f} ms for one target, {t.twenty:.2f} times as long for twenty"
            for t in targets
        )
        + ".",
        "",
        "One photograph, Lite0, layer `blocks.6` unless noted. In brackets: the correlation of the rectified map with",
        "convscope's; `docs/methods.md` says where and why maps differ.",
        "",
        "| method | work | convscope, ms | time relative to convscope |",
        "| --- | --- | --- | --- |",
    ]
    for row in many_passes:
        peers = [f"{peer} {row.times[peer].text(1)} ({value:.2f})" for peer, value in row.correlations.items()]
        milliseconds = f"{1000 * row.times['convscope'].seconds:.0f}"
        lines.append(f"| {row.method} | {row.work} | {milliseconds} | " + ", ".join(peers) + " |")
    return lines
