"""Models of transformers, made from small configurations with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convscope
from convscope import ConvscopeError, Preprocessing
from tests.oracles.nets import randomized

transformers = pytest.importorskip("transformers")

NAMES = ("cat", "dog", "fox", "owl", "pig")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


def resnet(**options: Any) -> Any:
    torch.manual_seed(7)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **{**LABELS, **options}
    )
    return transformers.ResNetForImageClassification(config).eval()


def swin() -> Any:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, **LABELS
    )
    return transformers.SwinForImageClassification(config).eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_classes_come_from_the_configuration(x: torch.Tensor) -> None:
    net = resnet()
    model = convscope.load(net, preprocessing={"size": 64})
    assert (model.classes, model.task, model.notes) == (NAMES, "classification", ())
    with torch.no_grad():
        np.testing.assert_allclose(convscope.predict(model, x).logits, net(x).logits.numpy(), rtol=1e-4, atol=1e-6)
    assert convscope.load(resnet(id2label={0: "LABEL_0", 1: "LABEL_1"})).classes is None  # placeholders


def test_scores_that_are_not_called_logits() -> None:
    config = transformers.PPLCNetConfig(num_labels=3, scale=0.25)
    net = randomized(transformers.PPLCNetForImageClassification(config))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = convscope.load(net, preprocessing={"size": 32})
    with torch.no_grad():
        expected = net(x).last_hidden_state.numpy()
    assert model.task == "classification"
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-6)


def test_independent_classes_by_the_problem_type(x: torch.Tensor) -> None:
    net = resnet(problem_type="multi_label_classification")
    model = convscope.load(net, preprocessing={"size": 64})
    predictions = convscope.predict(model, x)
    with torch.no_grad():
        expected = net(x).logits.sigmoid().gather(1, torch.from_numpy(predictions.indices))
    assert model.task == "multilabel"
    np.testing.assert_allclose(predictions.probabilities, expected.numpy(), rtol=1e-6)


def test_a_folder_is_the_model_again(tmp_path: Path, x: torch.Tensor) -> None:
    net = resnet()
    net.save_pretrained(tmp_path)
    processor = {"do_rescale": True, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    processor |= {"size": {"height": 64, "width": 48}, "resample": 3, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = convscope.load(f"hf:{tmp_path}")
    assert model.preprocessing == Preprocessing(
        size=(64, 48), interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)
    )
    with torch.no_grad():
        expected = net(x[..., :48]).logits.numpy()
    np.testing.assert_allclose(convscope.predict(model, x[..., :48]).logits, expected, rtol=1e-4, atol=1e-6)
    random = convscope.load(f"hf:{tmp_path}", weights="random")
    assert random.weights_hash() != model.weights_hash()
    assert random.weights_hash() == convscope.load(f"hf:{tmp_path}", weights="random").weights_hash()


def test_pickles_and_unknown_folders_are_refused(tmp_path: Path) -> None:
    net = resnet()
    net.config.architectures = ["ResNetForImageClassification"]
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConvscopeError, match="safetensors"):
        convscope.load(f"hf:{tmp_path}")
    with pytest.raises(ConvscopeError, match="save_pretrained"):
        convscope.load(f"hf:{tmp_path.parent}")


PROCESSORS = {
    "vit": {"image_processor": "ViTImageProcessor", "size": {"height": 32, "width": 40}},
    "rescale to -1..1": {
        "image_processor": "EfficientNetImageProcessor",
        "size": {"height": 32, "width": 32},
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "do_normalize": False,
        "do_center_crop": False,
    },
    "EfficientNet's second division": {
        "image_processor": "EfficientNetImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    },
    "no rescaling": {"image_processor": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_rescale": False},
    "crop": {
        "image_processor": "CLIPImageProcessor",
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
    },
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_equals_the_processor(name: str) -> None:
    """Both turn the same pixels into the same input; resizing is left out, since its filters differ by rounding."""
    options = dict(PROCESSORS[name])
    processor = getattr(transformers, str(options.pop("image_processor")))(**options)
    preprocessing = Preprocessing.of(processor)
    assert preprocessing == Preprocessing.of(processor.to_dict())
    height, width = preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = processor(pixels, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    actual = preprocessing.normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert preprocessing.resize == (40 if name == "crop" else None)


def test_windows_of_swin_lie_on_the_grid(x: torch.Tensor) -> None:
    """The tokens of the last stage, which went through windows and a merging of patches, row by row."""
    net = swin()
    model = convscope.load(net, preprocessing={"size": 64})
    with torch.no_grad():
        tokens = net.swin(x).last_hidden_state
    maps = convscope.activations(model, x, "swin.layernorm")["swin.layernorm"]
    np.testing.assert_allclose(maps, tokens.unflatten(1, (8, 8)).movedim(-1, 1).numpy(), rtol=1e-5, atol=1e-6)
    assert convscope.heatmaps(model, x, 1, layer="swin.layernorm").values.shape == (2, 1, 8, 8)
    assert not model.notes


def test_receptive_field_of_windows_by_brute_force() -> None:
    """Change one pixel: no token outside the bounds of the first block may change."""
    net = swin()
    layer = convscope.load(net, preprocessing={"size": 64}).layers["swin.encoder.layers.0.blocks.0"]
    assert layer.receptive_field is not None
    assert layer.stride is not None
    assert layer.origin is not None
    image = torch.rand(1, 3, 64, 64)
    block = net.swin.encoder.layers[0].blocks[0]
    outputs: list[torch.Tensor] = []
    hook = block.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    with torch.no_grad():
        net(image)
        for row, column in ((0, 0), (15, 16), (33, 62)):
            changed = image.clone()
            changed[..., row, column] += 1
            net(changed)
    hook.remove()
    for pixel, output in zip(((0, 0), (15, 16), (33, 62)), outputs[1:], strict=True):
        is_changed = (output - outputs[0]).abs().amax(2).unflatten(1, (16, 16))[0] > 1e-6
        for index in is_changed.nonzero().tolist():
            for i, p, start, jump, size in zip(
                index, pixel, layer.origin, layer.stride, layer.receptive_field, strict=True
            ):
                assert i * jump + start <= p < i * jump + start + size


def test_a_detectors_class_score_is_its_best_query(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 7}
    loading = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    config = transformers.DetrConfig(**loading, **sizes, **heads, **LABELS, backbone_config=backbone)
    net = transformers.DetrForObjectDetection(config).eval()
    model = convscope.load(net, preprocessing={"size": 64})
    predictions = convscope.predict(model, x, 5)
    with torch.no_grad():
        best = net(x).logits.softmax(2)[..., :5].amax(1)
    assert (model.task, model.classes) == ("detection", NAMES)
    expected = best.gather(1, torch.from_numpy(predictions.indices)).numpy()
    np.testing.assert_allclose(predictions.probabilities, expected, rtol=1e-5)
    assert convscope.heatmaps(model, x, lambda out: out.logits[:, 3, 2]).values.shape[:2] == (2, 1)


def test_a_backbone_is_an_embedding(x: torch.Tensor) -> None:
    config = transformers.Dinov2Config(
        image_size=56, patch_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    net = transformers.Dinov2Model(config).eval()
    model = convscope.load(net)
    assert (model.task, model.num_outputs, model.preprocessing.size) == ("embedding", 16, (56, 56))
    maps = convscope.activations(model, x[..., :56, :56], "layernorm")["layernorm"]
    assert maps.shape == (2, 16, 4, 4)  # without the class token


def test_other_networks_that_take_text_are_refused() -> None:
    """Those that have another way to compare images with text than the scale of CLIP."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config={**text, "image_size": 32, "patch_size": 16})
    net = transformers.CLIPModel(config)
    del net.logit_scale
    with pytest.raises(ConvscopeError, match="takes text besides images"):
        convscope.load(net)


def test_default_layer_of_swin_is_the_norm_in_front_of_the_pooling(x: torch.Tensor) -> None:
    heatmaps = convscope.heatmaps(convscope.load(swin(), preprocessing={"size": 64}), x, 1)
    assert (heatmaps.layer, heatmaps.values.shape) == ("swin.layernorm", (2, 1, 8, 8))


def test_class_names_of_another_number_are_left_out_with_a_note() -> None:
    net = resnet()
    net.config.id2label = {0: "cat", 1: "dog"}
    model = convscope.load(net, preprocessing={"size": 64})
    assert (model.classes, model.num_outputs) == (None, 5)
    assert any("2 class names are left out: it has 5 outputs" in note for note in model.notes)
