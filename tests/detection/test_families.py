"""Detectors of torchvision and Hugging Face: the same boxes as their own post-processing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convscope
from tests.oracles.detectors import tiny_faster_rcnn

SIDE = 64


@pytest.fixture(scope="module")
def faster_rcnn():
    """A tiny Faster R-CNN with random weights."""
    return tiny_faster_rcnn()


@pytest.fixture(scope="module")
def images():
    """Three images of noise."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(3)]


@pytest.fixture(scope="module")
def model(faster_rcnn):
    """The detector as it is loaded."""
    return convscope.load(faster_rcnn)


def test_torchvision_boxes_are_its_own(faster_rcnn, model, images):
    detections = convscope.detect(model, images, threshold=0)
    with torch.no_grad():
        expected = faster_rcnn([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images])
    assert model.task == "detection"
    assert model.num_outputs == 3
    for one, own in zip(detections, expected, strict=True):
        np.testing.assert_allclose(one.boxes, own["boxes"], atol=1e-3)
        np.testing.assert_allclose(one.scores, own["scores"], atol=1e-5)
        np.testing.assert_array_equal(one.labels, own["labels"])


def test_torchvision_heatmap_is_on_the_feature_map_not_on_crops(model, images):
    detections = convscope.detect(model, images[0], threshold=0)
    heatmaps = convscope.heatmaps(model, images[0], convscope.box_target(detections, 0))
    assert heatmaps.layer == "backbone"
    assert heatmaps.values.shape == (1, 1, 8, 8)
    assert heatmaps.values.any()
    np.testing.assert_allclose(heatmaps.logits, [[detections.scores[0]]], atol=1e-5)


def test_layers_of_crops_are_not_spatial_and_anchors_are_none(model):
    assert not model.layers["roi_heads.box_roi_pool"].is_spatial
    assert "rpn.anchor_generator" not in model.layers.names


def test_torchvision_gradient_is_that_of_its_own_score(faster_rcnn, model, images):
    detections = convscope.detect(model, images[0], threshold=0)
    heatmaps = convscope.heatmaps(model, images[0], convscope.box_target(detections, 2), method="saliency")
    x = (torch.from_numpy(images[0]).permute(2, 0, 1) / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(faster_rcnn([x])[0]["scores"][2], x)
    np.testing.assert_allclose(heatmaps.values[0, 0], gradient.abs().amax(0), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["yolos", "detr"])
def test_hugging_face_boxes_are_its_own(family, images):
    transformers = pytest.importorskip("transformers")
    module, processor = _hugging_face(transformers, family)
    model = convscope.load(module, preprocessing={"size": SIDE})
    detections = convscope.detect(model, images, threshold=0.1)
    x = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images])
    with torch.no_grad():
        outputs = module(x)
    expected = processor.post_process_object_detection(outputs, 0.1, [(SIDE, SIDE)] * len(images))
    assert len(detections.labels)
    for one, own in zip(detections, expected, strict=True):
        order = own["scores"].argsort(descending=True, stable=True)
        np.testing.assert_allclose(one.scores, own["scores"][order], atol=1e-5)
        np.testing.assert_allclose(one.boxes, own["boxes"][order].clamp(0, SIDE), atol=1e-3)
        np.testing.assert_array_equal(one.labels, own["labels"][order])
    heatmaps = convscope.heatmaps(model, images[0], convscope.box_target(detections[0], 0), method="saliency")
    assert heatmaps.logits[0, 0] == pytest.approx(detections[0].scores[0], abs=1e-4)
    assert heatmaps.values.any()


@pytest.mark.slow
def test_layer_of_a_box_holds_positions_not_queries(images):
    """RT-DETR with 5 queries on a map of 2 x 2: the queries are no grid with a token in front."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16, 16, 16], "embedding_size": 8, "depths": [1, 1, 1, 1], "layer_type": "basic"}
    backbone = transformers.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16], encoder_ffn_dim=16,
        encoder_attention_heads=2, d_model=16, decoder_in_channels=[16, 16, 16], num_queries=5, decoder_layers=1,
        decoder_ffn_dim=16, decoder_attention_heads=2, num_denoising=0, num_labels=3,
    )  # fmt: skip
    model = convscope.load(transformers.RTDetrForObjectDetection(config).eval(), preprocessing={"size": SIDE})
    detections = convscope.detect(model, images[0], threshold=0.1)
    heatmaps = convscope.heatmaps(model, images[0], convscope.box_target(detections, 0))
    assert heatmaps.logits[0, 0] == pytest.approx(detections.scores[0], abs=1e-4)
    assert heatmaps.values.any()
    assert "decoder.layers" not in heatmaps.layer


def _hugging_face(transformers, family):
    """Return a tiny detector with random weights, and the image processor that belongs to it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if family == "yolos":
        config = transformers.YolosConfig(
            **sizes, image_size=[SIDE, SIDE], patch_size=16, num_detection_tokens=5, num_labels=3
        )
        return transformers.YolosForObjectDetection(config).eval(), transformers.YolosImageProcessor()
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_type="basic"
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, backbone=None, num_queries=5, d_model=16, num_labels=3,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config).eval(), transformers.DetrImageProcessor()
