"""Pictures shown larger, the automatic choice of a layer, controls, and how maps on the input are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.default_layer import choose_layer
from convscope.attribution.multiscale import scale_preprocessing
from convscope.images.preprocessing import Preprocessing
from tests.attribution.test_heatmaps import SIZE, TINY, Pooled, apart, inputs, loaded
from tests.oracles.nets import Usual, filled


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    return loaded(filled(Usual()))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for n, (height, width) in enumerate(((96, 96), (50, 120))):
        pixels = np.random.default_rng(n).integers(0, 256, (height // 2, width // 2, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{n}.png")
        found.append(str(folder / f"{n}.png"))
    return found


# --- scales ----------------------------------------------------------------------------------------------------------


def larger(net: nn.Module, times: float) -> convscope.Model:
    """The same network, loaded as one for larger pictures, of which it crops the same part."""
    return loaded(net, round(SIZE * times), resize=round(28 * times))


@pytest.mark.parametrize("times", [2, 1.5, 0.5])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_scale_is_the_network_loaded_for_larger_pictures(pictures: list[str], times: float, fit: str) -> None:
    """Read from the pictures anew, not enlarged from what the network's own size left of them."""
    net = filled(Usual())
    found = convscope.heatmaps(loaded(net, resize=28), pictures, 2, scale=times, fit=fit)
    expected = convscope.heatmaps(larger(net, times), pictures, 2, fit=fit)
    assert np.array_equal(found.values, expected.values)
    # The second picture's crop begins half a pixel of the network's input elsewhere: crops are whole pixels.
    count = 2 if fit == "squash" else 1
    assert all(np.array_equal(a, b) for a, b in zip(found.resized()[:count], expected.resized()[:count], strict=True))


def test_targets_and_logits_are_those_of_the_own_size(usual: convscope.Model, pictures: list[str]) -> None:
    own = convscope.heatmaps(usual, pictures)
    for scale in (2, (2, 3), (3, 1)):
        found = convscope.heatmaps(usual, pictures, scale=scale)
        assert np.array_equal(found.targets, own.targets)
        assert np.array_equal(found.logits, own.logits)


@pytest.mark.parametrize("fuse", ["mean", "max", "product"])
def test_several_scales_by_hand(usual: convscope.Model, pictures: list[str], fuse: str) -> None:
    parts = [convscope.heatmaps(usual, pictures, [[0, 3]] * 2, scale=s).values for s in (1, 2, 3)]
    size = parts[2].shape[2:]
    scaled = []
    for part in parts:
        maps = torch.from_numpy(part / np.abs(part).max((2, 3), keepdims=True))
        scaled.append(F.interpolate(maps, size, mode="bilinear", align_corners=False).numpy())
    by_hand = {
        "mean": sum(scaled) / 3,
        "max": np.maximum.reduce(scaled),
        "product": np.prod([np.maximum(m, 0) for m in scaled], axis=0) ** (1 / 3),
    }
    found = convscope.heatmaps(usual, pictures, [[0, 3]] * 2, scale=(1, 2, 3), fuse=fuse)
    assert apart(found.values, by_hand[fuse]) < 1e-5  # a cube root near 0 is steep
    assert found.parameters()["scale"] == [1, 2, 3]
    assert found.parameters()["fuse"] == fuse


def test_prepared_tensors_are_interpolated(usual: convscope.Model) -> None:
    x = inputs()
    expected = F.interpolate(x, (2 * SIZE, 2 * SIZE), mode="bilinear", align_corners=False, antialias=True)
    found = convscope.heatmaps(usual, x, 1, scale=2)
    assert np.array_equal(found.values, convscope.heatmaps(usual, expected, 1).values)
    assert [r.shape for r in found.resized()] == [(1, SIZE, SIZE)] * 3


def test_unreadable_pictures_are_left_out_at_every_scale(
    usual: convscope.Model, pictures: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    found = convscope.heatmaps(usual, [pictures[0], str(broken), pictures[1]], 1, scale=(1, 2))
    assert [failure.name for failure in found.failed] == [str(broken)]
    assert np.array_equal(found.values, convscope.heatmaps(usual, pictures, 1, scale=(1, 2)).values)


@pytest.mark.parametrize("scale", [0, -1, 17, (), (1, "2"), True, float("nan")])
def test_scales_that_make_no_sense_are_refused(usual: convscope.Model, scale: Any) -> None:
    with pytest.raises(ConvscopeError, match="scale is"):
        convscope.heatmaps(usual, inputs(), scale=scale)


def test_network_of_fixed_size_says_so() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=5)
    with pytest.raises(ConvscopeError, match=r"does not run on inputs of 64 x 64 .* its own size is 32 x 32"):
        convscope.heatmaps(loaded(net.eval(), 32), inputs(2, 32), scale=2)


def test_enlarged_preprocessing_keeps_its_crop() -> None:
    own = Preprocessing(size=(20, 30), resize=40)
    assert (scale_preprocessing(own, 1.5).size, scale_preprocessing(own, 1.5).resize) == ((30, 45), 60)
    assert scale_preprocessing(Preprocessing(size=(224, 224)), 3).resize == 3 * 256  # 224 / 0.875 is 256
    assert scale_preprocessing(own, 1) == own


# --- the automatic choice --------------------------------------------------------------------------------------------


def test_convnets_get_their_last_layer_with_places(usual: convscope.Model) -> None:
    row, why = choose_layer(usual)
    assert row.name == usual.layers.last_spatial().name
    assert why == "the last layer with spatial extent (12 x 12) that is not a pooling"
    for layer in (None, "auto"):
        found = convscope.heatmaps(usual, inputs(), layer=layer)
        assert (found.layer, found.layer_reason) == (row.name, why)
        assert found.manifest()["parameters"]["why"] == why
    assert convscope.heatmaps(usual, inputs(), layer="conv1").layer_reason == "as asked for"


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_transformers_get_the_last_layer_that_counts(pool: str) -> None:
    """Behind the last attention, what is read off the class token does not depend on any patch."""
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        depth=3,
        embed_dim=24,
        num_heads=3,
        num_classes=5,
        global_pool=pool,
    )
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    model = loaded(net.eval(), 64)
    found = convscope.heatmaps(model, inputs(2, 64), [[0, 1]] * 2)
    assert found.values.shape == (2, 2, 4, 4)
    assert np.abs(found.values).max((2, 3)).min() > 0
    if pool == "token":
        assert found.layer == "blocks.2.norm1"
        assert "read off the class token alone" in found.layer_reason
        behind = convscope.heatmaps(model, inputs(2, 64), 0, layer="blocks.2")
        assert not behind.values.any()
    else:
        assert found.layer == "blocks.2"


# --- controls --------------------------------------------------------------------------------------------------------


def test_controls_know_nothing_of_network_target_and_picture(usual: convscope.Model) -> None:
    for method in ("random", "centred"):
        found = convscope.heatmaps(usual, inputs(), [[0, 4]] * 3, method=method, layer="conv2").values
        assert all(np.array_equal(found[0, 0], other) for row in found for other in row)
        assert found.shape[2:] == (12, 12)
    drawn = convscope.heatmaps(usual, inputs(1), method="random").values.ravel()
    assert len(set(drawn.tolist())) == drawn.size
    assert 0 <= drawn.min() < 0.2 < 0.8 < drawn.max() <= 1
    assert not np.array_equal(drawn, convscope.heatmaps(usual, inputs(1), method="random", seed=1).values.ravel())


def test_centred_control_is_a_gaussian(usual: convscope.Model) -> None:
    found = convscope.heatmaps(usual, inputs(1), method="centred", layer="conv2", width=0.2).values[0, 0]
    place = (np.arange(12) + 0.5) / 12 - 0.5
    assert apart(found, np.exp(-(place[:, None] ** 2 + place**2) / (2 * 0.2**2))) < TINY


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_maps_on_the_input_are_drawn_spread() -> None:
    """One hot pixel among a thousand would be all there is to see, and too small for that."""
    net = filled(Pooled(rectified=True))
    found = convscope.heatmaps(loaded(net, 64), inputs(1, 64), 1, method="saliency")
    found.values[:] = 0
    found.values[0, 0, 20, 30] = 1
    shown = np.asarray(found.overlay(alpha=1, colormap="gray")[0])[..., 0]
    assert found.layer == "input"
    assert shown[20, 30] == shown.max() == 255
    assert (shown > 128).sum() >= 4
    assert not shown[:15].any()
    assert not shown[25:].any()
    assert found.values.max() == 1


# --- options, and what is found besides ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rise", {"samples": 0}),
        ("rise", {"keep": 1.5}),
        ("rise", {"tolerance": -1}),
        ("occlusion", {"fill": "black"}),
        ("smooth-grad", {"samples": 0}),
        ("var-grad", {"noise": "much"}),
        ("integrated-gradients", {"steps": 1.5}),
        ("integrated-gradients", {"baseline": "white"}),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_network_runs(method: str, options: dict[str, Any]) -> None:
    net = filled(Usual())
    model, runs = loaded(net), []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ConvscopeError, match=f"{next(iter(options))} is "):
        convscope.heatmaps(model, inputs(), method=method, **options)
    with pytest.raises(ConvscopeError, match="baseline is"):
        convscope.heatmaps(model, inputs(), method="integrated-gradients", baseline="grey")
    assert runs == []


def test_standard_error_is_turned_back_with_its_map(usual: convscope.Model) -> None:
    """The mean over the picture and its mirror image, place by place, for all that has places."""
    x, settings = inputs(1), {"method": "rise", "samples": 60, "tolerance": 0.0}
    plain, mirrored = (convscope.heatmaps(usual, given, 1, **settings) for given in (x, x.flip(-1)))
    both = convscope.heatmaps(usual, x, 1, smooth="flips", **settings)
    for name in ("values", "standard_error"):
        found, first, second = (r.arrays()[name] for r in (both, plain, mirrored))
        assert apart(found, (first + second[..., ::-1]) / 2) < 1e-5
        assert apart(found, (first + second) / 2) > 1e-3
