"""Several input scales, the default layer, baseline methods, overlays of maps at the input, and options."""

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
from convscope.images.preprocessing import Preprocessing
from tests.attribution.helpers import SIZE, load_module, random_images, relative_error
from tests.attribution.test_heatmaps import TINY, Pooled
from tests.oracles.nets import SmallConvNet, randomized


@pytest.fixture(scope="module")
def small_model() -> convscope.Model:
    return load_module(randomized(SmallConvNet()))


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, paths = tmp_path_factory.mktemp("images"), []
    for n, (height, width) in enumerate(((96, 96), (50, 120))):
        pixels = np.random.default_rng(n).integers(0, 256, (height // 2, width // 2, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{n}.png")
        paths.append(str(folder / f"{n}.png"))
    return paths


# --- scales ----------------------------------------------------------------------------------------------------------


def load_enlarged(net: nn.Module, scale: float) -> convscope.Model:
    """Load the same network for larger inputs, with the same crop of the image."""
    return load_module(net, round(SIZE * scale), resize=round(28 * scale))


@pytest.mark.parametrize("scale", [2, 1.5, 0.5])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_scale_equals_loading_the_network_for_larger_inputs(image_paths: list[str], scale: float, fit: str) -> None:
    """Inputs are resized from the original images, not from the network's own input."""
    net = randomized(SmallConvNet())
    actual = convscope.heatmaps(load_module(net, resize=28), image_paths, 2, scale=scale, fit=fit)
    expected = convscope.heatmaps(load_enlarged(net, scale), image_paths, 2, fit=fit)
    assert np.array_equal(actual.values, expected.values)
    # The second image's crop is shifted by half an input pixel, because crops are whole pixels.
    count = 2 if fit == "squash" else 1
    assert all(np.array_equal(a, b) for a, b in zip(actual.resized()[:count], expected.resized()[:count], strict=True))


def test_targets_and_logits_are_those_at_scale_1(small_model: convscope.Model, image_paths: list[str]) -> None:
    at_input_size = convscope.heatmaps(small_model, image_paths)
    for scale in (2, (2, 3), (3, 1)):
        actual = convscope.heatmaps(small_model, image_paths, scale=scale)
        assert np.array_equal(actual.targets, at_input_size.targets)
        assert np.array_equal(actual.logits, at_input_size.logits)


@pytest.mark.parametrize("fuse", ["mean", "max", "product"])
def test_several_scales_by_hand(small_model: convscope.Model, image_paths: list[str], fuse: str) -> None:
    parts = [convscope.heatmaps(small_model, image_paths, [[0, 3]] * 2, scale=s).values for s in (1, 2, 3)]
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
    actual = convscope.heatmaps(small_model, image_paths, [[0, 3]] * 2, scale=(1, 2, 3), fuse=fuse)
    assert relative_error(actual.values, by_hand[fuse]) < 1e-5  # the cube root is steep near 0
    assert actual.parameters()["scale"] == [1, 2, 3]
    assert actual.parameters()["fuse"] == fuse


def test_preprocessed_tensors_are_interpolated(small_model: convscope.Model) -> None:
    x = random_images()
    expected = F.interpolate(x, (2 * SIZE, 2 * SIZE), mode="bilinear", align_corners=False, antialias=True)
    actual = convscope.heatmaps(small_model, x, 1, scale=2)
    assert np.array_equal(actual.values, convscope.heatmaps(small_model, expected, 1).values)
    assert [r.shape for r in actual.resized()] == [(1, SIZE, SIZE)] * 3


def test_unreadable_images_are_left_out_at_every_scale(
    small_model: convscope.Model, image_paths: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    actual = convscope.heatmaps(small_model, [image_paths[0], str(broken), image_paths[1]], 1, scale=(1, 2))
    assert [failure.name for failure in actual.failed] == [str(broken)]
    assert np.array_equal(actual.values, convscope.heatmaps(small_model, image_paths, 1, scale=(1, 2)).values)


@pytest.mark.parametrize("scale", [0, -1, 17, (), (1, "2"), True, float("nan")])
def test_invalid_scales_are_refused(small_model: convscope.Model, scale: Any) -> None:
    with pytest.raises(ConvscopeError, match="scale is"):
        convscope.heatmaps(small_model, random_images(), scale=scale)


def test_network_with_fixed_input_size_is_refused() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=5)
    with pytest.raises(ConvscopeError, match=r"does not run on inputs of 64 x 64 .* its own size is 32 x 32"):
        convscope.heatmaps(load_module(net.eval(), 32), random_images(2, 32), scale=2)


def test_scaled_preprocessing_keeps_its_crop() -> None:
    at_input_size = Preprocessing(size=(20, 30), resize=40)
    assert (at_input_size.scaled(1.5).size, at_input_size.scaled(1.5).resize) == (
        (30, 45),
        60,
    )
    assert Preprocessing(size=(224, 224)).scaled(3).resize == 3 * 256  # 224 / 0.875 is 256
    assert at_input_size.scaled(1) == at_input_size


# --- the default layer -----------------------------------------------------------------------------------------------


def test_default_layer_of_a_convnet(small_model: convscope.Model) -> None:
    chosen_layer, reason = choose_layer(small_model)
    assert chosen_layer.name == small_model.layers.last_spatial().name
    assert reason == "the last layer with spatial extent (12 x 12), that every path to the target passes through"
    for layer in (None, "auto"):
        actual = convscope.heatmaps(small_model, random_images(), layer=layer)
        assert (actual.layer, actual.layer_reason) == (chosen_layer.name, reason)
        assert actual.manifest()["parameters"]["layer_reason"] == reason
    assert convscope.heatmaps(small_model, random_images(), layer="conv1").layer_reason == "as requested"


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_default_layer_of_a_transformer_influences_the_classes(pool: str) -> None:
    """After the last attention, the class token does not depend on any patch."""
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
    model = load_module(net.eval(), 64)
    actual = convscope.heatmaps(model, random_images(2, 64), [[0, 1]] * 2)
    assert actual.values.shape == (2, 2, 4, 4)
    assert np.abs(actual.values).max((2, 3)).min() > 0
    if pool == "token":
        assert actual.layer == "blocks.1"
        assert actual.layer_reason.startswith("the input of the last attention block (4 x 4)")
        assert "later layers pass on the class token alone" in actual.layer_reason
        later = convscope.heatmaps(model, random_images(2, 64), 0, layer="blocks.2")
        assert not later.values.any()
    else:
        assert actual.layer == "blocks.2"


# --- baseline methods ------------------------------------------------------------------------------------------------


def test_baselines_ignore_network_target_and_image(small_model: convscope.Model) -> None:
    for method in ("random", "centred"):
        actual = convscope.heatmaps(small_model, random_images(), [[0, 4]] * 3, method=method, layer="conv2").values
        assert all(np.array_equal(actual[0, 0], other) for row in actual for other in row)
        assert actual.shape[2:] == (12, 12)
    noise = convscope.heatmaps(small_model, random_images(1), method="random").values.ravel()
    assert len(set(noise.tolist())) == noise.size
    assert 0 <= noise.min() < 0.2 < 0.8 < noise.max() <= 1
    assert not np.array_equal(
        noise, convscope.heatmaps(small_model, random_images(1), method="random", seed=1).values.ravel()
    )


def test_centred_baseline_is_a_gaussian(small_model: convscope.Model) -> None:
    actual = convscope.heatmaps(small_model, random_images(1), method="centred", layer="conv2", width=0.2).values[0, 0]
    offsets = (np.arange(12) + 0.5) / 12 - 0.5
    assert relative_error(actual, np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 0.2**2))) < TINY


# --- overlays --------------------------------------------------------------------------------------------------------


def test_overlays_of_maps_at_the_input_are_smoothed() -> None:
    """A single pixel would hardly be visible."""
    net = randomized(Pooled(with_relu=True))
    actual = convscope.heatmaps(load_module(net, 64), random_images(1, 64), 1, method="saliency")
    actual.values[:] = 0
    actual.values[0, 0, 20, 30] = 1
    overlays = np.asarray(actual.overlay(alpha=1, colormap="gray")[0])[..., 0]
    assert actual.layer == "input"
    assert overlays[20, 30] == overlays.max() == 255
    assert (overlays > 128).sum() >= 4
    assert not overlays[:15].any()
    assert not overlays[25:].any()
    assert actual.values.max() == 1


# --- options and extras ----------------------------------------------------------------------------------------------


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
def test_invalid_options_are_refused_before_the_network_runs(method: str, options: dict[str, Any]) -> None:
    net = randomized(SmallConvNet())
    model, runs = load_module(net), []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ConvscopeError, match=f"{next(iter(options))} is "):
        convscope.heatmaps(model, random_images(), method=method, **options)
    with pytest.raises(ConvscopeError, match="baseline is"):
        convscope.heatmaps(model, random_images(), method="integrated-gradients", baseline="grey")
    assert runs == []


def test_standard_error_is_flipped_back_with_its_map(small_model: convscope.Model) -> None:
    """Arrays with spatial extent are averaged over the image and its mirror image position by position."""
    x, settings = random_images(1), {"method": "rise", "samples": 60, "tolerance": 0.0}
    plain, mirrored = (convscope.heatmaps(small_model, x_view, 1, **settings) for x_view in (x, x.flip(-1)))
    both = convscope.heatmaps(small_model, x, 1, smooth="flips", **settings)
    for name in ("values", "standard_error"):
        actual, first, second = (r.arrays()[name] for r in (both, plain, mirrored))
        assert relative_error(actual, (first + second[..., ::-1]) / 2) < 1e-5
        assert relative_error(actual, (first + second) / 2) > 1e-3
