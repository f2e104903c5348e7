"""Judges whose answers are known: a tiny CLIP with constructed weights, and a classifier; vocabularies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope.errors import ConvscopeError
from convscope.naming.vocabulary import COLORS, TEXTURES, read_words

SIZE = 16
WORDS = ["red", "green", "blue"]
PREPROCESSING = {"size": SIZE, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def colored_images(count: int = 60) -> np.ndarray:
    """Return images (N, 16, 16, 3) of one color each, red, green and blue in turn, on noise."""
    images = np.random.default_rng(0).integers(0, 60, (count, SIZE, SIZE, 3)).astype(np.uint8)
    images[np.arange(count), ..., np.arange(count) % 3] += 150
    return images


class ColorNet(nn.Module):
    """Its units and classes are the mean red, green and blue of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.colors = nn.Conv2d(3, 3, 1, bias=False)
        self.colors.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 20 * self.colors(x).mean((2, 3))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> convscope.Store:
    model = convscope.load(ColorNet().eval(), preprocessing=PREPROCESSING, classes=WORDS)
    folder = tmp_path_factory.mktemp("colors") / "store"
    return convscope.scan(model, colored_images(), folder, layers=["colors"], workers=0)


def color_clip(bias: float | None = None) -> Any:
    """Make a CLIP of open_clip that embeds images by their mean color, and the words red, green and blue to match.

    The blocks of both transformers add nothing; patches are averaged, and the first token of a text is its word.
    """
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": SIZE, "pool_type": "avg"}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1, "pool_type": "first"}
    net = open_clip.CLIP(embed_dim=3, vision_cfg=vision, text_cfg=text)
    with torch.no_grad():
        for block in [*net.visual.transformer.resblocks, *net.transformer.resblocks]:
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        net.visual.conv1.weight.zero_()
        net.visual.positional_embedding.zero_()
        net.positional_embedding.zero_()
        net.token_embedding.weight.zero_()
        for channel in range(3):
            net.visual.conv1.weight[channel, channel] = 1 / 64
            net.token_embedding.weight[channel + 1, channel] = 1
        net.visual.proj.copy_(torch.eye(16)[:, :3])
        net.text_projection.copy_(torch.eye(16)[:, :3])
        if bias is not None:
            net.logit_bias = nn.Parameter(torch.tensor(bias))
    return net.eval()


def tokenizer(texts: list[str]) -> torch.Tensor:
    """Return the number of the color in a text, as its first token."""
    numbers = [next(i for i, word in enumerate(WORDS, 1) if word in text) for text in texts]
    return torch.tensor([[number, 0, 0, 0] for number in numbers])


@pytest.mark.parametrize("bias", [None, -10.0])
def test_a_clip_that_sees_colors_names_units_by_colors(store, bias):
    judge = convscope.load(color_clip(bias), tokenizer=tokenizer, preprocessing=PREPROCESSING)
    names = convscope.name_units(store, WORDS, judge=judge, template="a {} image", save=False)
    assert names.names.tolist() == WORDS * 2
    assert names.named.all()
    assert (names.scores > 0.95).all()
    assert names.judge == judge.name


def test_a_classifier_names_units_by_its_classes(store):
    judge = convscope.load(ColorNet().eval(), preprocessing=PREPROCESSING, classes=["red", "green", "blue, azure"])
    names = convscope.name_units(store, "classes", judge=judge, layer="colors", save=False)
    assert names.names.tolist() == ["red", "green", "blue, azure"]
    assert names.named.all()
    part = convscope.name_units(store, ["azure", "red"], judge=judge, layer="colors", save=False)
    assert (part.names[0], part.names[2]) == ("red", "azure")
    assert any("thumbnails" in note for note in part.notes)  # images in memory have no files


def test_search_by_meaning_and_by_words(store):
    convscope.name_units(store, ["bright red", "green", "blue"], np.eye(3)[np.arange(60) % 3], layer="colors")
    by_words = store.search("red")
    assert [m[:3] for m in by_words[:2]] == [("colors", 0, "bright red"), ("logits", 0, "red")]
    assert all(m.relevance == 0.5 for m in by_words[2:])  # runners-up
    assert store.search("bri")[0].relevance == 0.5
    assert len(store.search("violet")) == 0
    assert "0 units for 'violet'" in str(store.search("violet"))
    judge = convscope.load(color_clip(), tokenizer=tokenizer, preprocessing=PREPROCESSING)
    by_meaning = store.search("greenish", n=2, judge=judge)
    assert {(m.layer, m.unit) for m in by_meaning} == {("colors", 1), ("logits", 1)}
    assert by_meaning[0].relevance == pytest.approx(1, abs=1e-5)
    assert store.unit("colors", 0).description == "bright red"
    assert "colors, unit 0 (bright red)" in str(store.unit("colors", 0))
    assert by_words.figure().axes
    with pytest.raises(ConvscopeError, match="text is ' '"):
        store.search(" ")
    with pytest.raises(ConvscopeError, match="does not"):
        store.search("red", judge=convscope.load(ColorNet().eval(), preprocessing=PREPROCESSING))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": ["red", "violet"], "judge": "classifier"}, "'violet' is not in this model"),
        ({"words": WORDS, "judge": "classifier", "template": "a {}"}, "template is for a judge that reads text"),
        ({"words": WORDS, "judge": "classifier", "scores": np.zeros((60, 3))}, "expected one of them"),
        ({"words": WORDS, "judge": "classifier", "output": "softmax"}, "leave it out"),
        ({"words": WORDS, "scores": np.zeros((60, 3)), "template": "a {}"}, "template is 'a {}'"),
        ({"words": WORDS, "judge": "nameless"}, "no named classes"),
        ({"words": "classes"}, "give it as judge="),
        ({"words": "labels", "judge": "classifier"}, "scores of their own"),
        ({"words": "no such file.txt", "judge": "classifier"}, "neither a vocabulary nor a text file"),
    ],
)
def test_judges_that_do_not_fit_are_refused(store, arguments, message):
    networks = {
        "classifier": convscope.load(ColorNet().eval(), preprocessing=PREPROCESSING, classes=WORDS),
        "nameless": convscope.load(ColorNet().eval(), preprocessing=PREPROCESSING),
    }
    judge = networks.get(arguments.pop("judge", ""))
    with pytest.raises(ConvscopeError, match=message):
        convscope.name_units(store, judge=judge, save=False, **arguments)


def test_vocabularies(tmp_path):
    assert (len(TEXTURES), len(set(TEXTURES)), len(COLORS)) == (47, 47, 11)
    assert read_words("textures,colors") == (*TEXTURES, *COLORS)
    imagenet = read_words("imagenet")
    assert len(imagenet) == len(set(imagenet)) == 1000
    assert any(word.startswith("crane: ") for word in imagenet)  # two classes share the label
    (tmp_path / "words.txt").write_text("striped fur\n\n  wheel \n")
    assert read_words(str(tmp_path / "words.txt")) == ("striped fur", "wheel")
    (tmp_path / "one.txt").write_text("wheel\n")
    with pytest.raises(ConvscopeError, match="two or more"):
        read_words(str(tmp_path / "one.txt"))
