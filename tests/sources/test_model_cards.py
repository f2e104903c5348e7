"""Networks of public model cards: their configuration and image processor as published, with narrower layers.

Each is explained in at most three lines of Python or by one command, as the documentation shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import convscope
from convscope.cli import app

transformers = pytest.importorskip("transformers")

NAMES = ("tench", "goldfish", "great white shark")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGENET: dict[str, Any] = {"do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": STD}
CONVNEXT = {
    **IMAGENET,
    "crop_pct": 0.875,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "resample": 3,
    "size": 224,
}
TIMM = {"input_size": [3, 96, 96], "interpolation": "bicubic", "crop_pct": 0.95, "mean": [0.5] * 3, "std": [0.5] * 3}

# The published image processor, and the model with narrower layers.
CARDS: dict[str, tuple[dict[str, Any], Any]] = {
    "microsoft/resnet-50": (
        CONVNEXT,
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **LABELS)
        ),
    ),
    "facebook/convnext-tiny-224": (
        CONVNEXT,
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], **LABELS)
        ),
    ),
    "microsoft/swin-tiny-patch4-window7-224": (
        {**IMAGENET, "feature_extractor_type": "ViTFeatureExtractor", "resample": 3, "size": 224},
        lambda: transformers.SwinForImageClassification(
            transformers.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], **LABELS)
        ),
    ),
    "google/vit-base-patch16-224": (
        {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224},
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **LABELS
            )
        ),
    ),
    "nvidia/segformer-b0-finetuned-ade-512-512": (
        {**IMAGENET, "feature_extractor_type": "SegformerFeatureExtractor", "reduce_labels": True, "size": 512},
        lambda: transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(
                hidden_sizes=[8, 8, 8, 8],
                depths=[1, 1, 1, 1],
                num_attention_heads=[1, 1, 1, 1],
                decoder_hidden_size=8,
                **LABELS,
            )
        ),
    ),
    "facebook/detr-resnet-50": (
        {**IMAGENET, "feature_extractor_type": "DetrFeatureExtractor", "format": "coco_detection", "max_size": 1333}
        | {"size": 800},
        lambda: transformers.DetrForObjectDetection(
            transformers.DetrConfig(
                use_timm_backbone=False,
                backbone=None,
                backbone_config=transformers.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
                ),
                d_model=8,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=1,
                decoder_attention_heads=1,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                num_queries=5,
                **LABELS,
            )
        ),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the folder of each card, one of timm, and a photograph."""
    root = tmp_path_factory.mktemp("cards")
    for name, (processor, build) in CARDS.items():
        torch.manual_seed(0)
        build().eval().save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps(processor))
    timm_folder = root / "timm" / "efficientnet"
    timm_folder.mkdir(parents=True)
    config = {"architecture": "test_efficientnet", "num_classes": 1000, "num_features": 256, "pretrained_cfg": TIMM}
    (timm_folder / "config.json").write_text(json.dumps(config))
    import timm

    save_file(timm.create_model("test_efficientnet").state_dict(), timm_folder / "model.safetensors", {"format": "pt"})
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).resize((240, 180)).save(root / "photo.jpg")
    return root


SIZES = {"resnet": (224, 256), "convnext": (224, 256), "swin": (224, None), "vit": (224, None)}


@pytest.mark.parametrize("name", [name for name in CARDS if name.partition("/")[2].partition("-")[0] in SIZES])
def test_classifiers_in_three_lines(name: str, folder: Path) -> None:
    model = convscope.load(f"hf:{folder / name}")
    heatmaps = convscope.heatmaps(model, folder / "photo.jpg", "goldfish")
    figure = heatmaps.figure()
    size, resize = SIZES[name.partition("/")[2].partition("-")[0]]
    assert (model.task, model.classes, model.preprocessing.size) == ("classification", NAMES, (size, size))
    assert model.preprocessing.mean == tuple(CARDS[name][0]["image_mean"])
    assert resize is None or model.preprocessing.resize == resize
    assert heatmaps.values.any()
    assert heatmaps.layer_reason
    assert figure.axes


def test_segmentation_in_three_lines(folder: Path) -> None:
    model = convscope.load(f"hf:{folder / 'nvidia/segformer-b0-finetuned-ade-512-512'}")
    heatmaps = convscope.heatmaps(model, folder / "photo.jpg", "tench")
    assert (model.task, model.preprocessing.size, heatmaps.values.any()) == ("segmentation", (512, 512), True)


def test_detection_in_three_lines(folder: Path) -> None:
    model = convscope.load(f"hf:{folder / 'facebook/detr-resnet-50'}")
    detections = convscope.detect(model, folder / "photo.jpg", threshold=0.0)
    heatmaps = convscope.heatmaps(model, folder / "photo.jpg", convscope.box_target(detections[0], 0))
    assert (model.task, model.preprocessing.size) == ("detection", (800, 800))
    assert len(detections[0].boxes) > 0
    assert heatmaps.values.any()


def test_repositories_of_timm_say_their_preprocessing_in_the_configuration(folder: Path) -> None:
    model = convscope.load(f"hf:{folder / 'timm/efficientnet'}")
    heatmaps = convscope.heatmaps(model, folder / "photo.jpg", "tench")
    preprocessing = model.preprocessing
    assert (preprocessing.size, preprocessing.resize, preprocessing.mean) == ((96, 96), 101, (0.5, 0.5, 0.5))
    assert preprocessing.interpolation == "bicubic"
    assert model.classes is not None
    assert model.classes[0].startswith("tench")
    assert heatmaps.values.any()


def test_one_command(folder: Path, tmp_path: Path) -> None:
    command = [
        "heatmap",
        f"hf:{folder / 'microsoft/resnet-50'}",
        str(folder / "photo.jpg"),
        "-o",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "out").glob("*.png"))
