"""Networks that compare images with text, made from small configurations with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convscope
from convscope import ConvscopeError
from convscope.cli.parsing import parse_targets

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

CLASSES = ("cat", "dog", "striped owl")
TEMPLATE = "a photo of a {}"
TEXTS = [TEMPLATE.format(name) for name in CLASSES]
WORDS = ("[PAD]", "[UNK]", "a", "photo", "of", "cat", "dog", "striped", "owl", "[EOS]")
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 32}
VIT = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 64}
PREPROCESSING = {"size": 64, "mean": 0.5, "std": 0.5}


def clip_resnet() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=8, vision_cfg=RESNET, text_cfg=TEXT)


def clip_vit() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=8, vision_cfg=VIT, text_cfg=TEXT)


def open_siglip() -> Any:
    torch.manual_seed(0)
    return open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=VIT, text_cfg=TEXT, init_logit_bias=-2.0)


def hugging_face(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": len(WORDS) - 1}
    text |= {"bos_token_id": 1, "pad_token_id": 0}
    vision = {**sizes, "image_size": 64, "patch_size": 16}
    options = {"text_config": text, "vision_config": vision}
    if kind == "CLIP":
        return transformers.CLIPModel(transformers.CLIPConfig(**options, projection_dim=8))
    return transformers.SiglipModel(transformers.SiglipConfig(**options))


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", len(WORDS) - 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


def own_logits(net: Any, x: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """The network's own logits."""
    if not hasattr(net, "get_image_features"):
        return net.get_logits(x, open_clip.SimpleTokenizer()(texts))[0]
    tokens = word_tokenizer()(texts, padding="max_length", max_length=12, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    return net(**tokens, pixel_values=x).logits_per_image


NETWORKS: dict[str, Callable[[], Any]] = {
    "open_clip resnet": clip_resnet,
    "open_clip vit": clip_vit,
    "open_clip siglip": open_siglip,
    "transformers clip": lambda: hugging_face("CLIP"),
    "transformers siglip": lambda: hugging_face("SigLIP"),
}
LAYERS = {
    "open_clip resnet": "visual.layer4",
    "open_clip vit": "visual.transformer.resblocks.0",
    "open_clip siglip": "visual.transformer.resblocks.0",
    "transformers clip": "vision_model.encoder.layers.0",
    "transformers siglip": "vision_model.post_layernorm",  # the tokens, which a head pools by attention
}


def load(net: Any, **options: Any) -> convscope.Model:
    tokenizer = word_tokenizer() if hasattr(net, "get_image_features") else None
    return convscope.load(net, tokenizer=tokenizer, preprocessing=PREPROCESSING, **options)


@pytest.fixture(scope="module", params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def net(name: str) -> Any:
    return NETWORKS[name]().eval()


@pytest.fixture(scope="module")
def model(net: Any) -> convscope.Model:
    return load(net, classes=CLASSES, template=TEMPLATE)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_logits_are_the_networks_own(net: Any, model: convscope.Model, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected = own_logits(net, x, TEXTS)
    predictions = convscope.predict(model, x, top=3)
    np.testing.assert_allclose(predictions.logits, expected.numpy(), rtol=1e-5, atol=1e-5)
    is_sigmoid = getattr(net, "logit_bias", None) is not None
    probabilities = expected.sigmoid() if is_sigmoid else expected.softmax(1)
    np.testing.assert_allclose(
        predictions.probabilities, probabilities.sort(1, descending=True).values.numpy(), rtol=1e-4
    )
    assert (model.classes, model.task) == (CLASSES, "multilabel" if is_sigmoid else "classification")


def test_a_text_is_the_class_with_this_text(name: str, net: Any, model: convscope.Model, x: torch.Tensor) -> None:
    """On the classifier and on the network without classes."""
    expected = convscope.heatmaps(model, x, [[1, 2]] * 2)
    assert expected.layer == LAYERS[name]
    assert np.abs(expected.values).max() > 0
    embedding = load(net)
    assert (embedding.task, embedding.classes) == ("embedding", None)
    for other in (model, embedding):
        heatmaps = convscope.heatmaps(other, x, [convscope.text_target(text) for text in TEXTS[1:]])
        assert heatmaps.layer == expected.layer
        np.testing.assert_allclose(heatmaps.logits, expected.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(heatmaps.values, expected.values, rtol=1e-4, atol=1e-6)
        assert heatmaps.names[0] == TEXTS[1:]


def test_predictions_of_texts_are_the_networks_own(
    name: str, net: Any, model: convscope.Model, x: torch.Tensor
) -> None:
    """In the order of the texts; with probabilities only where a text has one of its own."""
    texts = ["striped dog", *TEXTS]
    with torch.no_grad():
        expected = own_logits(net, x, texts)
    targets = [convscope.text_target(text) for text in texts]
    for predictions in (
        convscope.predict(model, x, 1, targets=targets),
        convscope.predict(load(net), x, targets=targets),
    ):
        np.testing.assert_allclose(predictions.logits, expected.numpy(), rtol=1e-5, atol=1e-5)
        if "siglip" in name:
            probabilities = expected.sigmoid().sort(dim=1, descending=True, stable=True)
            np.testing.assert_allclose(predictions.probabilities, probabilities.values.numpy(), rtol=1e-4)
            assert predictions.names == [[texts[i] for i in row] for row in probabilities.indices.tolist()]
        else:
            np.testing.assert_allclose(predictions.probabilities, expected.numpy(), rtol=1e-5, atol=1e-5)
            assert (predictions.names, predictions.model.score_name) == ([texts] * 2, "value")
    alone = convscope.predict(model, x, targets=targets[0])
    np.testing.assert_allclose(alone.logits, expected[:, :1].numpy(), rtol=1e-5, atol=1e-5)
    assert model.classes == CLASSES


def test_the_embedding_is_the_networks_own(net: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        features = net.get_image_features(x) if hasattr(net, "get_image_features") else net.encode_image(x)
        features = getattr(features, "pooler_output", features)
        expected = (features / features.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(convscope.predict(load(net), x).logits, expected, rtol=1e-4, atol=1e-5)


def test_images_of_a_batch_are_independent(model: convscope.Model, x: torch.Tensor) -> None:
    target = convscope.text_target(TEXTS[0])
    together = convscope.heatmaps(model, x, target)
    for i in range(2):
        alone = convscope.heatmaps(model, x[i : i + 1], target)
        np.testing.assert_allclose(alone.values[0], together.values[i], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(alone.logits[0], together.logits[i], rtol=1e-5, atol=1e-5)


def test_only_the_image_encoder_has_layers(model: convscope.Model) -> None:
    assert {layer.name.partition(".")[0] for layer in model.layers} <= {"visual", "vision_model", "visual_projection"}


def test_grad_cam_by_hand(x: torch.Tensor) -> None:
    """The weights are the mean gradients of the network's own logit at the last maps."""
    net = clip_resnet().eval()
    stored: list[torch.Tensor] = []
    with net.visual.layer4.register_forward_hook(lambda _, __, output: stored.append(output)):
        logits = own_logits(net, x, ["a striped cat"])
    (gradient,) = torch.autograd.grad(logits.sum(), stored)
    expected = (gradient.mean((2, 3), keepdim=True) * stored[0]).sum(1).detach().numpy()
    heatmaps = convscope.heatmaps(load(net), x, convscope.text_target("a striped cat"))
    np.testing.assert_allclose(heatmaps.values[:, 0], expected, rtol=1e-3, atol=1e-6)


def test_nothing_is_left_behind(x: torch.Tensor) -> None:
    net = clip_resnet().train()
    net.visual.layer1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [m.training for m in net.modules()]

    def check() -> None:
        assert [m.training for m in net.modules()] == flags
        assert all(p.requires_grad and p.grad is None for p in net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    model = load(net, classes=CLASSES)
    convscope.heatmaps(model, x, convscope.text_target("a dog"))
    check()
    net.token_embedding.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convscope.heatmaps(model, x, convscope.text_target("a dog"))
    net.token_embedding._forward_pre_hooks.clear()
    check()


def test_weights_that_change_later_take_effect(x: torch.Tensor) -> None:
    net = clip_vit().eval()
    model = load(net, classes=CLASSES)
    before = convscope.predict(model, x).logits
    with torch.no_grad():
        net.logit_scale += 1
    np.testing.assert_allclose(convscope.predict(model, x).logits, before * np.e, rtol=1e-4)


def test_pattern_of_a_class() -> None:
    model = load(clip_resnet(), classes=CLASSES)
    patterns = convscope.patterns(model, "logits", ["dog"], steps=4)
    assert patterns.scores.shape == (1,)
    assert np.isfinite(patterns.scores).all()


def test_pattern_of_a_text(name: str, net: Any, model: convscope.Model) -> None:
    """Its score is the network's own logit of the finished image, whatever else is optimised beside it."""
    first, second = (convscope.text_target(text) for text in TEXTS[:2])
    patterns = convscope.patterns(load(net), [first, second], steps=4)
    assert patterns.names == TEXTS[:2]
    x = (torch.from_numpy(patterns.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = own_logits(net, x, TEXTS[:2]).diagonal()
    np.testing.assert_allclose(patterns.scores, expected.numpy(), rtol=1e-4, atol=1e-4)
    alone = convscope.patterns(model, second, steps=4)
    np.testing.assert_allclose(alone.scores, patterns.scores[1:], rtol=0.01)


def test_ascent_increases_the_similarity() -> None:
    texts = [convscope.text_target(text) for text in TEXTS]
    model = load(clip_vit())
    start, end = (convscope.patterns(model, texts, steps=steps, seed=1).scores for steps in (0, 24))
    assert (end > start + 0.5).all()


def test_objectives_of_texts_are_combined() -> None:
    text, channel = convscope.objectives.text, convscope.objectives.channel
    net = clip_resnet().eval()
    difference = 2 * text(TEXTS[0]) - text(TEXTS[1]) + channel("visual.layer4", 0)
    patterns = convscope.patterns(load(net), [difference, text(TEXTS[2])], steps=2)
    x = (torch.from_numpy(patterns.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    stored: list[torch.Tensor] = []
    with torch.no_grad(), net.visual.layer4.register_forward_hook(lambda _, __, output: stored.append(output)):
        logits = own_logits(net, x, TEXTS)
    expected = [2 * logits[0, 0] - logits[0, 1] + stored[0][0, 0].mean(), logits[1, 2]]
    np.testing.assert_allclose(patterns.scores, torch.stack(expected).numpy(), rtol=1e-4, atol=1e-4)


def test_classes_and_templates() -> None:
    net, siglip = clip_vit(), open_siglip()
    named = load(net, classes=TEXTS)
    assert any("template=" in note for note in named.notes)
    with pytest.raises(ConvscopeError, match="at least two"):
        load(net, classes=["cat"])
    assert load(siglip, classes=["cat"]).num_outputs == 1
    with pytest.raises(ConvscopeError, match=r"one \{\}"):
        load(net, classes=CLASSES, template="a photo")
    with pytest.raises(ConvscopeError, match="needs classes"):
        load(net, template=TEMPLATE)
    with pytest.raises(ConvscopeError, match="compare images with text"):
        convscope.load(torch.nn.Conv2d(3, 2, 3), template=TEMPLATE, preprocessing=PREPROCESSING)


def test_text_targets_are_refused_elsewhere(x: torch.Tensor) -> None:
    with pytest.raises(ConvscopeError, match="text is empty"):
        convscope.text_target(" ")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    plain = convscope.load(net, preprocessing=PREPROCESSING)
    with pytest.raises(ConvscopeError, match="compare images with text"):
        convscope.heatmaps(plain, x, convscope.text_target("a cat"))
    for call in (convscope.patterns, lambda model, text: convscope.predict(model, x, targets=text)):
        with pytest.raises(ConvscopeError, match="compare images with text"):
            call(plain, convscope.text_target("a cat"))
    with pytest.raises(ConvscopeError, match=r"expected convscope\.text_target"):
        convscope.predict(load(clip_vit()), x, targets="a cat")  # type: ignore[arg-type]
    with pytest.raises(ConvscopeError, match="text_target"):
        convscope.heatmaps(load(clip_vit()), x)
    with pytest.raises(ConvscopeError, match="text_target"):
        convscope.heatmaps(load(clip_vit()), x, "a cat")


def test_targets_of_the_command_line_are_texts_without_classes() -> None:
    net = clip_vit()
    assert parse_targets(load(net), ["a cat", "fur"], 2) == [convscope.text_target(t) for t in ("a cat", "fur")]
    assert parse_targets(load(net), None, 2) is None
    assert parse_targets(load(net, classes=CLASSES), ["dog"], 2) == [[1], [1]]


def test_tokenizers(tmp_path: Path, x: torch.Tensor) -> None:
    net = hugging_face("CLIP").eval()
    with pytest.raises(ConvscopeError, match="tokenizer="):
        convscope.load(net, classes=CLASSES, preprocessing=PREPROCESSING)
    with pytest.raises(ConvscopeError, match="knows 10 tokens"):
        convscope.load(
            net, classes=CLASSES, preprocessing=PREPROCESSING, tokenizer=open_clip.SimpleTokenizer(context_length=12)
        )
    with pytest.raises(ConvscopeError, match=r"expected \(K, L\)"):
        convscope.load(net, classes=CLASSES, preprocessing=PREPROCESSING, tokenizer=len)
    small = open_clip.CLIP(embed_dim=8, vision_cfg=VIT, text_cfg={**TEXT, "vocab_size": 100})
    with pytest.raises(ConvscopeError, match="tokenizer="):
        convscope.load(small, classes=CLASSES, preprocessing=PREPROCESSING)
    net.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    model = convscope.load(f"hf:{tmp_path}", classes=CLASSES, template=TEMPLATE)
    with torch.no_grad():
        expected = own_logits(net, x, TEXTS).numpy()
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-5, atol=1e-5)
    assert (model.preprocessing.resize, model.preprocessing.interpolation) == (64, "bicubic")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A small configuration under a name of open_clip."""
    path = tmp_path_factory.mktemp("configurations") / "small-test-clip.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT}))
    open_clip.add_model_config(path)
    yield path.stem
    path.unlink()
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
    open_clip.factory._rescan_model_configs()


def test_networks_by_name(registered: str, tmp_path: Path, x: torch.Tensor) -> None:
    random = convscope.load(f"open_clip:{registered}", weights="random", classes=CLASSES)
    net = clip_vit().eval()
    net.logit_scale.data += 1
    file = tmp_path / "weights.pth"
    torch.save(net.state_dict(), file)
    model = convscope.load(f"open_clip:{registered}", weights=file, classes=CLASSES, template=TEMPLATE)
    with torch.no_grad():
        expected = own_logits(net, x, TEXTS).numpy()
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-5, atol=1e-5)
    assert random.weights_hash() != model.weights_hash()
    with pytest.raises(ConvscopeError, match="no weights"):
        convscope.load(f"open_clip:{registered}")
    with pytest.raises(ConvscopeError, match="nearest: ViT-B-32"):
        convscope.load("open_clip:VitB32")
    with pytest.raises(ConvscopeError, match="there are openai"):
        convscope.load("open_clip:ViT-B-32/unknown")


def test_preprocessing_equals_open_clips(registered: str) -> None:
    """The input of the network's own transform, but for the rounding of its resized pixels."""
    model = convscope.load(f"open_clip:{registered}", weights="random")
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=64), is_train=False)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC)
    expected = transform(image)
    loaded: list[torch.Tensor] = []
    handle = model.module.visual.conv1.register_forward_pre_hook(lambda _, args: loaded.append(args[0].detach()))
    convscope.predict(model, image, fit="crop")
    handle.remove()
    torch.testing.assert_close(loaded[-1][0].contiguous(), expected, rtol=0, atol=2 / 255 / 0.26)
