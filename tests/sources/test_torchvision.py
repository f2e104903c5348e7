"""torchvision's networks for videos, its quantised networks and its detectors, by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision

import convscope
from convscope import ConvscopeError
from convscope.sources.torchvision import from_name

VIDEO = ("r3d_18", "s3d", "swin3d_t")


@pytest.mark.parametrize("name", VIDEO)
def test_networks_for_videos_have_the_preprocessing_and_classes_of_their_weights(name: str) -> None:
    spec = from_name(name, "random")
    entry = torchvision.models.get_model_weights(name).DEFAULT
    preset = entry.transforms()
    assert spec.classes == tuple(entry.meta["categories"])
    assert spec.preprocessing is not None
    assert spec.preprocessing.size == (16, *preset.crop_size)
    frames = torch.zeros(1, 16, 3, 130, 180, dtype=torch.uint8)
    black = spec.preprocessing.normalize(torch.zeros(1, 3, *spec.preprocessing.size))
    torch.testing.assert_close(preset(frames), black)


def test_a_network_for_videos_takes_clips() -> None:
    model = convscope.load("torchvision:r3d_18", weights="random", preprocessing={"size": (4, 32, 32), "channels": 3})
    clips = torch.rand(2, 3, 4, 32, 32)
    with torch.no_grad():
        expected = model.module(clips)
    predictions = convscope.predict(model, clips)
    np.testing.assert_allclose(predictions.logits, expected, atol=1e-5)
    assert model.classes is not None
    assert model.classes[int(expected[0].argmax())] in str(predictions)
    heatmaps = convscope.heatmaps(model, clips, 7, layer="layer2")
    assert heatmaps.values.shape == (2, 1, 2, 8, 8)
    maps = {}
    handle = model.module.layer2.register_forward_hook(lambda _m, _i, output: maps.update(layer2=output))
    score = model.module(clips.requires_grad_())[:, 7].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, maps["layer2"])
    cam = (gradient.mean((2, 3, 4), keepdim=True) * maps["layer2"]).sum(1).detach().numpy()
    np.testing.assert_allclose(heatmaps.values[:, 0], cam, rtol=1e-3, atol=1e-5 * np.abs(cam).max())


def test_quantised_networks_run_and_refuse_gradients() -> None:
    model = convscope.load("torchvision:quantized_resnet18", weights="random", preprocessing={"size": 64})
    entry = torchvision.models.get_model_weights("quantized_resnet18").DEFAULT
    assert model.classes == tuple(entry.meta["categories"])
    assert any("quantised" in note for note in model.notes)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        np.testing.assert_allclose(convscope.predict(model, x).logits, model.module(x), atol=1e-6)
    assert np.abs(convscope.heatmaps(model, x, 0, method="occlusion").values).max() > 0
    with pytest.raises(ConvscopeError, match="int8 arithmetic has no gradients"):
        convscope.heatmaps(model, x, 0, method="saliency")


def test_a_quantised_network_keeps_the_preprocessing_of_its_weights() -> None:
    spec = from_name("quantized_shufflenet_v2_x0_5", "random")
    preset = torchvision.models.get_model_weights("quantized_shufflenet_v2_x0_5").DEFAULT.transforms()
    assert spec.preprocessing is not None
    assert (spec.preprocessing.size, spec.preprocessing.resize) == ((224, 224), preset.resize_size[0])
    assert spec.preprocessing.mean == tuple(preset.mean)


def test_a_processor_without_quantised_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object, **kwargs: object) -> None:
        raise RuntimeError("quantized engine FBGEMM is not supported")

    monkeypatch.setattr(torchvision.models, "get_model", unsupported)
    with pytest.raises(ConvscopeError, match=r"FBGEMM.*torchvision:resnet18"):
        convscope.load("torchvision:quantized_resnet18", weights="random")


def test_detectors_have_the_classes_of_their_weights() -> None:
    name = "ssdlite320_mobilenet_v3_large"
    model = convscope.load(f"torchvision:{name}", weights="random")
    entry = torchvision.models.get_model_weights(name).DEFAULT
    assert (model.task, model.preprocessing.size) == ("detection", (320, 320))
    assert model.classes == tuple(entry.meta["categories"])
    x = torch.rand(1, 3, 320, 320)
    with torch.no_grad():
        (expected,) = model.module(x)
    (found,) = convscope.detect(model, x, threshold=0.0)
    assert len(found.boxes) == len(expected["boxes"]) > 0
    best = int(expected["scores"].argmax())
    assert found.names[0] == model.classes[int(expected["labels"][best])]
    np.testing.assert_allclose(found.scores[0], expected["scores"][best], rtol=1e-5)
    np.testing.assert_allclose(found.boxes[0], expected["boxes"][best], atol=1e-3)
